"""Errors of predicted depths, of each image.

Source: Eigen et al., "Depth Map Prediction from a Single Image using a Multi-Scale Deep Network" (2014).
"""

import torch
from torch import Tensor

NAMES = ("rmse", "abs_rel", "log10", "delta1", "delta2", "delta3")
EIGEN_CROP = (45 / 480, 471 / 480, 41 / 640, 601 / 640)  # first and last row, first and last column


def depth_errors(predicted: Tensor, depths: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """Return the errors of each image, [B] float32, NaN for one without valid pixels.

    Predicted and measured depths [B, H, W] are positive where valid, in metres.

    Returns:
        `rmse` in metres; `abs_rel`, the mean of |predicted − measured| / measured; `log10`, that of the
        difference of their logarithms; `delta1` to `delta3`, the share of pixels whose larger depth is less
        than 1.25, 1.25², 1.25³ times the smaller. They are in the order of `NAMES`.
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
