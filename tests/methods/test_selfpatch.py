"""SelfPatch: the original code's tensors, a plain loop of eight steps, and its published names."""

from itertools import product
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from locat_lightning.backbones.create import create_backbone, load_backbone
from locat_lightning.errors import InputError
from locat_lightning.methods import SelfPatch
from locat_lightning.methods.dino import Loss
from locat_lightning.methods.selfpatch import AggregationHead, PatchLoss, SelfPatchNetwork, neighbours
from tests.methods.runs import BACKBONE, fit, random_batch, small

GOLDEN = Path(__file__).parents[1] / "golden" / "selfpatch.safetensors"
PAPERS = {"class_token": False, "global_pool": "avg", "final_norm": False}  # the paper's backbone


class Identity(nn.Module):
    """A backbone whose patch features are its images."""

    def forward_intermediates(self, images, **options):
        return images, [images]

    def forward_head(self, features, pre_logits):
        return features.mean((2, 3))


def as_map(features):
    """Features [4, P, D] of two views of two images as images [2, 2, D, H, W]."""
    side = round(features.shape[1] ** 0.5)
    return features.mT.unflatten(-1, (side, side)).unflatten(0, (2, 2))


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN)


@pytest.fixture(scope="module")
def networks(golden):
    """Student and teacher with the golden weights, and patch features for a backbone."""
    heads = SelfPatch("vit_tiny_patch16_224", hidden_dim=16, bottleneck_dim=8, norm_last_layer=False)
    both = []
    for name in ("student", "teacher"):
        cls, patches = (heads.make_head(16, out_dim) for out_dim in (24, 12))
        network = SelfPatchNetwork(Identity(), AggregationHead(16, 2, 4), cls, patches)
        prefix = f"w.{name}."
        weights = {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}
        network.load_state_dict({k.replace("head.mlp.", "head.layers."): v for k, v in weights.items()})
        both.append(network)
    return both


def test_the_golden_neighbours(golden, networks):
    for (side, size), name in {(14, 196): "global", (6, 36): "local"}.items():
        assert torch.equal(neighbours((side, side)).int(), golden[f"neigh_{size}"])
        chosen = networks[1].ca_head.choose(golden[f"teacher_feat_{name}"], (side, side))
        assert torch.equal(chosen.int(), golden[f"teacher_top_abs_{name}"])


def test_the_golden_loss_gradients_and_centres(golden, networks):
    student, teacher = networks
    views = {
        name: [golden[f"{name}_feat_{size}"].requires_grad_(name == "student") for size in ("global", "local")]
        for name in ("student", "teacher")
    }
    with torch.no_grad():
        _, taught, taught_patches = teacher([as_map(each) for each in views["teacher"]], of_neighbours=True)
    _, learnt, learnt_patches = student([as_map(each) for each in views["student"]])
    for name, cls, patches in (("teacher", taught, taught_patches), ("student", learnt, learnt_patches)):
        for size, of_size in (("global", slice(2)), ("local", slice(2, 4))):
            close(torch.cat(cls[of_size]), golden[f"{name}_cls_logits_{size}"][:, 0], atol=1e-5)
            expected = golden[f"{name}_patch_logits_{size}"]
            close(torch.cat(patches[of_size])[: len(expected)], expected, atol=1e-5)

    of_cls, of_patches = Loss(24), PatchLoss(12)
    of_cls.center.copy_(golden["center0"])
    of_patches.center.copy_(golden["patch_center0"])
    cls_loss = of_cls(taught[:2], learnt, teacher_temp=0.05)
    of_cls.update_center(torch.stack(taught[2:]))
    patch_loss, _ = of_patches(taught_patches, learnt_patches, 0.05)
    loss = cls_loss + 0.1 * patch_loss
    for name, value in {"cls_loss": cls_loss, "patch_loss": patch_loss, "loss": loss}.items():
        torch.testing.assert_close(value, golden[name], atol=0, rtol=1e-6)
    of_cls.move_center()
    of_patches.move_center()
    close(of_cls.center, golden["center_after"])
    close(of_patches.center[0], golden["patch_center_after"])

    loss.backward()
    for features, size in zip(views["student"], ("global", "local"), strict=True):
        expected = golden[f"grad_student_feat_{size}"]
        close(features.grad, expected, atol=1e-5 * expected.abs().max())
    for name, parameter in student.named_parameters():
        norm = golden[f"gradnorm.{name.replace('head.layers.', 'head.mlp.')}"]
        close(parameter.grad.norm(), norm, rtol=1e-5)
    student.zero_grad()


def close(value, expected, *, atol=1e-6, rtol=1e-6):
    torch.testing.assert_close(value, expected, atol=float(atol), rtol=rtol)
