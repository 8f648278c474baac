"""Multi-crop views whose global ones come with masks of blocks of patches, for iBOT and DINOv2.

Source: `dinov2/data/masking.py` and `dinov2/data/collate.py` of github.com/facebookresearch/dinov2, and
`loader.py` of github.com/bytedance/ibot.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random
from typing import Self

import numpy as np
import torch
from jsonargparse.typing import ClosedUnitInterval, PositiveInt
from torch import Tensor

from locat_lightning.data.band_transforms import no_jitter
from locat_lightning.data.base import check_side, check_span
from locat_lightning.data.colour import NEUTRAL
from locat_lightning.data.views import Drawn, MultiCrop, ViewBatch, Views
from locat_lightning.errors import InputError

ATTEMPTS = 10  # to place a block
ASPECT_RATIOS = (0.3, 1 / 0.3)


@dataclass(frozen=True)
class MaskedMultiCrop(MultiCrop):
    """Cut an image into views as `MultiCrop` does, and mask blocks of patches of the global ones.

    Args:
        patch_size: side of a patch of the model in pixels.
        masked_share: share of the global views that are masked.
        mask_ratio: smallest and largest share of the patches that are masked in one of them.
        min_block: patches of the smallest block. iBOT's are (min(H, W) // 3)² for a grid of H × W.
        stratified: mask exactly that share of each batch, with ratios spread evenly over the span, as DINOv2
            does; else each view for itself, as iBOT does.
        undistorted_size: side in pixels of the global views once more, with their own colours; null for none.
            With `mixed_sizes` it grows with the global size, in whole patches.
    """

    patch_size: PositiveInt = 16
    masked_share: ClosedUnitInterval = 0.5
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    min_block: PositiveInt = 4
    stratified: bool = True
    undistorted_size: PositiveInt | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_span("views.mask_ratio", self.mask_ratio, most=1)
        check_side("views.undistorted_size", self.undistorted_size or 1)
        for size, *_ in self.mixed_sizes or []:
            if self.undistorted_size and self.undistorted_size * size / self.global_size < self.patch_size:
                raise InputError(
                    f"data.views.undistorted_size ({self.undistorted_size}, at a data.views.global_size of "
                    f"{self.global_size}) leaves less than a patch for {size} of data.views.mixed_sizes"
                )
        mixed = [size for size, _, _ in self.mixed_sizes or []]
        for option, size in [("global_size", self.global_size), *(("mixed_sizes", size) for size in mixed)]:
            if size % self.patch_size:
                raise InputError(
                    f"data.views.patch_size ({self.patch_size}) must divide data.views.{option} ({size})"
                )

    def of_batch(self, rng: np.random.Generator) -> Self:
        drawn = super().of_batch(rng)
        if not self.mixed_sizes or self.undistorted_size is None:
            return drawn
        patches = self.undistorted_size * drawn.global_size / self.global_size / self.patch_size
        return replace(drawn, undistorted_size=round(patches) * self.patch_size)

    def draw(self, size: tuple[int, int], rng: np.random.Generator, channels: int | None = None) -> Drawn:
        drawn = super().draw(size, rng, channels)
        drawn = drawn._replace(seed=int(rng.integers(2**62)))
        if self.undistorted_size is None:
            return drawn
        _, boxes, flipped, colour, sizes, _ = drawn
        neutral = torch.tensor([NEUTRAL] * 2) if channels is None else no_jitter(2, channels)
        return drawn._replace(
            boxes=np.concatenate([boxes, boxes[:2]]),
            flipped=np.concatenate([flipped, flipped[:2]]),
            colour=torch.cat([colour, neutral]),
            sizes=sizes + [self.undistorted_size] * 2,
        )

    def collate(self, items: Sequence[tuple[list[Views], int, int]]) -> ViewBatch:
        batch = super().collate(items)
        if self.undistorted_size is not None:
            batch = batch._replace(views=batch.views[:-1], undistorted=batch.views[-1])
        seeds = [views[0].seed for views, _, _ in items]
        grid = (batch.views[0].crops.shape[-1] // self.patch_size,) * 2
        options = {"share": self.masked_share, "ratio": self.mask_ratio, "min_block": self.min_block}
        if self.stratified:
            masks = masks_of_batch(2 * len(items), grid, Random(str(seeds)), **options)
            masks = masks.unflatten(0, (2, -1))
        else:
            each = [masks_of_each(2, grid, Random(seed), **options) for seed in seeds]
            masks = torch.stack(each, dim=1)
        return batch._replace(masks=masks, mask_indices=masks.flatten().nonzero().flatten())


def masks_of_batch(
    views: int,
    grid: tuple[int, int],
    rng: Random,
    *,
    share: float = 0.5,
    ratio: tuple[float, float] = (0.1, 0.5),
    min_block: int = 4,
) -> Tensor:
    """Mask exactly a share of a batch's views, in random places, with ratios spread evenly over a span.

    Args:
        views: how many there are; `share` of them, rounded down, are masked.
        grid: (H, W) in patches.
        rng: equal seeds give the masks of DINOv2's code.
        share: of the views.
        ratio: smallest and largest share of patches that are masked in a view.
        min_block: see `block_mask`.

    Returns:
        bool [views, H, W].
    """
    masked = int(views * share)
    edges = torch.linspace(*ratio, masked + 1).tolist()
    patches = grid[0] * grid[1]
    masks = [
        block_mask(grid, int(patches * rng.uniform(low, high)), rng, min_block)
        for low, high in pairwise(edges)
    ]
    masks += [np.zeros(grid, dtype=bool)] * (views - masked)
    rng.shuffle(masks)
    return torch.from_numpy(np.stack(masks))


def masks_of_each(
    views: int,
    grid: tuple[int, int],
    rng: Random,
    *,
    share: float,
    ratio: tuple[float, float],
    min_block: int,
) -> Tensor:
    """Mask each view with a probability of `share`, and a ratio from the span; else as `masks_of_batch`."""
    patches = grid[0] * grid[1]
    counts = [int(patches * rng.uniform(*ratio)) if rng.random() < share else 0 for _ in range(views)]
    return torch.from_numpy(np.stack([block_mask(grid, count, rng, min_block) for count in counts]))


def block_mask(grid: tuple[int, int], count: int, rng: Random, min_block: int = 4) -> np.ndarray:
    """Mask `count` patches of a grid (H, W), or somewhat fewer, by rectangles at random places.

    A rectangle has an area between `min_block` and what is left to mask, and adds at most what is left. It
    ends when ten attempts in a row add nothing.

    Returns:
        bool [H, W], true where masked.
    """
    height, width = grid
    mask = np.zeros(grid, dtype=bool)
    left, failures = count, 0
    while left > 0 and failures < ATTEMPTS:
        failures += 1
        area = rng.uniform(min_block, left)
        ratio = math.exp(rng.uniform(*map(math.log, ASPECT_RATIOS)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if h >= height or w >= width:
            continue
        row, column = rng.randint(0, height - h), rng.randint(0, width - w)
        block = mask[row : row + h, column : column + w]
        if 0 < (added := h * w - int(block.sum())) <= left:
            block[:] = True
            left, failures = left - added, 0
    return mask
