"""Attention with a Gaussian kernel added to its logits: softmax(q kᵀ / √d + S) v."""

from collections.abc import Iterator
from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from locat_lightning.nn.gaussian import (
    GaussianAugmentation,
    Gaussians,
    PatchGrid,
    factors,
    gaussian_kernel,
    squared_distances,
)


class GaussianAttention(Attention):
    """timm's self-attention with GAug; for the `attn_layer` argument of timm's Vision Transformers.

    Takes the arguments of `timm.layers.Attention`. The model's `PatchGrid` is put into `grid` once its
    patch embedding is known.

    Source: "Locality-Attending Vision Transformer" (ICLR 2026), Gaussian-augmented attention.
    """

    grid: PatchGrid
    num_prefix_tokens: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        weight = self.qkv.weight
        self.gaug = GaussianAugmentation(self.head_dim, device=weight.device, dtype=weight.dtype)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend within [B, N, D]; masks are not supported (`ValueError`)."""
        if attn_mask is not None or is_causal:
            raise ValueError("Gaussian-augmented attention takes no attn_mask and is not causal")
        gate = self.gate(x).sigmoid() if self.gate is not None else None
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).contiguous()
        q, k = self.q_norm(q), self.k_norm(k)

        grid = self.grid.of(x.shape[1] - self.num_prefix_tokens)
        gaussians = self.gaug(q, grid, self.grid.built_for)
        dropout = self.attn_drop.p if self.training else 0.0
        x = gaussian_attention(q, k, v, gaussians, dropout=dropout).transpose(1, 2).flatten(2)

        x = self.norm(x)
        if gate is not None:
            x = x * gate
        out: Tensor = self.proj_drop(self.proj(x))
        return out


def gaussian_attention(
    q: Tensor, k: Tensor, v: Tensor, gaussians: Gaussians, *, dropout: float = 0.0
) -> Tensor:
    """softmax(q kᵀ / √d + S) v, with S = 0 in every row and column of a prefix token.

    S exists for a few heads at a time, in the forward and in the backward pass: the memory is that
    of flash attention. Under `torch.compile`, `torch.export` and with dropout it is one expression instead.

    Args:
        q: Queries [B, h, N, d].
        k: Keys [B, h, N, d].
        v: Values [B, h, N, d].
        gaussians: Kernels of the last H·W tokens.
        dropout: Probability of dropping an attention weight.

    Returns:
        [B, h, N, d] in the type of v.
    """
    q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast on a GPU, q-norm and k-norm give float32
    if torch.compiler.is_compiling() or dropout > 0:
        prefix = q.shape[-2] - gaussians.slope.shape[-2]
        s = F.pad(gaussian_kernel(gaussians).to(q.dtype), (prefix, 0, prefix, 0))
        expression: Tensor = F.scaled_dot_product_attention(q, k, v, attn_mask=s, dropout_p=dropout)
        return expression
    slope, log_alpha, grid, cap = gaussians
    heads = (t.flatten(0, 1) for t in (q, k, v, slope, log_alpha))
    out: Tensor = _ChunkedGaussianAttention.apply(*heads, grid, cap).unflatten(0, q.shape[:2])
    return out


class _ChunkedGaussianAttention(torch.autograd.Function):
    """`gaussian_attention` of all images' heads, [B·h, N, d], a chunk of heads or rows at a time.

    With A = q kᵀ / √d + S, P = softmax(A) and T = ∂A ∘ S, the gradients of the logarithms of S's factors are
    T summed by row, T_y[p, i] = Σ_j T[p, (i, j)], and by column, T_x[p, j] = Σ_i T[p, (i, j)]: one product
    with an indicator. Then ∂(slope_y)[p] = Σ_i T_y[p, i] D_y[p, i], likewise x, and ∂(ln α)[p] is T_y's sum.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slope: Tensor,
        log_alpha: Tensor,
        grid: tuple[int, int],
        cap: int,
    ) -> Tensor:
        gaussians = Gaussians(slope, log_alpha, grid, cap)
        prefix = q.shape[1] - slope.shape[1]
        y, x = (F.pad(factor, (0, 0, prefix, 0)) for factor in factors(gaussians))
        out = torch.empty_like(v)
        room = _room(q, y.dtype)
        for head, row in _chunks(q):
            s = _first(room, head, row)
            _kernel_of_tokens(y[head, row], x[head, row], prefix, s)
            chunk = F.scaled_dot_product_attention(
                q[None, head, row], k[None, head], v[None, head], attn_mask=s[None].to(q.dtype)
            )
            out[head, row] = chunk[0]
        ctx.save_for_backward(q, k, v, y, x, out, *squared_distances(gaussians))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, x, out, d_y, d_x = ctx.saved_tensors
        H, W = len(d_y), len(d_x)
        prefix = q.shape[1] - H * W
        scale = q.shape[-1] ** -0.5
        grad = grad.contiguous()
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        grad_yx = y.new_empty(*y.shape[:2], H + W)
        rows_and_columns = _rows_and_columns((H, W), prefix, y)
        grad_softmax = (grad * out).sum(-1, keepdim=True, dtype=y.dtype)
        q_scaled = q * scale
        rooms = [_room(q, y.dtype) for _ in range(3)]
        for head, row in _chunks(q):
            s, p, g = (_first(room, head, row) for room in rooms)
            _kernel_of_tokens(y[head, row], x[head, row], prefix, s)
            torch.softmax(_product(q_scaled[head, row], k[head].mT, p).add_(s), -1, out=p)
            _product(grad[head, row], v[head].mT, g).sub_(grad_softmax[head, row]).mul_(p)
            grad_v[head].baddbmm_(p.to(q.dtype).mT, grad[head, row])
            narrow = g.to(q.dtype)
            grad_q[head, row] = torch.bmm(narrow, k[head])
            grad_k[head].baddbmm_(narrow.mT, q_scaled[head, row])
            grad_yx[head, row] = (g.mul_(s).flatten(0, 1) @ rows_and_columns).unflatten(0, g.shape[:2])
        grad_y, grad_x = grad_yx[:, prefix:].split([H, W], dim=-1)
        by_y = (grad_y * d_y.repeat_interleave(W, 0)).sum(-1)
        by_x = (grad_x * d_x.repeat(H, 1)).sum(-1)
        grad_slope, grad_log_alpha = torch.stack([by_y, by_x], dim=-1), grad_y.sum(-1, keepdim=True)
        return grad_q.mul_(scale), grad_k, grad_v, grad_slope, grad_log_alpha, None, None


def _chunk_size(q: Tensor) -> tuple[int, int]:
    """Of how many heads, and of how many rows of a head, the logits stay in a CPU's cache, or fill a GPU."""
    heads, N, _ = q.shape
    size = 2**18 if q.device.type == "cpu" else 2**26
    chunks_of_a_head = -(-(N**2) // size)
    return min(heads, max(1, size // N**2)), -(-N // chunks_of_a_head)


def _chunks(q: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of the B·h heads and of the rows of q [B·h, N, d]."""
    heads, rows = _chunk_size(q)
    for head in range(0, q.shape[0], heads):
        for row in range(0, q.shape[1], rows):
            yield slice(head, min(head + heads, q.shape[0])), slice(row, min(row + rows, q.shape[1]))


def _room(q: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for the logits [heads, rows, N] of a chunk of q [B·h, N, d]."""
    return q.new_empty(*_chunk_size(q), q.shape[1], dtype=dtype)


def _first(room: Tensor, head: slice, row: slice) -> Tensor:
    """As much of the room as the chunk needs."""
    return room[: head.stop - head.start, : row.stop - row.start]


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """A batched product in the type of its factors, kept in that of `out`."""
    return torch.bmm(a, b, out=out) if a.dtype == out.dtype else out.copy_(torch.bmm(a, b))


def _kernel_of_tokens(y: Tensor, x: Tensor, prefix: int, out: Tensor) -> None:
    """S [heads, rows, N] from its factors in these rows, into `out`."""
    out[..., :prefix] = 0
    patches = out[..., prefix:].unflatten(-1, (y.shape[-1], x.shape[-1]))
    torch.mul(y.unsqueeze(-1), x.unsqueeze(-2), out=patches)


def _rows_and_columns(grid: tuple[int, int], prefix: int, like: Tensor) -> Tensor:
    """Indicator [N, H + W] of each token's row and column; zero for prefix tokens."""
    H, W = grid
    rows = torch.eye(H, dtype=like.dtype, device=like.device).repeat_interleave(W, 0)
    columns = torch.eye(W, dtype=like.dtype, device=like.device).repeat(H, 1)
    return F.pad(torch.cat([rows, columns], dim=1), (0, 0, prefix, 0))
