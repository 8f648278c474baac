"""How many dimensions features use: a sign of collapse that needs no labels."""

import torch
from torch import Tensor
from torch.nn import functional as F

ROUNDING = 1e-5  # of a feature of length 1, in float32, with room to spare


def effective_rank(features: Tensor) -> Tensor:
    """Compute the effective rank of normalised, centred features: exp of their singular values' entropy.

    Each feature is scaled to length 1, then the mean is subtracted; the singular values are divided by their
    sum. k directions of equal strength give k. Computed in float32, with autocast too. On a GPU the singular
    values make the host wait for the device.

    Source: "The effective rank: A measure of effective dimensionality" (Roy & Vetterli, EUSIPCO 2007).

    Args:
        features: [N, D], one for each image.

    Returns:
        A float32 scalar on the features' device, from 1 (all alike, or on one line) to min(N - 1, D); NaN if
        a feature is not finite.
    """
    if features.ndim != 2 or not features.numel():
        raise ValueError(f"features must be [N, D], neither of them 0, not {list(features.shape)}")
    directions = F.normalize(features.float(), dim=-1)
    finite = directions.isfinite().all()
    directions = torch.where(finite, directions, 0)
    values = torch.linalg.svdvals(directions - directions.mean(0))
    # Before they were centred, the largest singular value was at most √N: far below this is only rounding.
    rounding = ROUNDING * len(features) ** 0.5
    values = torch.where(values > rounding, values, 0)
    shares = values / values.sum().clamp_min(rounding)
    rank: Tensor = torch.where(finite, torch.special.entr(shares).sum().exp(), torch.nan)
    return rank
