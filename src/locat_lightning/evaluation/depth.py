"""Errors of predicted depths: of each image, and their means over a data set.

Source: Eigen et al., "Depth Map Prediction from a Single Image using a Multi-Scale Deep Network" (2014).
"""

from typing import ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

EIGEN_CROP = (45 / 480, 471 / 480, 41 / 640, 601 / 640)  # first and last row, first and last column


def depth_errors(predicted: Tensor, depths: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """Return the errors of each image, [B] float32, NaN for one without valid pixels.

    Predicted and measured depths [B, H, W] are positive where valid, in metres.

    Returns:
        `rmse` in metres; `abs_rel`, the mean of |predicted − measured| / measured; `log10`, that of the
        difference of their logarithms; `delta1` to `delta3`, the share of pixels whose larger depth is less
        than 1.25, 1.25², 1.25³ times the smaller.
    """
    number = valid.sum((1, 2))

    def mean(values: Tensor) -> Tensor:
        return values.where(valid, 0).sum((1, 2)) / number

    predicted, depths = (each.float().where(valid, 1) for each in (predicted, depths))
    ratio = torch.maximum(predicted / depths, depths / predicted)
    return {
        "rmse": mean((predicted - depths) ** 2).sqrt(),
        "abs_rel": mean((predicted - depths).abs() / depths),
        "log10": mean((predicted.log10() - depths.log10()).abs()),
    } | {f"delta{power}": mean((ratio < 1.25**power).float()) for power in (1, 2, 3)}


def eigen_crop(depths: Tensor) -> Tensor:
    """Return which pixels of [B, H, W] are in the crop that is evaluated on NYUv2: [H, W] bool.

    It is [45:471, 41:601] of 480 × 640 pixels, and the same share of another size.
    """
    height, width = depths.shape[1:]
    rows, columns = (torch.arange(side, device=depths.device) for side in (height, width))
    top, bottom, left, right = EIGEN_CROP
    inside = (rows >= round(top * height)) & (rows < round(bottom * height))
    return inside[:, None] & (columns >= round(left * width)) & (columns < round(right * width))


class DepthErrors(Metric):
    """Means over the images of a data set, of all processes; images without valid pixels do not count."""

    NAMES: ClassVar[tuple[str, ...]] = ("rmse", "abs_rel", "log10", "delta1", "delta2", "delta3")

    is_differentiable = False
    full_state_update = False

    sums: Tensor
    images: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(len(self.NAMES), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, depths: Tensor, valid: Tensor) -> None:
        """Add images; arguments are those of `depth_errors`."""
        found = depth_errors(predicted, depths, valid)
        counts = valid.any(2).any(1)
        self.sums += torch.stack([found[name].where(counts, 0).sum() for name in self.NAMES]).double()
        self.images += counts.sum()

    def compute(self) -> dict[str, Tensor]:
        """Return the mean of each error, NaN if there is no image."""
        means = (self.sums / self.images).float()
        return dict(zip(self.NAMES, means, strict=True))
