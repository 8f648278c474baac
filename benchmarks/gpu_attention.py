"""Attention on a GPU: exactness against float64, and time beside torch's own kernels (rows of `gpu.py`)."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from locat_lightning.nn import GaussianAugmentation, gaussian_attention, gaussian_kernel
from locat_lightning.nn.attention import gaussian_augmented_attention

BUILT_FOR = 14, 14

Triple = tuple[Tensor, Tensor, Tensor]  # q, k, v [B, h, N, d]


class Shape(NamedTuple):
    """Images, heads, width of a head, patch grid, prefix tokens."""

    images: int
    heads: int
    width: int
    grid: tuple[int, int]
    prefix: int = 1

    @property
    def tokens(self) -> int:
        return self.prefix + self.grid[0] * self.grid[1]


EXACT = [
    Shape(2, 3, 64, (6, 6)),
    Shape(2, 6, 64, (14, 14)),
    Shape(1, 2, 64, (32, 32)),
    Shape(2, 2, 64, (14, 14), 0),
    Shape(2, 2, 64, (5, 9), 5),
    Shape(2, 2, 64, (13, 7), 6),
    Shape(2, 2, 16, (14, 14)),
    Shape(2, 2, 32, (14, 14)),
    Shape(2, 2, 96, (14, 14)),
    Shape(2, 2, 128, (14, 14)),
]
LAYERS = [
    Shape(256, 6, 64, (14, 14)),
    Shape(32, 6, 64, (32, 32)),
    Shape(32, 6, 64, (40, 40)),
    Shape(512, 6, 64, (6, 6)),
    Shape(4, 6, 64, (64, 64)),
]
TINY = [Shape(2, 2, 16, (3, 4))]


def milliseconds(run: Callable[[], object], device: str, seconds: float = 0.3) -> float:
    """Return the median time of a run, of some that follow each other without a wait."""

    def took(times: int) -> float:
        start = perf_counter()
        for _ in range(times):
            run()
        if device == "cuda":
            torch.cuda.synchronize()
        return perf_counter() - start

    took(3)
    times = max(1, min(50, int(seconds / 10 / took(1))))
    return 1e3 * median(took(times) / times for _ in range(7))


def inputs(shape: Shape, device: str, dtype: torch.dtype) -> tuple[Triple, GaussianAugmentation]:
    """Return q, k, v as a layer cuts them out of one projection, and the layer's kernels."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(shape.images, shape.tokens, 3, shape.heads, shape.width, generator=generator)
    q, k, v = (each.transpose(1, 2) for each in qkv.to(device, dtype).unbind(2))
    gaug = GaussianAugmentation(shape.width).to(device)
    with torch.no_grad():  # wide and narrow, strong and weak ones
        gaug.log_var.weight.copy_(torch.randn(gaug.log_var.weight.shape, generator=generator) * 0.3)
        gaug.log_alpha.weight.copy_(torch.randn(gaug.log_alpha.weight.shape, generator=generator) * 0.3)
    return (q.requires_grad_(), k.requires_grad_(), v.requires_grad_()), gaug


def attention(qkv: Triple, gaug: GaussianAugmentation, grid: tuple[int, int]) -> Tensor:
    return gaussian_attention(*qkv, gaug(qkv[0], grid, BUILT_FOR))


def in_full(qkv: Triple, gaug: GaussianAugmentation, grid: tuple[int, int]) -> Tensor:
    """The equation in float64."""
    return gaussian_augmented_attention(*qkv, gaussian_kernel(gaug(qkv[0], grid, BUILT_FOR)).double())


def poison(device: str) -> None:
    """Fill free memory with NaN, which the outputs that follow are made of."""
    for size in (2**12, 2**16, 2**20, 2**24):
        for _ in range(4):
            torch.full((size,), torch.nan, device=device)


def gradients(out: Tensor, trained: Sequence[Tensor]) -> list[Tensor]:
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad(out, trained, upstream)]


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest difference, in units of the largest value, of the output and of any gradient."""
    pairs = zip(found, expected, strict=True)
    return max(float((a.double() - b.double()).abs().max() / b.double().abs().max()) for a, b in pairs)


def exactness(shape: Shape, device: str, dtype: torch.dtype) -> dict[str, Any]:
    qkv, gaug = inputs(shape, device, dtype)
    q, k, v = (each.detach().double().requires_grad_() for each in qkv)
    wide = q, k, v
    reference = GaussianAugmentation(shape.width).to(device).double()
    reference.load_state_dict(gaug.state_dict())
    weights = [gaug.log_var.weight, gaug.log_alpha.weight]
    wide_weights = [reference.log_var.weight, reference.log_alpha.weight]
    runs = []
    for _ in range(2):
        poison(device)
        runs.append(gradients(attention(qkv, gaug, shape.grid), [*qkv, *weights]))
    expected = gradients(in_full(wide, reference, shape.grid), [*wide, *wide_weights])
    plain = gradients(F.scaled_dot_product_attention(*qkv), qkv)
    plain_expected = gradients(F.scaled_dot_product_attention(*wide), wide)
    same = all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    return {
        "row": f"{str(dtype).removeprefix('torch.')}, {shape.grid[0]} × {shape.grid[1]} patches, "
        f"{shape.prefix} prefix, d = {shape.width}",
        "error": error(runs[0], expected),
        "SDPA's of plain attention": error(plain, plain_expected),
        "same twice": "yes" if same else "no",
    }


def time_of(run: Callable[[], Tensor], trained: Sequence[Tensor], device: str) -> float | None:
    """Return the milliseconds of forward and backward; None where torch has no such kernel."""
    try:
        upstream = torch.randn_like(run())
        return milliseconds(lambda: torch.autograd.grad(run(), trained, upstream), device)
    except RuntimeError as problem:
        print(f"not measured: {str(problem).splitlines()[0]}", flush=True)
        return None


def layer(shape: Shape, device: str, backend: str) -> dict[str, Any]:
    qkv, gaug = inputs(shape, device, torch.bfloat16)

    def plain(kernel: SDPBackend) -> float | None:
        def run() -> Tensor:
            with sdpa_kernel(kernel) if device == "cuda" else nullcontext():
                return F.scaled_dot_product_attention(*qkv)

        return time_of(run, qkv, device)

    def ours(function: Callable[..., Tensor]) -> float | None:
        with torch.autocast(device, dtype=torch.bfloat16):
            return time_of(lambda: function(qkv, gaug, shape.grid), [*qkv, *gaug.parameters()], device)

    found: dict[str, Any] = {"row": f"N = {shape.tokens}, {shape.images} images, {shape.heads} heads"}
    found["flash"], found["cuDNN"] = plain(SDPBackend.FLASH_ATTENTION), plain(SDPBackend.CUDNN_ATTENTION)
    found["LocAt"] = ours(attention)
    found["LocAt compiled"] = ours(torch.compile(attention, dynamic=False, backend=backend))
    best = min((each for each in (found["flash"], found["cuDNN"]) if each), default=None)
    for name in ("LocAt", "LocAt compiled"):
        found[f"{name} / SDPA"] = found[name] / best if best and found[name] else None
    return found


def rows(group: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure the rows of `exact` or `layer`."""
    if group == "layer":
        backend = "eager" if args.tiny else "inductor"
        yield from (layer(shape, args.device, backend) for shape in (TINY if args.tiny else LAYERS))
        return
    for dtype in (torch.bfloat16, torch.float16):
        for shape in TINY if args.tiny else EXACT:
            yield exactness(shape, args.device, dtype)
