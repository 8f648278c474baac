"""Which file is a run's own, and which config is the record of it."""

import shutil
from pathlib import Path

import pytest

from locat_lightning.commands.fit import main
from locat_lightning.commands.sources import record_of_run
from tests.commands.runs import BEST, RUN

pytestmark = pytest.mark.usefixtures("workplace")


@pytest.mark.parametrize("weights", ["x.pth", "weights/x.pth", "checkpoints/x.pth", "checkpoints/x.ckpt"])
def test_a_config_of_the_users_own_is_no_record_of_weights(weights, trained):
    weights = Path(weights)
    weights.parent.mkdir(exist_ok=True)
    shutil.copy(BEST, weights)
    for folder in (Path(), weights.parent):
        (folder / "config.yaml").write_text("model: {class_path: Classification}\ndata: {}\n")
    assert record_of_run(weights) is None
    # A copy of a record is one of ./checkpoints/*.ckpt alone.
    shutil.copy(RUN / "config.yaml", "config.yaml")
    found = record_of_run(weights)
    assert found == (Path("config.yaml").absolute() if weights == Path("checkpoints/x.ckpt") else None)


@pytest.mark.parametrize("here", ["runs", "runs/classify_tiny", RUN, BEST.parent])
def test_a_run_is_known_from_any_directory(here, small, trained, monkeypatch):
    runs = Path("runs").absolute()
    monkeypatch.chdir(here)
    weights = BEST.relative_to(here)
    main(["validate", "--weights", str(weights), *small[:2], "--trainer.enable_progress_bar", "false"])
    assert (runs / "classify_tiny_validate/version_0/config.yaml").is_file()
    assert record_of_run(weights).samefile(runs / "classify_tiny/version_0/config.yaml")


def test_weights_beside_a_config_ask_for_it(trained, capsys):
    shutil.copy(BEST, "x.pth")
    Path("config.yaml").write_text("model: {class_path: Classification}\n")
    with pytest.raises(SystemExit) as stopped:
        main(["validate", "--weights", "x.pth"])
    assert stopped.value.code == 2
    assert "locat validate needs --config, a file or one of " in capsys.readouterr().err
