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

    The number of patches is all that it has to tell them apart: between the forward and the backward pass of
    a checkpointed block, no images may go through that have as many patches in another grid (4×9 and 6×6).
    The block would be recomputed with their grid. Without checkpointing nothing is recomputed.
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

    `slope` [2, B, h, H·W] is −½ / (σ² + ε), vertical and horizontal; `alpha` is α [B, h, H·W]; both float32.
    `grid` is (H, W), and `cap` bounds the squared distances.
    """

    slope: Tensor
    alpha: Tensor
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
            σ² [2, B, h, H·W] (vertical, horizontal; in squared patches) and α [B, h, H·W], float32.
        """
        za = torch.addmm(
            torch.cat([self.log_var.bias, self.log_alpha.bias]).unsqueeze(-1),
            torch.cat([self.log_var.weight, self.log_alpha.weight]),
            q.flatten(0, -2).mT,
        )
        z, a = za.unflatten(-1, q.shape[:-1])[..., -math.prod(grid) :].float().split([2, 1])
        largest = max(built_for) ** 2
        var = largest * torch.sigmoid(z - math.log(largest - 1) if largest > 2 else z)
        if grid != built_for:
            var = var * (min(grid) / min(built_for))
        return var, F.softplus(a.squeeze(0))

    def forward(self, q: Tensor, grid: tuple[int, int], built_for: tuple[int, int]) -> Gaussians:
        """Kernels of the patches' queries.

        Args:
            q: Queries [B, h, N, d] after q-norm, before rotary embedding; the patches' are the last H·W.
            grid: (H, W) of these images.
            built_for: (H0, W0).
        """
        with torch.autocast(q.device.type, enabled=False):
            var, alpha = self.variance_and_alpha(q.to(self.log_var.weight.dtype), grid, built_for)
            cap = min((max(built_for) - 1) ** 2, 13100)
            return Gaussians(-0.5 / (var + _epsilon(built_for)), alpha, grid, cap)


def distances(grid: tuple[int, int], prefix: int, cap: int, device: torch.device) -> Tensor:
    """From each token's place to the rows, (i − i')², and to the columns, (j − j')², of its grid.

    Args:
        grid: (H, W).
        prefix: Prefix tokens before the patches. They have no place: their rows are 0.
        cap: The largest value.
        device: Where the tensor is made.

    Returns:
        [N, H + W], float32.
    """
    H, W = grid
    i, j = (torch.arange(n, dtype=torch.float32, device=device) for n in grid)
    rows = (i.unsqueeze(-1) - i).square_().clamp_max_(cap).unsqueeze(1)
    columns = (j.unsqueeze(-1) - j).square_().clamp_max_(cap)
    of_patches = torch.cat([rows.expand(H, W, H), columns.expand(H, W, W)], dim=-1).flatten(0, 1)
    return F.pad(of_patches, (0, 0, prefix, 0)) if prefix else of_patches


def factors(gaussians: Gaussians, squares: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel's two factors: S[p, (i, j)] = y[p, i] · x[p, j], with α in y, which is 0 of prefix tokens.

    The exponential of a sum is a product: this takes H + W exponentials a row instead of H · W, and nothing
    of size [B, h, N, N, 2].

    Args:
        gaussians: Of the last H·W tokens.
        squares: (i − i')² and (j − j')² [N, H + W], capped.

    Returns:
        y [B, h, N, H] and x [B, h, N, W].
    """
    prefix = len(squares) - gaussians.alpha.shape[-1]
    slope, alpha = (F.pad(each, (prefix, 0)).unsqueeze(-1) for each in gaussians[:2])
    y, x = (
        (a * d).clamp_min_(_LEAST_EXPONENT).exp_()
        for a, d in zip(slope, squares.split(gaussians.grid, dim=-1), strict=True)
    )
    return y * alpha, x


def gaussian_kernel(gaussians: Gaussians) -> Tensor:
    """S [B, h, H·W, H·W] of the patches among themselves, float32."""
    _, alpha, grid, cap = gaussians
    y, x = factors(gaussians, distances(grid, 0, cap, alpha.device))
    return (y.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2)


def _epsilon(built_for: tuple[int, int]) -> float:
    """What keeps a kernel's exponents within half precision: 0.1, doubled as long as the grid needs it."""
    epsilon = 0.1
    while 0.5 * (max(built_for) - 1) ** 2 / epsilon**2 > 32500:
        epsilon *= 2
    return epsilon
