"""Transforms of an image together with its mask, after mmsegmentation's.

The image is a PIL image up to its colours, since that can cut a box out of a resized image without resizing
the rest of it: the crop is chosen on the mask alone, and only what it shows is computed. All random numbers
come from one generator per image: (seed, epoch, index) can fix what an epoch sees.

Source: `RandomResize`, `RandomCrop`, `RandomFlip`, `PhotoMetricDistortion` and `Pad` in
`mmseg/datasets/transforms` of github.com/open-mmlab/mmsegmentation, with the settings of its
`configs/_base_/datasets/ade20k.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from locat_lightning.data.colour import turn_hue

VOID = 255  # in a mask: of no class, ignored by loss and measure

ATTEMPTS = 10  # at a crop that shows more than one class
# Of the distortion: smallest and largest change in brightness, factors, and shares of a turn of the hue.
# mmsegmentation says 32 (of 255) and 18 (of 180, OpenCV's scale of the hue).
BRIGHTNESS = (-32 / 255, 32 / 255)
CONTRAST = SATURATION = (0.5, 1.5)
HUE = (-0.1, 0.1)


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
        pixels = as_tensor(image)
        if self.distortion:
            distort(pixels, rng)
        normalise(pixels, self.mean, self.std)

        padding = (0, self.crop_size - wide, 0, self.crop_size - high)
        classes = torch.from_numpy(np.ascontiguousarray(mask))
        return F.pad(pixels, padding), F.pad(classes, padding, value=VOID)


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
        return normalise(as_tensor(image), self.mean, self.std), torch.from_numpy(mask)


@dataclass(frozen=True)
class JointSquare:
    """Resizes the image to a square, whatever its shape, and normalises it; the mask where it is told to.

    Args:
        side: height and width of the result in pixels.
        with_mask: whether the mask is resized, too, by nearest neighbours.
        mean: of each channel (RGB, 0 to 1), subtracted.
        std: of each channel (RGB, 0 to 1), divided by.
    """

    side: int
    with_mask: bool
    mean: Sequence[float]
    std: Sequence[float]

    def __call__(
        self, image: Image.Image, mask: np.ndarray, rng: np.random.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Makes the image, float32 [3, side, side], and the mask, uint8, of an RGB image and its mask."""
        image = image.resize((self.side, self.side), Image.Resampling.BILINEAR)
        if self.with_mask:
            rows, columns = (((np.arange(self.side) + 0.5) * (n / self.side)).astype(int) for n in mask.shape)
            mask = mask[rows[:, None], columns]
        return normalise(as_tensor(image), self.mean, self.std), torch.from_numpy(mask)


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


def distort(pixels: Tensor, rng: np.random.Generator) -> None:
    """Changes brightness, contrast, saturation and hue, each with probability 1/2.

    The saturation is that of HSV. torchvision's `RandomPhotometricDistort` cannot be set to this: it
    multiplies the brightness, changes contrast and saturation about grey values, and permutes the channels.

    Args:
        pixels: RGB from 0 to 1, [3, H, W], changed in place.
        rng: where the random numbers come from.
    """
    brightness, contrast, saturation, hue = rng.uniform(
        *np.transpose([BRIGHTNESS, CONTRAST, SATURATION, HUE])
    )
    brighten, contrast_it, saturate, turn, contrast_first = rng.random(5) < 0.5
    if brighten:
        pixels.add_(brightness).clamp_(0, 1)
    if contrast_it and contrast_first:
        pixels.mul_(contrast).clamp_(0, 1)
    if saturate:
        scale_saturation(pixels, saturation)
    if turn:
        turn_hue(pixels[None], torch.full((1, 1, 1, 1), hue))
    if contrast_it and not contrast_first:
        pixels.mul_(contrast).clamp_(0, 1)


def scale_saturation(pixels: Tensor, factor: float) -> None:
    """Multiplies the saturation of HSV, up to its limit: a pixel's channels part from the largest of them.

    Args:
        pixels: RGB from 0 to 1, [3, H, W], changed in place.
        factor: of the saturation.
    """
    value = pixels.amax(0, keepdim=True)
    chroma = value - pixels.amin(0, keepdim=True)
    most = value / chroma.clamp_(min=1 / 1024)  # the factor that makes the smallest channel 0
    torch.sub(value, pixels, out=pixels).mul_(most.clamp_(max=factor)).sub_(value).neg_()


def as_tensor(image: Image.Image) -> Tensor:
    """Makes float32 [3, H, W], from 0 to 1, of an RGB image."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous() / 255


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalises float32 [3, H, W] in place, and returns it."""
    return pixels.sub_(torch.tensor(mean)[:, None, None]).div_(torch.tensor(std)[:, None, None])
