"""`locat average` as a user calls it."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file

from locat.command import main
from locat_lightning.backbones.create import load_backbone
from locat_lightning.data import ImageData
from tests.conftest import write_images

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
CLASSES = ["ant", "bee", "cat"]


@pytest.fixture(autouse=True)
def here(workplace):
    """Files lie, and go, in an empty directory."""


def model(seed, near=None, num_classes=3):
    torch.manual_seed(seed)
    made = timm.create_model("locatvit_tiny", num_classes=num_classes, **SIZES)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            own = 0.3 * torch.randn_like(parameter)
            parameter.copy_(own if near is None else near.get_parameter(name) + 0.2 * own)
    return made.eval()


def run(name, of, *, classes=CLASSES, mean=(0.5, 0.5, 0.5), counts=(200, 30, 3), **data):
    """A run of a classification, which wrote down what it is."""
    directory = Path("runs") / name / "version_0"
    (directory / "checkpoints").mkdir(parents=True)
    own = {"backbone": "locatvit_tiny", "backbone_args": SIZES, "class_names": classes}
    state = {f"backbone.{key}": value for key, value in of.state_dict().items()}
    contents = {"hyper_parameters": own, "state_dict": state, "class_counts": list(counts)}
    torch.save(contents, directory / "checkpoints" / "best.ckpt")
    images = {"img_size": 32, "mean": list(mean), "std": [0.2, 0.2, 0.2], "crop_pct": 1.0, "num_workers": 0}
    options = {"backbone": "locatvit_tiny", "backbone_args": SIZES}
    record = {
        "trainer": {},
        "weights": None,
        "ckpt_path": None,
        "model": {"class_path": "locat_lightning.tasks.Classification", "init_args": options},
        "data": {"class_path": "locat_lightning.data.ImageData", "init_args": images | data},
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(record))
    return str(directory)


def average(*arguments):
    main(["average", *arguments, "--to", "soup"])
    return json.loads(Path("soup/metrics.json").read_text())


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["average", *arguments])
    assert stopped.value.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("locat: error: ")]
    return line.removeprefix("locat: error: ")


def test_the_mean_of_runs_is_a_model_that_every_command_takes(capsys):
    first = model(0)
    models = [first, model(1, near=first), model(2, near=first)]
    runs = [run(f"r{i}", each, counts=(i, 2, 3)) for i, each in enumerate(models)]
    record = average(*runs)
    written = load_file("soup/model.safetensors")
    for name in first.state_dict():
        own = [each.state_dict()[name].double().numpy() for each in models]
        np.testing.assert_array_equal(written[name].numpy(), np.mean(own, 0).astype(np.float32))
    config = json.loads(Path("soup/config.json").read_text())
    assert config["label_names"] == CLASSES
    assert "class_counts" not in config  # of which each run had others
    assert config["pretrained_cfg"]["mean"] == [0.5, 0.5, 0.5]
    assert config["pretrained_cfg"]["crop_pct"] == 1.0
    assert [each["weights"] for each in record["ingredients"]] == [f"{r}/checkpoints/best.ckpt" for r in runs]
    assert len({each["digest"] for each in record["ingredients"]} | {record["digest"]}) == 4
    assert all(each["kept"] for each in record["ingredients"])
    assert "the mean of the weights of 3 models (uniform) -> soup: README.md, " in capsys.readouterr().out
    assert "tmp" not in Path("soup/README.md").read_text()
    loaded = load_backbone("local-dir:soup", classifier=True)
    torch.testing.assert_close(loaded.state_dict(), written, rtol=0, atol=0)


def test_runs_files_and_folders_mix(capsys):
    first = model(0, num_classes=0)
    second = model(1, near=first, num_classes=0)
    torch.save(second.state_dict(), "plain.pth")
    timm.models.save_for_hf(first, "folder", safe_serialization=True)
    options = ["--backbone", "locatvit_tiny", "--backbone_args", json.dumps(SIZES)]
    record = average("folder", "plain.pth", *options)
    expected = (first.state_dict()["norm.weight"] + second.state_dict()["norm.weight"]) / 2
    torch.testing.assert_close(load_file("soup/model.safetensors")["norm.weight"], expected)
    assert record["recipe"] == "uniform"


def test_greedy_measures_as_validate_does(tmp_path, capsys):
    images = str(write_images(tmp_path / "images"))
    first = model(0)
    models = [first, *(model(seed, near=first) for seed in (1, 2))]
    runs = [run(f"r{i}", each, root=images) for i, each in enumerate(models)]
    record = average(*runs, "--recipe", "greedy")
    shown = capsys.readouterr().out
    assert "soup with it" in shown

    data = ImageData(root=images, img_size=32, mean=(0.5,) * 3, std=(0.2,) * 3, crop_pct=1.0, num_workers=0)
    data.setup("validate")
    for each, own in zip(models, record["ingredients"], strict=True):
        found = [each(batch.images).argmax(-1) == batch.labels for batch in data.eval_dataloader("val")]
        assert own["val/top1"] == pytest.approx(torch.cat(found).float().mean().item(), abs=1e-6)

    options = ["--data.root", images, "--data.num_workers", "0", "--trainer.accelerator", "cpu"]
    main(["validate", "--weights", "soup", *options, "--trainer.enable_progress_bar", "false"])
    [file] = Path("runs").glob("*validate/version_*/metrics.json")
    validated = json.loads(file.read_text())
    assert record["val/top1"] == pytest.approx(validated["val/top1"], abs=1e-6)
    assert {"val/balanced", "val/many", "val/medium", "val/few"} <= validated.keys()
    assert json.loads(Path("soup/config.json").read_text())["class_counts"] == [200, 30, 3]
    assert record["val/top1"] >= record["best ingredient val/top1"]
    assert record["best ingredient val/top1"] == max(each["val/top1"] for each in record["ingredients"])

    Path("greedy.yaml").write_text("recipe: greedy\n")  # where the run brings its images, too
    assert average(*runs, "--config", "greedy.yaml", "--overwrite") == record


def test_averaged_statistics_of_batch_norm_are_warned_of():
    torch.save(timm.create_model("resnet10t", num_classes=0).state_dict(), "a.pth")
    with pytest.warns(UserWarning, match="the statistics of BatchNorm are averaged as well"):
        average("a.pth", "a.pth", "--backbone", "resnet10t")


def test_models_of_different_starts_are_warned_of():
    first, other = model(0), model(1)
    with pytest.warns(UserWarning, match="have little in common .cosine of their weights "):
        record = average(run("a", first), run("b", other))
    assert abs(record["ingredients"][1]["similarity"]) < 0.2


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (
            {"of": model(1, num_classes=4), "classes": [*CLASSES, "dog"]},
            "it has head.weight of shape [4, 24]",
        ),
        ({"of": model(1, near=model(0)), "classes": ["ant", "cat", "bee"]}, "its class cat is bee there"),
        (
            {"of": model(1, near=model(0)), "mean": (0.1, 0.2, 0.3)},
            "its images have another mean, [0.1, 0.2, 0.3], not [0.5",
        ),
    ],
    ids=["shapes", "classes", "images"],
)
def test_what_does_not_fit_is_named(other, expected, capsys):
    a, b = run("a", model(0)), run("b", **other)
    assert expected in (line := refused(capsys, a, b, "--to", "soup"))
    assert f"{b}/checkpoints/best.ckpt cannot be averaged with {a}/checkpoints/best.ckpt: " in line
    assert not Path("soup").exists()


def test_other_mistakes(tmp_path, capsys):
    a, b = run("a", model(0)), run("b", model(1, num_classes=0), classes=None)
    assert "needs two models or more before its options, not 1" in refused(capsys, a, "--to", "soup")
    assert "no such file" in refused(capsys, a, "nowhere.ckpt", "--to", "soup")
    Path(run("c", model(0)), "checkpoints", "best.ckpt").unlink()
    expected = "runs/c/version_0 has no checkpoints/best.ckpt: give the checkpoint itself"
    assert expected in refused(capsys, a, "runs/c/version_0", "--to", "soup")
    assert "runs/c has no checkpoints/best.ckpt" in refused(capsys, a, "runs/c", "--to", "soup")
    assert "random weights have nothing in common" in refused(capsys, a, "random", "--to", "soup")
    images = str(write_images(tmp_path / "images"))
    line = refused(capsys, b, b, "--recipe", "greedy", "--data.root", images, "--to", "soup")
    assert "has no classifier, and the data have 3 classes" in line
    assert "give a folder" in refused(capsys, a, a, "--to", "soup.safetensors")
