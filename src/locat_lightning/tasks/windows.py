"""Logits of an image by sliding windows, as the segmentation protocols have it."""

from collections.abc import Callable, Iterator
from math import ceil

from torch import Tensor


def slide(
    logits: Callable[[Tensor], Tensor], images: Tensor, classes: int, window: int, stride: int
) -> Tensor:
    """Return logits [B, classes, H, W], averaged where windows overlap.

    `logits` maps windows [B, 3, h, w] of images [B, 3, H, W] to [B, classes, h, w]. Windows are squares of
    `window` pixels, one every `stride` pixels (at most `window`).
    """
    height, width = images.shape[-2:]
    total = images.new_zeros(len(images), classes, height, width)
    times = images.new_zeros(height, width)
    for top in _starts(height, window, stride):
        for left in _starts(width, window, stride):
            part = (..., slice(top, top + window), slice(left, left + window))
            total[part] += logits(images[part])
            times[part[1:]] += 1
    return total / times


def _starts(length: int, window: int, stride: int) -> Iterator[int]:
    """Yield where the windows along a side begin; the last one ends with the side."""
    for number in range(max(0, ceil((length - window) / stride)) + 1):
        yield max(0, min(number * stride, length - window))
