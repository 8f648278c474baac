"""Mixtures of images and their labels, against the authors' tensors, timm and plain loops."""

import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.data import Mixup
from torch.nn import functional as F

from locat_lightning.data.dataset import ImageBatch
from locat_lightning.errors import InputError
from locat_lightning.tasks import Classification
from locat_lightning.tasks.mixing import (
    BY_ATTENTION,
    Mixed,
    Mixing,
    attended_share,
    mixed_labels,
    own_cells,
    own_pixels,
)
from tests.tasks.test_classification import BACKBONE, Batches, built, fit, task

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "transmix.safetensors")
KINDS = ["mixup", "transmix", "maskmix", "mixpro", "patch_mixing"]

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")


def mixing(kind, attention=None, mixing_prob=1.0, **options):
    """A mixing of images with patches of 8 × 8, which finds this attention [B, H, W]."""
    torch.manual_seed(0)
    backbone = timm.create_model("vit_tiny_patch16_224", **BACKBONE)
    options = {"num_classes": 10, "label_smoothing": 0.1, "cutmix_alpha": 1.0} | options
    made = Mixing(kind, mixing_prob, backbone, **options)
    made._attention_map = lambda images: attention
    return made


def smoothed(targets, smoothing):
    return (1 - smoothing) * targets + smoothing / targets.shape[1]


def beneath(prefix):
    return {key.removeprefix(prefix): value for key, value in GOLDEN.items() if key.startswith(prefix)}


@pytest.mark.parametrize("which", ["tm0.", "tm1."])
def test_transmix_is_the_authors(which):
    common, golden = beneath("tm."), beneath(which)
    labels, attention = common["target"], common["attn"].view(4, 14, 14)
    heads = common["attn_heads_cls_row"]
    torch.testing.assert_close(heads.mean(1)[:, 1:], common["attn"])
    top, bottom, left, right = golden["box"].tolist()
    own = torch.ones(1, 224, 224, dtype=torch.bool)
    own[:, top:bottom, left:right] = False
    on_grid = F.interpolate(own[:, None].float(), (14, 14))[0, 0]
    assert torch.equal(1 - on_grid, golden["mask_grid"].float())
    for key, each in (("y1", labels), ("y2", labels.flip(0))):
        torch.testing.assert_close(mixed_labels(each, each, 1.0, 10, 0.1), common[key])

    area = 1 - (bottom - top) * (right - left) / 224**2
    logits = common["logits"].requires_grad_()
    mixed = Mixed(torch.empty(0), labels, labels.flip(0), area, own)
    targets = smoothed(*mixing("transmix", attention).targets(mixed, logits))
    torch.testing.assert_close(targets, golden["label"], atol=2e-7, rtol=0)
    loss = F.cross_entropy(logits, targets)
    torch.testing.assert_close(loss, golden["loss"])
    [gradient] = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, golden["grad_logits"], atol=1e-7, rtol=0)


def test_a_box_between_the_patches_corners_counts_by_half_its_area():
    own = torch.ones(1, 32, 32, dtype=torch.bool)
    own[:, 9:16, 9:16] = False  # covers no upper left pixel of the 8 × 8 patches
    labels = torch.tensor([0, 1])
    mixed = Mixed(torch.empty(0), labels, labels.flip(0), 1 - 49 / 1024, own)
    targets, _ = mixing("transmix", torch.rand(2, 4, 4), num_classes=2).targets(mixed, None)
    pasted = 49 / 1024 / 2
    torch.testing.assert_close(targets, torch.tensor([[1 - pasted, pasted], [pasted, 1 - pasted]]))


@pytest.mark.parametrize(("kind", "which"), [("maskmix", "maskmix_only."), ("mixpro", "pal.")])
def test_mixpro_is_the_authors(monkeypatch, kind, which):
    golden, own = beneath("mp."), beneath(f"mp.{which}")
    cells = golden["mask_patch_grid"][:, ::2, ::2].bool()  # of two by two patches
    monkeypatch.setattr("locat_lightning.tasks.mixing.own_cells", lambda *size: cells)
    monkeypatch.setattr("numpy.random.permutation", lambda n: golden["partner_index"].numpy())
    mix = mixing(kind, golden["attn"].view(4, 8, 8))
    mixed = mix(golden["images"], golden["targets"])
    assert torch.equal(mixed.images, golden["mixed_images"])
    assert torch.equal(mixed.partners, golden["partner_targets"])
    assert torch.equal(mixed.area, golden["area_lambda"])
    soft = mixed_labels(mixed.labels, mixed.partners, mixed.area, 10, 0.1)
    torch.testing.assert_close(soft, golden["mixed_soft_targets"])
    logits = golden["outputs"].requires_grad_()
    loss = F.cross_entropy(logits, smoothed(*mix.targets(mixed, logits)))
    torch.testing.assert_close(loss, own["loss"])
    [gradient] = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, own["grad_outputs"], atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    ("kind", "alphas"),
    [("mixup", (0.8, 1.0)), ("mixup", (0.8, 0.0)), ("transmix", (0.8, 1.0)), ("transmix", (0.0, 1.0))],
)
def test_mixup_and_cutmix_are_timms(kind, alphas):
    options = {"mixup_alpha": alphas[0], "cutmix_alpha": alphas[1], "prob": 0.8, "switch_prob": 0.5}
    options |= {"label_smoothing": 0.1, "num_classes": 10}
    theirs, ours = Mixup(**options), mixing(kind, **options)
    images, labels = torch.randn(6, 3, 16, 24), torch.tensor([1, 4, 4, 0, 9, 7])
    boxes = 0
    for seed in range(12):
        np.random.seed(seed)  # noqa: NPY002
        expected, expected_targets = theirs(images.clone(), labels)
        np.random.seed(seed)  # noqa: NPY002
        mixed = ours(images, labels)
        assert torch.equal(mixed.images, expected)
        boxes += mixed.own is not None
        targets = smoothed(*ours.targets(mixed._replace(own=None), None))
        torch.testing.assert_close(targets, expected_targets)
        if mixed.own is not None:
            assert mixed.own.float().mean().item() == pytest.approx(mixed.area)
            assert torch.equal(mixed.images.where(mixed.own, 0), images.where(mixed.own, 0))
    assert (boxes > 0) == (kind == "transmix")


def test_the_share_of_the_attention_by_hand():
    """Not square, and of images whose sides are no multiples of a patch."""
    own = torch.rand(3, 13, 18, generator=torch.Generator().manual_seed(0)) < 0.5
    attention = torch.rand(3, 2, 3)
    found = attended_share(own, attention)
    for image in range(3):
        own_sum = whole = 0.0
        for row in range(2):
            for column in range(3):
                a = attention[image, row, column].item()
                whole += a
                own_sum += a * own[image, row * 13 // 2, column * 6].item()
        assert found[image].item() == pytest.approx(own_sum / whole)


@pytest.mark.parametrize(("draw", "kept"), [(0.0, 0), (1e-9, 1), (0.5, 8), (0.51, 9), (1.0, 16)])
def test_the_share_of_cells_is_rounded_up_and_the_cells_are_each_images_own(monkeypatch, draw, kept):
    monkeypatch.setattr("numpy.random.beta", lambda *_: draw)
    np.random.seed(0)  # noqa: NPY002 - timm draws from the global state
    cells = own_cells(5, 4, 4)
    assert cells.flatten(1).sum(1).tolist() == [kept] * 5
    if 0 < kept < 16:
        assert len({tuple(each.flatten().tolist()) for each in cells}) > 1


@pytest.mark.parametrize(("height", "width"), [(32, 32), (30, 44), (5, 3)])
def test_cells_cover_the_image(height, width):
    cells = torch.rand(2, 4, 4) < 0.5
    pixels = own_pixels(cells, height, width)
    assert pixels.shape == (2, height, width)
    for row in range(height):
        for column in range(width):
            of = cells[:, row // math.ceil(height / 4), column // math.ceil(width / 4)]
            assert torch.equal(pixels[:, row, column], of)


@pytest.mark.parametrize(("kind", "cells"), [("maskmix", (4, 4)), ("patch_mixing", (3, 5))])
def test_pixels_are_the_images_own_or_of_its_partner(kind, cells):
    images = torch.arange(7.0).view(7, 1, 1, 1).expand(7, 3, 24, 40).contiguous()
    labels = torch.arange(7) % 5
    np.random.seed(3)  # noqa: NPY002
    mixed = mixing(kind)(images, labels)
    assert len(mixed.images) == 7  # an odd batch, too
    for image, found in enumerate(mixed.images):
        values, counts = found[0].unique(return_counts=True)
        others = [value for value in values.tolist() if value != image]
        assert len(others) <= 1
        assert all(labels[int(value)] == mixed.partners[image] for value in others)
        share = dict(zip(values.tolist(), counts.tolist(), strict=True)).get(image, 0) / (24 * 40)
        if others:
            assert mixed.area[image].item() == pytest.approx(share)
            height, width = 24 // cells[0], 40 // cells[1]
            corners = found[0, ::height, ::width].repeat_interleave(height, 0).repeat_interleave(width, 1)
            assert torch.equal(corners, found[0])


def test_mixing_prob_says_how_many_batches_are_mixed_by_patches():
    images, labels = torch.rand(4, 3, 16, 16), torch.arange(4)
    mix = mixing("mixpro", mixing_prob=0.25, mixup_alpha=0.8)
    np.random.seed(0)  # noqa: NPY002 - timm draws from the global state
    of_patches = sum(mix(images, labels).own is not None for _ in range(400))
    assert 70 < of_patches < 130


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_each_kind(tmp_path, kind):
    options = {"mixing": kind, "mixing_prob": 1.0, "mixup": 0, "label_smoothing": 0.1}
    runs = [
        fit(tmp_path, task(Classification, **options), Batches(size=5), max_epochs=1).callback_metrics
        for _ in range(2)
    ]
    assert math.isfinite(runs[0]["train/loss"])
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])


def test_without_mixup_the_other_batches_are_not_mixed():
    module = built(mixing="maskmix", mixing_prob=0.0, mixup=0, cutmix=0)
    images = torch.randn(4, 3, 16, 16)
    assert torch.equal(module.mixup(images, torch.arange(4)).images, images)


@pytest.mark.parametrize("attention", ["class", "refined"])
@pytest.mark.parametrize("kind", BY_ATTENTION)
def test_labels_follow_the_attention_of_the_pass_itself(monkeypatch, kind, attention):
    module = built(mixing=kind, mixing_attention=attention, mixing_prob=1.0, mixup=0, label_smoothing=0.1)
    batch = ImageBatch(torch.randn(6, 3, 16, 16), torch.arange(6), torch.arange(6))
    for name, weight in module.backbone.named_parameters():
        if "qkv" in name:
            torch.nn.init.normal_(weight)
    passes, seen = [], []
    module.backbone.register_forward_hook(lambda *_: passes.append(1))
    module.log = module.log_dict = lambda *_, **__: None
    targets = module.mixup.targets
    module.mixup.targets = lambda *given: seen.append(given) or targets(*given)
    monkeypatch.setattr("numpy.random.beta", lambda *_: 0.5)
    loss = module.training_step(batch, 0)
    [(mixed, logits)] = seen
    assert len(passes) == 1
    found = module.mixup._attention.heads.mean(1).view(6, 2, 2)
    m = mixed.own[:, None, ::8, ::8].float()[:, 0]
    attended = (m * found).sum((1, 2)) / found.sum((1, 2))
    area = torch.as_tensor(mixed.area, dtype=torch.float32).expand(6)
    smooth = torch.full((6, 6), 0.1 / 6) + 0.9 * torch.eye(6)
    if kind == "transmix":
        share = ((area + attended) / 2)[:, None]
        expected = share * smooth[mixed.labels] + (1 - share) * smooth[mixed.partners]
        expected = -(expected * logits.log_softmax(-1)).sum(-1).mean()
    else:
        soft = area[:, None] * smooth[mixed.labels] + (1 - area[:, None]) * smooth[mixed.partners]
        p = logits.softmax(-1)
        c = (soft * p).sum(-1) / soft.norm(dim=-1) / p.norm(dim=-1)
        share = c * attended + (1 - c) * area
        own, other = (
            F.cross_entropy(logits, labels, reduction="none") for labels in (mixed.labels, mixed.partners)
        )
        expected = (share * own + (1 - share) * other).mean()
    torch.testing.assert_close(loss, expected)
    if attention == "class":
        assert not torch.allclose(attended, area, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"mixing": "transmix", "cutmix": 0.0}, r"transmix is about the labels of CutMix: set model\.cutmix"),
        (
            {"mixing": "transmix", "backbone_args": BACKBONE | {"global_pool": "avg", "prr": False}},
            r"mixing transmix .* does not fit model\.backbone: it pools no \[CLS\] token.*or maskmix",
        ),
        (
            {"mixing": "mixpro", "mixing_attention": "refined", "backbone_args": BACKBONE | {"prr": False}},
            r"mixing_attention refined does not fit model\.backbone: it has no PRR",
        ),
    ],
)
def test_what_does_not_fit_is_said(tmp_path, options, expected):
    module = task(Classification, **options)
    with pytest.raises(InputError, match=expected) as error:
        fit(tmp_path, module)
    assert "\n" not in str(error.value)
