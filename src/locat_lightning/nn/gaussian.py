"""Gaussian augmentation (GAug): each patch's query says how far, and how strongly, it looks around itself.

Source: "Locality-Attending Vision Transformer" (ICLR 2026), the section on Gaussian-augmented attention.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# A factor of 1e-10 beside 1 is beneath float32's resolution of a logit. Smaller ones, left alone, make
# denormal numbers, with which a CPU computes several times slower.
_LEAST_EXPONENT = -23.0


class PatchGrid:
    """The patch grid (rows, columns) of the images under way, shared by all layers of one model.

    A layer sees a sequence, not a grid. This object is a forward hook of the model's patch embedding and
    remembers the grid of each sequence length, so that a checkpointed block which is recomputed in the
    backward pass, after images of another size went through, still finds the grid of its own tokens.
    """

    def __init__(self, built_for: tuple[int, int]) -> None:
        self.built_for = built_for
        self._by_patches = {math.prod(built_for): built_for}

    def __call__(self, patch_embed: Any, inputs: tuple[Tensor, ...], patches: Tensor) -> None:
        """Take note of the grid: `patches` is [B, H, W, D] from a dynamic embedding, else [B, H·W, D]."""
        if patches.ndim == 4:
            rows, columns = patches.shape[1:3]
        else:
            rows, columns = patch_embed.grid_size
        if self._by_patches.get(rows * columns) != (rows, columns):
            self._by_patches[rows * columns] = (rows, columns)

    def of(self, patches: int) -> tuple[int, int]:
        """Rows and columns of a sequence of that many patches; `ValueError` if no such image was seen."""
        try:
            return self._by_patches[patches]
        except KeyError:
            raise ValueError(
                f"no image with {patches} patches went through the patch embedding (grids seen: "
                f"{sorted(self._by_patches.values())}); GAug needs every patch, so patch dropout has to be 0"
            ) from None


class Gaussians(NamedTuple):
    """The kernels of a layer's patches, each centred on its own patch.

    `slope` [B, h, H·W, 2] is −½ / (σ² + ε), vertical and horizontal; `log_alpha` [B, h, H·W, 1] is ln α; both
    float32. `grid` is (H, W), and `cap` bounds the squared distances.
    """

    slope: Tensor
    log_alpha: Tensor
    grid: tuple[int, int]
    cap: int


class GaussianAugmentation(nn.Module):
    """The query-dependent Gaussian kernel S of one attention layer.

    For a patch at (i, j) with query q, and a patch at (i', j'):

        z = q · Wσ + bσ ∈ R²                            σ² = C · sigmoid(z − ln(C − 1)),   C = max(H0, W0)²
        a = q · Wα + bα ∈ R                             α = softplus(a)
        S = α · exp(−½ ((i − i')² / (σ²_y + ε) + (j − j')² / (σ²_x + ε)))

    so that z = 0 is a variance of one patch. On another grid than (H0, W0), which the model was built for,
    variances are scaled by min(H, W) / min(H0, W0).

    Args:
        head_dim: Width d of one head's query; the maps are shared by all heads of the layer.
        device: Where the parameters are made.
        dtype: Type of the parameters.
    """

    def __init__(
        self, head_dim: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.log_var = nn.Linear(head_dim, 2, device=device, dtype=dtype)
        self.log_alpha = nn.Linear(head_dim, 1, device=device, dtype=dtype)

    def variance_and_alpha(
        self, q: Tensor, grid: tuple[int, int], built_for: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Kernels of the patches' queries, the last H·W of [B, h, N, d].

        Returns:
            σ² [B, h, H·W, 2] (vertical, horizontal; in squared patches) and α [B, h, H·W, 1], float32.
        """
        za = F.linear(
            q,
            torch.cat([self.log_var.weight, self.log_alpha.weight]),
            torch.cat([self.log_var.bias, self.log_alpha.bias]),
        )[:, :, -math.prod(grid) :].float()
        z, a = za.split([2, 1], dim=-1)
        largest = max(built_for) ** 2
        var = largest * torch.sigmoid(z - math.log(largest - 1) if largest > 2 else z)
        if grid != built_for:
            var = var * (min(grid) / min(built_for))
        return var, F.softplus(a)

    def forward(self, q: Tensor, grid: tuple[int, int], built_for: tuple[int, int]) -> Gaussians:
        """Kernels of the patches' queries.

        Args:
            q: Queries [B, h, N, d] after q-norm, before rotary embedding; the patches' are the last H·W.
            grid: (H, W) of these images.
            built_for: (H0, W0).
        """
        with torch.autocast(q.device.type, enabled=False):
            var, alpha = self.variance_and_alpha(q.to(self.log_var.weight.dtype), grid, built_for)
            log_alpha = alpha.clamp_min(torch.finfo(alpha.dtype).tiny).log()
            cap = min((max(built_for) - 1) ** 2, 13100)
            return Gaussians(-0.5 / (var + _epsilon(built_for)), log_alpha, grid, cap)


def factors(gaussians: Gaussians) -> tuple[Tensor, Tensor]:
    """The kernel's two factors: S[p, (i, j)] = y[p, i] · x[p, j], with α in y.

    The exponential of a sum is a product: this takes H + W exponentials a row instead of H · W, and nothing
    of size [B, h, N, N, 2].

    Returns:
        y [B, h, H·W, H] and x [B, h, H·W, W].
    """
    slope, log_alpha, (H, W), _ = gaussians
    d_y, d_x = squared_distances(gaussians)
    slope_y, slope_x = slope.unflatten(-2, (H, W)).unsqueeze(-1).unbind(-2)
    y = (slope_y * d_y[:, None, :]).clamp_min(_LEAST_EXPONENT).exp().flatten(-3, -2)
    x = (slope_x * d_x).clamp_min(_LEAST_EXPONENT).exp().flatten(-3, -2)
    return y * log_alpha.exp(), x


def gaussian_kernel(gaussians: Gaussians) -> Tensor:
    """S [B, h, H·W, H·W] of the patches among themselves, float32."""
    y, x = factors(gaussians)
    return (y.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2)


def squared_distances(gaussians: Gaussians) -> tuple[Tensor, Tensor]:
    """(i − i')² [H, H] between rows and (j − j')² [W, W] between columns, in squared patches, capped."""
    device, dtype = gaussians.slope.device, gaussians.slope.dtype
    rows, columns = (torch.arange(size, device=device, dtype=dtype) for size in gaussians.grid)
    return tuple((p[:, None] - p).square().clamp_max(gaussians.cap) for p in (rows, columns))  # type: ignore[return-value]


def _epsilon(built_for: tuple[int, int]) -> float:
    """What keeps a kernel's exponents within half precision: 0.1, doubled as long as the grid needs it."""
    epsilon = 0.1
    while 0.5 * (max(built_for) - 1) ** 2 / epsilon**2 > 32500:
        epsilon *= 2
    return epsilon
