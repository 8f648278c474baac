"""Gaussian-augmented attention a chunk at a time, with the memory of flash attention: for CPUs and GPUs.

S exists for a few heads of each thread at a time, in the forward and in the backward pass. With
A = q kᵀ / √d + S and P = softmax(A), the gradient of S is that of A, where
S[p, (i, j)] = α[p] y[p, i] x[p, j]. By way of

    T_y[p, i] = y[p, i] Σ_j ∂A[p, (i, j)] x[p, j]    and    T_x[p, j] = Σ_i (∂A ∘ S)[p, (i, j)]

it becomes

    ∂α[p] = Σ_i T_y[p, i]
    ∂(slope_y)[p] = α[p] Σ_i T_y[p, i] D_y[p, i]
    ∂(slope_x)[p] = Σ_j T_x[p, j] D_x[p, j]

Of a subset of the patches, each key has the factors y[p, i] and x[p, j] of its row i and column j, and the
sums over j and over i go over the keys of that row, or column.

Matrices are transposed, [heads, keys, queries]: a pass over S then runs along the many queries, not along the
few patches of a grid's row. Only flash attention wants its mask query by query.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from locat_lightning.nn.gaussian import Gaussians, distances, factors


def chunked_attention(q: Tensor, k: Tensor, v: Tensor, gaussians: Gaussians) -> Tensor:
    """Compute `gaussian_augmented_attention` [B, h, N, d] for kernels without `cross`; B is at least 1.

    The attention weights P are kept for the backward pass only on a CPU, in float32 and for at most 4 d
    patches: they are then about as large as q, k, v and the output together.
    """
    slope, alpha, grid, cap, _, kept = gaussians
    if kept is not None:  # [1 or B·h, n]
        kept = kept[None] if kept.ndim == 1 else kept.repeat_interleave(q.shape[1], 0)
    out: Tensor = _ChunkedAttention.apply(q, k, v, slope.flatten(1, 2), alpha.flatten(0, 1), grid, cap, kept)
    return out


class _ChunkedAttention(torch.autograd.Function):
    """`chunked_attention` of q, k, v, slope [2, B·h, N], alpha [B·h, N], grid, cap and kept [1 or B·h, n]."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        q, k, v, slope, alpha, grid, cap, kept = inputs
        patches = math.prod(grid) if kept is None else kept.shape[-1]
        short = _is_short(q, alpha, patches)
        if short or kept is not None:
            q, k, v = (t.contiguous() for t in (q, k, v))
            *squares, y, x = _of_tokens(slope, grid, cap, kept)
            tokens = q.shape[2]
            weights = [y.new_empty(len(y), tokens, tokens)] if short and any(ctx.needs_input_grad) else []
            out = _short_attention(q, k, v, y * alpha.unsqueeze(-2), x, kept, weights)
            of_tokens = [*squares, y, x, *weights] if short else []
        else:
            y, x = factors(slope[..., -patches:], distances(grid, cap, q.device))
            out = _flash_attention(q, k, v, y * alpha[..., -patches:].unsqueeze(-1), x)
            of_tokens = []
        ctx.grid, ctx.cap = grid, cap
        ctx.save_for_backward(q, k, v, slope, alpha, kept, *of_tokens)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, slope, alpha, kept, *of_tokens = ctx.saved_tensors
        shape = q.shape
        rows, columns, y, x, *weights = of_tokens or _of_tokens(slope, ctx.grid, ctx.cap, kept)
        grads = tuple(t.new_empty(shape) for t in (q, k, v))  # filled through their views
        q, k, v, grad, grad_q, grad_k, grad_v = (_flat(t) for t in (q, k, v, grad, *grads))
        scale = q.shape[-1] ** -0.5
        alpha_y = y * alpha.unsqueeze(-2)
        sum_x, t_x = torch.empty_like(y), torch.empty_like(x)
        factors_ = alpha_y.unsqueeze(2), x.unsqueeze(1)
        by_query = (q.mT, *factors_, grad.mT, grad_q.mT, sum_x, t_x, *weights)
        size = _chunk_size(q)
        rooms = [y.new_empty(math.prod(size) * q.shape[1]) for _ in range(2)]
        for first, q_, alpha_y_, x_, d_out, d_q, sum_x_, t_x_, *p_, k_, v_, d_k, d_v, kept_ in _chunks(
            by_query, (k, v, grad_k, grad_v, _of_heads(kept, q)), size
        ):
            alpha_y_, x_, row, column = _of_keys(alpha_y_, x_, kept_)
            g, p = (_matrix(room, k_, q_) for room in rooms)
            p = p_[0] if p_ else _weights(q_, k_, alpha_y_, x_, out=p)
            d_v.baddbmm_(p.to(q.dtype), d_out.mT, beta=1 - first)
            _product(v_, d_out, g)
            g.mul_(p).addcmul_(p, g.sum(1, keepdim=True), value=-1)  # ∂A = P ∘ (∂P − Σ P ∘ ∂P)
            d_a = g.to(q.dtype)
            d_q.mT.baddbmm_(d_a.mT, k_, beta=0, alpha=scale)
            d_k.baddbmm_(d_a, q_.mT, beta=1 - first, alpha=scale)
            _, g_of_patches = _by_keys(g, alpha_y_, x_)
            _sum(g_of_patches.mul_(x_), 2, row, out=sum_x_)
            _sum(g_of_patches.mul_(alpha_y_), 1, column, out=t_x_)
        t_y = sum_x.mul_(y)
        grad_slope = torch.stack([(t_y * rows).sum(1).mul_(alpha), (t_x * columns).sum(1)])
        return *grads, grad_slope, t_y.sum(1), None, None, None


def _flash_attention(q: Tensor, k: Tensor, v: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Attention [B, h, N, d] with the factors α · y [B·h, H·W, H] and x [B·h, H·W, W].

    Queries of prefix tokens need no mask. Flash attention reads the mask of a patch's query in blocks of 16
    numbers: on a CPU, one of them begins where the patches' columns begin.
    """
    B, h, N, d = q.shape
    grid = y.shape[-1], x.shape[-1]
    prefix = N - math.prod(grid)
    images, heads, rows = _flash_chunk_size(q, prefix)
    lead = -prefix % 16 if q.device.type == "cpu" else 0
    room = y.new_empty(images, heads, rows, lead + N + -(lead + N) % 16)[..., lead : lead + N]
    room[..., :prefix] = 0
    out = v.new_empty(B, N, h, d).transpose(1, 2)
    of_prefix, of_patches = out.split([prefix, N - prefix], dim=2)
    if prefix:
        of_prefix.copy_(F.scaled_dot_product_attention(q[:, :, :prefix], k, v))
    y, x = y.view(B, h, -1, grid[0], 1), x.view(B, h, -1, 1, grid[1])
    by_row = q[:, :, prefix:], y, x, of_patches
    for keys, values, *of_images in zip(*(t.split(images) for t in (k, v, *by_row)), strict=True):
        for of_rows in zip(*(t.split(rows, dim=2) for t in of_images), strict=True):
            of_heads = zip(*(t.split(heads, dim=1) for t in (keys, values, *of_rows)), strict=True)
            for k_, v_, q_, y_, x_, out_ in of_heads:
                s = room[: q_.shape[0], : q_.shape[1], : q_.shape[2]]
                torch.mul(y_, x_, out=s[..., prefix:].unflatten(-1, grid))
                out_.copy_(F.scaled_dot_product_attention(q_, k_, v_, attn_mask=s.to(q.dtype)))
    return out


def _short_attention(
    q: Tensor, k: Tensor, v: Tensor, y: Tensor, x: Tensor, kept: Tensor | None, weights: list[Tensor]
) -> Tensor:
    """Attention [B, h, N, d] with the factors α · y [B·h, H, N] and x [B·h, W, N], perhaps of a subset.

    `weights` is empty, or has room for P [B·h, N, N], keys before queries.
    """
    shape = v.shape
    q, k, v = (_flat(t) for t in (q, k, v))
    out = torch.empty_like(v)
    size = _chunk_size(q)
    room = y.new_empty(math.prod(size) * q.shape[1])
    by_query = q.mT, y.unsqueeze(2), x.unsqueeze(1), out.mT, *weights
    for _, q_, y_, x_, out_, *p_, k_, v_, kept_ in _chunks(by_query, (k, v, _of_heads(kept, q)), size):
        y_, x_, _, _ = _of_keys(y_, x_, kept_)
        p = _weights(q_, k_, y_, x_, out=p_[0] if p_ else _matrix(room, k_, q_))
        _product(p.mT.to(v_.dtype), v_, out=out_.mT)
    return out.view(shape)


def _weights(q: Tensor, k: Tensor, y: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """Write P of a chunk to `out` [heads, keys, queries]."""
    of_prefix, of_patches = _by_keys(out, y, x)
    of_prefix.zero_()
    torch.mul(y, x, out=of_patches)
    scale = k.shape[-1] ** -0.5
    if q.dtype == out.dtype:
        out.baddbmm_(k, q, alpha=scale)
    else:  # the product in half precision, the sum in float32
        out.add_(torch.bmm(k, q), alpha=scale)
    return torch.softmax(out, 1, out=out)


def _is_short(q: Tensor, alpha: Tensor, patches: int) -> bool:
    """Whether flash attention, which reads a mask in a pass of its own, would be slower."""
    return q.device.type == "cpu" and q.dtype == alpha.dtype and patches <= 4 * q.shape[-1]


def _chunk_size(q: Tensor) -> tuple[int, int]:
    """Number of heads, and of queries of each, whose logits fit into a CPU's caches, or fill a GPU.

    Every thread of a CPU gets as many heads, and whole ones as long as that is possible.
    """
    heads, N = q.shape[:-2].numel(), q.shape[-2]
    threads, size = (torch.get_num_threads(), 2**18) if q.device.type == "cpu" else (1, 2**26)
    if 2 * size >= N**2:
        return min(heads, threads * max(1, size // N**2)), N
    return min(heads, max(2, threads)), math.ceil(N / math.ceil(N**2 / (2 * size)))  # chunks of equal size


def _flash_chunk_size(q: Tensor, prefix: int) -> tuple[int, int, int]:
    """Number of images, heads and patches for which flash attention gets a mask at a time."""
    if q.device.type == "cpu":
        patches = q.shape[2] - prefix
        # Flash attention computes 256 rows at a time if it has 768 or more, else 64, which is slower.
        heads, rows = 2, math.ceil(patches / max(1, patches // 768))
    else:
        heads, rows = _chunk_size(q)
    images = min(q.shape[0], heads)
    return images, heads // images, rows


def _flat(t: Tensor) -> Tensor:
    """Return [B, h, N, d] as [B·h, N, d]."""
    return t.flatten(0, 1).contiguous()


def _chunks(
    by_query: tuple[Tensor, ...], by_head: tuple[Tensor, ...], size: tuple[int, int]
) -> Iterator[tuple[Any, ...]]:
    """Yield the parts, of at most `size`, of tensors of queries [B·h, .., N] and of whole heads [B·h, ..].

    Before them comes whether these are the first queries of their heads.
    """
    heads, queries = (math.ceil(by_query[0].shape[dim] / n) for dim, n in zip((0, -1), size, strict=True))
    for of_heads in zip(*(t.tensor_split(heads) for t in by_query + by_head), strict=True):
        of_queries = zip(*(t.tensor_split(queries, dim=-1) for t in of_heads[: len(by_query)]), strict=True)
        for number, parts in enumerate(of_queries):
            yield number == 0, *parts, *of_heads[len(by_query) :]


def _matrix(room: Tensor, k: Tensor, q: Tensor) -> Tensor:
    """Return the beginning of `room` as the matrix [heads, keys, queries] of a chunk."""
    shape = *k.shape[:2], q.shape[2]
    return room[: math.prod(shape)].view(shape)


def _by_keys(matrix: Tensor, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Split [heads, keys, queries] into the keys of prefix tokens and of patches [heads, H, W, queries]."""
    grid = y.shape[1], x.shape[2]
    patches = math.prod(grid)
    of_prefix, of_patches = matrix.split([matrix.shape[1] - patches, patches], dim=1)
    return of_prefix, of_patches.unflatten(1, grid)


def _of_heads(kept: Tensor | None, q: Tensor) -> Tensor:
    """Return the subset of each head, [B·h, n]; n = 0 stands for all patches."""
    return q.new_empty(len(q), 0) if kept is None else kept.expand(len(q), -1)


def _of_keys(y: Tensor, x: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gather factors [heads, H, 1, queries] and [heads, 1, W, queries] for the keys of a subset [heads, n].

    Returns:
        Both factors [heads, n, 1, queries], as of a grid of one column, and of each key its row and its
        column among those of all heads. Without a subset, the factors as they are.
    """
    if not kept.shape[1]:
        return y, x, None, None
    head = torch.arange(len(y), device=y.device).unsqueeze(-1)
    row = (head * y.shape[1] + kept.div(x.shape[2], rounding_mode="floor")).flatten()
    column = (head * x.shape[2] + kept.remainder(x.shape[2])).flatten()
    y, x = (t.flatten(0, 2).index_select(0, at) for t, at in ((y, row), (x, column)))
    shape = *kept.shape, 1, -1
    return y.view(shape), x.view(shape), row, column


def _sum(matrix: Tensor, dim: int, line: Tensor | None, out: Tensor) -> None:
    """Write the sums of [heads, H, W, queries] over `dim` to `out`; of a subset, those of each key's line."""
    if line is None:
        torch.sum(matrix, dim, out=out)
    else:
        out.zero_().flatten(0, 1).index_add_(0, line, matrix.flatten(0, 2))


def _of_tokens(
    slope: Tensor, grid: tuple[int, int], cap: int, kept: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Distances [.., H, N], [.., W, N] and factors y [.., H, N], x [.., W, N]; y of prefix tokens is 0."""
    prefix = slope.shape[-1] - (math.prod(grid) if kept is None else kept.shape[-1])
    squares = distances(grid, cap, slope.device, prefix=prefix, keys=-2, kept=kept)
    y, x = factors(slope, squares, keys=-2)
    y[..., :prefix] = 0
    return *squares, y, x


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Write a batched product, computed in the type of its factors, to `out`."""
    return torch.bmm(a, b, out=out) if a.dtype == out.dtype else out.copy_(torch.bmm(a, b))
