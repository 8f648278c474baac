"""Gaussian augmentation (GAug): each patch's query says how far, and how strongly, it looks around itself.

Source: "Locality-Attending Vision Transformer" (ICLR 2026), the section on Gaussian-augmented attention.
"""

import math
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# A factor of 1e-10 beside 1 is below float32's resolution. Smaller ones would become denormal numbers, with
# which a CPU computes several times slower.
_LEAST_EXPONENT = -23.0

# Adam moves every parameter by about the learning rate. A gate, which moves from 0 towards 1, is this many
# times its parameter, which then moves as far as weights with a standard deviation of 0.02.
GATE_GAIN = 50


class Gaussians(NamedTuple):
    """The kernels of a layer's queries, each centred on its own patch.

    `slope` [2, B, h, N] is −½ / (σ² + ε), vertical and horizontal; `alpha` is α [B, h, N]; both float32.
    `grid` is (H, W): the last H·W tokens are the patches. Those before them, prefix tokens, have no kernel:
    their values here are finite and unused. `cap` bounds the squared distances. `cross` [B, h, N],
    only of rotated kernels, is the factor of (i − i') (j − j') in the exponent. `kept`, int64 [n] or [B, n],
    says which patches of the grid the last n tokens are, counted row by row; None if they are all, in order.
    """

    slope: Tensor
    alpha: Tensor
    grid: tuple[int, int]
    cap: int
    cross: Tensor | None = None
    kept: Tensor | None = None

    @property
    def patches(self) -> int:
        """Number of tokens that are patches: H·W, or n of a subset."""
        return math.prod(self.grid) if self.kept is None else self.kept.shape[-1]


class LazyGaussians(NamedTuple):
    """The kernels of queries [B, h, N, d], not computed yet: fused attention does so a tile at a time.

    `grid` is (H, W), `built_for` (H0, W0); `kept` is as in `Gaussians`.
    """

    gaug: "GaussianAugmentation"
    q: Tensor
    grid: tuple[int, int]
    built_for: tuple[int, int]
    kept: Tensor | None = None

    def compute(self) -> Gaussians:
        """Compute them."""
        return self.gaug.gaussians(self.q, self.grid, self.built_for, self.kept)


class GaussianAugmentation(nn.Module):
    """The query-dependent Gaussian kernel S of one attention layer.

    For a patch at (i, j) with query q, and a patch at (i', j'):

        z = q · Wσ + bσ ∈ R²                            σ² = C · sigmoid(z − ln(C − 1)),   C = max(H0, W0)²
        a = q · Wα + bα ∈ R                             α = softplus(a)
        S = α · exp(−½ ((i − i')² / (σ²_y + ε) + (j − j')² / (σ²_x + ε)))

    so that z = 0 is a variance of one patch. On another grid than (H0, W0), which the model was built for,
    variances are scaled by min(H, W) / min(H0, W0).

    Where patches have another size than those that the model was built with (`built_with`), (H0, W0) is the
    grid that it would have been built for, and ln(C − 1) stays that of its own: σ² is the same in pixels.

    The arguments after the first are variants for an ablation; what they fix is a buffer with the name of the
    parameter that it replaces.

    Args:
        head_dim: Width d of one head's query; the maps are shared by all heads of the layer.
        query_dependent: False: Wσ and Wα are 0, and a layer has one kernel for all queries.
        isotropic: One variance for both directions.
        learned_alpha: False: α is `initial_alpha`.
        rotated: A full covariance: the two directions are correlated by tanh(q · Wr + br). Such a kernel is
            not a product of two factors: it takes H · W exponentials a row, and memory for all of S.
        initial_variance: exp(bσ) before the training: a variance of so many patches, and less where it is not
            small against C.
        initial_alpha: softplus(bα) before the training; None: bα is 0 (0.69), and 1 where α is not learned.
        gated: Multiply α by a learned gate that starts at 1e-6, so that a model to which GAug is added starts
            with the outputs that it had before.

    Attributes:
        built_with: the grid that bσ refers to, where `built_for` changes with the patches; None if it does
            not.
    """

    built_with: tuple[int, int] | None = None

    def __init__(
        self,
        head_dim: int,
        *,
        query_dependent: bool = True,
        isotropic: bool = False,
        learned_alpha: bool = True,
        rotated: bool = False,
        initial_variance: float = 1.0,
        initial_alpha: float | None = None,
        gated: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not (initial_variance > 0 and (initial_alpha is None or initial_alpha > 0)):
            given = f"{initial_variance!r} and {initial_alpha!r}"
            raise ValueError(f"initial_variance and initial_alpha must be greater than 0; got {given}")
        linear = partial(nn.Linear, head_dim, device=device, dtype=dtype)
        self.log_var = linear(1 if isotropic else 2)
        self.log_alpha = linear(1)
        self.correlation = linear(1) if rotated else None
        each: Any
        for each in self.children():  # start as timm's linear layers do
            nn.init.zeros_(each.bias)
            if query_dependent and (learned_alpha or each is not self.log_alpha):
                nn.init.trunc_normal_(each.weight, std=0.02)
            else:
                _fix(each, "weight", 0.0)
        nn.init.constant_(self.log_var.bias, math.log(initial_variance))
        if initial_alpha is not None or not learned_alpha:
            bias = math.log(math.expm1(1.0 if initial_alpha is None else initial_alpha))  # softplus inverted
            nn.init.constant_(self.log_alpha.bias, bias)
        if not learned_alpha:
            _fix(self.log_alpha, "bias", self.log_alpha.bias.item())
        start = torch.full((), 1e-6 / GATE_GAIN, device=device, dtype=dtype)
        self.gate = nn.Parameter(start) if gated else None

    def variance_and_alpha(
        self, q: Tensor, grid: tuple[int, int], built_for: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Compute σ² [2, B, h, N] (vertical, horizontal; squared patches) and α [B, h, N] in float32."""
        weight = torch.cat([self.log_var.weight, self.log_alpha.weight])
        bias = torch.cat([self.log_var.bias, self.log_alpha.bias])
        # F.linear would put a query's three numbers side by side: what follows would take strides of three.
        za = torch.addmm(bias.unsqueeze(-1), weight, q.flatten(0, -2).mT).unflatten(-1, q.shape[:-1])
        z, a = za.float().split([len(self.log_var.weight), 1])
        largest = max(built_for) ** 2
        var = largest * torch.sigmoid(z - _shift(max(self.built_with or built_for)))
        if grid != built_for:
            var = var * (min(grid) / min(built_for))
        alpha = F.softplus(a.squeeze(0))
        if self.gate is not None:
            alpha = alpha * (GATE_GAIN * self.gate)
        return var.expand(2, *alpha.shape), alpha

    def maps(self, built_for: tuple[int, int]) -> Tensor:
        """Return what `variance_and_alpha` takes of the parameters: [Wσ, Wα, bσ, bα, gain], 3 d + 4 numbers.

        bσ includes the shift by ln(C − 1).
        """
        weight, bias = (each.expand(2, *each.shape[1:]) for each in (self.log_var.weight, self.log_var.bias))
        alpha, shift = self.log_alpha, _shift(max(self.built_with or built_for))
        gain = torch.ones_like(alpha.bias) if self.gate is None else (GATE_GAIN * self.gate).view(1)
        each = weight.flatten(), alpha.weight.flatten(), bias.float() - shift, alpha.bias, gain
        return torch.cat(each).float()

    def limits(self, grid: tuple[int, int], built_for: tuple[int, int]) -> tuple[float, float, float]:
        """Return the largest σ², ε, and the largest squared distance."""
        wider = 1.0 if grid == built_for else min(grid) / min(built_for)
        return max(built_for) ** 2 * wider, _epsilon(built_for), float(_cap(built_for))

    @staticmethod
    def patch_widening(before: float, now: float) -> float:
        """Return what, added to bσ, gives σ² the factor (now / before)² and the bound C of the grid of now.

        These are the longer sides of the grids of one image in patches of two sizes.
        """
        return _shift(now) - _shift(before)

    def forward(
        self, q: Tensor, grid: tuple[int, int], built_for: tuple[int, int], *, kept: Tensor | None = None
    ) -> LazyGaussians:
        """Return the kernels of queries [B, h, N, d], taken after q-norm and before rotary embedding.

        The patches are those of a grid, or the subset `kept` of it (see `Gaussians`).
        """
        return LazyGaussians(self, q, grid, built_for, kept)

    def gaussians(
        self, q: Tensor, grid: tuple[int, int], built_for: tuple[int, int], kept: Tensor | None = None
    ) -> Gaussians:
        """Compute these kernels."""
        kind = q.device.type
        mixed = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        # Turning it off takes as long as three of these operations, even where it is off.
        with torch.autocast(kind, enabled=False) if mixed else nullcontext():
            q = q.to(self.log_var.weight.dtype)
            var, alpha = self.variance_and_alpha(q, grid, built_for)
            var = var + _epsilon(built_for)
            cap = _cap(built_for)
            if self.correlation is None:
                return Gaussians(-0.5 / var, alpha, grid, cap, kept=kept)
            r = torch.tanh(self.correlation(q).squeeze(-1).float())
            left = 1 - r.square() + torch.finfo(r.dtype).eps
            cross = r / (var.prod(0).sqrt() * left)
            return Gaussians(-0.5 / (var * left), alpha, grid, cap, cross, kept)


class GaussianMixture(nn.Module):
    """A learned kernel that is the same for all queries and heads: a baseline to compare GAug with.

    S = Σ_m α_m · exp(−½ ((i − i')² + (j − j')²) / σ²_m). Source: Gaussian mixture mask attention
    (arXiv 2309.04875).

    Args:
        components: Number of Gaussians. Their initial widths range from one patch to the whole grid.
        built_for: (H0, W0).
        gated: Start all α_m at 1e-6 instead of 1 / m.
    """

    built_with: tuple[int, int] | None = None  # as of `GaussianAugmentation`

    def __init__(
        self,
        components: int,
        built_for: tuple[int, int],
        *,
        gated: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if type(components) is not int or components < 1:
            raise ValueError(f"mixture is the number of Gaussians, 1 or more; got {components!r}")
        widest = 2 * math.log(max(built_for))
        self.log_var = nn.Parameter(torch.linspace(0, widest, components, device=device, dtype=dtype))
        alpha = 1e-6 if gated else 1 / components
        self.alpha = nn.Parameter(torch.full((components,), alpha, device=device, dtype=dtype))

    @staticmethod
    def patch_widening(before: float, now: float) -> float:
        """Return what, added to ln σ², gives σ² the factor (now / before)²."""
        return 2 * math.log(now / before)

    def forward(
        self, q: Tensor, grid: tuple[int, int], built_for: tuple[int, int], *, kept: Tensor | None = None
    ) -> Tensor:
        """Return S [1, 1, H·W, H·W], or [.., 1, n, n] of a subset, float32; q only tells the device."""
        wider = (max(built_for) / max(self.built_with or built_for)) ** 2
        var = self.log_var.float().exp() * (wider * min(grid) / min(built_for))
        slope = (-0.5 / var).expand(2, 1, -1).mT
        cap = max(grid) ** 2
        y, x = factors(slope, distances(grid, cap, q.device))
        s: Tensor = torch.einsum("m,mpi,mpj->pij", self.alpha.float(), y, x).flatten(1)
        if kept is not None:
            s = s[kept.unsqueeze(-1), kept.unsqueeze(-2)]
        return s.unsqueeze(-3)[None] if s.ndim == 2 else s.unsqueeze(-3)


def distances(
    grid: tuple[int, int],
    cap: int,
    device: torch.device,
    *,
    prefix: int = 0,
    keys: int = -1,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (i − i')² [N, H] of tokens and rows of a grid, and (j − j')² [N, W] of tokens and columns.

    Both are float32, at most `cap`, and transposed for keys = -2. Those of prefix tokens mean nothing. With a
    subset `kept` [.., n] of the patches, the tokens are these: [.., N, H] and [.., N, W].
    """
    height, width = grid
    if kept is None:
        token = torch.arange(-prefix, height * width, dtype=torch.float32, device=device)
    else:
        token = F.pad(kept.float(), (prefix, 0))
    places = token.div(width, rounding_mode="floor"), token.remainder(width)
    rows, columns = (
        (place.unsqueeze(keys) - torch.arange(n, dtype=torch.float32, device=device).unsqueeze(-3 - keys))
        .square_()
        .clamp_max_(cap)
        for place, n in zip(places, grid, strict=True)
    )
    return rows, columns


def factors(slope: Tensor, squares: tuple[Tensor, Tensor], *, keys: int = -1) -> tuple[Tensor, Tensor]:
    """Compute the kernel's two exponentials: S[p, (i, j)] = α[p] · y[p, i] · x[p, j].

    The exponential of a sum is a product: this takes H + W exponentials a query instead of H · W, and
    nothing of size [B, h, N, N, 2]. With slope [2, .., N] and `distances`, y is [.., N, H] and x [.., N, W];
    for keys = -2, [.., H, N] and [.., W, N].
    """
    y, x = (
        (each.unsqueeze(keys) * d).clamp_min_(_LEAST_EXPONENT).exp_()
        for each, d in zip(slope, squares, strict=True)
    )
    return y, x


def gaussian_kernel(gaussians: Gaussians | LazyGaussians) -> Tensor:
    """Return S of the patches among themselves, float32: [B, h, H·W, H·W], of a subset [B, h, n, n]."""
    if isinstance(gaussians, LazyGaussians):
        gaussians = gaussians.compute()
    slope, alpha, grid, cap, cross, kept = gaussians
    patches = gaussians.patches
    slope, alpha = slope[..., -patches:], alpha[..., -patches:]
    if cross is None and kept is None:
        y, x = factors(slope, distances(grid, cap, alpha.device))
        return ((alpha.unsqueeze(-1) * y).unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2)
    token = torch.arange(patches, device=alpha.device) if kept is None else kept.unsqueeze(-2)
    places = token.div(grid[1], rounding_mode="floor").float(), token.remainder(grid[1]).float()
    dy, dx = ((at.unsqueeze(-1) - at.unsqueeze(-2)).clamp(-(cap**0.5), cap**0.5) for at in places)
    of_y, of_x = slope.unsqueeze(-1)
    exponent = of_y * dy.square() + of_x * dx.square()
    if cross is not None:
        exponent = exponent + cross[..., -patches:].unsqueeze(-1) * dy * dx
    s: Tensor = alpha.unsqueeze(-1) * exponent.clamp_min(_LEAST_EXPONENT).exp()
    return s


def _shift(longest: float) -> float:
    """Return ln(C − 1) of the longer side of a grid: z = 0 then gives a variance of 1."""
    largest = longest**2
    return math.log(largest - 1) if largest > 2 else 0.0


def _cap(built_for: tuple[int, int]) -> int:
    """Return the largest squared distance."""
    return min((max(built_for) - 1) ** 2, 13100)


def _epsilon(built_for: tuple[int, int]) -> float:
    """Return ε: 0.1, doubled until the grid's exponents fit into half precision."""
    epsilon = 0.1
    while 0.5 * (max(built_for) - 1) ** 2 / epsilon**2 > 32500:
        epsilon *= 2
    return epsilon


def _fix(layer: nn.Module, name: str, value: float) -> None:
    """Replace a parameter by a buffer of the same name."""
    fixed = torch.full_like(getattr(layer, name).detach(), value)
    delattr(layer, name)
    layer.register_buffer(name, fixed)
