"""`locat study`: the whole of it on generated images, cut off twice and taken up again; its statistics."""

import dataclasses
import json
import logging
import os
import signal
import statistics
import subprocess
import sys
import tarfile
from math import inf, isnan, sqrt
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image, ImageColor
from scipy.stats import t as student

from locat import configs
from locat_lightning.commands.study import command, results
from locat_lightning.commands.study.charts import Point, colours_of, draw_lines, draw_points
from locat_lightning.commands.study.command import _claim
from locat_lightning.commands.study.folders import some_of_each_class, unpacked
from locat_lightning.commands.study.plan import MEASURES, TRAIN, Step, Study
from locat_lightning.commands.study.report import differences_to, in_words
from locat_lightning.commands.study.statistics import (
    T_QUANTILES,
    Difference,
    mean_and_deviation,
    paired_difference,
)
from locat_lightning.errors import InputError

BACKBONE = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
EPOCHS = 4
CLASSES = ["sky", "road", "car"]
DEFAULTS = {"gaug": True, "prr": True, "global_pool": "token"}


@pytest.fixture(scope="module")
def shipped():
    return yaml.safe_load((configs.config_directory() / "study_cifar.yaml").read_text())


@pytest.fixture
def config(shipped, tmp_path):
    """The shipped study with small models, few steps, two arms and two seeds."""
    tiny = {f"model.backbone_args.{name}": value for name, value in BACKBONE.items()}
    cpu = {"data.num_workers": 0, "trainer.accelerator": "cpu", "trainer.log_every_n_steps": 1}
    steps = {"trainer.max_steps": 2, "trainer.val_check_interval": 2, "data.batch_size": 3}
    probe = {"data.num_workers": 0, "accelerator": "cpu"}
    options = {
        "supervised": tiny
        | cpu
        | {"trainer.max_epochs": EPOCHS, "model.warmup_epochs": 0, "data.batch_size": 6}
        | {"trainer.callbacks+": "test_study.Halt"},
        "knn": probe,
        "linear": probe | {"epochs": 2},
        "digits_retrieve": probe | {"image_size": 32, "memory_size": 50},
        "digits": cpu | steps | {"trainer.limit_val_batches": 1, "data.eval_batch_size": 4},
        "masks": cpu | steps | {"data.classes": CLASSES, "data.scale": [48, 40], "data.crop_size": 32},
        "retrieve": probe | {"data.classes": CLASSES, "image_size": 32, "memory_size": 50},
    }
    preset = {"arms": ["vit", "locat"], "seeds": [0, 1], "images_per_class": 4, "options": options}
    file = tmp_path / "study_tiny.yaml"
    file.write_text(yaml.safe_dump(shipped | {"presets": {"cpu": preset}}))
    return file


class Halt(Callback):
    """Writes down each epoch that begins, and sends a signal at the one that the environment names."""

    def on_train_epoch_start(self, trainer, module):
        arm, seed = Path(trainer.default_root_dir).parts[-4:-2]
        here = f"{arm}/{seed}/{trainer.current_epoch}"
        with Path(os.environ["TEST_EPOCHS"]).open("a") as file:
            print(here, file=file)
        if os.environ.get("TEST_HALT") == here:
            os.kill(os.getpid(), int(os.environ["TEST_SIGNAL"]))


@pytest.fixture
def study(config, folder, scenes, tmp_path):
    """Runs the study in a process of its own, up to a signal at an epoch if one is named."""
    with tarfile.open(tmp_path / "animals.tar", "w") as archive:
        archive.add(folder, arcname="animals")

    def run(halt="", by=0):
        own = {"TEST_EPOCHS": str(tmp_path / "epochs.txt"), "TEST_HALT": halt, "TEST_SIGNAL": str(int(by))}
        paths = {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "locat", "study", "--config", str(config), "--to", "all"]
        places = ["--images", "animals.tar", "--masks", str(scenes("folder")), "--report", "docs/page.md"]
        return subprocess.run(
            [*command, *places],
            cwd=tmp_path,
            env=os.environ | own | paths,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


@pytest.mark.slow
def test_a_study_that_is_cut_off_goes_on_and_does_nothing_twice(study, tmp_path):
    page, runs = tmp_path / "docs" / "page.md", tmp_path / "all"
    killed = study("vit/seed_0/2", signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not page.exists()
    assert not (runs / "vit/seed_0/result.json").exists()

    told = study("locat/seed_0/2", signal.SIGTERM)
    assert told.returncode == 128 + signal.SIGTERM, told.stderr
    assert told.stderr.endswith("cut off; the same command goes on\n")
    assert "Missing: locat (seed 0), vit (seed 1), locat (seed 1)." in page.read_text()
    assert "## Difference" not in page.read_text()
    first = runs / "vit/seed_0/result.json"
    finished = first.stat().st_mtime_ns

    done = study()
    assert done.returncode == 0, done.stderr
    assert first.stat().st_mtime_ns == finished
    epochs = (tmp_path / "epochs.txt").read_text().split()
    # The killed run begins its third epoch again; the one that was told to stop goes on within it.
    begun = {"vit/seed_0": [0, 1, 2, 2, 3]} | dict.fromkeys(
        ("locat/seed_0", "vit/seed_1", "locat/seed_1"), range(EPOCHS)
    )
    assert epochs == [f"{run}/{epoch}" for run, of_run in begun.items() for epoch in of_run]

    text = page.read_text()
    assert "Missing" not in text
    assert "--preset cpu --images animals.tar --masks folder`" in text
    assert (
        "- **vit**: supervised, `gaug: false`, `prr: false`.\n- **locat**: supervised, the recipe unchanged."
        in text
    )
    commands = text.partition("## Commands")[2]
    assert "- train: `locat fit --config=" in commands
    assert "'--data.scale=[0.5, 1.0]'" in commands
    assert "'--weights={train}' --name=knn` (k-NN: " in commands
    assert "'--weights={masks}' --name=predictions`" in commands
    results = json.loads(page.with_suffix(".json").read_text())["results"]
    assert [(each["arm"], each["seed"]) for each in results] == [
        ("vit", 0),
        ("locat", 0),
        ("vit", 1),
        ("locat", 1),
    ]
    for result in results:
        assert result["measures"].keys() == MEASURES.keys()
        assert all(0 <= value <= 1 for value in result["measures"].values())
        assert result["seconds_per_step"] > 0
        assert len(result["kernel_widths"]) == (BACKBONE["depth"] if result["arm"] == "locat" else 0)
        assert str(tmp_path) not in json.dumps(result)
    vit, locat_ = (next(each for each in results if each["arm"] == arm) for arm in ("vit", "locat"))
    # Per block and head dimension d: 3 (d + 1).
    d = BACKBONE["embed_dim"] // BACKBONE["num_heads"]
    assert locat_["parameters"] - vit["parameters"] == BACKBONE["depth"] * 3 * (d + 1)
    top1 = [each["measures"]["top1"] for each in results if each["arm"] == "vit"]
    deviation = statistics.stdev(top1)
    assert f"| vit | 2 | {50 * sum(top1):.2f} ± {100 * deviation:.2f} |" in text
    for name in ("quality", "kernels", "features", "predictions"):
        assert f"(page_{name}.png)" in text
        with Image.open(tmp_path / "docs" / f"page_{name}.png") as picture:
            assert min(picture.size) > 100


def test_what_cannot_be_resumed_is_done_again(config, folder, scenes, tmp_path, monkeypatch):
    """A checkpoint that nobody can read does not stop a study for good."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results.locat, "main", commands := Commands())
    broken = tmp_path / "arm" / TRAIN / "version_3" / "checkpoints" / "last.ckpt"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"half a checkpoint")
    step = Step(TRAIN, "fit", {"data.root": "{images}", "trainer.max_epochs": 3})
    results._take(step, tmp_path / "arm", {"images": "here"})
    first, second = commands.given
    assert "--ckpt_path=last" in first
    assert "--ckpt_path=last" not in second
    assert {"--data.root=here", "--trainer.max_epochs=3"} <= {*first} & {*second}
    assert not broken.exists()
    assert json.loads((tmp_path / "arm" / f"{TRAIN}.json").read_text())["metrics"] == {"val/top1": 0.5}


class Commands:
    """Stands for `locat`: refuses to go on, and else leaves a result."""

    def __init__(self):
        self.given = []

    def __call__(self, arguments):
        self.given.append(arguments)
        if "--ckpt_path=last" in arguments:
            print("locat: error: cannot be read", file=sys.stderr)
            sys.exit(2)
        file = Path("arm") / TRAIN / "version_0" / "metrics.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"val/top1": 0.5}))


def test_a_command_that_refuses_is_quoted(tmp_path, monkeypatch):
    def refuse(arguments):
        print("locat: error: no such thing", file=sys.stderr)
        sys.exit(2)

    monkeypatch.setattr(results.locat, "main", refuse)
    with pytest.raises(InputError, match=r"locat knn: no such thing \(see .*knn\.log\)"):
        results._take(Step("knn", "knn", {}), tmp_path, {})
    assert not (tmp_path / "knn.json").exists()


def test_every_arm_differs_from_the_first_in_nothing_but_its_options(shipped):
    for preset in shipped["presets"]:
        study = Study.of(shipped, preset)
        assert len(study.seeds) >= 3
        for arm in study.arms:
            base = study.base_of(arm)
            for seed in study.seeds:
                for step, other in zip(study.steps(arm, seed), study.steps(base, seed), strict=True):
                    own = study.arms[arm] | study.arms[base] if step.name == TRAIN else {}
                    differing = {
                        option
                        for option in step.options.keys() | other.options.keys()
                        if step.options.get(option) != other.options.get(option)
                    }
                    assert differing <= own.keys()
                    if step.command == "fit":
                        assert step.options["seed_everything"] == step.options["data.seed"] == seed


def test_the_arms_are_those_of_the_paper(shipped):
    study = Study.of(shipped, "cpu")
    parts = {
        arm: tuple(options.get(f"model.backbone_args.{name}", default) for name, default in DEFAULTS.items())
        for arm, options in study.arms.items()
    }
    assert parts == {
        "vit": (False, False, "token"),
        "gaug": (True, False, "token"),
        "prr": (False, True, "token"),
        "locat": (True, True, "token"),
        "gap": (False, False, "avg"),
    }
    assert {study.base_of(arm) for arm in study.arms} == {"vit"}
    assert Study.of(shipped, "gpu").base_of("dino_locat") == "dino_vit"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"presets": {"cpu": {"arms": ["vitt"]}}}, "arms: there is no 'vitt' .*did you mean vit"),
        ({"presets": {"gpu": {}}}, "preset: there is no 'cpu' among gpu"),
        ({"presets": {"cpu": {"seed": [0]}}}, "presets.cpu has no seed"),
        ({"presets": {"cpu": {"options": {"nothing": {}}}}}, "there is no 'nothing'"),
        ({"probes": {"segment": {}}}, "probes: there is no 'segment' among knn"),
        ({"arms": {"vit": {}}, "presets": {"cpu": {}}}, "arms.vit: recipe is missing"),
        ({"arms": {"vit": {"recipe": "none"}}, "presets": {"cpu": {}}}, "recipe: there is no 'none'"),
    ],
)
def test_a_mistake_in_the_config_is_told(shipped, change, message):
    with pytest.raises(InputError, match=message):
        Study.of(shipped | change, "cpu")


def test_results_of_another_study_are_not_mixed_in(config, folder, scenes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    places = ["--images", str(folder), "--masks", str(scenes("folder"))]
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "study.json").write_text(json.dumps({"preset": "cpu", "seeds": [7]}))
    with pytest.raises(SystemExit) as stopped:
        command.main(["study", "--config", str(config), "--preset", "cpu", "--to", "all", *places])
    assert stopped.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("locat: error: all has the results of another study (seeds, ")


def test_messages_of_a_step_that_is_taken_up_go_to_its_log(config, tmp_path, monkeypatch, capsys):
    def measure(study, arm, seed, directory, folders):
        with results.said_in(tmp_path / "step.log"):
            rank_zero_info("78 of the model's 78 tensors matched")
        return False

    for name in ("lightning.pytorch", "lightning.fabric"):  # as outside of tests
        monkeypatch.setattr(logging.getLogger(name), "propagate", False)
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
    monkeypatch.setattr(command, "measure_arm", measure)
    monkeypatch.setattr(command, "write_report", lambda *_: None)
    monkeypatch.setattr(command, "some_of_each_class", lambda root, count, to: root)
    places = [f"--{name}={tmp_path}" for name in ("images", "masks", "to")]
    command.main(["study", "--config", str(config), "--preset", "cpu", *places])
    assert "matched" not in "".join(capsys.readouterr())
    assert "78 of the model's 78 tensors matched" in (tmp_path / "step.log").read_text()


def test_results_of_other_images_are_not_mixed_in(shipped, tmp_path):
    study = Study.of(shipped, "cpu")
    _claim(tmp_path, study, {"images": "cifar10.tar.gz", "masks": "camvid.tar"})
    _claim(tmp_path, study, {"images": "cifar10.tar.gz", "masks": "camvid.tar"})
    with pytest.raises(InputError, match=r"of another study \(images differ\)"):
        _claim(tmp_path, study, {"images": "animals", "masks": "camvid.tar"})


def test_seeds_arms_and_probes_can_be_added(shipped, tmp_path):
    data = {"images": "cifar10.tar.gz", "masks": "camvid.tar"}
    full = Study.of(shipped, "cpu")
    less = {group: dict(list(getattr(full, group).items())[:2]) for group in ("arms", "recipe_of", "probes")}
    fewer = dataclasses.replace(full, seeds=full.seeds[:1], **less)
    for study in (fewer, full):
        _claim(tmp_path, study, data)
    with pytest.raises(InputError, match=r"another study \(seeds, arms, recipe_of, probes differ\)"):
        _claim(tmp_path, fewer, data)
    other = dataclasses.replace(full, probes=full.probes | {"knn": {"k": 5}})
    with pytest.raises(InputError, match=r"another study \(probes differ\)"):
        _claim(tmp_path, other, data)


def test_of_a_finished_arm_only_an_added_probe_is_done(shipped, tmp_path, monkeypatch):
    study = Study.of(shipped, "cpu")
    taken = []

    def take(step, directory, folders):
        if not (note := directory / f"{step.name}.json").is_file():
            taken.append(step.name)
            metrics = {each.metric: 0.5 for each in MEASURES.values()}
            results.write_atomically(note, {"metrics": metrics, "seconds": 1, "peak_gpu_memory_bytes": None})

    monkeypatch.setattr(results, "_take", take)
    monkeypatch.setattr(results, "_cost", lambda directory: {})
    monkeypatch.setattr(results, "_kernel_widths", lambda directory: [])
    fewer = dataclasses.replace(study, probes={"knn": study.probes["knn"]})
    arm = tmp_path / "vit" / "seed_1"
    assert results.measure_arm(fewer, "vit", 1, arm, {})
    assert not results.measure_arm(fewer, "vit", 1, arm, {})
    assert taken == [TRAIN, "knn"]
    assert results.measure_arm(study, "vit", 1, arm, {})
    assert taken == [TRAIN, "knn", *(name for name in study.probes if name != "knn")]
    assert json.loads((arm / "result.json").read_text())["measures"].keys() == MEASURES.keys()
    assert not results.measure_arm(study, "vit", 1, arm, {})


def test_links_to_some_images_of_each_class_are_made_once(folder, tmp_path):
    some = some_of_each_class(folder, 4, tmp_path / "some")
    chosen = {path.name: sorted(each.name for each in path.iterdir()) for path in (some / "train").iterdir()}
    assert {name: len(files) for name, files in chosen.items()} == {"ant": 4, "bee": 4, "cat": 4}
    assert (some / "val").resolve() == folder / "val"
    again = some_of_each_class(folder, 4, tmp_path / "again")
    assert chosen == {p.name: sorted(each.name for each in p.iterdir()) for p in (again / "train").iterdir()}
    assert len(list((some_of_each_class(folder, 99, tmp_path / "all") / "train" / "ant").iterdir())) == 6


def test_neither_folder_nor_archive(tmp_path):
    with pytest.raises(InputError, match=r"--masks: no such folder or archive: .*nowhere"):
        unpacked(tmp_path / "nowhere", tmp_path, "--masks")
    (tmp_path / "text").write_text("no archive")
    with pytest.raises(InputError, match=r"--images: .*text is neither a folder nor a \.tar"):
        unpacked(tmp_path / "text", tmp_path, "--images")


def test_paired_difference_by_hand():
    # Mean 2, deviation 1, so the interval is 2 ± 4.3027 / √3.
    found = paired_difference([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert found.low == pytest.approx(2 - 2.48417, abs=1e-4)
    assert found.high == pytest.approx(2 + 2.48417, abs=1e-4)
    assert found.pairs == 3
    assert paired_difference([0.5]) == (0.5, -inf, inf, 1)
    assert mean_and_deviation([1.0, 3.0]) == (2, pytest.approx(sqrt(2)))
    assert isnan(mean_and_deviation([1.0])[1])


def test_quantiles_are_students():
    freedom = range(1, len(T_QUANTILES) + 1)
    assert list(T_QUANTILES) == pytest.approx([student.ppf(0.975, n) for n in freedom], abs=5e-5)


def result(arm, seed, **measures):
    return {"arm": arm, "seed": seed, "measures": measures}


def test_differences_are_of_runs_of_one_seed():
    results = [
        *(result("vit", seed, top1=value) for seed, value in enumerate((0.5, 0.6, 0.7))),
        *(result("locat", seed, top1=value) for seed, value in ((2, 0.75), (0, 0.6), (3, 0.9))),
        result("dino", 0, top1=None),
    ]
    found = differences_to("vit", "locat", "top1", results)  # 0.1 and 0.05 of seeds 0 and 2
    assert found.pairs == 2
    assert found.mean == pytest.approx(0.075)
    half = 12.7062 * (0.05 / sqrt(2)) / sqrt(2)
    assert (found.low, found.high) == pytest.approx((0.075 - half, 0.075 + half))
    assert differences_to("vit", "dino", "top1", results) is None
    assert differences_to("vit", "locat", "knn", results) is None


def test_words_say_where_nothing_is_shown():
    found = {
        "top1": Difference(0.01, -0.01, 0.03, 3),
        "knn": Difference(-0.02, -0.03, -0.01, 3),
        "masks": Difference(0.02, 0.01, 0.03, 3),
        "linear": None,
    }
    assert in_words(found) == (
        "better in probe mIoU; no difference shown (the interval includes 0) in top-1; worse in k-NN top-1"
    )
    assert in_words({"top1": paired_difference([0.1])}) == "no interval with one seed in top-1"


def test_charts_have_points_where_they_belong():
    colours = colours_of("ab")
    image = draw_points({"b": [Point(10, 1)], "a": [Point(0, 0)]}, "x", "y", colours=colours)
    left, right = (place_of(image, colours[arm]) for arm in "ab")
    assert left[0] < right[0]
    assert left[1] > right[1]  # pixels count downwards
    assert draw_lines({"a": [1.0]}, "block", "width", colours=colours, level=1.0).size == image.size


def place_of(image, colour):
    """The middle of a colour's pixels left of the key."""
    rgb = ImageColor.getrgb(colour)
    at = [
        (x, y) for x in range(image.width - 190) for y in range(image.height) if image.getpixel((x, y)) == rgb
    ]
    return tuple(sum(each) / len(at) for each in zip(*at, strict=True))


@pytest.mark.slow
def test_arms_of_dino_are_probed_without_a_top1(shipped, folder, scenes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = {f"model.backbone_args.{name}": value for name, value in BACKBONE.items()}
    heads = {"model.out_dim": 64, "model.hidden_dim": 32, "model.bottleneck_dim": 16}
    short = {
        "trainer.max_epochs": 1,
        "model.warmup_epochs": 0,
        "data.batch_size": 6,
        "data.views.local_views": 1,
    }
    run = {"data.num_workers": 0, "trainer.accelerator": "cpu", "trainer.log_every_n_steps": 1}
    options = {"dino": tiny | heads | short | run, "knn": {"data.num_workers": 0, "accelerator": "cpu"}}
    preset = {"arms": ["dino_vit", "dino_locat"], "seeds": [0], "options": options}
    study = shipped | {"probes": {"knn": shipped["probes"]["knn"]}, "presets": {"small": preset}}
    Path("study.yaml").write_text(yaml.safe_dump(study))
    own = ["--config", "study.yaml", "--preset", "small", "--images", str(folder)]
    command.main(["study", *own])
    page = Path("runs/study_small/results.md").read_text()
    found = json.loads(Path("runs/study_small/results.json").read_text())["results"]
    assert [each["measures"].keys() for each in found] == [{"top1", "knn"}] * 2
    assert all(each["measures"]["top1"] is None for each in found)
    assert "| arm | seeds | k-NN top-1 |" in page
    assert "**dino_locat** beside dino_vit: no interval with one seed in k-NN top-1" in page
