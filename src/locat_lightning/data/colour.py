"""DINO's colour augmentation for a batch of uint8 crops, with random parameters of their own for each crop.

The random numbers are drawn beside the crops (`draw_colour`); what they do to the pixels (`apply_colour`) is
a pure function that runs on any device and never waits for it. A resumed run therefore sees the same views.

Source: `DataAugmentationDINO` in `main_dino.py` of github.com/facebookresearch/dino.
"""

import importlib.util
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from itertools import permutations

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

# Columns of a colour parameter tensor. A neutral value (1, 1, 1, 0; 0 elsewhere) leaves the crop as it is.
BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, GRAYSCALE, SIGMA, SOLARIZE = range(8)
NEUTRAL = (1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)

JITTER_PROBABILITY = 0.8
JITTER_RANGES = ((0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1))  # of the columns BRIGHTNESS to HUE
JITTER_ORDERS = tuple(permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE)))
# A sequence that has every order of the three operations on single pixels as a part, and the dear one once.
SLOTS = [BRIGHTNESS, SATURATION, BRIGHTNESS, HUE, BRIGHTNESS, SATURATION, BRIGHTNESS]
GRAYSCALE_PROBABILITY = 0.2
BLUR_SIGMAS = (0.1, 2.0)  # pixels
BLUR_REACH = 6  # pixels that the widest of these blurs reaches to each side
BLOCK = 48  # rows of a banded matrix product at once
SOLARIZE_THRESHOLD = 128 / 255

LUMA = (0.2989, 0.587, 0.114)  # torchvision's weights of red, green and blue


def draw_colour(rng: np.random.Generator, blur: Sequence[float], solarize: Sequence[float]) -> Tensor:
    """Draw what happens to the colours of an image's V views, blurred and solarized with V probabilities.

    Returns:
        float32 [V, 8], columns `BRIGHTNESS` to `SOLARIZE`: three factors, a shift of the hue in turns, the
        index into `JITTER_ORDERS`, 1 for grayscale, the blur's sigma in pixels, 1 for solarize. Neutral where
        not applied.
    """
    views = len(blur)
    low, high = np.transpose(JITTER_RANGES)
    parameters = np.tile(np.array(NEUTRAL, dtype=np.float32), (views, 1))
    values, order = rng.uniform(low, high, (views, 4)), rng.integers(len(JITTER_ORDERS), size=(views, 1))
    jitter = np.concatenate([values, order], axis=1)
    jittered = rng.random(views) < JITTER_PROBABILITY
    parameters[jittered, : ORDER + 1] = jitter[jittered]
    parameters[:, GRAYSCALE] = rng.random(views) < GRAYSCALE_PROBABILITY
    parameters[:, SIGMA] = rng.uniform(*BLUR_SIGMAS, views) * (rng.random(views) < np.asarray(blur))
    parameters[:, SOLARIZE] = rng.random(views) < np.asarray(solarize)
    return torch.from_numpy(parameters)


def apply_colour(crops: Tensor, parameters: Tensor) -> Tensor:
    """Jitter, grayscale, blur, solarize and normalise crops, each by its own parameters.

    A CPU takes crop by crop, in its cache, and runs the operations that each needs. A GPU takes all together,
    and is never waited for.

    Args:
        crops: uint8 [N, 3, S, S] on any device.
        parameters: float32 [N, 8] on the CPU, from `draw_colour`.

    Returns:
        float32 [N, 3, S, S] on the crops' device. Unlike PIL, nothing rounds to 1/255 between operations.
    """
    augment = _augment_one_by_one if crops.device.type == "cpu" else _augment_together
    normalisation = torch.tensor([IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD])
    mean, std = _beside(crops, normalisation)[..., None, None]
    with torch.autocast(crops.device.type, enabled=False):  # a blur in bfloat16 would round to 1/256
        return augment(crops, parameters, mean, std)


def _beside(crops: Tensor, x: Tensor) -> Tensor:
    """Move x to the crops' device; only CUDA, whose stream keeps copy and use in order, need not wait."""
    return x.to(crops.device, non_blocking=crops.is_cuda)


def _used() -> Tensor:
    """Return which `SLOTS` each of `JITTER_ORDERS` takes, before and after its contrast: bool [24, 2, 7]."""
    used = torch.zeros(len(JITTER_ORDERS), 2, len(SLOTS), dtype=torch.bool)
    for order, columns in enumerate(JITTER_ORDERS):
        contrast = columns.index(CONTRAST)
        for half, own in enumerate((columns[:contrast], columns[contrast + 1 :])):
            slot = 0
            for column in own:
                slot = SLOTS.index(column, slot)
                used[order, half, slot] = True
    return used


_USED = _used()


def _steps(parameters: list[float]) -> list[tuple[int, int]]:
    """Return the operations on one crop as (step, column), first the jitter in its order."""
    columns = (*JITTER_ORDERS[int(parameters[ORDER])], GRAYSCALE, SIGMA, SOLARIZE)
    return [(step, column) for step, column in enumerate(columns) if parameters[column] != NEUTRAL[column]]


def _augment_one_by_one(crops: Tensor, parameters: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    x = torch.empty(crops.shape)
    blurred = parameters[parameters[:, SIGMA] > 0, SIGMA, None, None, None]
    bands = iter(_blur_bands(crops.shape[-1], blurred).split(1))
    arguments = parameters[..., None, None, None, None].unbind()
    rows = zip(x.split(1), crops.split(1), parameters.tolist(), arguments, strict=True)
    for crop, source, row, values in rows:
        torch.mul(source, 1 / 255, out=crop)
        for _, column in _steps(row):
            _OPERATIONS[column](crop, next(bands) if column == SIGMA else values[column])
        crop.sub_(mean).div_(std)
    return x


def _augment_together(crops: Tensor, parameters: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Augment all crops at once: each goes through all operations, those that it has not with neutral values.

    The jitter before the contrast and that after it are two passes through `SLOTS`.
    """
    orders = parameters[:, ORDER].long()
    slots = torch.where(_USED[orders], parameters[:, None, SLOTS], torch.tensor(NEUTRAL)[SLOTS])
    values = _beside(crops, torch.cat([slots.flatten(1), parameters], 1))
    return _compiled(crops.device.type)(crops, values, mean, std)


def _augment(crops: Tensor, values: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Augment crops by values [N, 14 + 8]: of `SLOTS` before and after the contrast, and the parameters."""
    columns = values[..., None, None, None].unbind(1)
    before, after, own = columns[: len(SLOTS)], columns[len(SLOTS) : -len(NEUTRAL)], columns[-len(NEUTRAL) :]
    x = _in_slots(crops * (1 / 255), before)
    _contrast(x, own[CONTRAST])
    x = _in_slots(x, after)
    x = torch.where(own[GRAYSCALE] > 0, _luma(x), x)
    _blur(x, _blur_bands(x.shape[-1], own[SIGMA]))
    x = torch.where((own[SOLARIZE] > 0) & (x >= SOLARIZE_THRESHOLD), 1 - x, x)
    return x.sub_(mean).div_(std)


def _in_slots(x: Tensor, values: Sequence[Tensor]) -> Tensor:
    for column, value in zip(SLOTS, values, strict=True):
        before = x.clone() if column == HUE else x
        _OPERATIONS[column](x, value)
        if column == HUE:  # the others leave the pixels exactly as they are if the value is neutral
            x = torch.where(value != 0, x, before)
    return x


@cache
def _compiled(device: str) -> Callable[..., Tensor]:
    """Return `_augment`, compiled where that is quick: on CUDA, a graph for each size of crops."""
    triton = importlib.util.find_spec("triton") is not None and any(map(shutil.which, ("cc", "gcc", "clang")))
    return torch.compile(_augment, dynamic=False) if device == "cuda" and triton else _augment


# Each operation changes crops [N, 3, S, S] in place by values [N, 1, 1, 1]. Arithmetic stands where
# torch.where would read better, since that takes ten times as long on a CPU.


def _luma(x: Tensor) -> Tensor:
    """Compute the brightness that the eye sees: [N, 3, H, W] -> [N, 1, H, W]."""
    red, green, blue = x.chunk(3, dim=1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def _brightness(x: Tensor, factor: Tensor) -> None:
    x.mul_(factor).clamp_(0, 1)


def _contrast(x: Tensor, factor: Tensor) -> None:
    mean = _luma(x.mean((2, 3), keepdim=True))
    x.mul_(factor).add_(mean.mul_(1 - factor)).clamp_(0, 1)


def _saturation(x: Tensor, factor: Tensor) -> None:
    x.lerp_(_luma(x), 1 - factor).clamp_(0, 1)


def turn_hue(x: Tensor, turns: Tensor) -> None:
    """Turn the hue of RGB pixels [N, 3, H, W] from 0 to 1, in place, by [N, 1, 1, 1] of at most 1/6 turn.

    With u, v, w = (red, green, blue - smallest) / chroma, one of them 0 and one 1, the hue in sixths of a
    turn, -3 to 3 with red at 0, is ±(1 - u + v + w), positive where green is above blue. A channel is at its
    largest within one sixth of its own hue and at its smallest from two sixths on.
    """
    red, green, blue = x.chunk(3, dim=1)
    largest, smallest = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = largest - smallest
    hue = (green + blue).sub_(red).sub_(smallest).div_(chroma.clamp_min(torch.finfo(x.dtype).tiny)).add_(1)
    hue.copysign_(green - blue).add_(turns, alpha=6)
    red.copy_(largest.add_(chroma)).addcmul_(chroma, hue.abs().clamp_(1, 2), value=-1)
    green_and_blue = torch.arange(2, -3, -4, device=x.device)[:, None, None]  # their hues: 2 and -2
    distance = (hue - green_and_blue).abs_().sub_(3).abs_().clamp_(1, 2)
    x[:, 1:].copy_(smallest.sub_(chroma)).addcmul_(chroma, distance)


def _grayscale(x: Tensor, _: Tensor) -> None:
    x.copy_(_luma(x))


def _blur(x: Tensor, band: Tensor) -> None:
    """Blur the lines of both axes by a matrix of `_blur_bands`, [N, 1, S, S]."""
    planes, bands = x.view(-1, *x.shape[2:]), band.expand(-1, x.shape[1], -1, -1).flatten(0, 1)
    lines = torch.empty_like(planes)
    _banded_product(bands, planes.mT, lines.mT)
    _banded_product(bands, lines, planes)


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Blur crops [N, C, S, S] in place, each by its own sigma [N] in pixels, and return them."""
    _blur(x, _blur_bands(x.shape[-1], sigma[:, None, None, None]))
    return x


def _banded_product(band: Tensor, x: Tensor, out: Tensor) -> None:
    """Multiply by matrices [N, S, S] that are 0 beyond `BLUR_REACH` of their diagonals; skip most zeros."""
    for start in range(0, band.shape[-1], BLOCK):
        rows = slice(start, start + BLOCK)
        near = slice(max(0, start - BLUR_REACH), start + BLOCK + BLUR_REACH)
        out[:, rows].baddbmm_(band[:, rows, near], x[:, near], beta=0)


def _blur_bands(size: int, sigma: Tensor) -> Tensor:
    """Return the blur of a line of pixels as a banded matrix: [N, 1, 1, 1] -> [N, 1, size, size].

    It is PIL's `GaussianBlur` without its rounding: three box blurs, the border pixels extended before
    each. A box reaches `whole` pixels to each side, and one more with weight `part` (Gwosdek et al.,
    "Theoretical foundations of Gaussian convolution by extended box filtering", 2011).
    """
    reach, window = BLUR_REACH, 2 * BLUR_REACH + 1
    if size > window:  # only the rows nearest to the border differ by more than a shift
        small = _blur_bands(window, sigma)
        line = F.pad(small[..., reach, :], [size - reach - 1] * 2)
        bands = line.unfold(-1, size, 1).flip(-2)
        bands[..., :reach, :window] = small[..., :reach, :]
        bands[..., -reach:, -window:] = small[..., -reach:, :]
        return bands
    variance = sigma.square() / 3
    whole = ((12 * variance + 1).sqrt().sub_(1) / 2).floor_()
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1).square()))
    offset = torch.arange(-size, size, device=sigma.device, dtype=sigma.dtype)
    inner = torch.minimum((offset + whole + 1).clamp_(min=0), 2 * whole + 1)
    outer = (offset + whole + 2).clamp_(0, 1) + (offset - whole).clamp_(0, 1)
    up_to = (inner + part * outer) / (2 * (whole + part) + 1)  # sum of the weights up to each offset
    lines = up_to[..., 0, :].unfold(-1, size + 1, 1).flip(-2)  # row i: offsets from -i-1 to size-i-1
    lines[..., 0], lines[..., -1] = 0, 1  # the first and the last pixel stand for all beyond them
    box = lines.diff()
    return box @ box @ box


def _solarize(x: Tensor, _: Tensor) -> None:
    x.copy_(torch.where(x >= SOLARIZE_THRESHOLD, 1 - x, x))


_OPERATIONS: dict[int, Callable[[Tensor, Tensor], None]] = {
    BRIGHTNESS: _brightness,
    CONTRAST: _contrast,
    SATURATION: _saturation,
    HUE: turn_hue,
    GRAYSCALE: _grayscale,
    SIGMA: _blur,
    SOLARIZE: _solarize,
}
