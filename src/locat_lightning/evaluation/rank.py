"""Signs of quality that need no labels: dimensions that features use, patches that are alike or artefacts."""

import torch
from torch import Tensor
from torch.nn import functional as F

OUTLYING = 3.0  # norm of an artefact, as a multiple of the median
PATCHES = 2048  # whose effective rank is measured, at most
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


def patch_signs(features: Tensor, patches: Tensor) -> dict[str, Tensor]:
    """Measure how much the patches of an image differ from each other and from the image's own features.

    Args:
        features: [N, D], one for each image.
        patches: [N, n, D'], of the same images.

    Returns:
        float32 scalars: `patch_cosine`, the mean cosine of two patches of an image, near 1 where the patch
        features have collapsed; `patch_rank`, the effective rank of the patches of all images, of which
        2,048 are taken; and, if D' is D, `patch_cls_cosine`, the mean cosine of a patch and its image.

    Source of the first: "DINOv3" (Siméoni et al. 2025), on the degradation of dense features.
    """
    flat = patches.detach().flatten(0, 1)
    some = flat[:: -(-len(flat) // PATCHES)]
    signs = {"patch_cosine": patch_cosines(patches).mean(), "patch_rank": effective_rank(some)}
    if features.shape[-1] == patches.shape[-1]:
        signs["patch_cls_cosine"] = cosines_to(features, patches).mean()
    return signs


def patch_cosines(patches: Tensor) -> Tensor:
    """Return the mean cosine of two patches [N, n, D] of an image: [N] float32; 0 for a single patch."""
    directions, number = F.normalize(patches.detach().float(), dim=-1), patches.shape[1]
    # The squared length of a sum is the sum of all products; each patch has a cosine of 1 with itself.
    of_pairs: Tensor = (directions.sum(1).square().sum(-1) - number) / max(1, number * (number - 1))
    return of_pairs


def cosines_to(features: Tensor, patches: Tensor) -> Tensor:
    """Return the mean cosine of the patches [N, n, D] of an image and its features [N, D]: [N] float32."""
    cosines = F.cosine_similarity(patches.detach().float(), features.detach().float().unsqueeze(1), dim=-1)
    return cosines.mean(1)


def outlying_share(tokens: Tensor) -> Tensor:
    """Compute the share of patches whose norm is more than three times the median of all patches.

    In large models, such patches have given up their own content to hold that of the image.

    Source: "Vision Transformers Need Registers" (Darcet et al., ICLR 2024). Its cut-off is a norm of 150 for
    one model, whose other patches are below 100; relative to the median it holds for any.

    Args:
        tokens: [N, n, D], patches of the last block before the final norm.

    Returns:
        A float32 scalar.
    """
    norms = tokens.detach().float().norm(dim=-1)
    share: Tensor = (norms > OUTLYING * norms.median()).float().mean()
    return share
