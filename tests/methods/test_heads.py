"""Projection heads out of checkpoints: of own runs, and by the names and shapes of DINO, iBOT and DINOv2."""

import pytest
import timm
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from locat_lightning.backbones.create import load_backbone
from locat_lightning.errors import InputError
from tests.methods.runs import BACKBONE, fit, random_batch, same, small, trainer

PLAIN = {"gaug": False, "prr": False}


@pytest.mark.parametrize("name", ["Dino", "Ibot", "Dinov2"])
def test_a_pre_training_goes_on_from_a_checkpoint_of_its_own(name, tmp_path):
    options = {} if name == "Dino" else {"shared_head": False, "patch_out_dim": 24}
    first = small(name, **options)
    fit(first, [random_batch(3, seed) for seed in range(3)], ModelCheckpoint(tmp_path, save_last=True))
    task = small(name, seed=1, weights=str(tmp_path / "last.ckpt"), heads=True, **options)
    for network in (task.student, task.teacher):
        assert same(network.state_dict(), first.teacher.state_dict())
    centres = {k: v for k, v in first.named_buffers() if k.endswith(".center")}
    assert centres
    assert all(v.any() and torch.equal(task.state_dict()[k], v) for k, v in centres.items())
    without = small(name, seed=1, weights=str(tmp_path / "last.ckpt"), **options)
    assert not same(without.teacher.head.state_dict(), first.teacher.head.state_dict())


def published(kind):
    """A teacher's checkpoint with the names that the original code gives, and the task that made it."""
    options = {"backbone_args": PLAIN, "norm_last_layer": False}
    if kind == "dino":
        options |= {"name": "Dino"}
    elif kind == "ibot":
        options |= {"name": "Ibot"}
    elif kind == "ibot_two_last_layers":
        options |= {"name": "Ibot", "shared_head": False}
    else:
        options |= {"name": "Dinov2", "shared_head": False, "patch_out_dim": 24, "bottleneck_dim": 12}
        options |= {"patch_bottleneck_dim": 16}
    task, state = small(**options), {}
    if kind == "ibot_two_last_layers":  # one body with two last layers
        task.teacher.patch_head.layers.load_state_dict(task.teacher.head.layers.state_dict())
    for name, value in task.teacher.state_dict().items():
        theirs = name.replace(".layers.", ".mlp.")
        if kind == "dinov2":
            theirs = theirs.replace("patch_head.", "ibot_head.")
            theirs = "dino_" + theirs if theirs.startswith("head.") else theirs
            theirs = "backbone.mask_token" if name == "mask_token.token" else theirs
            theirs = theirs.replace("backbone.blocks.", "backbone.blocks.0.")  # in chunks, as trained
        elif theirs.startswith("patch_head.mlp."):
            continue
        else:
            theirs = theirs.replace("patch_head.last_layer", "head.last_layer2")
            theirs = "backbone.masked_embed" if name == "mask_token.token" else theirs
        state[theirs] = value + 0.01
    student = {f"module.{name}": value - 1 for name, value in state.items()}
    return task, options, {"student": student, "teacher": state, "epoch": 3}


@pytest.mark.parametrize("kind", ["dino", "ibot", "ibot_two_last_layers", "dinov2"])
def test_a_pre_training_goes_on_from_a_published_checkpoint(kind, tmp_path):
    task, options, checkpoint = published(kind)
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    expected = {name: value + 0.01 for name, value in task.teacher.state_dict().items()}
    found = small(**options, seed=1, weights=str(tmp_path / "checkpoint.pth"), heads=True)
    assert same(found.student.state_dict(), expected)
    assert same(found.teacher.state_dict(), expected)
    backbone = load_backbone(
        str(tmp_path / "checkpoint.pth"), "locatvit_tiny", BACKBONE | PLAIN, network="student"
    )
    own = {name.removeprefix("backbone."): value for name, value in expected.items()}
    assert all(torch.allclose(value, own[name] - 1) for name, value in backbone.state_dict().items())


@pytest.mark.parametrize("registers", [0, 4])
def test_the_backbone_of_dinov2_loads_as_it_is_published(registers, tmp_path):
    """Their names: register_tokens, mask_token, ls1.gamma; [CLS] has a position of its own."""
    arguments = BACKBONE | {"patch_size": 14, "img_size": 56, "init_values": 1e-5}
    if registers:
        arguments |= {"reg_tokens": registers, "no_embed_class": True}
    model = timm.create_model("vit_tiny_patch16_224", **arguments, num_classes=0)
    state = model.state_dict()
    generator = torch.Generator().manual_seed(0)
    if registers:
        state["register_tokens"] = state.pop("reg_token")
        state["pos_embed"] = torch.randn(1, 17, 24, generator=generator)
    state["mask_token"] = torch.zeros(1, 24)
    torch.save(state, tmp_path / "dinov2_vits14_pretrain.pth")
    found = load_backbone(str(tmp_path / "dinov2_vits14_pretrain.pth"), "vit_tiny_patch16_224", arguments)
    own = found.state_dict()
    assert torch.equal(own["blocks.1.ls2.gamma"], state["blocks.1.ls2.gamma"])
    if registers:
        assert torch.equal(own["pos_embed"], state["pos_embed"][:, 1:])
        assert torch.equal(own["cls_token"], state["cls_token"] + state["pos_embed"][:, :1])
    else:
        assert same(own, {name: value for name, value in state.items() if name != "mask_token"})


def test_the_backbone_of_dinov3_loads_as_it_is_published(tmp_path):
    """Their names: storage_tokens, mask_token, rope_embed.periods, attn.qkv.bias_mask, ls1.gamma."""
    arguments = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3}
    name = "vit_small_patch16_dinov3"
    model = timm.create_model(name, **arguments, num_classes=0)
    state = {}
    for ours, value in model.state_dict().items():
        theirs = ours.replace("reg_token", "storage_tokens").replace("gamma_1", "ls1.gamma")
        state[theirs.replace("gamma_2", "ls2.gamma")] = value + 0.01
    for block in range(2):
        state[f"blocks.{block}.attn.qkv.bias"] = torch.zeros(72)
        state[f"blocks.{block}.attn.qkv.bias_mask"] = torch.ones(72)
    state |= {"rope_embed.periods": torch.ones(2), "mask_token": torch.zeros(1, 24)}
    torch.save(state, tmp_path / "dinov3_vits16_pretrain.pth")
    found = load_backbone(str(tmp_path / "dinov3_vits16_pretrain.pth"), name, arguments)
    own = {ours: value + 0.01 for ours, value in model.state_dict().items()}
    assert same(found.state_dict(), own)


def test_heads_that_do_not_fit_are_an_error(tmp_path):
    torch.save({"teacher": small("Dino").teacher.state_dict()}, tmp_path / "dino.pth")
    torch.save(small("Dino").backbone.state_dict(), tmp_path / "backbone.pth")
    with pytest.raises(InputError, match=r"no heads that fit: head.* is \[64, .*, and the options make it"):
        small("Dino", weights=str(tmp_path / "dino.pth"), heads=True, out_dim=32)
    with pytest.raises(InputError, match=r"no heads that fit: head.* is missing"):
        small("Dino", weights=str(tmp_path / "backbone.pth"), heads=True)
    with pytest.raises(InputError, match=r"model.heads: --weights says where"):
        small("Dino", heads=True).check(trainer(max_epochs=20), training=True)
