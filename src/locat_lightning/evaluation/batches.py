"""How evaluations read a loader beside a training."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from rich.progress import track
from torch import nn
from torch.utils.data import DataLoader

from locat_lightning.evaluation.gather import first_process


@contextmanager
def frozen(backbone: nn.Module) -> Iterator[None]:
    """Put `backbone` in evaluation mode; afterwards every submodule has its own training flag again."""
    training = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag


@contextmanager
def measuring(backbone: nn.Module, loader: DataLoader, what: str, progress: bool) -> Iterator[Iterable[Any]]:
    """Freeze `backbone`, compute without gradients, and read `loader` with a progress bar.

    A training around this is not touched: training flags and the states of the random number generators are
    put back. The bar is shown on the first process only.
    """
    with isolate_rng(), frozen(backbone), torch.inference_mode():
        yield track(loader, what, total=len(loader), disable=not (progress and first_process()))
