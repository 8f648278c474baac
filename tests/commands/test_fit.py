"""`locat` as its user types it, in process."""

import contextlib
import csv
import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from locat.runs import LOCK, list_runs
from locat_lightning.commands.fit import main
from locat_lightning.commands.messages import NO_NEWS
from locat_lightning.commands.parsing import find_config
from locat_lightning.data.classification import ImageData
from locat_lightning.errors import InputError
from locat_lightning.evaluation.intervals import intervals
from locat_lightning.evaluation.per_image import read_table
from locat_lightning.tasks import Classification
from tests.commands.runs import BEST, FIT, LAST, QUIET, RUN, scalars
from tests.conftest import PICTURES, small_options, write_images

pytestmark = pytest.mark.usefixtures("workplace")

DINO = ["fit", "--config", "dino_tiny.yaml"]
STEADY = ["--model.mixup", "0", "--model.cutmix", "0", "--trainer.max_epochs", "4", "--model.lr", "1e-2"]


def refusal(capsys, arguments):
    """The one line with which a command is refused."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("locat: error: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("locat: error: ")


def test_a_run_of_a_folder_with_a_name_in_any_script_is_resumed(small, folder):
    elsewhere = folder.with_name("😀 \u2028 猫")
    folder.rename(elsewhere)
    small[small.index(str(folder))] = str(elsewhere)
    main([*FIT, *small, "--trainer.max_epochs", "1"])
    main(["fit", "--ckpt_path", str(LAST), "--trainer.max_epochs", "2", "--allow_changes", "true"])
    assert torch.load(LAST, weights_only=True)["global_step"] == 6


def test_a_mistake_in_a_record_says_where_it_comes_from(trained, capsys):
    record = RUN / "config.yaml"
    text = record.read_text()
    record.write_text(text.replace("  images: 8\n", "  images: two\n"))
    assert text != record.read_text()
    said = refusal(capsys, ["fit", "--ckpt_path", str(LAST)])
    assert said.startswith('recorded with the weights, not typed: Parser key "pictures.images"')
    said = refusal(capsys, ["fit", "--ckpt_path", str(LAST), "--pictures.images", "three"])
    assert said.startswith('Parser key "pictures.images"')


def test_a_run_leaves_its_record(small, caplog):
    main([*FIT, *small, *PICTURES])
    config = yaml.safe_load((RUN / "config.yaml").read_text())
    assert config["model"]["init_args"]["backbone"] == "locatvit_tiny"
    assert config["trainer"]["gradient_clip_val"] == 5.0
    assert BEST.is_file()
    assert LAST.is_file()
    assert torch.load(LAST, weights_only=True)["global_step"] == 6
    assert json.loads((RUN / "metrics.json").read_text())["epochs"] == 2
    with (RUN / "metrics.csv").open() as file:
        assert {row["step"] for row in csv.DictReader(file)} == set("012345")
    assert f"run: {RUN}\nlook: tensorboard --logdir runs\n" in caplog.text
    assert "data: 18 training images, 8 validation images, 3 classes\n" in caplog.text
    assert "locatvit_tiny: " in caplog.text

    events = EventAccumulator(str(RUN)).Reload()
    tags = set(events.Tags()["scalars"])
    of_steps = {"loss", "top1", "lr", "weight_decay", "grad_norm", "images_per_s", "data_wait"}
    assert {f"train/{name}" for name in of_steps} <= tags
    assert {"val/loss", "val/top1", "gaug_variance/block_01", "gaug_alpha/block_00"} <= tags
    assert not {"train/top5", "val/top5"} & tags  # of three classes
    assert "pictures/validation" in events.Tags()["images"]
    assert {"config/text_summary", "versions/text_summary"} <= set(events.Tags()["tensors"])
    assert [step for step, _ in scalars(RUN, "train/loss")] == list(range(6))  # 2 epochs of 3 batches
    assert [step for step, _ in scalars(RUN, "gaug_variance/block_00")] == [2, 5]
    assert [image.step for image in events.Images("pictures/validation")] == [2, 5]
    session = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert all(
        name in session for name in (b"model.backbone_args.embed_dim", b"data.batch_size", b"seed_everyth")
    )
    assert not any(name in session for name in (b"_class_path", b"_instantiator"))
    written = (RUN / "hparams.yaml").read_text()
    assert "embed_dim: 24" in written
    assert not any(line.startswith("_") for line in written.splitlines())

    plain = ["--model.backbone_args.gaug", "false", "--model.backbone_args.prr", "false"]
    main([*FIT, *small, *plain, "--trainer.max_epochs", "1"])
    assert (RUN.parent / "version_1" / "metrics.json").is_file()
    assert "locatvit_tiny without GAug and PRR: " in caplog.text


def test_a_config_is_a_local_file_first(tmp_path):
    shipped = find_config("quickstart.yaml")
    assert find_config("quickstart") == shipped
    (tmp_path / "quickstart.yaml").write_text("model: {}\n")
    assert find_config("quickstart.yaml") == "quickstart.yaml"
    with pytest.raises(InputError, match="no shipped config 'nowhere'"):
        find_config("nowhere")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("model: {}\n")
    with pytest.raises(InputError, match=r"run is a directory: give a file, such as run/config\.yaml"):
        find_config("run")


NEGATIVE_LR = (
    'Parser key "lr": Does not validate against any of the Union subtypes Subtypes: '
    "[NonNegativeFloat, NoneType] Errors: - Not of type NonNegativeFloat: "
    "does not conform to restriction v>=0 - Expected a NoneType Given value type: str Given value: -1"
)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["fit"], "locat fit needs --config, a file or one of adapt_locality.yaml"),
        (["fit", "--config", "nowhere"], "no shipped config 'nowhere'"),
        (["validate", "--data.root", "x"], "locat validate needs --weights: a checkpoint of a run, or"),
        (["validate", "--weights", "random"], "locat validate needs --config, a file or one of adapt"),
        (["fit", "--ckpt_path", "nowhere.ckpt"], "--ckpt_path: no such file: "),
        (
            ["fit", "--config", "quickstart", "--data.root", "x"],
            "data.root: x would not be read, because data.dataset is digits",
        ),
        (["validate", "--config", "dino_digits", "--weights", "random"], "Dino trains without classes"),
        (["predict", "--config", "dino_digits", "--weights", "random"], "Dino trains without classes"),
        (
            ["fit", "--config", "classify_tinny"],
            "no shipped config 'classify_tinny'; did you mean classify_tiny.yaml",
        ),
        (["fit", "--config", "."], "--config: . is a directory, not a file"),
        (["validate", "--weights", "runs/nope/last.ckpt"], "--weights: no such file: "),
        (["validate", "--weights", "."], "--weights: . is a directory, not a file"),
        ([*FIT, "--model.lrr", "1"], "--model.lrr: there is no such option; did you mean --model.lr, "),
        (
            [*FIT, "--data.batchsize", "1"],
            "--data.batchsize: there is no such option; did you mean --data.batch_size, ",
        ),
        (
            [*FIT, "--trainer.max_epoch", "1"],
            "--trainer.max_epoch: there is no such option; did you mean --trainer.max_",
        ),
        ([*FIT, "--dataa.root", "x"], "--dataa.root: there is no such option; did you mean --data.root"),
        ([*FIT, "--trainr.max_epochs", "1"], "no such option; did you mean --trainer.max_epochs?"),
        ([*FIT, "--batch_size", "8"], "no such option; did you mean --data.batch_size, "),
        ([*FIT, "--epochs", "8"], "no such option; did you mean --trainer.max_epochs, "),
        ([*FIT, "--seed", "8"], "no such option; did you mean --seed_everything, "),
        ([*FIT, "--lr", "8"], "no such option; did you mean --model.lr?"),
        (
            [*FIT, "--model.lr", "fast"],
            'Classification\': Parser key "lr": Does not validate against any of the Union subtypes',
        ),
        ([*FIT, "--data.batch_size", "0"], 'Parser key "batch_size": Not of type PositiveInt: 0'),
        ([*FIT, "--model", "Nope"], 'Parser key "model": - Expected a path but Nope'),
        ([*FIT, "--trainer.callbacks+=lightning.Nope"], 'Parser key "trainer.callbacks": '),
        (
            [*FIT, "--trainer.precision", "17"],
            "'transformer-engine', 'transformer-engine-float16', '16-true', '16-mixed', 'bf16-true', ",
        ),
        ([*FIT, "--checkpoint.mode", "most"], "`mode` can be min, max but got most"),
        ([*FIT, "--model.backbone", "locatvit_huge"], "timm knows no model 'locatvit_huge'; did you mean "),
        ([*FIT, "--model.optimizer", "adamz"], "timm knows no optimizer 'adamz'; did you mean"),
        ([*FIT, "--trainer.max_epochs", "20"], "model.warmup_epochs (20) has to be less than trainer.max"),
        ([*FIT, "--weights", "nowhere.pth"], "nowhere.pth; timm knows no such model either"),
        ([*FIT, "--weights", "locatvit_tinny"], "no such model either; did you mean locatvit_tiny, "),
        (
            ["fit", "--config", "adapt_pretrained"],
            "--weights is missing: the model that LocAt is put into, because model.locat has start: identity",
        ),
        (
            ["fit", "--config", "quickstart", "--model.backbone", "vit_tiny_patch16_224.nope"],
            "Invalid pretrained tag (nope)",
        ),
        (
            [*FIT, "--data.batch_size", "many"],
            'Parser key "batch_size": Not of type PositiveInt: invalid literal',
        ),
        (["validate", *FIT[1:]], "locat validate needs --weights"),
        (["predict", *FIT[1:]], "locat predict needs --weights"),
        ([*FIT, "--ckpt_path", "last"], "has a last.ckpt"),
        ([*FIT, "--ckpt_path", "nowhere.ckpt"], "--ckpt_path: no such file"),
        (
            [*FIT, "--model.mixup", "-1"],
            'Parser key "mixup": Not of type NonNegativeFloat: -1 does not conform to restriction v>=0',
        ),
        ([*FIT, "--model.lr=-1"], NEGATIVE_LR),
        (
            [*FIT, "--model.label_smoothing", "2"],
            'Parser key "label_smoothing": Not of type '
            "ClosedUnitInterval: 2 does not conform to restriction v>=0 and v<=1",
        ),
        (
            [*FIT, "--model.warmup_epochs", "-1"],
            'Parser key "warmup_epochs": Not of type '
            "NonNegativeFloat: -1 does not conform to restriction v>=0",
        ),
        ([*FIT, "--model.optimizer", "lbfgs"], "timm knows no optimizer 'lbfgs'"),
        ([*FIT, "--data.std", "[0,0,0]"], "std (0.0, 0.0, 0.0) must be three numbers above 0"),
        ([*DINO, "--data.views.hflip", "3"], 'Parser key "hflip": Not of type ClosedUnitInterval: '),
        (
            [*DINO, "--data.views.local_size", "a"],
            'Parser key "local_size": Not of type PositiveInt',
        ),
        (
            [*DINO, "--data.views={crops: 3}"],
            "'locat_lightning.data.views.MultiCrop': Option 'crops' is not accepted",
        ),
        (
            [*FIT, "--model.mixing", "transmixx"],
            "--model.mixing: transmixx is none of mixup, transmix, maskmix, mixpro, patch_mixing",
        ),
        ([*DINO, "--data.views.crops", "3"], "--data.views.crops: there is no such option; did you mean "),
        ([*FIT, "--data.hflip", "3"], 'Parser key "hflip": Not of type ClosedUnitInterval: 3'),
        ([*FIT, "--data.scale", "[2,0.1]"], "scale (2.0, 0.1) must be two numbers, 0 < low <= high <= 1"),
        (
            [*FIT, "--data.scale", "[0.9]"],
            'Parser key "scale": Expected a tuple with 2 elements. Got value: [0.9]',
        ),
        (
            [*FIT, "--data.eval_interpolation", "sharp"],
            "--data.eval_interpolation: sharp is none of nearest, bilinear, bicubic, lanczos, box, hamming",
        ),
        (
            [*FIT, "--data.auto_augment", "bogus"],
            "timm cannot make an augmentation of data.auto_augment 'bogus'",
        ),
        ([*FIT, "--trainer.strategy", "bogus"], "trainer: You selected an invalid strategy name"),
        (
            [*FIT, "--data.root", "nowhere", "--model.backbone_args.nonsense", "1"],
            "model.backbone_args do not fit locatvit_tiny: VisionTransformer.__init__() got an unexpected",
        ),
        ([*FIT, "--model.backbone_args", "{depth: -1}"], "model.backbone_args do not fit locatvit_tiny"),
        (
            [*FIT, "--model.backbone_args", "{pretrained: true}"],
            "model.backbone_args.pretrained: use --weights",
        ),
        (["fit", "--config", "dino_tiny.yaml", "--model.lr=-1"], NEGATIVE_LR),
    ],
)
def test_options_are_refused_before_anything_is_read_or_built(arguments, expected, capsys, monkeypatch):
    monkeypatch.setattr(ImageData, "setup", None)
    create = timm.create_model

    def create_without_memory(*arguments, **options):
        assert torch.get_default_device().type == "meta"
        return create(*arguments, **options)

    monkeypatch.setattr("timm.create_model", create_without_memory)
    assert expected in refusal(capsys, arguments)
    assert not Path("runs").exists()


@pytest.mark.parametrize("accelerator", ["cpu", "auto"])
@pytest.mark.parametrize("command", [FIT, ["validate", *FIT[1:], "--weights", "random"]])
def test_more_processes_than_cores_are_refused(command, accelerator, capsys, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(ImageData, "setup", None)
    monkeypatch.setattr("subprocess.Popen", None)
    said = refusal(capsys, [*command, "--trainer.accelerator", accelerator, "--trainer.devices", "2"])
    assert said.startswith("devices: 2 processes need as many CPU cores, but there is 1: use at most 1")
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "model: [1,\n",
            "--config: mine.yaml is not valid YAML in line 2: expected the node content, but found '<",
        ),
        (
            "model:\n  lr: 1: 2\n",
            "--config: mine.yaml is not valid YAML in line 2: mapping values are not allowed",
        ),
        ("a: \x01\n", "--config: mine.yaml is not text (character 3)"),
        ("just text\n", "--config: mine.yaml has no options (such as `trainer:` with what"),
        ("", "--config: mine.yaml has no options (such as `trainer:` with what"),
        ("modell: {a: 1}\n", "does not accept option 'modell.a'"),
        (
            "model: {class_path: Classification, init_args: {lrr: 1}}\n",
            "Classification': Option 'lrr' is not accepted",
        ),
        ("trainer: {max_epochs: many}\n", 'Parser key "trainer.max_epochs": Does not validate'),
    ],
)
def test_mistakes_in_a_config_are_refused(text, expected, capsys):
    Path("mine.yaml").write_text(text)
    assert expected in refusal(capsys, ["fit", "--config", "mine.yaml"])
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--data.root", "/nowhere"], "no such folder: /nowhere"),
        (["--model.num_classes", "7"], "model.num_classes is 7, but the data have 3 classes (ant, bee, cat)"),
        (["--data.img_size", "40"], "data.img_size is 40, but locatvit_tiny takes 32×32"),
        (["--trainer.max_steps", "2", "--model.warmup_epochs", "1"], "the whole run has only 2"),
        (["--trainer.max_epochs", "-1"], "the schedule needs an end"),
    ],
)
def test_what_does_not_fit_is_one_line(options, expected, small, capsys):
    assert expected in refusal(capsys, [*FIT, *small, *options])
    assert not RUN.exists()


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_unreadable_image_is_named(workers, small, folder, capsys):
    broken = folder / "train" / "bee" / "3.png"
    broken.write_bytes(broken.read_bytes()[:40])
    said = refusal(capsys, [*FIT, *small, "--data.num_workers", workers])
    assert str(broken) in said
    assert "allow more with --data.max_unreadable (now 0)" in said
    assert not RUN.exists()


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


@pytest.fixture(scope="module")
def steady(tmp_path_factory):
    """Options of a run of four epochs, and a directory with that run in one go, not to be changed."""
    place = tmp_path_factory.mktemp("steady")
    options = [*FIT, *small_options(write_images(place / "images")), *PICTURES, *STEADY]
    with contextlib.chdir(place):
        main([*options, "--checkpoint.save_top_k", "-1", "--checkpoint.filename", "{epoch}"])
    return options, place


def test_a_run_that_diverges_stops_and_leaves_no_checkpoint(small, capsys):
    """Else the top-1 of weights that are no numbers would be the share of the first class."""
    said = refusal(capsys, [*FIT, *small, "--model.lr", "1e30", "--model.optimizer", "sgd"])
    assert said.startswith("the loss is ")
    assert " at optimizer step " in said
    assert said.endswith("last good checkpoint: none yet")
    assert not list(Path("runs").rglob("*.ckpt"))


@pytest.mark.parametrize("command", ["validate", "predict", "fit"])
def test_weights_that_are_not_finite_are_refused(command, trained, capsys):
    contents = torch.load(LAST, weights_only=True)
    next(iter(contents["state_dict"].values())).view(-1)[3] = torch.nan
    torch.save(contents, LAST)
    option = "--ckpt_path" if command == "fit" else "--weights"
    said = refusal(capsys, [command, option, str(LAST)])
    assert said.startswith(f"{LAST} holds weights that are not finite numbers (backbone.")


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_stopped(steady):
    """From the checkpoint of the second epoch to the fourth: as four in one go, in the same directory."""
    options, place = steady
    shutil.copytree(place / "runs", "runs")
    whole = torch.load(LAST, weights_only=True)
    LAST.write_bytes((RUN / "checkpoints/1.ckpt").read_bytes())
    main([*options, "--ckpt_path", "last"])

    assert not (RUN.parent / "version_1").exists()
    part = torch.load(LAST, weights_only=True)
    assert whole["global_step"] == part["global_step"] == 12
    for name, value in whole["state_dict"].items():
        torch.testing.assert_close(part["state_dict"][name], value, rtol=0, atol=0)
    for tag in ("train/loss", "train/lr"):
        assert [step for step, _ in scalars(RUN, tag)] == list(range(12))
    events = EventAccumulator(str(RUN), size_guidance={"images": 0}).Reload()
    # The checkpoint is of the validation of its epoch, which the resumed run makes again.
    assert [image.step for image in events.Images("pictures/validation")] == [2, 5, 5, 8, 11]
    assert yaml.safe_load((RUN / "config.yaml").read_text())["ckpt_path"] is None
    with (RUN / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert steps == list(range(12))


@pytest.mark.slow
def test_a_run_cut_off_within_an_epoch_goes_on_with_the_next_batch(steady, monkeypatch, capsys):
    """The best checkpoint stays, and the end is that of a run in one go."""
    options, place = steady
    options = [*options, "--pictures.every_n_epochs", "0"]
    step = Classification.training_step

    def fail_once(self, batch, batch_idx):
        if self.global_step == 7:
            raise InputError("a power cut")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(Classification, "training_step", fail_once)
        assert refusal(capsys, options) == "a power cut"
    assert torch.load(LAST, weights_only=True)["global_step"] == 7
    assert torch.load(BEST, weights_only=True)["global_step"] % 3 == 0
    main([*options, "--ckpt_path", "last"])

    whole = torch.load(place / LAST, weights_only=True)
    part = torch.load(LAST, weights_only=True)
    assert part["global_step"] == whole["global_step"] == 12
    for name, value in whole["state_dict"].items():
        torch.testing.assert_close(part["state_dict"][name], value, rtol=0, atol=0)
    for tag in ("train/loss", "train/lr", "val/loss"):
        assert scalars(RUN, tag) == scalars(place / RUN, tag)


def test_nothing_is_lost_where_nothing_can_go_on(trained, capsys, caplog):
    record = {
        path: path.read_bytes() for path in RUN.rglob("*") if "tfevents" not in path.name and path.is_file()
    }
    Path("half.ckpt").write_bytes(LAST.read_bytes()[:1000])
    torch.save({"state_dict": {}}, "weights.ckpt")
    for options, expected in (
        (["--ckpt_path", "half.ckpt"], "half.ckpt cannot be read"),
        (["--ckpt_path", "weights.ckpt"], "not a checkpoint of a run"),
        (["--ckpt_path", "last", "--model.lrr", "1"], "model.lrr"),
        (["--ckpt_path", "last", "--data.root", "/nowhere"], "no such folder"),
    ):
        assert expected in refusal(capsys, [*FIT, *trained, *options])
    main([*FIT, *trained, "--ckpt_path", "last"])
    assert "nothing is left to train" in caplog.text
    assert {path: path.read_bytes() for path in record} == record
    assert [step for step, _ in scalars(RUN, "train/loss")] == list(range(6))


def test_a_folder_of_images_none_of_which_can_be_read_is_named(trained, folder, capsys):
    for path in (folder / "val").rglob("*.png"):
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    for command in ([*FIT, *trained, "--name", "other"], ["validate", "--weights", str(LAST), *QUIET]):
        assert str(folder / "val") in refusal(capsys, command)
    assert list(Path("runs").iterdir()) == [RUN.parent]


def test_there_are_no_predictions_of_images_none_of_which_can_be_read(trained, tmp_path, capsys):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no image")
    images = ["--data.root", str(tmp_path / "broken"), "--data.max_unreadable", "9"]
    said = refusal(capsys, ["predict", "--weights", str(LAST), *images, *QUIET])
    assert said == "nothing is predicted: none of the images can be read"


def test_images_of_a_side_that_is_no_multiple_of_the_patch(small):
    """timm leaves out what remains at right and bottom."""
    with pytest.warns(
        UserWarning, match="37 pixels are no multiple of the patch size 8: the last 5 at right"
    ):
        main([*FIT, *small, "--data.img_size", "37", "--model.backbone_args.img_size", "37"])
    assert scalars(RUN, "gaug_alpha/block_00")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--trainer.accumulate_grad_batches", "0"],
            "trainer.accumulate_grad_batches: 0 does not conform to restriction v>0",
        ),
        (
            ["--trainer.check_val_every_n_epoch", "0"],
            "trainer.check_val_every_n_epoch: 0 does not conform to restriction v>0",
        ),
        (
            ["--trainer.gradient_clip_val", "-1"],
            "trainer.gradient_clip_val: -1 does not conform to restriction v>=0",
        ),
        (["--model.class_names", "[a, b]"], "model.class_names: 2 names for 3 classes"),
        (
            ["--trainer.limit_train_batches", "0"],
            "trainer.limit_train_batches: 0 does not conform to restriction v>0",
        ),
        (
            ["--model.backbone_args.drop_path_rate", "2"],
            "model.backbone_args.drop_path_rate: 2 is not between 0 and 1",
        ),
    ],
    ids=str,
)
def test_a_number_that_cannot_be_is_refused(options, said, small, capsys):
    assert refusal(capsys, [*FIT, *small, *options]) == said
    assert not Path("runs").is_dir() or not list(Path("runs").iterdir())


def test_validation_that_would_never_come_is_refused(small, capsys):
    said = refusal(capsys, [*FIT, *small, "--trainer.val_check_interval", "1000"])
    assert said.startswith("`val_check_interval` (1000) must be less than or equal to the number")
    assert not Path("runs").exists()


def test_runs_where_nothing_can_be_written_are_refused(small, capsys, tmp_path):
    Path("file").touch()
    Path("broken").symlink_to("nowhere")
    named = [*FIT, *small, "--name", "mine", "--runs"]
    said = refusal(capsys, [*named, "file"])
    assert said == f"--runs: cannot write to file/mine: {tmp_path / 'file'}: Not a directory"
    said = refusal(capsys, [*named, "broken"])
    assert said.startswith("--runs: cannot write to broken/mine: ")
    Path("runs").mkdir()
    Path("runs/mine").touch()
    said = refusal(capsys, [*named, "runs"])
    assert said == "--runs: cannot write to runs/mine: runs/mine: Not a directory"


def test_a_config_that_is_no_text_is_refused(capsys, tmp_path):
    config = tmp_path / "latin1.yaml"
    config.write_bytes("seed_everything: 1 # für alle\n".encode("latin-1"))
    said = refusal(capsys, ["fit", "--config", str(config)])
    assert said == f"--config: {config} is not UTF-8 text (byte 22)"


def test_a_run_that_is_still_training_cannot_be_gone_on_with(trained, capsys):
    assert not (RUN / LOCK).exists()
    (RUN / "metrics.json").unlink()
    record = {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()}
    hold = f"kept = runs.lock(Path({str(RUN)!r})); print(); input()"
    script = f"from pathlib import Path; from locat import runs; {hold}"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script], **pipes) as other:
        other.stdout.readline()
        assert list_runs(Path("runs")).splitlines()[1].split()[1:] == ["training", "0", "1", "val/top1", "1"]
        assert refusal(capsys, [*FIT, *trained, "--ckpt_path", "last"]) == (
            f"--ckpt_path: another process is training in {RUN}: wait for its end, or stop it"
        )
        other.communicate(b"\n")
    assert {path: path.read_bytes() for path in record} == record
    assert list_runs(Path("runs")).splitlines()[1].split()[1:] == ["interrupted", "0", "1", "val/top1", "1"]
    main([*FIT, *trained, "--ckpt_path", "last", "--trainer.max_epochs", "3", "--allow_changes", "true"])
    assert not (RUN / LOCK).exists()


def test_while_a_run_trains_its_directory_is_held(small, monkeypatch):
    step, held = Classification.training_step, []
    script = f"import pathlib; from locat import runs; print(runs.is_locked(pathlib.Path({str(RUN)!r})))"

    def ask(self, batch, batch_idx):
        if not held:
            held.append(subprocess.check_output([sys.executable, "-c", script], text=True).strip())
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Classification, "training_step", ask)
    main([*FIT, *small])
    assert held == ["True"]


def test_the_last_run_of_a_name_goes_on_without_its_config(trained, capsys):
    assert refusal(capsys, ["fit", "--ckpt_path", "last", "--runs", "none"]) == (
        "--ckpt_path last needs --name, the name of the run, or its --config"
    )
    last = ["fit", "--ckpt_path", "last"]
    assert "the name of the run (classify_tiny), or" in refusal(capsys, last)
    assert "no run in" in refusal(capsys, [*last, "--name", "other"])
    main([*last, "--name", "classify_tiny", "--trainer.max_epochs", "3", "--allow_changes", "true"])
    assert torch.load(LAST, weights_only=True)["global_step"] == 9


def test_a_record_as_config_resumes_wherever_it_stands(trained, caplog):
    main(["fit", "--ckpt_path", "last", "--config", str(RUN / "config.yaml")])
    assert "nothing is left to train" in caplog.text
    assert [run.name for run in RUN.parent.iterdir()] == ["version_0"]


def test_a_small_data_set_has_curves(small, recwarn):
    main([*FIT, *small, "--trainer.log_every_n_steps", "null"])  # 50, of 3 batches an epoch
    assert [step for step, _ in scalars(RUN, "train/loss")] == [2, 5]
    assert not [warning for warning in recwarn if "logging interval" in str(warning.message)]


def test_what_tells_a_user_nothing_is_said_with_debug_alone(small, monkeypatch, capsys):
    def said(*arguments):
        main([*arguments, *FIT, *small, "--trainer.max_epochs", "1"])
        lines = capsys.readouterr().err.splitlines()
        assert any(line.startswith("run: runs/classify_tiny/version_") for line in lines)
        return {beginning for beginning in NO_NEWS for line in lines if line.startswith(beginning)}

    for name in ("lightning.pytorch", "lightning.fabric"):  # as outside of tests
        monkeypatch.setattr(logging.getLogger(name), "propagate", False)
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
    assert said() == set()
    assert {"Seed set to", "GPU available"} <= said("--debug")


@pytest.mark.slow
def test_an_option_at_resuming_counts(small, capsys):
    main([*FIT, *small, "--model.lr", "0.1"])
    changed = ["--trainer.max_epochs", "3", "--model.lr", "0.25"]
    with pytest.raises(SystemExit):
        main(["fit", "--ckpt_path", str(LAST), *changed])
    said = capsys.readouterr().err
    assert "model.lr was 0.1 and is 0.25 now; trainer.max_epochs was 2 and is 3 now" in said
    assert "--allow_changes true" in said
    main(["fit", "--allow_changes", "true", "--ckpt_path", str(LAST), *changed])
    assert scalars(RUN, "train/lr")[-3][1] == pytest.approx(0.25 - (0.25 - 1e-7) * 6 / 8)
    # One that moved is taken up too, in a directory of its own.
    Path("moved.ckpt").write_bytes(LAST.read_bytes())
    more = ["--ckpt_path", "moved.ckpt", "--trainer.max_epochs", "4", "--model.weight_decay", "0.2"]
    main([*FIT, *small, *more, "--allow_changes", "true"])
    assert [step for step, _ in scalars(RUN.parent / "version_1", "train/lr")] == [9, 10, 11]
    assert scalars(RUN.parent / "version_1", "train/weight_decay")[0][1] == pytest.approx(0.2)


def test_images_that_came_or_went_are_refused_at_resuming(trained, folder, capsys, caplog):
    before = LAST.read_bytes()
    (folder / "train" / "ant" / "0.png").unlink()
    longer = ["fit", "--ckpt_path", str(LAST), "--data.root", str(folder)]
    said = refusal(capsys, longer)
    assert said == (
        f"resuming from {LAST}, the number of training images was 18 and is 17 now: restore the images, or "
        "allow the change with --allow_changes true"
    )
    assert LAST.read_bytes() == before
    assert len(scalars(RUN, "train/lr")) == 6
    main([*longer, "--trainer.max_epochs", "3", "--allow_changes", "true"])
    assert "resuming with a change: the number of training images was 18 and is 17 now" in caplog.text
    assert torch.load(LAST, weights_only=True)["global_step"] > 6
    (folder / "train" / "ant" / "1.png").rename(folder / "train" / "ant" / "renamed.png")
    main(longer)


def test_weights_of_a_run_are_measured_with_its_record(trained, folder, caplog):
    fitted = json.loads((RUN / "metrics.json").read_text())
    top1 = fitted["best val/top1"]
    low, high = fitted["intervals"]["val/top1"]
    assert low <= fitted["val/top1"] <= high
    assert (fitted["images"], fitted["protocol"]) == (8, "classification")
    for command in ("validate", "test"):
        main([command, "--weights", str(BEST), *QUIET])
        with Path(f"runs/classify_tiny_{command}/version_0/metrics.csv").open() as file:
            row = list(csv.DictReader(file))[-1]
        assert float(row["test/top1" if command == "test" else "val/top1"]) == pytest.approx(top1)
        assert not [name for name in row if name.startswith("gaug_")]
        split = "test" if command == "test" else "val"
        record = json.loads(Path(f"runs/classify_tiny_{command}/version_0/metrics.json").read_text())
        assert (record[f"{split}/top1"], record["images"]) == (pytest.approx(top1), 8)
        table = read_table(Path(f"runs/classify_tiny_{command}/version_0/images.csv"))
        assert float(table.scores["top1"].mean()) == pytest.approx(top1)
        assert record["intervals"][f"{split}/top1"] == pytest.approx(list(intervals(table)["top1"]))
        assert f"{split}/top1 {top1:.2%} [" in caplog.text
        assert (record["protocol"], record["weights"]) == ("classification", str(BEST))
        assert (record["fingerprint"], record["versions"]) == (fitted["fingerprint"], fitted["versions"])
        where = f"run: runs/classify_tiny_{command}/version_0\nlook: tensorboard --logdir runs\n"
        assert caplog.text.endswith(where)
        assert (f"no test/ in {folder}: using val/\n" in caplog.text) == (command == "test")

    some = folder.parent / "some"
    some.mkdir()
    for i in range(5):
        Image.new("RGB", (40, 30), (i * 40, 0, 90)).save(some / f"{i}.jpg")
    main(["predict", "--weights", str(BEST), "--data.root", str(some), *QUIET])
    with Path("runs/classify_tiny_predict/version_0/predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [Path(row["path"]).name for row in rows] == [f"{i}.jpg" for i in range(5)]
    for row in rows:
        shares = {name: float(row[name]) for name in ("ant", "bee", "cat")}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
        assert row["class"] == max(shares, key=shares.get)


def test_a_warm_start_leaves_a_head_of_another_size(trained, capsys, caplog):
    digits = [
        "--data.dataset",
        "digits",
        "--trainer.limit_train_batches",
        "1",
        "--trainer.limit_val_batches",
        "1",
    ]
    main([*FIT, *trained, *digits, "--weights", str(BEST), "--name", "warm"])
    assert "of another shape (head.bias, head.weight)" in caplog.text
    refused = ["validate", *FIT[1:], *trained, *digits[:2], "--weights", str(BEST)]
    assert "weights do not fit (head.bias, head.weight)" in refusal(capsys, refused)


@pytest.mark.slow
def test_weight_averaging_is_an_option(small):
    average = ["--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay=0.5"]
    main([*FIT, *small, *STEADY, *average, "--trainer.max_epochs", "2"])
    saved = torch.load(LAST, weights_only=True)
    name = "backbone.blocks.0.attn.qkv.weight"
    assert (saved["state_dict"][name] - saved["current_model_state"][name]).abs().max() > 1e-6
    record = ["--config", str(RUN / "config.yaml")]  # its callbacks are code, so it has to be named
    main(["fit", *record, "--allow_changes", "true", "--ckpt_path", str(LAST), "--trainer.max_epochs", "3"])
    assert torch.load(LAST, weights_only=True)["global_step"] == 9
    main(["validate", "--weights", str(LAST), *QUIET])
    [(_, measured)] = scalars("runs/classify_tiny_validate/version_0", "val/loss")
    assert measured == pytest.approx(scalars(RUN, "val/loss")[-1][1], rel=1e-5)


@pytest.mark.parametrize(("option", "expected"), [("model", "mixup_prob"), ("data", "batch_size")])
def test_the_options_of_a_class_need_no_config(option, expected, capsys):
    name = {"model": "Classification", "data": "ImageData"}[option]
    with pytest.raises(SystemExit) as ended:
        main(["fit", f"--{option}.help", name])
    assert ended.value.code == 0
    assert f"--{option}.{expected}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    assert f"--{option}.help {name}" in " ".join(capsys.readouterr().out.split())


def test_weights_and_a_run_to_go_on_with_exclude_each_other(trained, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--ckpt_path", str(LAST), "--weights", str(LAST)])
    assert "give only one of them" in capsys.readouterr().err


def test_another_model_at_resuming_is_refused(trained, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--ckpt_path", str(LAST), "--model.backbone_args.depth", "3"])
    assert stopped.value.code == 2
    [line] = capsys.readouterr().err.strip().splitlines()[-1:]
    assert "model.backbone_args.depth was 2 and is 3 now" in line


@pytest.mark.parametrize(
    "options",
    [
        ["--checkpoint.monitor", "val/acc"],
        ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "val/acc"],
    ],
)
def test_a_metric_that_nobody_logs_is_answered_with_those_that_are(options, small, capsys):
    said = refusal(capsys, [*FIT, *small, *options])
    assert "val/acc" in said
    assert "val/top1" in said


def test_classes_of_other_names_are_refused(trained, folder, capsys):
    """To measure, and to go on; a warm start takes the names of its data, whatever the weights are of."""
    for split in ("train", "val"):
        (folder / split / "bee").rename(folder / split / "wasp")
    expected = "only the weights have bee; only the data have wasp"
    assert expected in refusal(capsys, ["validate", "--weights", str(BEST), *QUIET])
    assert expected in refusal(capsys, ["validate", *FIT[1:], *trained, "--weights", str(BEST)])
    more = ["--trainer.max_epochs", "3", "--allow_changes", "true"]
    assert expected in refusal(capsys, ["fit", "--ckpt_path", str(LAST), *more])
    main([*FIT, *trained, "--trainer.max_epochs", "1", "--weights", str(BEST), "--name", "warm"])
    warm = torch.load("runs/warm/version_0/checkpoints/last.ckpt", weights_only=True)
    assert warm["hyper_parameters"]["class_names"] == ["ant", "cat", "wasp"]


def test_classes_may_have_names_of_their_own(small):
    main([*FIT, *small, "--trainer.max_epochs", "1", "--model.class_names", "[Ameise, Biene, Katze]"])
    saved = torch.load(LAST, weights_only=True)
    assert saved["hyper_parameters"]["class_names"] == ["Ameise", "Biene", "Katze"]
    assert saved["data_classes"] == ["ant", "bee", "cat"]
    main(["validate", "--weights", str(LAST), *QUIET])


def test_an_interrupt_before_the_first_step_leaves_nothing(small, monkeypatch):
    def interrupted(*_):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Classification, "on_train_epoch_start", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main([*FIT, *small])
    assert stopped.value.code == 130
    assert not Path("runs").exists()
