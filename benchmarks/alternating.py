"""The times of two sides whose runs alternate in one process: the machines are shared."""

from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds(run: Callable[[], object]) -> float:
    start = perf_counter()
    run()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return perf_counter() - start


def compare(
    plain: Callable[[], object], ours: Callable[[], object], rounds: int
) -> tuple[float, float, float]:
    """Median seconds of each side, and the median ratio of neighbouring runs; the first rounds warm up."""
    pairs = [(seconds(plain), seconds(ours)) for _ in range(rounds + 3)][3:]
    a, b = zip(*pairs, strict=True)
    return median(a), median(b), median(y / x for x, y in pairs)
