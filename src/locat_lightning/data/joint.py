"""Transforms of an image together with its mask, after mmsegmentation's.

The image is a PIL image up to the normalisation, since that can cut a box out of a resized image without
resizing the rest of it: the crop is chosen on the mask alone, and only what it shows is computed. All random
numbers come from one generator per image: (seed, epoch, index) can fix what an epoch sees.

Source: `RandomResize`, `RandomCrop`, `RandomFlip`, `PhotoMetricDistortion` and `Pad` in
`mmseg/datasets/transforms` of github.com/open-mmlab/mmsegmentation, with the settings of its
`configs/_base_/datasets/ade20k.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

VOID = 255  # in a mask: of no class, ignored by loss and measure

ATTEMPTS = 10  # at a crop that shows more than one class
BRIGHTNESS = 32  # levels of 255 added at most
CONTRAST = SATURATION = (0.5, 1.5)  # factors
HUE = 36  # degrees at most; OpenCV's scale, on which mmsegmentation says 18, has 180


@dataclass(frozen=True)
class JointAugmentation:
    """Resizes, crops, flips, distorts the colours, normalises and pads, at random.

    Args:
        crop_size: height and width of the result in pixels.
        scale: longer and shorter side in pixels within which the image is resized.
        ratio: smallest and largest factor of `scale`.
        cat_max_ratio: share of the crop's annotated pixels that no class should reach; 1 takes any crop.
        hflip: probability of a horizontal flip.
        distortion: whether the colours are distorted.
        mean: of each channel (RGB, 0 to 1), subtracted.
        std: of each channel (RGB, 0 to 1), divided by.
    """

    crop_size: int
    scale: Sequence[int]
    ratio: Sequence[float]
    cat_max_ratio: float
    hflip: float
    distortion: bool
    mean: Sequence[float]
    std: Sequence[float]

    def __call__(
        self, image: Image.Image, mask: np.ndarray, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Makes what one epoch sees of an image.

        Args:
            image: RGB.
            mask: uint8 [H, W], the classes of its pixels, 255 for none.
            rng: the image's own generator, e.g. `np.random.default_rng([seed, epoch, index])`.

        Returns:
            The image, float32 [3, crop_size, crop_size], with 0 on the right and below where it is smaller;
            its mask, uint8 [crop_size, crop_size], with 255 there.
        """
        ratio = rng.uniform(self.ratio[0], self.ratio[1])
        width, height = fitted_size(image.size, (int(self.scale[0] * ratio), int(self.scale[1] * ratio)))
        # Nearest neighbours: the row and the column that each pixel of the resized mask comes from.
        rows = ((np.arange(height) + 0.5) * (mask.shape[0] / height)).astype(int)
        columns = ((np.arange(width) + 0.5) * (mask.shape[1] / width)).astype(int)
        left, top, mask = draw_crop(rng, mask, rows, columns, self.crop_size, self.cat_max_ratio)

        high, wide = mask.shape
        across, down = image.width / width, image.height / height
        box = (left * across, top * down, (left + wide) * across, (top + high) * down)
        box = (box[0], box[1], min(box[2], image.width), min(box[3], image.height))
        image = image.resize((wide, high), Image.Resampling.BILINEAR, box)
        if rng.random() < self.hflip:
            image, mask = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), mask[:, ::-1]
        if self.distortion:
            image = distorted(image, rng)

        pixels = torch.zeros(3, self.crop_size, self.crop_size)
        pixels[:, :high, :wide] = normalised(image, self.mean, self.std)
        padded = np.full((self.crop_size, self.crop_size), VOID, np.uint8)
        padded[:high, :wide] = mask
        return pixels, torch.from_numpy(padded)


@dataclass(frozen=True)
class JointEvaluation:
    """Resizes and normalises the image; leaves its mask as large as it was annotated.

    Args:
        scale: longer and shorter side in pixels within which the image is resized.
        mean: of each channel (RGB, 0 to 1), subtracted.
        std: of each channel (RGB, 0 to 1), divided by.
    """

    scale: Sequence[int]
    mean: Sequence[float]
    std: Sequence[float]

    def __call__(
        self, image: Image.Image, mask: np.ndarray, rng: np.random.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Makes the image, float32 [3, h, w], and the mask, uint8 [H, W], of an RGB image and its mask."""
        image = image.resize(fitted_size(image.size, self.scale), Image.Resampling.BILINEAR)
        return normalised(image, self.mean, self.std), torch.from_numpy(mask)


def fitted_size(size: tuple[int, int], scale: Sequence[int]) -> tuple[int, int]:
    """Finds the (width, height) of an image of a size that just fits within a scale.

    Args:
        size: (width, height).
        scale: what the longer and the shorter side may have at most, in either order.
    """
    factor = min(max(scale) / max(size), min(scale) / min(size))
    return max(1, int(size[0] * factor + 0.5)), max(1, int(size[1] * factor + 0.5))


def draw_crop(
    rng: np.random.Generator,
    mask: np.ndarray,
    rows: np.ndarray,
    columns: np.ndarray,
    crop_size: int,
    cat_max_ratio: float,
) -> tuple[int, int, np.ndarray]:
    """Draws a crop of a resized mask until it shows enough variety, or after ten attempts any.

    Args:
        rng: where the random numbers come from.
        mask: uint8 [H, W] before it is resized.
        rows: of it, that are the rows of the resized mask.
        columns: of it, that are the columns of the resized mask.
        crop_size: greatest height and width of the crop.
        cat_max_ratio: see `is_varied`; 1 takes the first crop.

    Returns:
        Left, top, and the crop of the resized mask.
    """
    for attempt in range(ATTEMPTS + 1):
        top = int(rng.integers(max(0, len(rows) - crop_size) + 1))
        left = int(rng.integers(max(0, len(columns) - crop_size) + 1))
        across = columns[left : left + crop_size]
        crop = mask[rows[top : top + crop_size]][:, across]
        if cat_max_ratio >= 1 or attempt == ATTEMPTS or is_varied(crop, cat_max_ratio):
            break
    return left, top, crop


def is_varied(mask: np.ndarray, cat_max_ratio: float) -> bool:
    """Whether a mask shows more than one class, and none on as much as a share of its annotated pixels."""
    counts = np.bincount(mask.ravel(), minlength=256)[:VOID]
    return bool(np.count_nonzero(counts) > 1 and counts.max() < cat_max_ratio * counts.sum())


def distorted(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Changes brightness, contrast, saturation and hue of an RGB image, each with probability 1/2.

    torchvision's `RandomPhotometricDistort` cannot be set to this: it multiplies the brightness, changes the
    contrast about the mean and the saturation about the grey value, and permutes the channels.
    """
    levels = np.arange(256)
    bright, contrasted, saturated, turned = rng.random(4) < 0.5
    brightness = rng.uniform(-BRIGHTNESS, BRIGHTNESS) if bright else 0
    contrast = rng.uniform(*CONTRAST) if contrasted else 1
    contrast_first = rng.random() < 0.5
    saturation = rng.uniform(*SATURATION) if saturated else 1
    hue = rng.uniform(-HUE, HUE) / 360 if turned else 0

    brightened = (levels + brightness).clip(0, 255).astype(np.uint8)
    before = (brightened * contrast).clip(0, 255).astype(np.uint8) if contrast_first else brightened
    if bright or (contrasted and contrast_first):
        image = image.point(np.tile(before, 3).tolist())
    if saturated or turned:
        turn = (levels + round(hue * 256)) % 256
        table = np.concatenate([turn, (levels * saturation).clip(0, 255).astype(np.uint8), levels])
        image = image.convert("HSV").point(table.tolist()).convert("RGB")
    if contrasted and not contrast_first:
        image = image.point(np.tile((levels * contrast).clip(0, 255).astype(np.uint8), 3).tolist())
    return image


def normalised(image: Image.Image, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Makes the normalised float32 [3, H, W] of an RGB image."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float()
    shift, factor = torch.tensor([mean, std]).mul(255).view(2, 3, 1, 1)
    return pixels.sub_(shift).div_(factor)
