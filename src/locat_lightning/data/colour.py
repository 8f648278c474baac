"""DINO's colour augmentation for a batch of uint8 crops, with random parameters of their own for each crop.

The random numbers are drawn beside the crops (`draw_colour`); what they do to the pixels (`apply_colour`) is
a pure function that runs on any device and never waits for it. A resumed run therefore sees the same views.

Source: `DataAugmentationDINO` in `main_dino.py` of github.com/facebookresearch/dino.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
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

    Every operation runs only for the crops that need it. On a GPU those with the same operation at the same
    step are gathered, by indices that are known on the CPU: the device is never waited for. A CPU takes crop
    by crop, in its cache.

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
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row, values in enumerate(parameters.tolist()):
        for step in _steps(values):
            groups[step].append(row)
    steps = sorted(groups)
    flat = torch.tensor([row for step in steps for row in groups[step]], dtype=torch.long)
    rows = _beside(crops, flat).split([len(groups[step]) for step in steps])
    on_device = _beside(crops, parameters)

    x = torch.mul(crops.contiguous(), 1 / 255)
    for (_, column), r in zip(steps, rows, strict=True):
        part, values = x[r], on_device[r, column, None, None, None]
        _OPERATIONS[column](part, _blur_bands(x.shape[-1], values) if column == SIGMA else values)
        x[r] = part
    return x.sub_(mean).div_(std)


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
    torch.addcmul(largest.add_(chroma), chroma, hue.abs().clamp_(1, 2), value=-1, out=red)
    green_and_blue = torch.arange(2, -3, -4, device=x.device)[:, None, None]  # their hues: 2 and -2
    distance = (hue - green_and_blue).abs_().sub_(3).abs_().clamp_(1, 2)
    torch.addcmul(smallest.sub_(chroma), chroma, distance, out=x[:, 1:])


def _grayscale(x: Tensor, _: Tensor) -> None:
    x.copy_(_luma(x))


def _blur(x: Tensor, band: Tensor) -> None:
    """Blur the lines of both axes by a matrix of `_blur_bands`, [N, 1, S, S]."""
    planes, bands = x.view(-1, *x.shape[2:]), band.expand(-1, 3, -1, -1).flatten(0, 1)
    lines = torch.empty_like(planes)
    _banded_product(bands, planes.mT, lines.mT)
    _banded_product(bands, lines, planes)


def _banded_product(band: Tensor, x: Tensor, out: Tensor) -> None:
    """Multiply by matrices [N, S, S] that are 0 beyond `BLUR_REACH` of their diagonals; skip most zeros."""
    for start in range(0, band.shape[-1], BLOCK):
        rows = slice(start, start + BLOCK)
        near = slice(max(0, start - BLUR_REACH), start + BLOCK + BLUR_REACH)
        torch.bmm(band[:, rows, near], x[:, near], out=out[:, rows])


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
