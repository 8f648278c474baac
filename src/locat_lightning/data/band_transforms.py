"""Transforms of images of any number of channels: where they are cut, and the jitter of each channel.

Pixels are float32, in standard deviations from each channel's mean. Jitter gives each channel a gain about
its own mean in the image, and an offset: what light, exposure and staining change, and no more. It has no
hue, grey or inversion, which mean nothing between channels that are no colours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor

import numpy as np
import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import RandomResizedCrop
from torchvision.transforms.v2.functional import center_crop, resize, resized_crop

from locat_lightning.data.bands import Bands
from locat_lightning.data.colour import BLUR_SIGMAS, JITTER_PROBABILITY, blur
from locat_lightning.errors import InputError

ON_TENSORS = ("nearest", "bilinear", "bicubic")  # interpolations that torchvision has for them


@dataclass(frozen=True)
class BandEvaluation:
    """Resize so that the shorter side is `img_size / crop_pct`, and crop the centre: [C, side, side]."""

    img_size: int
    crop_pct: float = 0.875
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        if self.interpolation not in ON_TENSORS:
            known = ", ".join(ON_TENSORS)
            raise InputError(f"data.eval_interpolation {self.interpolation!r}: of channels, one of {known}")

    def __call__(self, image: Bands) -> Tensor:
        how = InterpolationMode(self.interpolation)
        resized = resize(image.pixels, [floor(self.img_size / self.crop_pct)], how, antialias=True)
        pixels: Tensor = center_crop(resized, [self.img_size, self.img_size])
        return pixels


@dataclass(frozen=True)
class BandAugmentation:
    """Crop at random, flip, jitter the channels and erase a part, as options of `ImageData` say.

    `interpolation` other than bilinear is bicubic.
    """

    img_size: int
    scale: tuple[float, float]
    ratio: tuple[float, float]
    hflip: float
    jitter: float
    erasing: float
    interpolation: str = "bicubic"

    def __call__(self, image: Bands) -> Tensor:
        side, how = [self.img_size] * 2, "bilinear" if self.interpolation == "bilinear" else "bicubic"
        box = RandomResizedCrop(side, self.scale, self.ratio).make_params([image.pixels])
        crop = [box[name] for name in ("top", "left", "height", "width")]
        pixels: Tensor = resized_crop(image.pixels, *crop, side, InterpolationMode(how), antialias=True)
        if torch.rand(()) < self.hflip:
            pixels = pixels.flip(-1)
        pixels = jittered(pixels, self.jitter)
        erased: Tensor = RandomErasing(self.erasing, mode="pixel", device="cpu")(pixels)
        return erased


def jittered(pixels: Tensor, strength: float) -> Tensor:
    """Jitter the channels of an image [C, H, W] by torch's random numbers: see `draw_jitter`."""
    if not strength:
        return pixels
    gain, offset = torch.empty(2, len(pixels), 1, 1).uniform_(-strength, strength)
    mean = pixels.mean((1, 2), keepdim=True)
    changed: Tensor = (pixels - mean) * (1 + gain) + mean + offset
    return changed


def draw_jitter(rng: np.random.Generator, blur: Sequence[float], channels: int, strength: float) -> Tensor:
    """Draw what happens to the channels of an image's V views, blurred with V probabilities.

    Returns:
        float32 [V, 2 C + 1]: the channels' gains, from 1 - strength to 1 + strength, their offsets, up to
        `strength` standard deviations, and the blur's sigma in pixels. Neutral (`no_jitter`) where not
        applied: one view in five is not jittered.
    """
    views = len(blur)
    drawn = rng.uniform(-strength, strength, (views, 2, channels))
    drawn *= rng.random((views, 1, 1)) < JITTER_PROBABILITY
    sigma = rng.uniform(*BLUR_SIGMAS, views) * (rng.random(views) < np.asarray(blur))
    parameters = np.concatenate([1 + drawn[:, 0], drawn[:, 1], sigma[:, None]], axis=1)
    return torch.from_numpy(parameters.astype(np.float32))


def no_jitter(views: int, channels: int) -> Tensor:
    """Return the parameters that leave V views as they are."""
    return torch.cat([torch.ones(views, channels), torch.zeros(views, channels + 1)], dim=1)


def apply_jitter(crops: Tensor, parameters: Tensor) -> Tensor:
    """Jitter and blur crops, each by its own parameters, on any device, without waiting for it.

    Args:
        crops: float32 [N, C, S, S].
        parameters: float32 [N, 2 C + 1] on the CPU, from `draw_jitter`.

    Returns:
        float32 [N, C, S, S], new.
    """
    channels = crops.shape[1]
    beside = parameters.to(crops.device, non_blocking=crops.is_cuda)[..., None, None]
    gain, offset, _ = beside.split([channels, channels, 1], dim=1)
    mean = crops.mean((2, 3), keepdim=True)
    crops = (crops - mean).mul_(gain).add_(mean).add_(offset)
    blurred = parameters[:, -1].nonzero().flatten()
    if len(blurred):
        places = blurred.to(crops.device, non_blocking=crops.is_cuda)
        crops[places] = blur(crops[places], parameters[blurred, -1].to(crops.device))
    return crops
