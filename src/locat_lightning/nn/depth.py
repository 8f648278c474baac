"""From patch features to depth: a linear head over bins, and its losses at full size.

Sources: the linear evaluation of depth in DINOv2 (Oquab et al. 2024), with the bins of AdaBins (Bhat et al.
2021), of one width; its `SigLoss` and `GradientLoss` in github.com/facebookresearch/dinov2. The latter slices
[B, 1, H, W] by its first two dimensions, batch and channel; `gradient_loss` compares pixels, in height and
width.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPSILON = 1e-3  # metres, added to depths before their logarithm
STRIDES = (1, 2, 4, 6)  # of the pixels that the loss of gradients compares


class DepthDecoder(nn.Module):
    """1×1 convolution to bins of depth, whose weights are relu + 0.1 divided by their sum.

    Maps patch features [B, D, h, w] to depths [B, 4h, 4w] in metres. The features are upsampled bilinearly by
    4: here what the convolution makes of them, which is the same. The depths are float32 in any precision of
    the weights: in bfloat16 they would be rounded by up to 3 cm.

    Args:
        features: D.
        bins: number of the bins, whose depths are evenly spaced.
        nearest: depth of the first, in metres.
        farthest: depth of the last, in metres.
    """

    def __init__(self, features: int, bins: int = 256, nearest: float = 1e-3, farthest: float = 10.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(features, bins, 1)
        self.nearest, self.farthest = nearest, farthest  # no buffer, whose type would be that of the weights

    def forward(self, features: Tensor) -> Tensor:
        logits = self.conv(features).float()
        with torch.autocast(logits.device.type, enabled=False):
            weights = F.interpolate(logits, scale_factor=4, mode="bilinear").relu() + 0.1
            bins = torch.linspace(
                self.nearest, self.farthest, weights.shape[1], dtype=weights.dtype, device=weights.device
            )
            depths: Tensor = torch.einsum("bkhw,k->bhw", weights, bins) / weights.sum(1)
        return depths


def scale_invariant_loss(
    predicted: Tensor, depths: Tensor, *, farthest: float = 10.0, with_variance: bool = True
) -> Tensor:
    """Return √(var g + 0.15 · mean² g) of g = log(predicted / measured), over all measured pixels of a batch.

    Depths [B, H, W] are in metres, 0 where not measured; those beyond `farthest` do not count either. Without
    the variance, as in the first steps, the loss says only that depths are too large or too small on average.
    0 where nothing is measured. The variance is that of a sample.
    """
    valid = measured(depths, farthest)
    g = _log_ratio(predicted, depths, valid)
    number = valid.sum().clamp(min=1)
    mean = g.sum() / number
    if not with_variance:
        return math.sqrt(0.15) * mean.abs()
    variance = ((g - mean) ** 2 * valid).sum() / (number - 1).clamp(min=1)
    loss: Tensor = (variance + 0.15 * mean**2).clamp(min=1e-12).sqrt()  # whose gradient at 0 is infinite
    return loss


def gradient_loss(predicted: Tensor, depths: Tensor, *, farthest: float = 10.0) -> Tensor:
    """Return how much log(predicted / measured) differs between pixels two apart, at several resolutions.

    Of each resolution, every 1st, 2nd, 4th and 6th pixel, it is the sum of absolute differences in height and
    width where both pixels are measured, divided by the number of measured pixels.
    """
    losses = []
    for stride in STRIDES:
        small, true = predicted[:, ::stride, ::stride], depths[:, ::stride, ::stride]
        valid = measured(true, farthest)
        g = _log_ratio(small, true, valid)
        down = (g[:, :-2] - g[:, 2:]).abs() * (valid[:, :-2] & valid[:, 2:])
        across = (g[:, :, :-2] - g[:, :, 2:]).abs() * (valid[:, :, :-2] & valid[:, :, 2:])
        losses.append((down.sum() + across.sum()) / valid.sum().clamp(min=1))
    return torch.stack(losses).sum()


def measured(depths: Tensor, farthest: float) -> Tensor:
    """Return where a depth in metres is measured, and not beyond `farthest`."""
    return (depths > 0) & (depths <= farthest)


def _log_ratio(predicted: Tensor, depths: Tensor, valid: Tensor) -> Tensor:
    """Return log((predicted + ε) / (measured + ε)), 0 where not valid."""
    return ((predicted.float() + EPSILON).log() - (depths + EPSILON).log()).where(valid, 0)
