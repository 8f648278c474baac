"""What a timm model costs: parameters, multiply-adds, memory for the backward pass, and time."""

from collections.abc import Callable
from copy import deepcopy
from itertools import chain
from math import prod
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from locat_lightning.evaluation.batches import frozen
from locat_lightning.evaluation.features import autocast
from locat_lightning.nn import GaussianAugmentation


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Count the parameters of a model, and those of GAug among them."""
    gaugs = (module for module in model.modules() if isinstance(module, GaussianAugmentation))
    of_gaug = {id(p): p.numel() for gaug in gaugs for p in gaug.parameters()}
    return sum(p.numel() for p in model.parameters()), sum(of_gaug.values())


def multiply_adds(model: nn.Module, images: Tensor) -> int:
    """Count the multiply-adds of a forward pass in matrix products, convolutions and attention.

    Half of the FLOPs of torch's counter, as in the papers' tables. As there, norms and elementwise operations
    do not count, so GAug's kernel and softmax do not.
    """

    def baddbmm(to: Any, a: tuple[int, ...], b: tuple[int, ...], *_: Any, **__: Any) -> int:
        return 2 * prod(a) * b[-1]  # of shapes [B, n, m] and [B, m, p]

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: baddbmm})
    with frozen(model), torch.no_grad(), counter:
        model(images)
    return counter.get_total_flops() // 2


def activation_bytes(model: nn.Module, images: Tensor) -> int:
    """Count the bytes that autograd keeps for the backward pass, images included, without the parameters."""
    model = deepcopy(model).train()
    own = {t.untyped_storage().data_ptr() for t in chain(model.parameters(), model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return t.detach()

    with torch.enable_grad(), saved_tensors_hooks(keep, lambda t: t):
        model(images)
    return sum(storage.nbytes() for storage in kept.values())


def images_per_second(
    model: nn.Module, images: Tensor, *, seconds: float = 2.0, autocast_dtype: torch.dtype | None = None
) -> float:
    """Measure images per second of the forward pass, from the median of three repetitions or more.

    They take `seconds` or more, besides a warm-up.
    """
    wait: Callable[[], None] = torch.cuda.synchronize if images.is_cuda else lambda: None
    times: list[float] = []
    with frozen(model), torch.inference_mode(), autocast(images.device, autocast_dtype):
        model(images)
        while len(times) < 3 or sum(times) < seconds:
            wait()
            begin = perf_counter()
            model(images)
            wait()
            times.append(perf_counter() - begin)
    return len(images) / median(times)
