"""`locat export` as a user calls it, on every kind of weights."""

import json
from pathlib import Path

import pytest
import timm
import torch
import yaml

from locat.command import main
from locat_lightning import add_locat
from locat_lightning.backbones.flexible import make_flexible, use_patches

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
OWN = {"backbone": "locatvit_tiny", "backbone_args": SIZES}
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Files lie, and go, in an empty directory."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def backbone(seed=0, num_classes=0, name="locatvit_tiny"):
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=num_classes, **SIZES)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def beneath(prefix, model):
    return {f"{prefix}.{name}": value for name, value in model.state_dict().items()}


def of_run(checkpoint, **config):
    """A checkpoint in a run, which wrote down what it is."""
    run = Path("runs/mine/version_0")
    (run / "checkpoints").mkdir(parents=True)
    torch.save({"hyper_parameters": OWN} | checkpoint, run / "checkpoints" / "best.ckpt")
    data = {"root": str(Path("secret/pets").absolute()), "mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3]}
    model = {"class_path": "locat_lightning.tasks.Classification", "init_args": {"lr": 0.125}}
    record = {
        "model": model,
        "data": {"class_path": "locat_lightning.data.ImageData", "init_args": data | {"batch_size": 48}},
        "trainer": {"max_epochs": 7, "max_steps": -1},
        "weights": str(Path("secret/start.ckpt").absolute()),
        "ckpt_path": None,
    }
    (run / "config.yaml").write_text(yaml.safe_dump(record | config))
    (run / "metrics.json").write_text(json.dumps({"epochs": 7, "best val/top1": 0.87654321}))
    return str(run / "checkpoints" / "best.ckpt")


def export(weights, *options, to="out"):
    main(["export", "--weights", weights, "--to", to, *options])
    if Path(to, "config.json").is_file():
        return timm.create_model(f"local-dir:{to}", pretrained=True).eval()
    return None


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["export", *arguments])
    assert stopped.value.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("locat: error: ")]
    return line


def test_a_classification(capsys):
    model = backbone(num_classes=3)
    names = {"class_names": ["ant", "bee", "cat"]}
    weights = of_run(
        {
            "state_dict": beneath("backbone", model),
            "hyper_parameters": OWN | names,
            "class_counts": [200, 30, 3],
        }
    )
    assert torch.equal(export(weights)(IMAGES), model(IMAGES))
    assert (
        "a model with 3 classes -> out: README.md, config.json, model.safetensors" in capsys.readouterr().out
    )

    config = json.loads(Path("out/config.json").read_text())
    assert config["label_names"] == names["class_names"]
    assert config["class_counts"] == [200, 30, 3]
    assert config["pretrained_cfg"]["mean"] == [0.5, 0.4, 0.3]
    assert "license" not in config["pretrained_cfg"]  # timm's own weights of this name have one

    card = Path("out/README.md").read_text()
    for told in ("locatvit_tiny", "lr: 0.125", "max_epochs: 7", "batch_size: 48", "folder: pets"):
        assert told in card
    assert "best val/top1: 0.8765\n" in card
    assert "started from: start.ckpt" in card
    assert "arXiv:2603.04892" in card
    assert "secret" not in card
    assert "max_steps" not in card
    assert "pipeline_tag: image-classification" in card
    assert [path.name for path in Path().iterdir() if path.name.startswith(".")] == []


def test_patches_of_another_size():
    model = backbone(num_classes=3)
    weights = of_run({"state_dict": beneath("backbone", model)})
    flexible = timm.create_model("locatvit_tiny", num_classes=3, dynamic_img_size=True, **SIZES).eval()
    flexible.load_state_dict(model.state_dict())
    make_flexible(flexible, [4])
    use_patches(flexible, 4)
    exported = export(weights, "--backbone_args.patch_size", "4")
    torch.testing.assert_close(exported(IMAGES), flexible(IMAGES), rtol=1e-4, atol=1e-4)


def test_a_run_with_locat_in_another_model(capsys):
    torch.manual_seed(0)
    model = add_locat(timm.create_model("vit_tiny_patch16_224", num_classes=3, **SIZES), start="identity")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    own = {"backbone": "vit_tiny_patch16_224", "backbone_args": SIZES, "locat": {"start": "identity"}}
    weights = of_run({"state_dict": beneath("backbone", model), "hyper_parameters": own})
    assert torch.equal(export(weights)(IMAGES), model.eval()(IMAGES))
    assert "vit_tiny_patch16_224 with LocAt" in Path("out/README.md").read_text()


@pytest.mark.parametrize("network", ["teacher", "student"])
def test_a_dino_run_exports_its_teacher(network, capsys):
    networks = {"teacher": backbone(1), "student": backbone(2)}
    state = {k: v for name, model in networks.items() for k, v in beneath(f"{name}.backbone", model).items()}
    state |= {"teacher.head.last_layer.weight_g": torch.ones(4, 1)}
    options = ["--student"] if network == "student" else []
    exported = export(of_run({"state_dict": state}), *options)
    assert torch.equal(exported(IMAGES), networks[network](IMAGES))
    assert f"the {network}'s backbone" in capsys.readouterr().out
    assert "pipeline_tag: image-feature-extraction" in Path("out/README.md").read_text()


def test_a_segmentation_exports_its_backbone(capsys):
    model = backbone()
    state = beneath("backbone", model) | {"decoder.0.weight": torch.ones(3, 24, 1, 1)}
    assert torch.equal(export(of_run({"state_dict": state}))(IMAGES), model(IMAGES))
    assert "the backbone of a segmentation (its decoder stays behind)" in capsys.readouterr().out


def test_a_decoder_leads_to_its_frozen_backbone(capsys):
    model = backbone(num_classes=3)
    weights = of_run({"state_dict": beneath("backbone", model)})
    decoder = {"state_dict": {"decoder.0.weight": torch.ones(3, 24, 1, 1)}, "hyper_parameters": OWN}
    torch.save(decoder | {"decoder_of": {"weights": weights, "digest": ""}}, "decoder.ckpt")
    exported = export("decoder.ckpt")
    assert torch.equal(exported(IMAGES), model.forward_head(model.forward_features(IMAGES), True))
    assert "the frozen backbone of a segmentation" in capsys.readouterr().out
    assert "lr: 0.125" in Path("out/README.md").read_text()  # the run that trained it


def test_a_state_dict_and_a_folder_of_the_hub():
    model = backbone(num_classes=4, name="vit_tiny_patch16_224")
    torch.save(model.state_dict(), "a.pth")
    exported = export("a.pth", "--backbone", "vit_tiny_patch16_224", "--backbone_args", json.dumps(SIZES))
    assert torch.equal(exported(IMAGES), model(IMAGES))
    assert torch.equal(export("local-dir:out", to="again")(IMAGES), model(IMAGES))
    assert torch.equal(export("again", to="once_more")(IMAGES), model(IMAGES))
    assert "Recipe" not in Path("out/README.md").read_text()


@pytest.mark.filterwarnings("ignore:.torch.jit.load. is deprecated")
@pytest.mark.parametrize("form", ["torchscript", "export"])
def test_programs(form, capsys):
    model = backbone(num_classes=3)
    export(of_run({"state_dict": beneath("backbone", model)}), "--format", form)
    written = torch.jit.load("out/model.pt") if form == "torchscript" else None
    written = written or torch.export.load("out/model.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(written(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-4)
    assert "of the largest" in capsys.readouterr().out
    assert "[batch, 3, 32, 32]" in Path("out/README.md").read_text()


@pytest.mark.parametrize("name", ["m.onnx", "model.pt2", "m.safetensors"])
def test_a_file_s_name_is_no_folder(name, capsys):
    weights = of_run({"state_dict": beneath("backbone", backbone())})
    assert f"--to: {name} is the name of a file: give a folder" in refused(
        capsys, "--weights", weights, "--to", name
    )
    assert not Path(name).exists()


def test_a_folder_with_something_in_it_is_left_alone(capsys):
    weights = of_run({"state_dict": beneath("backbone", backbone())})
    Path("out").mkdir()
    Path("out/config.json").write_text("mine")
    Path("out/other").write_text("mine")
    assert "out is not empty: give another folder, or add --overwrite" in refused(
        capsys, "--weights", weights, "--to", "out"
    )
    assert Path("out/config.json").read_text() == "mine"
    export(weights, "--overwrite")
    assert Path("out/config.json").read_text() != "mine"
    assert Path("out/other").read_text() == "mine"
    assert "--to: out/other is a file" in refused(capsys, "--weights", weights, "--to", "out/other")


def test_nothing_is_left_of_an_export_that_differs(capsys, monkeypatch):
    weights = of_run({"state_dict": beneath("backbone", backbone())})
    monkeypatch.setattr("locat_lightning.backbones.formats._difference", lambda *_: 0.5)
    assert "differ from the model's" in refused(capsys, "--weights", weights, "--to", "new/out")
    assert [path.name for path in Path().iterdir()] == ["runs"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--weights", "nothing.ckpt", "--to", "out"], "--weights: no such file"),
        (["--weights", "a.pth", "--to", "out"], "add --backbone"),
        (["--weights", "a.pth"], "to"),
        (
            ["--weights", "a.pth", "--to", "out", "--format", "tf"],
            "--format: tf is none of timm, onnx, torchscript",
        ),
        (["--weights", "a.pth", "--to", "out", "--fromat", "timm"], "did you mean --format"),
        (["--weights", "text.pth", "--to", "out"], "text.pth"),
    ],
)
def test_a_mistake_is_one_line(arguments, expected, capsys):
    torch.save(backbone().state_dict(), "a.pth")
    Path("text.pth").write_text("just text")
    assert expected in refused(capsys, *arguments)
    assert not Path("out").exists()
