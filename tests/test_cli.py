"""`locat` as its user types it, in process."""

import csv
import json
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from locat_lightning.cli import LocatCLI, find_config, main
from locat_lightning.data.images import ImageData
from locat_lightning.errors import InputError

FIT = ["fit", "--config", "classify_tiny.yaml"]
RUN = Path("runs/classify_tiny/version_0")
BEST, LAST = RUN / "checkpoints/best.ckpt", RUN / "checkpoints/last.ckpt"


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def scalars(run, tag):
    events = EventAccumulator(str(run)).Reload()
    return [(point.step, point.value) for point in events.Scalars(tag)]


def refusal(capsys, arguments):
    """The one line with which a command is refused."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("locat: error: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("locat: error: ")


def test_a_run_leaves_its_record(small, caplog):
    main([*FIT, *small])
    config = yaml.safe_load((RUN / "config.yaml").read_text())
    assert config["model"]["init_args"]["backbone"] == "locatvit_tiny"
    assert config["trainer"]["gradient_clip_val"] == 5.0
    assert BEST.is_file()
    assert LAST.is_file()
    assert json.loads((RUN / "metrics.json").read_text())["epochs"] == 2
    assert "tensorboard --logdir runs/classify_tiny" in caplog.text

    events = EventAccumulator(str(RUN)).Reload()
    tags = set(events.Tags()["scalars"])
    of_steps = {"loss", "top1", "lr", "weight_decay", "grad_norm", "images_per_s", "data_wait"}
    assert {f"train/{name}" for name in of_steps} <= tags
    assert {"val/loss", "val/top1", "gaug_variance/block_01", "gaug_alpha/block_00"} <= tags
    assert not {"train/top5", "val/top5"} & tags  # of three classes
    assert "pictures/validation" in events.Tags()["images"]
    assert {"config/text_summary", "versions/text_summary"} <= set(events.Tags()["tensors"])
    assert scalars(RUN, "final/val/top1")[0][1] == pytest.approx(scalars(RUN, "val/top1")[-1][1])
    assert [step for step, _ in scalars(RUN, "train/loss")] == list(range(6))  # 2 epochs of 3 batches

    main([*FIT, *small])
    assert (RUN.parent / "version_1" / "metrics.json").is_file()


def test_a_config_is_a_local_file_first(tmp_path):
    shipped = find_config("quickstart.yaml")
    assert find_config("quickstart") == shipped
    (tmp_path / "quickstart.yaml").write_text("model: {}\n")
    assert find_config("quickstart.yaml") == "quickstart.yaml"
    with pytest.raises(InputError, match="no shipped config 'nowhere'"):
        find_config("nowhere")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["fitt"], "invalid choice: 'fitt'"),
        (["fit"], "locat fit needs --config, a file or one of classify_base.yaml"),
        (["fit", "--config", "nowhere"], "no shipped config 'nowhere'"),
        ([*FIT, "--model.lrr", "1"], "model.lrr: there is no such option"),
        ([*FIT, "--data.batch_size", "many"], "data.batch_size: 'many' is not of the type int"),
        (["validate", *FIT[1:]], "locat validate needs --weights"),
        (["predict", *FIT[1:]], "locat predict needs --weights"),
        ([*FIT, "--ckpt_path", "last"], "has a last.ckpt"),
        ([*FIT, "--ckpt_path", "nowhere.ckpt"], "--ckpt_path: no such file"),
    ],
)
def test_options_are_refused_before_anything_is_read_or_built(arguments, expected, capsys, monkeypatch):
    monkeypatch.setattr(ImageData, "setup", None)
    monkeypatch.setattr("timm.create_model", None)
    assert expected in refusal(capsys, arguments)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--model.backbone", "locatvit_huge"],
            "timm knows no model 'locatvit_huge'; near it: ",
        ),
        (["--model.backbone_args", "{wrong: 1}"], "model.backbone_args do not fit locatvit_tiny"),
        (["--data.root", "/nowhere"], "no such folder: /nowhere"),
        (["--model.num_classes", "7"], "model.num_classes is 7, but the data have 3 classes (ant, bee, cat)"),
        (
            ["--model.warmup_epochs", "9"],
            "model.warmup_epochs (9) has to be less than trainer.max_epochs (2)",
        ),
        (["--weights", "nowhere.pth"], "no such file"),
    ],
)
def test_what_does_not_fit_is_one_line(options, expected, small, capsys):
    assert expected in refusal(capsys, [*FIT, *small, *options])


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_unreadable_image_is_named(workers, small, folder, capsys):
    broken = folder / "train" / "bee" / "3.png"
    broken.write_bytes(broken.read_bytes()[:40])
    assert str(broken) in refusal(capsys, [*FIT, *small, "--data.num_workers", workers])


def test_debug_shows_the_traceback(small):
    with pytest.raises(InputError, match="no such folder"):
        main(["--debug", *FIT, *small, "--data.root", "/nowhere"])


class Exploit:
    def __reduce__(self):
        return Path.touch, (Path("exploited"),)


def test_nothing_in_a_file_of_weights_is_executed(small, capsys):
    with Path("evil.pth").open("wb") as file:
        pickle.dump({"state_dict": Exploit()}, file, protocol=2)
    torch.save({"state_dict": Exploit()}, "evil.ckpt")
    for name in ("evil.pth", "evil.ckpt"):
        assert name in refusal(capsys, [*FIT, *small, "--weights", name])
    assert not Path("exploited").exists()


def test_a_run_goes_on_where_it_was_stopped(small):
    """From the checkpoint of the second epoch to the fourth: as four in one go, in the same directory."""
    steady = [*FIT, *small, "--model.mixup", "0", "--model.cutmix", "0", "--trainer.max_epochs", "4"]
    main([*steady, "--checkpoint.save_top_k", "-1", "--checkpoint.filename", "{epoch}"])
    whole = torch.load(LAST, weights_only=True)
    LAST.write_bytes((RUN / "checkpoints/1.ckpt").read_bytes())
    main([*steady, "--ckpt_path", "last"])

    assert not (RUN.parent / "version_1").exists()
    part = torch.load(LAST, weights_only=True)
    assert whole["global_step"] == part["global_step"] == 12
    for name, value in whole["state_dict"].items():
        torch.testing.assert_close(part["state_dict"][name], value, rtol=0, atol=0)
    assert [step for step, _ in scalars(RUN, "train/loss")] == list(range(12))
    with (RUN / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert steps == list(range(12))


def test_an_option_at_resuming_counts(small):
    main([*FIT, *small, "--model.lr", "0.1"])
    main(["fit", "--ckpt_path", str(LAST), "--trainer.max_epochs", "3", "--model.lr", "0.25"])
    assert scalars(RUN, "train/lr")[-3][1] == pytest.approx(0.25 - (0.25 - 1e-7) * 6 / 8)


def test_weights_of_a_run_are_measured_with_its_record(small, folder, capsys):
    main([*FIT, *small])
    top1 = json.loads((RUN / "metrics.json").read_text())["best val/top1"]
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
    for command in ("validate", "test"):
        main([command, "--weights", str(BEST), *quiet])
        with Path(f"runs/classify_tiny_{command}/version_0/metrics.csv").open() as file:
            row = list(csv.DictReader(file))[-1]
        assert float(row["test/top1" if command == "test" else "val/top1"]) == pytest.approx(top1)

    some = folder.parent / "some"
    some.mkdir()
    for i in range(5):
        Image.new("RGB", (40, 30), (i * 40, 0, 90)).save(some / f"{i}.jpg")
    main(["predict", "--weights", str(BEST), "--data.root", str(some), *quiet])
    with Path("runs/classify_tiny_predict/version_0/predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [Path(row["path"]).name for row in rows] == [f"{i}.jpg" for i in range(5)]
    for row in rows:
        shares = {name: float(row[name]) for name in ("ant", "bee", "cat")}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
        assert row["class"] == max(shares, key=shares.get)


def test_a_warm_start_leaves_a_head_of_another_size(small, capsys, caplog):
    main([*FIT, *small])
    digits = [
        "--data.dataset",
        "digits",
        "--trainer.limit_train_batches",
        "1",
        "--trainer.limit_val_batches",
        "1",
    ]
    main([*FIT, *small, *digits, "--weights", str(BEST), "--name", "warm"])
    assert "of another shape (head.bias, head.weight)" in caplog.text
    refused = ["validate", *FIT[1:], *small, *digits[:2], "--weights", str(BEST)]
    assert "weights do not fit (head.bias, head.weight)" in refusal(capsys, refused)


# Lightning says so of every model that overrides configure_model; nothing is sharded here.
@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
def test_weight_averaging_is_an_option(small):
    main([*FIT, *small, "--trainer.callbacks+=lightning.pytorch.callbacks.EMAWeightAveraging"])
    assert "averaging_state" in torch.load(LAST, weights_only=True)


def test_commands_are_those_of_the_help():
    import locat

    assert all(f"\n  {name} " in locat.HELP for name in LocatCLI.subcommands())


# The run ends in the middle of an epoch, before there is a validation to choose a best checkpoint by.
@pytest.mark.filterwarnings(
    "ignore:`ModelCheckpoint\\(monitor='val/top1'\\)` could not find the monitored key"
)
@pytest.mark.slow
def test_sigterm_leaves_a_checkpoint_to_go_on_from(small):
    arguments = [*FIT, *small, "--trainer.max_epochs", "2000"]
    command = [
        sys.executable,
        "-c",
        "import sys, torch, locat; torch.set_num_threads(1); locat.main(sys.argv[1:])",
    ]
    process = subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not LAST.is_file() and time.monotonic() < deadline:
        time.sleep(0.2)
    LAST.unlink()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert LAST.is_file()
    step = torch.load(LAST, weights_only=True)["global_step"]
    assert step > 0
    main(["fit", "--ckpt_path", str(LAST), "--trainer.max_steps", str(step + 2)])
    assert torch.load(LAST, weights_only=True)["global_step"] == step + 2
