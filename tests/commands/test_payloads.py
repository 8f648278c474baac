"""A run from elsewhere: one payload for three commands; the campaign puts others in every place, for all."""

from pathlib import Path

import pytest
import torch
import yaml

from locat.command import main
from locat_lightning.commands.sources import read_record
from tests.faults.test_payloads import CALL, HOOK, attempt, elsewhere, put

__all__ = ["elsewhere"]
pytestmark = pytest.mark.usefixtures("workplace")


@pytest.mark.parametrize("command", ["validate", "fit", "knn"])
def test_nothing_in_a_downloaded_run_is_executed(command, elsewhere):
    record, files = elsewhere / "config.yaml", list((elsewhere / "checkpoints").glob("*.ckpt"))
    config, contents = yaml.safe_load(record.read_text()), torch.load(files[0], weights_only=True)
    put(config, "model.init_args.backbone_args", {"prr": CALL})
    put(contents, "hyper_parameters.backbone_args", {"prr": CALL})
    record.write_text(yaml.safe_dump(config))
    for file in files:
        torch.save(contents, file)
    attempt(command, elsewhere)


def test_what_the_record_of_a_run_may_choose_is_as_it_was(elsewhere):
    attempt("validate", elsewhere)
    assert Path("downloads/theirs_validate/version_0").is_dir()


def test_code_in_a_record_is_refused_in_a_line(elsewhere, capsys):
    record = elsewhere / "config.yaml"
    config = yaml.safe_load(record.read_text())
    config["trainer"]["callbacks"] = [HOOK]
    record.write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--ckpt_path", str(elsewhere / "checkpoints/last.ckpt")])
    assert stopped.value.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith(f"locat: error: {record}: sets trainer.callbacks: ")
    assert line.endswith(f"if you trust it, add --config {record}")


@pytest.mark.parametrize("command", ["validate", "knn"])
def test_a_data_set_of_a_hub_is_not_fetched_because_a_record_says_so(command, elsewhere, capsys):
    record = elsewhere / "config.yaml"
    config = yaml.safe_load(record.read_text())
    put(config, "data.init_args.dataset", "hfds/evil/images")
    record.write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as stopped:
        main([command, "--weights", str(elsewhere / "checkpoints/best.ckpt")])
    assert stopped.value.code == 2
    assert "fetched: if you want it, add --data.dataset hfds/evil/images" in capsys.readouterr().err
    typed = read_record(record, ["data"], {"--data.dataset"})
    assert typed["data"]["init_args"]["dataset"] == "hfds/evil/images"
