"""Targets and losses: those of the original codes, and Sinkhorn-Knopp over several processes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from locat_lightning.methods.targets import (
    Targets,
    cross_view_loss,
    masked_patch_loss,
    sinkhorn_knopp,
)

FOLDER = Path(__file__).parents[1] / "golden"
DINOV2, IBOT = load_file(FOLDER / "dinov2_losses.safetensors"), load_file(FOLDER / "ibot_loss.safetensors")
CLOSE = {"atol": 1e-6, "rtol": 1e-6}
GRADIENTS = {"atol": 1e-7, "rtol": 1e-5}
TEMPERATURE = 0.055


def centred(center, momentum=0.9):
    targets = Targets(center.numel(), "centering", momentum)
    targets.center.copy_(center.flatten())
    return targets


def test_distributions_of_cls_are_those_of_dinov2():
    logits = DINOV2["dino.teacher_logits"]
    found = sinkhorn_knopp(logits, TEMPERATURE)
    torch.testing.assert_close(found, DINOV2["dino.sk.teacher_probs"], **CLOSE)
    targets = centred(DINOV2["dino.center0"])
    torch.testing.assert_close(targets(logits, TEMPERATURE), DINOV2["dino.center.teacher_probs"], **CLOSE)
    targets.add_to_center(logits.sum(0), len(logits))
    assert torch.equal(targets.center, DINOV2["dino.center_before_apply"][0])
    targets.move_center()
    torch.testing.assert_close(targets.center, DINOV2["dino.center_after_apply"][0], **CLOSE)
    again = targets(logits, TEMPERATURE)
    torch.testing.assert_close(again, DINOV2["dino.center.teacher_probs_2nd_call"], **CLOSE)


@pytest.mark.parametrize("kind", ["sk", "center"])
def test_the_loss_of_cls_is_that_of_dinov2(kind):
    """There all pairs are summed; the first two views, which stand for the teacher's own, are taken off."""
    probabilities = DINOV2[f"dino.{kind}.teacher_probs"].unflatten(0, (2, -1))
    views = DINOV2["dino.student_local_logits"].clone().requires_grad_()
    student = torch.cat([torch.zeros_like(views[:2]), views])
    all_pairs, first = (cross_view_loss(probabilities, each, 0.1) for each in (student, student[:2]))
    pairs = 10 * all_pairs - 2 * first
    torch.testing.assert_close(pairs, DINOV2[f"dino.{kind}.loss_sum"], **CLOSE)
    (gradient,) = torch.autograd.grad(pairs, views)
    torch.testing.assert_close(gradient, DINOV2[f"dino.{kind}.grad_student"], **GRADIENTS)


@pytest.mark.parametrize("kind", ["sk", "center"])
def test_the_loss_of_patches_is_that_of_dinov2(kind):
    masked = len(DINOV2["ibot.mask_indices"])
    taught = DINOV2["ibot.teacher_masked_logits"][:masked]
    targets = centred(DINOV2["ibot.center0"])
    if kind == "sk":
        targets.centering = "sinkhorn_knopp"
    found = targets(taught, TEMPERATURE)
    torch.testing.assert_close(found, DINOV2[f"ibot.{kind}.teacher_probs"], **CLOSE)
    logits = DINOV2["ibot.student_masked_logits"].clone().requires_grad_()
    weights = DINOV2["ibot.masks_weight"]
    loss = masked_patch_loss(found, logits[:masked] / 0.1, weights, len(DINOV2["ibot.masks"]))
    torch.testing.assert_close(loss, DINOV2[f"ibot.{kind}.loss"], **CLOSE)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, DINOV2[f"ibot.{kind}.grad_student"], **GRADIENTS)
    targets.add_to_center(taught.sum(0), masked)
    targets.move_center()
    if kind == "center":
        torch.testing.assert_close(targets.center, DINOV2["ibot.center_after_apply"].flatten(), **CLOSE)


@pytest.mark.parametrize(
    ("run", "epoch", "weights"),
    [("e2", 2, (1, 1)), ("e7", 7, (0.5, 2)), ("e1_global_only", 1, (1, 1))],
)
def test_losses_and_centres_are_those_of_ibot(run, epoch, weights):
    cls, patches = centred(IBOT["center0"]), centred(IBOT["center2_0"])
    masks = IBOT["mask"].bool().flatten(0, 1).flatten(1)
    names = ["student_cls", "student_patch"] + ["student_local_cls"] * (run != "e1_global_only")
    learnt = {name: IBOT[name].clone().requires_grad_() for name in names}
    temperature, of_patches = (IBOT[f"{run}.{each}_schedule"][epoch].item() for each in ("temp", "temp2"))

    student = torch.cat([learnt[name] for name in names if name != "student_patch"])
    targets = cls(IBOT["teacher_cls"], temperature).unflatten(0, (2, -1))
    cls_loss = weights[0] * cross_view_loss(targets, student.unflatten(0, (-1, 3)), 0.1)
    taught = IBOT["teacher_patch"]
    each = (1 / masks.sum(1, keepdim=True).clamp(min=1)).expand(masks.shape)[masks]
    patch_loss = weights[1] * masked_patch_loss(
        patches(taught[masks], of_patches), learnt["student_patch"][masks] / 0.1, each, len(masks)
    )
    torch.testing.assert_close(cls_loss, IBOT[f"{run}.cls"], **CLOSE)
    torch.testing.assert_close(patch_loss, IBOT[f"{run}.patch"], **CLOSE)
    (cls_loss + patch_loss).backward()
    for name, logits in learnt.items():
        torch.testing.assert_close(logits.grad, IBOT[f"{run}.grad_{name}"], **GRADIENTS)
    cls.add_to_center(IBOT["teacher_cls"].sum(0), len(IBOT["teacher_cls"]))
    patches.add_to_center(taught.sum((0, 1)), masks.numel())
    for targets, name in ((cls, "center"), (patches, "center2")):
        targets.move_center()
        torch.testing.assert_close(targets.center, IBOT[f"{run}.{name}_after"].flatten(), **CLOSE)


def test_nothing_moves_the_centre_if_nothing_was_masked():
    targets = centred(torch.arange(3.0))
    targets.add_to_center(torch.zeros(3), 0)
    targets.move_center()
    assert torch.equal(targets.center, torch.arange(3.0))


def test_sinkhorn_knopp_shares_rows_out_evenly():
    logits = torch.randn(64, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = sinkhorn_knopp(logits, 0.5, iterations=50)
    torch.testing.assert_close(p.sum(1), torch.ones(64, dtype=torch.float64))
    torch.testing.assert_close(p.sum(0), torch.full((8,), 8.0, dtype=torch.float64))
    plain = [[(z / 0.5).exp().item() for z in row] for row in logits]
    for _ in range(3):
        for k in range(8):
            column = sum(row[k] for row in plain)
            for row in plain:
                row[k] /= column * 8
        for row in plain:
            row[:] = [value / (sum(row) * 64) for value in row]
    torch.testing.assert_close(sinkhorn_knopp(logits, 0.5), 64 * torch.tensor(plain, dtype=torch.float64))
