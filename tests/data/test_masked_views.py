"""Masks of blocks: those of the original code for equal seeds, and how they come with a batch."""

from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

from locat_lightning.data import MultiViewData
from locat_lightning.data.masked_views import MaskedMultiCrop, block_mask, masks_of_batch, masks_of_each
from locat_lightning.data.views import MultiCrop
from locat_lightning.errors import InputError

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "dinov2_sched_masks.safetensors")
SMALL = {"global_size": 32, "local_size": 16, "local_views": 2, "patch_size": 4}


def image(seed=0):
    pixels = np.random.default_rng(seed).integers(256, size=(40, 50, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def batch_of(views, images=6, epoch=0):
    items = [(views(image(i), np.random.default_rng([0, epoch, i])), -1, i) for i in range(images)]
    return views.collate(items)


@pytest.mark.parametrize("side", [14, 16])
def test_blocks_are_those_of_the_original_code(side):
    rng = Random(0)
    masks = np.stack([block_mask((side, side), 50, rng) for _ in range(6)])
    assert np.array_equal(masks, GOLDEN[f"mask.seed0_grid{side}_n50"].bool().numpy())


def test_the_masks_of_a_batch_are_those_of_the_original_code():
    masks = masks_of_batch(12, (16, 16), Random(5))
    assert torch.equal(masks.flatten(1), GOLDEN["collate.masks"].bool())
    assert torch.equal(masks.flatten().nonzero().flatten(), GOLDEN["collate.mask_indices"])


@pytest.mark.parametrize("side", [14, 16])
def test_they_hit_their_number_as_often_as_in_the_original_code(side):
    rng = Random(1)
    for target, mean, _, least, most, hits, above in GOLDEN[f"mask.stats{side}"].tolist():
        counts = np.array([block_mask((side, side), int(target), rng).sum() for _ in range(300)])
        assert counts.mean() == pytest.approx(mean, abs=0.1)
        assert (counts == target).mean() == pytest.approx(hits, abs=0.07)
        assert counts.max() <= most
        assert counts.min() >= least - 3
        assert above == 0


@pytest.mark.parametrize(("grid", "count"), [((2, 2), 2), ((4, 4), 3), ((4, 4), 0), ((3, 5), 7)])
def test_small_grids_and_numbers_end(grid, count):
    for seed in range(20):
        mask = block_mask(grid, count, Random(seed), min_block=4)
        assert mask.shape == grid
        assert mask.sum() <= count


def test_each_view_by_itself_is_masked_or_not():
    masks = masks_of_each(2000, (8, 8), Random(0), share=0.25, ratio=(0.1, 0.5), min_block=1)
    counts = masks.flatten(1).sum(1)
    assert (counts > 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert counts[counts > 0].float().mean().item() == pytest.approx(0.3 * 64, abs=1)


@pytest.mark.parametrize("stratified", [True, False])
def test_a_batch_has_masks_of_its_global_views(stratified):
    views = MaskedMultiCrop(**SMALL, stratified=stratified, min_block=1)
    batch = batch_of(views)
    assert batch.masks.shape == (2, 6, 8, 8)
    assert batch.masks.dtype == torch.bool
    assert torch.equal(batch.mask_indices, batch.masks.flatten().nonzero().flatten())
    assert torch.equal(batch_of(views).masks, batch.masks)
    assert not torch.equal(batch_of(views, epoch=1).masks, batch.masks)
    if stratified:
        assert batch.masks.flatten(0, 1).flatten(1).any(1).sum() == 6
    else:  # as in any other batch
        assert torch.equal(batch_of(views, images=3).masks, batch.masks[:, :3])


@pytest.mark.parametrize("colour_on", ["device", "worker"])
def test_the_views_are_those_without_masks(colour_on):
    own = {key: value for key, value in SMALL.items() if key != "patch_size"} | {"colour_on": colour_on}
    plain, masked = batch_of(MultiCrop(**own)), batch_of(MaskedMultiCrop(**own, patch_size=4))
    assert plain.masks is None
    assert masked.masks.any()
    for a, b in zip(plain.views, masked.views, strict=True):
        assert torch.equal(a.crops, b.crops)


@pytest.mark.parametrize("local_views", [0, 2])
def test_undistorted_views_show_the_same_with_their_own_colours(local_views):
    options = SMALL | {"local_views": local_views, "undistorted_size": 64}
    views = MaskedMultiCrop(**options)
    batch = batch_of(views)
    assert len(batch.views) == (2 if local_views else 1)
    assert batch.undistorted.crops.shape == (2, 6, 3, 64, 64)
    assert views.sizes == [32, 32] + [16] * local_views
    same = batch_of(MaskedMultiCrop(**(options | {"undistorted_size": 32})))
    assert torch.equal(same.undistorted.crops, batch.views[0].crops)  # before their colours are changed
    neutral = same.undistorted.coloured().crops
    assert not torch.equal(neutral, same.views[0].coloured().crops)
    large = batch.undistorted.coloured().crops.flatten(0, 1)
    pooled = [
        F.avg_pool2d(crops, len(crops[0, 0]) // 8).flatten() for crops in (large, neutral.flatten(0, 1))
    ]
    assert torch.corrcoef(torch.stack(pooled))[0, 1] > 0.9


def test_masks_and_undistorted_views_follow_the_size_of_the_batch():
    views = MaskedMultiCrop(**SMALL, undistorted_size=48, mixed_sizes=[(64, 16, 1.0)])
    batch = batch_of(views.of_batch(np.random.default_rng(0)))
    assert batch.views[0].crops.shape == (2, 6, 3, 64, 64)
    assert batch.masks.shape == (2, 6, 16, 16)
    assert batch.undistorted.crops.shape == (2, 6, 3, 96, 96)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 5}, r"data.views.patch_size \(5\) must divide data.views.global_size \(32\)"),
        ({"mixed_sizes": [(64, 16, 1.0), (30, 16, 1.0)]}, r"must divide data.views.mixed_sizes \(30\)"),
        ({"mixed_sizes": [(64, 16, 0.0)]}, r"data.views.mixed_sizes \(\[64, 16, 0.0\]\)"),
        ({"mask_ratio": (0.5, 0.1)}, "views.mask_ratio"),
        ({"mask_ratio": (0.1, 1.5)}, "views.mask_ratio"),
    ],
)
def test_what_cannot_be_is_an_error(options, message):
    with pytest.raises(InputError, match=message):
        MaskedMultiCrop(**(SMALL | options))


def test_all_views_of_a_loaded_batch_are_coloured_on_the_device():
    views = MaskedMultiCrop(**SMALL, undistorted_size=48)
    data = MultiViewData(dataset="digits", views=views, batch_size=4, num_workers=0)
    data.setup("fit")
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    for each in (*batch.views, batch.undistorted):
        assert each.colour is None
        assert each.crops.dtype == torch.float32
    assert batch.undistorted.crops.shape[-1] == 48
    assert batch.masks.any()
