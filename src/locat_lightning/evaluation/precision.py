"""How matrices in float32 are multiplied."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, cast

import torch


@contextmanager
def float32_products(precision: Literal["ieee", "tf32"]) -> Iterator[None]:
    """Multiply matrices in full float32 (`ieee`) or on CUDA in TF32, whatever else is set."""
    cuda, mkldnn = torch.backends.cuda.matmul, cast(Any, torch.backends.mkldnn)
    with ExitStack() as stack:
        if hasattr(cuda, "fp32_precision"):  # torch 2.9
            for backend in (cuda, mkldnn.matmul) if precision == "ieee" else (cuda,):
                stack.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
                backend.fp32_precision = precision
        else:
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest" if precision == "ieee" else "high")
        yield
