"""Logits of an image by sliding windows, and their mean over scales, as segmentation protocols have it."""

from collections.abc import Callable, Iterator, Sequence
from math import ceil

import torch
from torch import Tensor
from torch.nn import functional as F

# Of windows that are computed together, but at least those of one.
LOGITS_AT_ONCE = 2**28
PIXELS_AT_ONCE = 2**22


def slide(
    logits: Callable[[Tensor], Tensor], images: Tensor, channels: int, window: int, stride: int
) -> Tensor:
    """Return logits [B, channels, H, W] float32, averaged where windows overlap.

    `logits` maps windows [N, 3, h, w] of images [B, 3, H, W] to [N, channels, h, w]. Windows are squares of
    `window` pixels, one every `stride` pixels (at most `window`); those of all images are computed together,
    as far as memory allows (`LOGITS_AT_ONCE`, `PIXELS_AT_ONCE`).
    """
    height, width = images.shape[-2:]
    total = images.new_zeros(len(images), channels, height, width, dtype=torch.float32)
    times = images.new_zeros(height, width)
    places = [
        (slice(top, top + window), slice(left, left + window))
        for top in _starts(height, window, stride)
        for left in _starts(width, window, stride)
    ]
    for rows, columns in places:
        times[rows, columns] += 1
    parts = [(number, ..., *place) for number in range(len(images)) for place in places]
    pixels = min(window, height) * min(window, width)
    some = max(1, min(LOGITS_AT_ONCE // (channels * pixels), PIXELS_AT_ONCE // pixels))
    for start in range(0, len(parts), some):
        together = parts[start : start + some]
        found = logits(torch.stack([images[part] for part in together]))
        for part, of_window in zip(together, found, strict=True):
            total[part] += of_window
    return total / times


def _starts(length: int, window: int, stride: int) -> Iterator[int]:
    """Yield where the windows along a side begin; the last one ends with the side."""
    for number in range(max(0, ceil((length - window) / stride)) + 1):
        yield max(0, min(number * stride, length - window))


def over_scales(
    logits: Callable[[Tensor], Tensor], images: Tensor, classes: int, scales: Sequence[float], flip: bool
) -> Tensor:
    """Return the mean probabilities of classes over scaled images, and mirrored ones if `flip`.

    `logits` maps images [B, 3, h, w] of any size to logits [B, n · classes, h, w], of n heads with `classes`
    each; what is returned has the size of `images`. Logits are resized before the softmax.

    Source: `SegTTAModel` of github.com/open-mmlab/mmsegmentation. It scales the image file; here what is
    scaled is `images`.
    """
    size = images.shape[-2:]
    total: Tensor | None = None
    for scale in scales:
        scaled = images
        if scale != 1:
            sides = [max(1, round(side * scale)) for side in size]
            scaled = F.interpolate(images.float(), sides, mode="bilinear", antialias=True).to(images.dtype)
        for mirrored in (False, True) if flip else (False,):
            found = logits(scaled.flip(-1) if mirrored else scaled)
            found = F.interpolate(found.flip(-1) if mirrored else found, size, mode="bilinear")
            shares = found.unflatten(1, (-1, classes)).softmax(2).flatten(1, 2)
            total = shares if total is None else total.add_(shares)
    assert total is not None
    return total / (len(scales) * (1 + flip))
