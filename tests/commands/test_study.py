"""`locat study`: a small one that is interrupted and resumed; its config, its steps, its statistics."""

import json
import logging
import os
import shutil
import signal
import sys
import tarfile
from dataclasses import replace
from math import inf, sqrt
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image

from locat import configs
from locat_lightning.commands.study import command, steps
from locat_lightning.commands.study.differences import (
    Difference,
    Place,
    course,
    difference_between,
    in_words,
    paired_difference,
)
from locat_lightning.commands.study.folders import some_of_each_class, unpacked
from locat_lightning.commands.study.pictures import differences_figure, lines_figure, points_figure
from locat_lightning.commands.study.plan import COMMANDS, TRAIN, Measure, Pictures, Probe, Step
from locat_lightning.commands.study.report import write_report
from locat_lightning.errors import InputError
from locat_lightning.evaluation.intervals import Interval
from locat_lightning.evaluation.packed import packed
from locat_lightning.evaluation.per_image import Scores

BACKBONE = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
EPOCHS = 2
STEPS = ["train", "near_epoch_1", "near", "scenes", "maps", "looks"]  # of a run of `TINY`
CLASSES = ["sky", "road", "car"]
DEFAULTS = {"gaug": True, "prr": True, "global_pool": "token"}
QUICK = {"data.num_workers": 0, "trainer.accelerator": "cpu", "trainer.log_every_n_steps": 1}
QUICK |= {"pictures.every_n_epochs": 0}  # of the runs: the study draws its own
PLAIN = {"model.backbone_args.gaug": False, "model.backbone_args.prr": False}
SMALL = {f"model.backbone_args.{name}": value for name, value in BACKBONE.items()} | {
    "data.dataset": "folder",
    "data.root": "{images}",
    "data.batch_size": 6,
    "model.warmup_epochs": 0,
}
TINY = {
    "seeds": [0],
    "recipes": {
        "supervised": {"config": "quickstart.yaml", "trainer.max_epochs": EPOCHS}
        | QUICK
        | SMALL
        | {"trainer.callbacks+": f"{__name__}.Halt"},
        "dino": {"config": "dino_digits.yaml", "trainer.max_epochs": 1}
        | QUICK
        | SMALL
        | {"model.out_dim": 64, "model.hidden_dim": 32, "model.bottleneck_dim": 16},
    },
    "arms": {
        "vit": {"recipe": "supervised", "options": PLAIN},
        "locat": {"recipe": "supervised"},
        "dino": {"recipe": "dino"},
    },
    "probes": {
        "near": {
            "command": "knn",
            "curve": True,
            "options": {"k": 3, "data.num_workers": 0, "accelerator": "cpu"},
        },
        "scenes": {
            "command": "fit",
            "options": {"config": "segment_folder.yaml", "data.root": "{masks}", "data.classes": CLASSES}
            | QUICK
            | {"data.scale": [48, 40], "data.crop_size": 32, "data.batch_size": 3}
            | {"trainer.max_steps": 2, "trainer.val_check_interval": 2},
        },
        "maps": {"command": "predict", "weights": "scenes", "seeds": [0]},
        "looks": {
            "command": "layers",
            "options": {"images": 4, "data.num_workers": 0, "accelerator": "cpu"},
        },
    },
    "measures": {
        "top1": {"title": "top-1", "step": "train", "metric": "val/top1"},
        "near": {"title": "3-NN", "step": "near", "metric": "knn/top1_k3"},
        "miou": {"title": "mIoU", "step": "scenes", "metric": "val/miou"},
        "never": {"title": "top-9", "step": "near", "metric": "knn/top9"},
    },
    "pictures": {"quality": ["near", "miou"], "layers": "looks", "features": "scenes", "predictions": "maps"},
    "epochs": [1, 2],
    "per_class": {"images": 4},
    "notes": ["Four images of each class."],
}


def study_of(config, preset=None, **changes):
    """The study of a config, as the command line describes it."""
    options = [f"--{name}={json.dumps(value)}" for name, value in changes.items()]
    return command.read_study(["--config", config, *options, *([f"--preset={preset}"] if preset else [])])[0]


@pytest.fixture(scope="module")
def cifar():
    return study_of("study_cifar.yaml", "cpu")


class Halt(Callback):
    """Records each epoch that begins; where there is a file `halt`, stops the run as a scheduler would."""

    def on_train_epoch_start(self, trainer, module):
        arm = Path(trainer.default_root_dir).parts[-4]
        with Path("epochs.txt").open("a") as file:
            print(f"{arm}/{trainer.current_epoch}", file=file)

    def on_after_backward(self, trainer, module):
        arm = Path(trainer.default_root_dir).parts[-4]
        if (arm, trainer.current_epoch) == ("locat", 1) and Path("halt").exists():
            Path("halt").unlink()
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def places(folder, scenes, tmp_path):
    """Options for the study's folders: an archive of images, a folder of masks."""
    with tarfile.open(tmp_path / "animals.tar", "w") as archive:
        archive.add(folder, arcname="animals")
    return ["--folders.images", "animals.tar", "--folders.masks", str(scenes("folder"))]


@pytest.mark.slow
def test_an_interrupted_study_resumes_and_repeats_nothing(places, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(steps, "gc", SimpleNamespace(collect=lambda: None))  # slow, and no workers to end
    Path("tiny.yaml").write_text(yaml.safe_dump(TINY, sort_keys=False))
    arguments = ["study", "--config", "tiny.yaml", *places, "--report", "docs/page.md", "--records=records"]
    page, runs = Path("docs/page.md"), Path("runs/tiny")

    Path("halt").touch()
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err.endswith("interrupted; the same command resumes the study\n")
    assert "Missing: locat (seed 0), dino (seed 0)." in page.read_text()
    assert "## Difference" not in page.read_text()
    record = Path("records/vit/seed_0.json")
    finished = record.stat().st_mtime_ns
    assert [*json.loads(record.read_text())] == STEPS

    command.main(arguments)
    assert record.stat().st_mtime_ns == finished
    epochs = Path("epochs.txt").read_text().split()
    assert epochs == ["vit/0", "vit/1", "locat/0", "locat/1"]  # resumed within its second epoch

    text = page.read_text()
    assert "Missing" not in text
    assert "`locat study --config tiny.yaml --folders.images animals.tar --folders.masks folder`" in text
    assert "- **vit**: supervised, `gaug: false`, `prr: false`.\n- **locat**: supervised, the recipe" in text
    assert "- 4 training images of each class of `{images}`" in text
    assert "- Four images of each class." in text
    assert "- No top-9: step `near` has no `knn/top9`." in text
    assert "- **locat** compared with vit: no interval with one seed in top-1, 3-NN, mIoU." in text
    commands = text.partition("## Commands")[2]
    assert "- train: `locat fit --config=quickstart.yaml --trainer.max_epochs=2" in commands
    assert "'--data.root={images}'" in commands
    assert '\'--data.classes=["sky", "road", "car"]\'' in commands
    assert "'--weights={train}' --name=near` (k-NN: " in commands
    assert "'--weights={scenes}' --name=maps`" in commands
    assert "measured alike after epochs 1, 2." in commands
    assert "near_epoch_1" not in commands
    results = json.loads(page.with_suffix(".json").read_text())["results"]
    assert [(each["arm"], each["seed"]) for each in results] == [("vit", 0), ("locat", 0), ("dino", 0)]
    vit, locat_, dino = results
    assert dino["measures"]["top1"] is None
    assert f"| dino | 1 | – | {100 * dino['measures']['near']:.2f} |" in text  # noqa: RUF001
    assert f"| vit | 1 | {100 * vit['measures']['top1']:.2f} |" in text
    for result in results:
        assert result["measures"].keys() == TINY["measures"].keys()
        assert all(0 <= value <= 1 for value in result["measures"].values() if value is not None)
        assert result["seconds_per_step"] > 0
        assert len(result["kernel_widths"]) == (0 if result is vit else BACKBONE["depth"])
        assert str(tmp_path) not in json.dumps(result)
    # Per block and head dimension d: 3 (d + 1).
    d = BACKBONE["embed_dim"] // BACKBONE["num_heads"]
    assert locat_["parameters"] - vit["parameters"] == BACKBONE["depth"] * 3 * (d + 1)
    for name in ("quality", "kernels", "layers", "features", "predictions"):
        assert f"(page_{name}.png)" in text
        with Image.open(f"docs/page_{name}.png") as picture:
            assert min(picture.size) > 100
    assert set(vit["curves"]["near"]) == {"1", "2"}  # measured after both epochs
    assert vit["curves"]["near"]["2"] == vit["measures"]["near"]
    assert set(dino["curves"]["near"]) == {"1"}
    assert [*locat_["layers"]] == ["2"]
    assert f"| distance in patches | dino | {dino['layers']['1']['distance']['block_00']:.3f} |" in text
    blocks = {each["arm"]: [*each["layers"]["2"]["distance"]] for each in (vit, locat_)}
    assert blocks == {"vit": ["block_00", "block_01"], "locat": ["block_00", "block_01", "prr"]}
    assert "After the last epoch:\n\n|  | arm | 0 | 1 | norm | PRR |\n" in text
    reach = [f"{vit['layers']['2']['distance'][block]:.3f}" for block in blocks["vit"]]
    assert f"| distance in patches | vit | {' | '.join(reach)} | – | – |" in text  # noqa: RUF001
    assert "(page_curves.png)" in text
    kept = torch.load(runs / "vit/seed_0/train/version_0/checkpoints/epoch_1.ckpt", weights_only=True)
    assert kept["global_step"] == 2

    # Without the runs, the records are enough for the page, and pictures of what is gone stay.
    before = Path("docs/page_features.png").read_bytes()
    shutil.rmtree(runs)
    command.main([*arguments, "--run", "false"])
    assert page.read_text() == text
    assert Path("docs/page_features.png").read_bytes() == before
    assert not (runs / "vit").exists()


class Commands:
    """Stands for the commands: records their options, and leaves what a run leaves."""

    def __init__(self, monkeypatch, **metrics):
        self.given, self.ends, self.metrics = [], {}, metrics
        for name in COMMANDS:
            monkeypatch.setitem(COMMANDS, name, self)

    def __call__(self, arguments):
        self.given.append(arguments)
        options = dict(option.removeprefix("--").split("=", 1) for option in arguments[1:])
        run = Path(options["runs"]) / options["name"] / "version_0"
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        (run / "checkpoints" / "last.ckpt").write_bytes(b"weights")
        if (end := self.ends.pop(options["name"], None)) is not None:
            print("locat: error: no such thing", file=sys.stderr)
            sys.exit(end)
        (run / "metrics.json").write_text(json.dumps(self.metrics.get(options["name"], {"val/top1": 0.5})))

    @property
    def names(self):
        return [
            next(o for o in given if o.startswith("--name=")).removeprefix("--name=") for given in self.given
        ]


@pytest.fixture
def commands(monkeypatch):
    monkeypatch.setattr(steps, "_cost", lambda directory: {"kernel_widths": []})
    monkeypatch.setattr(steps, "gc", SimpleNamespace(collect=lambda: None))  # slow, and no workers to end
    return Commands(monkeypatch)


TRAINING = Step(TRAIN, "fit", {"data.root": "{images}", "trainer.max_epochs": 3})


def test_an_interrupted_training_resumes_and_a_finished_one_is_left_alone(commands, tmp_path):
    commands.ends[TRAIN] = 143
    with pytest.raises(SystemExit):
        steps.run_step(TRAINING, tmp_path, {"images": "here"}, tmp_path / "record.json")
    assert not (tmp_path / "record.json").exists()
    assert steps.run_step(TRAINING, tmp_path, {"images": "here"}, tmp_path / "record.json")
    assert not steps.run_step(TRAINING, tmp_path, {"images": "here"}, tmp_path / "record.json")
    first, second = commands.given
    assert second == [*first, "--ckpt_path=last"]
    assert {"--data.root=here", "--trainer.max_epochs=3"} <= {*first}


def test_a_training_that_cannot_be_resumed_starts_again(commands, tmp_path):
    """An unreadable checkpoint does not stop a study for good."""
    broken = tmp_path / TRAIN / "version_0" / "checkpoints" / "last.ckpt"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"half a checkpoint")
    commands.ends[TRAIN] = 2
    steps.run_step(TRAINING, tmp_path, {"images": "here"}, tmp_path / "record.json")
    first, second = commands.given
    assert first == [*second, "--ckpt_path=last"]
    assert broken.read_bytes() == b"weights"
    record = json.loads((tmp_path / "record.json").read_text())
    assert record[TRAIN]["metrics"] == {"val/top1": 0.5}


def test_a_command_that_refuses_is_quoted(commands, tmp_path):
    commands.ends["knn"] = 2
    with pytest.raises(InputError, match=r"locat knn: no such thing \(see .*knn\.log\)"):
        steps.run_step(Step("knn", "knn", {}), tmp_path, {}, tmp_path / "record.json")
    assert not (tmp_path / "record.json").exists()


def test_results_of_other_options_or_images_are_not_mixed_in(commands, tmp_path):
    record = tmp_path / "record.json"
    steps.run_step(TRAINING, tmp_path, {"images": "data/cifar10"}, record)
    assert not steps.run_step(TRAINING, tmp_path, {"images": "elsewhere/cifar10"}, record)
    with pytest.raises(InputError, match=r"record\.json has the result of other options .*cifar10"):
        steps.run_step(TRAINING, tmp_path, {"images": "data/animals"}, record)
    with pytest.raises(InputError, match="has the result of other options"):
        steps.run_step(
            Step(TRAIN, "fit", {"data.root": "{images}"}), tmp_path, {"images": "data/cifar10"}, record
        )


def test_seeds_arms_and_probes_can_be_added(commands, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "write_report", lambda *_: None)
    study = yaml.safe_load((configs.config_directory() / "study_digits.yaml").read_text())
    Path("mine.yaml").write_text(yaml.safe_dump(study | {"measures": {}, "pictures": {}}))
    command.main(["study", "--config=mine.yaml", "--seeds=[1]", "--probes={}"])
    assert commands.names == [TRAIN, TRAIN]
    command.main(["study", "--config=mine.yaml", "--seeds=[1, 2]"])
    assert commands.names[2:] == ["knn", "knn", TRAIN, "knn", TRAIN, "knn"]
    command.main(["study", "--config=mine.yaml", "--seeds=[1, 2]"])
    assert len(commands.given) == 8
    assert {path.name for path in Path("runs/mine/vit").glob("*.json")} == {"seed_1.json", "seed_2.json"}


def test_what_is_measured_after_an_epoch_is_of_one_training(commands, tmp_path):
    """Where a checkpoint is gone that a missing step needs, the arm begins again."""
    study = study_of("study_digits.yaml", epochs=[2, 4])
    study = replace(
        study,
        recipes={"digits": {"trainer.max_epochs": 4}},
        probes={
            "near": Probe("knn", curve=True),
            "scenes": Probe("fit", curve=True),
            "miou": Probe("validate", weights="scenes", curve=True),
        },
        measures={name: Measure("", name, "") for name in ("near", "miou")},
        pictures=Pictures(),
    )
    todo = study.steps("vit", 0)
    assert todo[0].options["checkpoint.keep"] == [2]  # the last needs none
    weights = [(step.name, step.weights, step.epoch) for step in todo[1:]]
    assert weights == [
        ("near_epoch_2", "train", 2),
        ("near", "train", 0),
        ("scenes_epoch_2", "train", 2),
        ("scenes", "train", 0),
        ("miou_epoch_2", "scenes_epoch_2", 0),
        ("miou", "scenes", 0),
    ]

    def finish(missing):
        commands.given.clear()
        for name in missing:
            known = steps.finished_steps(record)
            known.pop(name)
            record.write_text(json.dumps(known))
        for step in steps.steps_to_run(todo, own, record):
            steps.run_step(step, own, {}, record)
        return commands.names

    own, record = tmp_path / "runs", tmp_path / "vit.json"
    names = [step.name for step in todo]
    assert finish([]) == names
    assert commands.given[1][-1].endswith("/checkpoints/epoch_2.ckpt")
    for kept in own.glob("train/version_0/checkpoints/*"):  # the stand-in writes the last one alone
        (kept.parent / "epoch_2.ckpt").write_bytes(b"weights")
    assert finish(["near_epoch_2"]) == ["near_epoch_2"]
    shutil.rmtree(own / "scenes_epoch_2")
    assert finish(["miou"]) == ["miou"]
    assert finish(["miou_epoch_2"]) == ["scenes_epoch_2", "miou_epoch_2"]
    shutil.rmtree(own)
    assert finish([]) == []
    assert finish(["near_epoch_2"]) == names


def test_a_probe_that_is_added_runs_alone_and_the_page_does_not_wait_for_it(commands, tmp_path, monkeypatch):
    """On records of before it, with the kept checkpoints of before it."""
    monkeypatch.chdir(tmp_path)
    commands.metrics = {
        name: {
            "layers/distance_px/block_00": far,
            "layers/distance_px/block_00/head_00": 9.0,
            "layers/distance_px/prr": 1.0,
        }
        for name, far in (("looks_epoch_2", 0.25), ("looks", 0.5))
    } | {TRAIN: {"val/top1": 0.5, "epochs": 4}}
    study = yaml.safe_load((configs.config_directory() / "study_digits.yaml").read_text())
    study |= {"probes": {"knn": {"command": "knn", "curve": True}}, "pictures": {}, "epochs": [2, 4]}
    study["recipes"]["digits"]["trainer.max_epochs"] = 4
    del study["measures"]["knn"]
    Path("mine.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    arguments = ["study", "--config=mine.yaml", "--seeds=[0]", "--records=records"]
    command.main(arguments)
    before = {path: path.read_text() for path in Path("records").glob("*/*.json")}
    assert len(before) == 2
    for kept in Path("runs").glob("mine/*/*/train/version_0/checkpoints"):
        (kept / "epoch_2.ckpt").write_bytes(b"weights")

    study["probes"]["looks"] = {"command": "layers", "curve": True}
    study["pictures"] = {"layers": "looks"}
    Path("mine.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    commands.given.clear()
    command.main([*arguments, "--run=false"])
    text = Path("runs/mine/results.md").read_text()
    assert "Missing: looks_epoch_2, looks of vit (seed 0), looks_epoch_2, looks of locat (seed 0). " in text
    assert "| vit | 1 | 50.00 |" in text
    assert "## What layers do" not in text
    assert not commands.given

    command.main(arguments)
    assert commands.names == ["looks_epoch_2", "looks"] * 2
    assert commands.given[0][-1].endswith("vit/seed_0/train/version_0/checkpoints/epoch_2.ckpt")
    for path, records in before.items():
        after = json.loads(path.read_text())
        assert {name: after[name] for name in json.loads(records)} == json.loads(records)
    text = Path("runs/mine/results.md").read_text()
    assert "Missing" not in text
    assert "| distance in px | locat | 0.500 | 1.000 |" in text
    results = json.loads(Path("runs/mine/results.json").read_text())["results"]
    assert results[0]["layers"] == {
        "2": {"distance_px": {"block_00": 0.25, "prr": 1.0}},
        "4": {"distance_px": {"block_00": 0.5, "prr": 1.0}},
    }
    assert Path("runs/mine/results_layers.png").is_file()

    study["probes"]["near"] = {"command": "knn", "weights": TRAIN, "options": {"k": 5}}
    Path("mine.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    finished = {path: path.read_text() for path in before}
    for checkpoint in Path("runs").rglob("*.ckpt"):
        checkpoint.unlink()
    commands.given.clear()
    command.main(arguments)  # trains nothing anew for what no measure reads
    assert not commands.given
    assert {path: path.read_text() for path in before} == finished
    assert "Missing: near of vit (seed 0)" in Path("runs/mine/results.md").read_text()


def test_messages_of_steps_go_to_their_logs(commands, tmp_path, monkeypatch, capsys):
    def measure(arguments):
        rank_zero_info("78 of the model's 78 tensors matched")

    monkeypatch.setitem(COMMANDS, "knn", measure)
    monkeypatch.setattr(command, "write_report", lambda *_: None)
    for name in ("lightning.pytorch", "lightning.fabric"):  # as outside of tests
        monkeypatch.setattr(logging.getLogger(name), "propagate", False)
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
    command.main(["study", "--config=study_digits.yaml", "--seeds=[0]", f"--to={tmp_path}"])
    assert "matched" not in "".join(capsys.readouterr())
    assert "78 of the model's 78 tensors matched" in (tmp_path / "vit/seed_0/knn.log").read_text()


def test_every_arm_differs_from_its_baseline_in_nothing_but_its_options():
    presets = ("cpu", "variants", "training", "quick", "gpu")
    studies = (*(("cifar", preset) for preset in presets), ("pretraining", None), ("tails", "teacher"))
    for config, preset in studies:
        study = study_of(f"study_{config}.yaml", preset)
        assert len(study.seeds) >= 3
        for arm, seed in study.runs():
            base = study.baseline_of(arm)
            own = study.arms[arm].options | study.arms[base].options
            for step, other in zip(study.steps(arm, seed), study.steps(base, seed), strict=True):
                differing = {
                    option
                    for option in step.options.keys() | other.options.keys()
                    if step.options.get(option) != other.options.get(option)
                }
                assert differing <= (own.keys() if step.name == TRAIN else set())
                if step.command == "fit":
                    assert step.options["seed_everything"] == step.options["data.seed"] == seed


def test_the_arms_are_those_of_the_paper(cifar):
    parts = {
        name: tuple(
            arm.options.get(f"model.backbone_args.{part}", default) for part, default in DEFAULTS.items()
        )
        for name, arm in cifar.arms.items()
    }
    assert parts == {
        "vit": (False, False, "token"),
        "gaug": (True, False, "token"),
        "prr": (False, True, "token"),
        "locat": (True, True, "token"),
        "gap": (False, False, "avg"),
    }
    assert {cifar.baseline_of(arm) for arm in cifar.arms} == {"vit"}
    assert study_of("study_cifar.yaml", "gpu").baseline_of("dino_locat") == "dino_vit"
    training = study_of("study_cifar.yaml", "training")
    assert training.baseline_of("locat_transmix") == "vit_transmix"
    assert training.baseline_of("locat_sam") == "vit_sam"
    for arm in ("vit", "locat"):  # so that their records serve for all
        assert training.steps(arm, 0) == cifar.steps(arm, 0)
    variants = study_of("study_cifar.yaml", "variants")
    assert {
        arm: variants.baseline_of(arm) for arm in ("locat", "rotated", "locat_nowhere", "locat_fine")
    } == {
        "locat": "vit",
        "rotated": "locat",
        "locat_nowhere": "vit_nowhere",
        "locat_fine": "vit_fine",
    }
    assert cifar.folders() == ["images", "masks"]
    assert study_of("study_digits.yaml").folders() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--presets={cpu: {arms: [vitt]}}"], "presets.cpu.arms: 'vitt' is not one of .*; did you mean vit"),
        (["--arms={vit: {recipe: dino, baseline: vid}}"], "arms.vit.baseline: 'vid' is not one of vit"),
        (["--presets={gpu: {}}"], "preset: 'cpu' is not one of gpu"),
        (["--presets={cpu: {options: {nothing: {}}}}"], "presets.cpu.options: 'nothing' is not one of super"),
        (["--probes={segment: {command: segment}}"], "probes.segment.command: 'segment' is not one of fit"),
        (["--probes={a: {command: knn, weights: b}}"], "probes.a.weights: 'b' is not one of train"),
        (["--arms={vit: {recipe: none}}"], "arms.vit.recipe: 'none' is not one of supervised, dino"),
        (["--measures={a: {title: a, step: b, metric: c}}"], "measures.a.step: 'b' is not one of train, "),
        (["--pictures.quality=[top1, top2]"], "pictures.quality: 'top2' is not one of top1, .*mean top1"),
        (
            ["--probes={a: {command: knn}, b: {command: validate, weights: a, curve: true}}"],
            "a, whose weights",
        ),
        (
            ["--presets={cpu: {probes: [kn]}}"],
            "presets.cpu.probes: 'kn' is not one of top1.*; did you mean knn",
        ),
        (["--probes.knn.recipes=[other]"], "probes.knn.recipes: 'other' is not one of supervised, dino"),
        (["--pictures.features=a"], "pictures: 'a' is not one of top1"),
        (["--pictures.layers=layer"], "pictures: 'layer' is not one of top1.*; did you mean layers"),
    ],
)
def test_a_mistake_in_the_config_is_told(options, message):
    with pytest.raises(InputError, match=message):
        command.read_study(["--config=study_cifar.yaml", "--preset=cpu", *options])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "locat study needs --config, for example study_digits.yaml"),
        (
            ["--config=study_cifar.yaml", "--preset=cpu", "--folders.images=."],
            "the config reads {masks}: add --",
        ),
        (
            ["--config=study_digits.yaml", "--folders.image=."],
            "--folders.image: the config does not read {image}",
        ),
        (
            ["--config=study_digits.yaml", "--arms={other: {}}"],
            "the following arguments are required: recipe",
        ),
        (
            ["--config=study_digits.yaml", "--presets={cpu: {seed: 1}}"],
            "Option 'seed' is not accepted",
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_a_line(options, message, commands, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        command.main(["study", *options])
    assert stopped.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("locat: error: ")
    assert message in line


def test_links_to_some_images_of_each_class_are_made_once(folder, tmp_path):
    def chosen(some):
        return {
            path.name: sorted(each.name for each in path.iterdir()) for path in (some / "train").iterdir()
        }

    some = some_of_each_class(folder, 4, tmp_path / "some", "--folders.images")
    assert some == tmp_path / "some" / "images_4_per_class"
    assert {name: len(files) for name, files in chosen(some).items()} == {"ant": 4, "bee": 4, "cat": 4}
    assert (some / "val").resolve() == folder / "val"
    assert chosen(some) == chosen(some_of_each_class(folder, 4, tmp_path / "again", "--folders.images"))
    everything = some_of_each_class(folder, 99, tmp_path, "--folders.images")
    assert len(chosen(everything)["ant"]) == 6
    with pytest.raises(InputError, match=r"--folders\.images: .*ant has no train/"):
        some_of_each_class(folder / "train" / "ant", 4, tmp_path, "--folders.images")


def test_neither_folder_nor_archive(tmp_path):
    with pytest.raises(InputError, match=r"--folders.masks: no such folder or archive: .*nowhere"):
        unpacked(tmp_path / "nowhere", tmp_path, "--folders.masks")
    (tmp_path / "text").write_text("no archive")
    with pytest.raises(InputError, match=r"--folders.images: .*text is neither a folder nor a \.tar"):
        unpacked(tmp_path / "text", tmp_path / "data", "--folders.images")


def test_paired_difference_by_hand():
    # Mean 2, deviation 1, so the interval is 2 ± 4.3027 / √3.
    found = paired_difference([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert found.low == pytest.approx(2 - 2.48417, abs=1e-4)
    assert found.high == pytest.approx(2 + 2.48417, abs=1e-4)
    assert found.pairs == 3
    assert paired_difference([0.5]) == (0.5, -inf, inf, 1)


def result(arm, seed, **measures):
    curves = {name: {4: value} for name, value in measures.items()}
    own = {"measures": measures, "curves": curves, steps.IMAGES: {}, steps.LAYERS: {}, "missing": []}
    return {"arm": arm, "seed": seed} | own


def test_differences_are_of_runs_of_one_seed():
    results = [
        *(result("vit", seed, top1=value) for seed, value in enumerate((0.5, 0.6, 0.7))),
        *(result("locat", seed, top1=value) for seed, value in ((2, 0.75), (0, 0.6), (3, 0.9))),
        result("dino", 0, top1=None),
    ]
    found = difference_between("vit", "locat", "top1", results)  # 0.1 and 0.05 of seeds 0 and 2
    assert found.pairs == 2
    assert found.mean == pytest.approx(0.075)
    half = 12.7062 * (0.05 / sqrt(2)) / sqrt(2)
    assert (found.low, found.high) == pytest.approx((0.075 - half, 0.075 + half))
    assert difference_between("vit", "dino", "top1", results) is None
    assert difference_between("vit", "locat", "knn", results) is None


def test_the_course_of_a_difference_has_intervals_over_seeds_and_over_images():
    rng = np.random.default_rng(0)
    hits = {name: rng.random((2, 8)) < share for name, share in (("vit", 0.4), ("locat", 0.8))}
    results = []
    for arm, of_arm in hits.items():
        for seed, each in enumerate(of_arm):
            own = Scores(
                torch.arange(8), [f"{i}" for i in range(8)], torch.zeros(8), {"top1": torch.tensor(each)}
            )
            results.append(result(arm, seed, top1=float(each.mean())))
            results[-1][steps.IMAGES] = {"top1": {4: packed(own, ["top1"])}}
    study = study_of("study_digits.yaml", seeds=[0, 1])
    study = replace(study, measures={"top1": Measure("top-1", "train", "val/top1")}, pictures=Pictures())
    [place] = course(study, "locat", "top1", results)
    assert place.epoch == 4
    assert place.difference == difference_between("vit", "locat", "top1", results)
    of_images = (hits["locat"].astype(float) - hits["vit"]).mean(0)  # of both seeds
    drawn = np.random.default_rng(0).integers(8, size=(2000, 8))
    assert place.over_images == pytest.approx(np.quantile(of_images[drawn].mean(1), [0.025, 0.975]))

    results[-1][steps.IMAGES]["top1"][4]["fingerprint"] = "of other images"
    assert course(study, "locat", "top1", results)[0].over_images is None


def test_words_say_where_nothing_is_shown():
    found = {
        "top-1": Difference(0.01, -0.01, 0.03, 3),
        "k-NN top-1": Difference(-0.02, -0.03, -0.01, 3),
        "probe mIoU": Difference(0.02, 0.01, 0.03, 3),
        "linear top-1": None,
    }
    unsure = "no difference shown (an interval includes 0) in"
    assert in_words(found, {}) == f"better in probe mIoU; {unsure} top-1; worse in k-NN top-1"
    over_images = {"probe mIoU": Interval(-0.01, 0.05), "k-NN top-1": Interval(-0.04, -0.01)}
    assert in_words(found, over_images) == f"{unsure} top-1, probe mIoU; worse in k-NN top-1"
    assert in_words({"top-1": paired_difference([0.1])}, {}) == "no interval with one seed in top-1"


def test_the_report_compares_seeds(commands, tmp_path):
    study = study_of("study_digits.yaml", seeds=[0, 1])
    for arm, seed in study.runs():
        for step in study.steps(arm, seed):
            value = 0.5 + 0.1 * seed + 0.2 * (arm == "locat")
            commands.metrics = {TRAIN: {"val/top1": value}, "knn": {"knn/top1_k20": 0.5, "measured": "k-NN"}}
            record = steps.record_of(tmp_path, arm, seed)
            steps.run_step(step, tmp_path / arm / f"seed_{seed}", {}, record)
    page = tmp_path / "page.md"
    write_report(page, study, steps.read_results(study, tmp_path), tmp_path, {}, "locat study")
    text = page.read_text()
    assert "| vit | 2 | 55.00 ± 7.07 | 50.00 ± 0.00 |" in text
    assert "| locat − vit | +20.00 [+20.00, +20.00] | +0.00 [+0.00, +0.00] |" in text
    assert "better in top-1" in text
    assert "(page_quality.png)" in text
    assert "kernels" not in text


def test_charts_have_points_where_they_belong():
    [axes] = points_figure({"a": [], "b": [(10, 1), (20, 3)]}, "x", "y").axes
    circles, dot = (points.get_offsets().tolist() for points in axes.collections)
    assert circles == [[10, 1], [20, 3]]
    assert dot == [[15, 2]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["b"]
    [axes] = lines_figure({"a": [1.0, 2.0]}, "block", "width", level=1.0).axes
    level, line = axes.lines
    assert set(level.get_ydata()) == {1.0}
    assert line.get_ydata().tolist() == [1.0, 2.0]
    assert axes.get_ylim()[0] == 0
    places = [
        Place(2, Difference(0.01, -0.02, 0.04, 3), Interval(0.0, 0.02)),
        Place(4, Difference(0.03, -inf, inf, 1), None),
    ]
    [axes] = differences_figure({"b − a": {"top-1": places}}).axes
    _, line = axes.lines
    assert line.get_xydata().tolist() == [[2, 1], [4, 3]]  # percentage points
    seeds, images = (band.get_paths()[0].get_extents() for band in axes.collections)
    assert (seeds.y0, seeds.y1, images.y0, images.y1) == (-2, 4, 0, 2)
