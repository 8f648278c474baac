"""Gaussian-augmented attention on a GPU, in Triton: the memory and nearly the time of flash attention.

With q, k, v [B, h, N, d], and what a query of a patch p = (i, j) says of its kernel,

    A[p, t] = q·k / √d + α y[i'] x[j'],    y[i'] = exp(slope_y (i − i')²),  x[j'] = exp(slope_x (j − j')²)
    P = softmax(A),    out = P v

S is a product: so a tile of keys is R rows × WC columns of the patch grid, and S of a tile of queries is the
outer product of y [BM, R] and x [BM, WC], one multiply-add a logit, in registers. Prefix tokens, whose S is
0, follow the patches: the token at row i and column j is at place i·W + j of (patches, prefix tokens). What
is beyond W or N is masked.

    ∂A = P ∘ (∂out vᵀ − δ),    δ = Σ out ∘ ∂out
    ∂q = ∂A k / √d,    ∂k = ∂Aᵀ q / √d,    ∂v = Pᵀ ∂out
    ∂α = Σ ∂A y x,    ∂slope_y = α Σ ∂A y x (i − i')²,    ∂slope_x = α Σ ∂A y x (j − j')²

One kernel computes ∂q and these sums by tiles of queries, another ∂k and ∂v by tiles of keys: nothing is
added atomically, so that the same input gives the same bits. α and slope are computed from the query as it
is, in float32, and so are logits and sums; products of matrices are of the type of q.

    z = source Wσ + bσ,    a = source Wα + bα;    σ² = widest · sigmoid(z),    slope = −½ / (σ² + ε)
    α = gain · softplus(a);    maps = [Wσ (2·d), Wα (d), bσ (2), bα, gain]
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
QUERIES = 64  # of a program of `d_queries`


def candidates(configs: list[triton.Config], _: Any, *, D: int, **__: Any) -> list[triton.Config]:
    """Return those to compare; the first where the same bits are wanted each time, and in the interpreter."""
    if D > 64:  # the registers do not suffice for more than one stage, if that is offered
        configs = [each for each in configs if each.num_stages == 1] or configs
    first = torch.are_deterministic_algorithms_enabled() or triton.knobs.runtime.interpret
    return configs[:1] if first else configs


def kernel(*configs: tuple[int, ...]) -> Callable[[Callable[..., None]], Any]:
    """Compile a function, with the fastest of some (queries, warps, stages).

    They are compared once for each width of a head and shape of tiles, and remembered on disk.
    """

    def compiled(function: Callable[..., None]) -> Any:
        # No other program for other sizes.
        function = triton.jit(function, do_not_specialize=["h", "N", "H", "W", "T"])
        return triton.autotune(
            [
                triton.Config({"BM": bm, "enable_fp_fusion": True}, num_warps=warps, num_stages=stages)
                for bm, warps, stages in configs
            ],
            key=["D", "WC", "ONE"],
            prune_configs_by={"early_config_prune": candidates},
            cache_results=True,
        )(function)

    return compiled


@triton.jit
def _load(head, rows, stride, valid, D: tl.constexpr, BD: tl.constexpr):
    """Read rows [n, BD] of a head; those that are not valid, and columns beyond D, are 0."""
    d = tl.arange(0, BD)
    mask = valid[:, None]
    if D != BD:
        mask = mask & (d < D)[None, :]
    return tl.load(head + rows[:, None] * stride + d[None, :], mask=mask, other=0.0)


@triton.jit
def _store(head, rows, stride, valid, value, D: tl.constexpr, BD: tl.constexpr):
    d = tl.arange(0, BD)
    mask = valid[:, None]
    if D != BD:
        mask = mask & (d < D)[None, :]
    tl.store(head + rows[:, None] * stride + d[None, :], value.to(head.dtype.element_ty), mask=mask)


@triton.jit
def _map(maps, row: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    d = tl.arange(0, BD)
    return tl.load(maps + row * D + d, mask=d < D, other=0.0)[None, :]


@triton.jit
def _z(source, maps, row: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    return tl.sum(source * _map(maps, row, D, BD), 1) + tl.load(maps + 3 * D + row)


@triton.jit
def _kernels(kernels, size, m, inside):
    """Slopes in base 2 and softplus(a), which is 0 for queries of prefix tokens."""
    slope_y = tl.load(kernels + m, mask=inside, other=-1.0)
    slope_x = tl.load(kernels + size + m, mask=inside, other=-1.0)
    return slope_y, slope_x, tl.load(kernels + 2 * size + m, mask=inside, other=0.0)


@triton.jit
def _d_slope(slope, widest, epsilon):
    """∂slope / ∂z, not in base 2."""
    total = -0.5 * LOG2E / slope
    var = total - epsilon
    return 0.5 / (total * total) * var * (1.0 - var / widest)


@triton.jit
def _place(token, N, H, W):
    """Row and column of patches, float32; exact, as the quotient is 1/2W or more away from an integer."""
    patch = (token - (N - H * W)).to(tl.float32)
    i = tl.floor((patch + 0.5) / W)
    return i, patch - i * W


@triton.jit
def _factor(slope, at, to, cap):
    """exp2(slope · distance²) [n, m] of queries and rows (or columns), and the distance²."""
    distance = at[:, None] - to[None, :]
    square = tl.minimum(distance * distance, cap)
    return tl.exp2(slope[:, None] * square), square


@triton.jit
def _keys(t, N, H, W, R: tl.constexpr, WC: tl.constexpr, ONE: tl.constexpr):
    """Tokens [R·WC] of a tile of keys, which of them there are, and their rows [R] and columns [WC]."""
    if ONE:
        top, left = t * R, 0
    else:
        blocks = (W + WC - 1) // WC
        top, left = t // blocks * R, t % blocks * WC
    n = tl.arange(0, R * WC)
    place = (top + n // WC) * W + left + n % WC
    valid = (left + n % WC < W) & (place < N)
    prefix = N - H * W
    token = tl.where(place < H * W, place + prefix, place - H * W)
    return token, valid, top + tl.arange(0, R), left + tl.arange(0, WC)


@triton.jit
def _xy(slope_y, slope_x, q_i, q_j, i, j, H, cap):
    """The factors y [BM, R] and x [BM, WC], and their squared distances."""
    y, square_y = _factor(slope_y, q_i, i.to(tl.float32), cap)
    x, square_x = _factor(slope_x, q_j, j.to(tl.float32), cap)
    return tl.where((i < H)[None, :], y, 0.0), x, square_y, square_x


@triton.jit
def _logits(qk, alpha, y, x, R: tl.constexpr, WC: tl.constexpr):
    BM: tl.constexpr = qk.shape[0]
    return tl.reshape(qk, [BM, R, WC]) + (alpha[:, None] * y)[:, :, None] * x[:, None, :]


@kernel((64, 4, 2), (128, 8, 2))
def forward(
    q, k, v, source, maps, out, lse, kernels,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, s_b, s_h, s_n,
    h, N, H, W, T, widest, epsilon, cap, scale,
    SAME: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, ONE: tl.constexpr,
    BM: tl.constexpr, R: tl.constexpr, WC: tl.constexpr,
):  # fmt: skip
    """Compute out, lse and (slopes, softplus) of a tile of queries."""
    head, block = tl.program_id(0) // tl.cdiv(N, BM), tl.program_id(0) % tl.cdiv(N, BM)
    b, head_ = (head // h).to(tl.int64), head % h
    m = block * BM + tl.arange(0, BM)
    inside = m < N
    q_ = _load(q + b * q_b + head_ * q_h, m, q_n, inside, D, BD)
    s_ = q_ if SAME else _load(source + b * s_b + head_ * s_h, m, s_n, inside, D, BD)
    s_ = s_.to(tl.float32)
    slope_y = -0.5 * LOG2E / (widest * tl.sigmoid(_z(s_, maps, 0, D, BD)) + epsilon)
    slope_x = -0.5 * LOG2E / (widest * tl.sigmoid(_z(s_, maps, 1, D, BD)) + epsilon)
    z = _z(s_, maps, 2, D, BD)
    softplus = tl.maximum(z, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(z)))
    kernels += head.to(tl.int64) * N
    size = (tl.num_programs(0) // tl.cdiv(N, BM)).to(tl.int64) * N
    tl.store(kernels + m, slope_y, mask=inside)
    tl.store(kernels + size + m, slope_x, mask=inside)
    tl.store(kernels + 2 * size + m, tl.where(m < N - H * W, 0.0, softplus), mask=inside)
    tl.debug_barrier()
    # Read back, they are laid out over the threads as the logits are, which saves an exchange for each tile.
    slope_y, slope_x, softplus = _kernels(kernels, size, m, inside)
    alpha = softplus * tl.load(maps + 3 * D + 3) / scale
    q_i, q_j = _place(m, N, H, W)

    k += b * k_b + head_ * k_h
    v += b * v_b + head_ * v_h
    largest = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    unit = scale * LOG2E
    for t in range(T):
        token, valid, i, j = _keys(t, N, H, W, R, WC, ONE)
        k_ = _load(k, token, k_n, valid, D, BD)
        y, x, _, _ = _xy(slope_y, slope_x, q_i, q_j, i, j, H, cap)
        a = _logits(tl.dot(q_, k_.T), alpha, y, x, R, WC)
        a = tl.where((j[None, :] < tl.minimum(N - i * W, W)[:, None])[None], a, float("-inf"))
        a = tl.reshape(a, [BM, R * WC])
        new = tl.maximum(largest, tl.max(a, 1) * unit)
        p = tl.exp2(a * unit - new[:, None])
        shrink = tl.exp2(largest - new)
        total = total * shrink + tl.sum(p, 1)
        v_ = _load(v, token, v_n, valid, D, BD)
        acc = tl.dot(p.to(v_.dtype), v_, acc * shrink[:, None])
        largest = new
    tl.store(lse + head.to(tl.int64) * N + m, largest + tl.log2(total), mask=inside)
    _store(out + b * N * h * D + head_ * D, m, h * D, inside, acc / total[:, None], D, BD)


@kernel((QUERIES, 4, 2), (QUERIES, 4, 1), (QUERIES, 8, 1))
def d_queries(
    q, k, v, source, maps, out, lse, kernels, d_out, d_q, d_source, d_maps, delta,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, s_b, s_h, s_n, o_b, o_h, o_n,
    h, N, H, W, T, widest, epsilon, cap, scale,
    SAME: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, ONE: tl.constexpr,
    BM: tl.constexpr, R: tl.constexpr, WC: tl.constexpr,
):  # fmt: skip
    """Compute ∂q, ∂source, δ and the share of ∂maps of a tile of queries."""
    head, block = tl.program_id(0) // tl.cdiv(N, BM), tl.program_id(0) % tl.cdiv(N, BM)
    b, head_ = (head // h).to(tl.int64), head % h
    m = block * BM + tl.arange(0, BM)
    inside = m < N
    own = b * N * h * D + head_ * D  # of [B, N, h, d]
    d_out_ = _load(d_out + b * o_b + head_ * o_h, m, o_n, inside, D, BD)
    out_ = _load(out + own, m, h * D, inside, D, BD)
    delta_ = tl.sum(out_.to(tl.float32) * d_out_.to(tl.float32), 1)
    row = head.to(tl.int64) * N
    tl.store(delta + row + m, delta_, mask=inside)
    tl.debug_barrier()
    delta_ = tl.load(delta + row + m, mask=inside, other=0.0)
    q_ = _load(q + b * q_b + head_ * q_h, m, q_n, inside, D, BD)
    size = (tl.num_programs(0) // tl.cdiv(N, BM)).to(tl.int64) * N
    slope_y, slope_x, softplus = _kernels(kernels + row, size, m, inside)
    alpha = softplus * tl.load(maps + 3 * D + 3) / scale
    lse_ = tl.load(lse + row + m, mask=inside, other=0.0)
    q_i, q_j = _place(m, N, H, W)

    k += b * k_b + head_ * k_h
    v += b * v_b + head_ * v_h
    acc = tl.zeros([BM, BD], tl.float32)
    of_alpha = tl.zeros([BM, WC], tl.float32)
    of_y = tl.zeros([BM, WC], tl.float32)
    of_x = tl.zeros([BM, WC], tl.float32)
    for t in range(T):
        token, valid, i, j = _keys(t, N, H, W, R, WC, ONE)
        k_ = _load(k, token, k_n, valid, D, BD)
        v_ = _load(v, token, v_n, valid, D, BD)
        y, x, square_y, square_x = _xy(slope_y, slope_x, q_i, q_j, i, j, H, cap)
        a = _logits(tl.dot(q_, k_.T), alpha, y, x, R, WC)
        a = tl.where((j[None, :] < tl.minimum(N - i * W, W)[:, None])[None], a, float("-inf"))
        p = tl.exp2(tl.reshape(a, [BM, R * WC]) * (scale * LOG2E) - lse_[:, None])
        d_a = p * (tl.dot(d_out_, v_.T) - delta_[:, None])
        acc = tl.dot(d_a.to(k_.dtype), k_, acc)
        d_a = tl.reshape(d_a, [BM, R, WC])
        over_rows = tl.sum(d_a * y[:, :, None], 1)
        over_squares = tl.sum(d_a * (y * square_y)[:, :, None], 1)
        if not ONE:
            over_rows *= x
            over_squares *= x
            of_x += over_rows * square_x
        of_alpha += over_rows
        of_y += over_squares
    tl.debug_barrier()
    # Loaded again here, so that they take no registers during the loop.
    slope_y, slope_x, softplus = _kernels(kernels + row, size, m, inside)
    gain = tl.load(maps + 3 * D + 3)
    if ONE:  # all tiles have the same x
        _, _, i, j = _keys(0, N, H, W, R, WC, ONE)
        _, x, _, square_x = _xy(slope_y, slope_x, q_i, q_j, i, j, H, cap)
        of_alpha *= x
        of_y *= x
        of_x = of_alpha * square_x
    of_alpha = tl.sum(of_alpha, 1)
    d_y = gain * softplus * tl.sum(of_y, 1) * _d_slope(slope_y, widest, epsilon)
    d_x = gain * softplus * tl.sum(of_x, 1) * _d_slope(slope_x, widest, epsilon)
    d_a = gain * (1.0 - tl.exp(-softplus)) * of_alpha
    d_gain = softplus * of_alpha
    s_ = _load(source + b * s_b + head_ * s_h, m, s_n, inside, D, BD).to(tl.float32)
    d_maps += tl.program_id(0).to(tl.int64) * (3 * D + 4)
    d = tl.arange(0, BD)
    tl.store(d_maps + d, tl.sum(d_y[:, None] * s_, 0), mask=d < D)
    tl.store(d_maps + D + d, tl.sum(d_x[:, None] * s_, 0), mask=d < D)
    tl.store(d_maps + 2 * D + d, tl.sum(d_a[:, None] * s_, 0), mask=d < D)
    tl.store(d_maps + 3 * D, tl.sum(d_y, 0))
    tl.store(d_maps + 3 * D + 1, tl.sum(d_x, 0))
    tl.store(d_maps + 3 * D + 2, tl.sum(d_a, 0))
    tl.store(d_maps + 3 * D + 3, tl.sum(d_gain, 0))
    d_s = d_y[:, None] * _map(maps, 0, D, BD) + d_x[:, None] * _map(maps, 1, D, BD)
    d_s += d_a[:, None] * _map(maps, 2, D, BD)
    acc *= scale
    if SAME:
        acc += d_s
    else:
        _store(d_source + own, m, h * D, inside, d_s, D, BD)
    _store(d_q + own, m, h * D, inside, acc, D, BD)


@kernel((64, 4, 2), (64, 4, 1), (128, 8, 1))
def d_keys_values(
    q, k, v, maps, lse, kernels, d_out, delta, d_k, d_v,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n,
    h, N, H, W, T, cap, scale,
    D: tl.constexpr, BD: tl.constexpr, ONE: tl.constexpr,
    BM: tl.constexpr, R: tl.constexpr, WC: tl.constexpr,
):  # fmt: skip
    """Compute ∂k and ∂v of a tile of keys."""
    head, tile = tl.program_id(0) // T, tl.program_id(0) % T
    b, head_ = (head // h).to(tl.int64), head % h
    token, valid, i, j = _keys(tile, N, H, W, R, WC, ONE)
    k_ = _load(k + b * k_b + head_ * k_h, token, k_n, valid, D, BD)
    v_ = _load(v + b * v_b + head_ * v_h, token, v_n, valid, D, BD)
    q += b * q_b + head_ * q_h
    d_out += b * o_b + head_ * o_h
    size = (tl.num_programs(0) // T).to(tl.int64) * N
    row = head.to(tl.int64) * N
    strength = tl.load(maps + 3 * D + 3) / scale
    acc_k = tl.zeros([R * WC, BD], tl.float32)
    acc_v = tl.zeros([R * WC, BD], tl.float32)
    for start in range(0, N, BM):
        m = start + tl.arange(0, BM)
        inside = m < N
        q_ = _load(q, m, q_n, inside, D, BD)
        d_out_ = _load(d_out, m, o_n, inside, D, BD)
        slope_y, slope_x, softplus = _kernels(kernels + row, size, m, inside)
        lse_ = tl.load(lse + row + m, mask=inside, other=float("inf"))
        delta_ = tl.load(delta + row + m, mask=inside, other=0.0)
        q_i, q_j = _place(m, N, H, W)
        y, x, _, _ = _xy(slope_y, slope_x, q_i, q_j, i, j, H, cap)
        a = tl.reshape(_logits(tl.dot(q_, k_.T), softplus * strength, y, x, R, WC), [BM, R * WC])
        p = tl.exp2(a * (scale * LOG2E) - lse_[:, None])
        acc_v = tl.dot(p.to(v_.dtype).T, d_out_, acc_v)
        d_a = p * (tl.dot(d_out_, v_.T) - delta_[:, None])
        acc_k = tl.dot(d_a.to(q_.dtype).T, q_, acc_k)
    own = b * N * h * D + head_ * D
    _store(d_k + own, token, h * D, valid, acc_k * scale, D, BD)
    _store(d_v + own, token, h * D, valid, acc_v, D, BD)
