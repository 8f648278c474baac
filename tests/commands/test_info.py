"""`locat info` as a user calls it."""

import json
import math

import pytest
import timm
import torch

from locat.command import main
from locat_lightning.commands import info

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(info.cost, "images_per_second", lambda *_, **__: 12.25)


def numbers(capsys, *arguments):
    main(["info", *arguments, "--json"])
    return json.loads(capsys.readouterr().out)


def test_a_name(capsys):
    found = numbers(capsys, "locatvit_tiny", "--backbone_args", json.dumps(SIZES), "--device", "cpu")
    model = timm.create_model("locatvit_tiny", **SIZES)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["gaug_parameters"] == 2 * 3 * 13
    assert found["image_size"] == [3, 32, 32]
    assert found["grid"] == [4, 4]
    assert found["images_per_second"] == 12.25
    assert found["outlying_share"] is None
    assert found["kernels"] == []  # of a model without weights
    assert found["attention"] == "PyTorch, in chunks (not Triton: it needs an NVIDIA GPU)"


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("locatswin_tiny", "PyTorch, with all of S in memory (not Triton: logits have a bias)"),
        ("vit_tiny_patch16_224", None),
    ],
)
def test_attention_of_other_models(capsys, name, attention):
    assert numbers(capsys, name, "--device", "cpu")["attention"] == attention


def test_weights_of_a_run_have_kernels(capsys, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("locatvit_tiny", num_classes=3, **SIZES)
    for block, width in zip(model.blocks, (1.5, 2.0), strict=True):
        gaug, largest = block.attn.gaug, 16  # 4², of a grid of 4 × 4
        torch.nn.init.zeros_(gaug.log_var.weight)
        torch.nn.init.constant_(
            gaug.log_var.bias, math.log(width**2 / (largest - width**2)) + math.log(largest - 1)
        )
    state = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    own = {"backbone": "locatvit_tiny", "backbone_args": SIZES}
    torch.save({"state_dict": state, "hyper_parameters": own}, tmp_path / "best.ckpt")

    found = numbers(capsys, str(tmp_path / "best.ckpt"))
    assert [kernel["width"] for kernel in found["kernels"]] == pytest.approx([1.5, 2.0], abs=1e-3)
    assert found["outlying_share"] == 0
    assert found["parameters"] == sum(p.numel() for p in model.parameters())  # with its classifier

    main(["info", str(tmp_path / "best.ckpt")])
    out = capsys.readouterr().out
    assert f"{found['parameters']:,} (GAug: 78)" in out
    assert "4 × 4" in out
    assert "12.2 images/s" in out
    assert "2.00" in out
    assert "0.00% of the patches of two photographs" in out


@pytest.mark.parametrize(
    ("name", "arguments", "grid"),
    [
        ("swin_tiny_patch4_window7_224", {"img_size": 56, "embed_dim": 24, "depths": [1, 1]}, [7, 7]),
        ("resnet10t", {"in_chans": 1}, [6, 6]),
    ],
)
def test_any_model_of_timm_s(capsys, name, arguments, grid):
    if "swin" in name:
        arguments = arguments | {"num_heads": [1, 2]}
    found = numbers(capsys, name, "--backbone_args", json.dumps(arguments))
    assert found["architecture"] == name
    assert found["grid"] == grid
    assert found["gaug_parameters"] == 0
    assert found["multiply_adds"] > 0
    assert found["activation_bytes"] > 0


def test_photographs_are_as_a_model_takes_its_images():
    for channels in (1, 3):
        model = timm.create_model("locatvit_tiny", in_chans=channels, **SIZES)
        images = info._photographs(model, (channels, 32, 32))
        assert images.shape == (2, channels, 32, 32)
        assert images.abs().max() < 3
        assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "the following arguments are required: model"),
        (["nothing.ckpt"], "no such file"),
        (["locatvit_tiny", "--device", "tpu9"], "--device tpu9: "),
        (["text.pth"], "text.pth cannot be read"),
        (["locatvit_tiny", "--jsn"], "--jsn: there is no such option; did you mean --json"),
        (["locatvit_tiny", "--backbone_args", "{depht: 2}"], "model.backbone_args do not fit locatvit_tiny"),
    ],
)
def test_a_mistake_is_one_line(arguments, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pth").write_text("junk")
    with pytest.raises(SystemExit) as stopped:
        main(["info", *arguments])
    assert stopped.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert expected in line
