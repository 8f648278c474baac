"""The kernels of `triton_attention` as one differentiable operator of torch."""

import math
import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from locat_lightning.nn.gaussian import LazyGaussians

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own switch: the kernels run on the CPU
_KEYS = 64  # in a tile


def fused_attention(q: Tensor, k: Tensor, v: Tensor, kernels: LazyGaussians) -> Tensor:
    """Compute attention [B, h, N, d] with kernels that are not computed yet; see `unsupported`.

    The layout is that of [B, N, h, d], transposed. Of q, k and v only the last dimension has to be dense.
    """
    source = None if kernels.q is q else kernels.q
    q, k = q.to(v.dtype), k.to(v.dtype)
    maps, limits = kernels.gaug.maps(kernels.built_for), kernels.gaug.limits(kernels.grid, kernels.built_for)
    out: Tensor = gaussian_attention(q, k, v, source, maps, kernels.grid, limits)[0]
    return out


def unsupported(v: Tensor, kernels: LazyGaussians) -> str:
    """Return why `fused_attention` cannot be computed; empty if it can."""
    if not INTERPRETED:
        if why := _unsupported_device(v.device):
            return str(why)
        if v.dtype not in (torch.bfloat16, torch.float16):
            return f"it computes in bfloat16 or float16, not {str(v.dtype).removeprefix('torch.')}"
    if not 16 <= v.shape[-1] <= 128:
        return f"heads must be 16 to 128 wide, not {v.shape[-1]}"
    if kernels.gaug.correlation is not None:
        return "a rotated kernel is not a product"
    if kernels.kept is not None:
        return "a subset of the patches is no grid"
    exported = torch.compiler.is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    return "an exported model has to run anywhere" if exported else ""


@torch.compiler.assume_constant_result  # the name of a GPU is no part of a compiled graph
def _unsupported_device(device: torch.device) -> str:
    if device.type != "cuda" or torch.version.hip:
        return "it needs an NVIDIA GPU"
    if torch.cuda.get_device_properties(device).major < 8:
        return "it needs an Ampere GPU or a later one"
    installed = find_spec("triton") and find_spec("triton.knobs")
    return "" if installed else "Triton 3.4 or later is not installed"


@torch.library.custom_op("locat::gaussian_attention", mutates_args=())
def gaussian_attention(
    q: Tensor, k: Tensor, v: Tensor, source: Tensor | None, maps: Tensor, grid: list[int], limits: list[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute out [B, h, N, d] and, for the backward pass, lse [B, h, N] and (slopes, softplus) [3, B, h, N].

    `source` [B, h, N, d] are the queries whose kernels these are, if they are not q; `maps` and the limits
    (widest, ε, largest squared distance) are those of `triton_attention`.
    """
    from locat_lightning.nn import triton_attention

    out, lse, kernels = _empty_outputs(q)
    tiles, shape = _tiles(q, *grid)
    q, k, v, of_kernels = (_dense(t) for t in (q, k, v, q if source is None else source))
    B, h, N, d = q.shape
    if not B:
        return out, lse, kernels
    with torch.cuda.device_of(q):  # where Triton launches
        triton_attention.forward[lambda meta: (math.ceil(N / meta["BM"]) * B * h,)](
            q, k, v, of_kernels, maps, out, lse, kernels, *_strides(q, k, v, of_kernels),
            h, N, *grid, tiles, *limits, d**-0.5, SAME=source is None, **shape,
        )  # fmt: skip
    return out, lse, kernels


@torch.library.custom_op("locat::gaussian_attention_backward", mutates_args=())
def gaussian_attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    source: Tensor | None,
    maps: Tensor,
    out: Tensor,
    lse: Tensor,
    kernels: Tensor,
    grid: list[int],
    limits: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k, v, source (empty if it is not given) and maps."""
    from locat_lightning.nn import triton_attention

    d_q, d_k, d_v, d_source, d_maps = _empty_gradients(q, source, maps)
    tiles, shape = _tiles(q, *grid)
    d_out, q, k, v, of_kernels = (_dense(t) for t in (d_out, q, k, v, q if source is None else source))
    B, h, N, d = q.shape
    if not B:
        return d_q, d_k, d_v, d_source, d_maps.zero_()
    delta = torch.empty_like(lse)
    blocks = math.ceil(N / triton_attention.QUERIES) * B * h
    partial = maps.new_empty(blocks, len(maps))
    with torch.cuda.device_of(q):
        triton_attention.d_queries[(blocks,)](
            q, k, v, of_kernels, maps, out, lse, kernels, d_out, d_q, d_source, partial, delta,
            *_strides(q, k, v, of_kernels, d_out),
            h, N, *grid, tiles, *limits, d**-0.5, SAME=source is None, **shape,
        )  # fmt: skip
        triton_attention.d_keys_values[(tiles * B * h,)](
            q, k, v, maps, lse, kernels, d_out, delta, d_k, d_v, *_strides(q, k, v, d_out),
            h, N, *grid, tiles, limits[-1], d**-0.5, **shape,
        )  # fmt: skip
    return d_q, d_k, d_v, d_source, torch.sum(partial, 0, out=d_maps)


@gaussian_attention.register_fake
def _(q: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_outputs(q)


@gaussian_attention_backward.register_fake
def _(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, source: Tensor | None, maps: Tensor, *others: Any
) -> Any:
    return _empty_gradients(q, source, maps)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.constants = inputs[5:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    *grads, d_source, d_maps = gaussian_attention_backward(d_out, *ctx.saved_tensors, *ctx.constants)
    return *grads, d_source if ctx.needs_input_grad[3] else None, d_maps, *(None for _ in ctx.constants)


gaussian_attention.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.locat.gaussian_attention)
def _flops(q: torch.Size, *others: Any, **kwargs: Any) -> int:
    """Two products of matrices, and the maps of the queries."""
    B, h, N, d = q
    return B * h * N * d * (4 * N + 6)


@register_flop_formula(torch.ops.locat.gaussian_attention_backward)
def _backward_flops(d_out: torch.Size, *others: Any, **kwargs: Any) -> int:
    """Five products, as is usual: those that are computed twice count once."""
    B, h, N, d = d_out
    return B * h * N * d * (10 * N + 12)


def _empty_outputs(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    B, h, N, _ = q.shape
    lse, kernels = (q.new_empty(*shape, B, h, N, dtype=torch.float32) for shape in ((), (3,)))
    return _empty_like(q), lse, kernels


def _empty_gradients(q: Tensor, source: Tensor | None, maps: Tensor) -> tuple[Tensor, ...]:
    d_source = q.new_empty(0) if source is None else _empty_like(source)
    return *(_empty_like(q) for _ in "qkv"), d_source, torch.empty_like(maps)


def _empty_like(t: Tensor) -> Tensor:
    """Return a tensor [B, h, N, d] that is laid out as [B, N, h, d]."""
    B, h, N, d = t.shape
    return t.new_empty(B, N, h, d).transpose(1, 2)


def _dense(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for t in tensors for stride in t.stride()[:3]]


def _tiles(q: Tensor, H: int, W: int) -> tuple[int, dict[str, Any]]:
    """Choose the shape of a tile of keys that takes the fewest, with as many columns as possible.

    Returns:
        The number of tiles of a head, and the constants of the kernels.
    """
    N, d = q.shape[2:]
    choices = []
    for columns in (64, 32, 16, 8):
        rows, blocks = _KEYS // columns, math.ceil(W / columns)
        full = (math.ceil(N / W) - 1) // rows * blocks  # tiles above the last ones
        left = N - full // blocks * rows * W  # tokens from there on
        choices.append((full + min(blocks, math.ceil(left / columns)), -columns, rows, blocks == 1))
    tiles, columns, rows, one = min(choices)
    width = max(16, 1 << (d - 1).bit_length())
    return tiles, {"D": d, "BD": width, "ONE": one, "R": rows, "WC": -columns}
