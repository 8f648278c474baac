"""What evaluations need of a loader, and how they read it beside a training."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from rich.progress import track
from torch import Tensor, nn

from locat_lightning.evaluation.gather import first_process


class Batch(Protocol):
    """A batch of images with their places in the data set."""

    @property
    def images(self) -> Tensor:
        """[B, 3, H, W], normalised."""

    @property
    def indices(self) -> Tensor:
        """[B] int64: positions in the data set."""


class LabelledBatch(Batch, Protocol):
    """A batch of images with their labels."""

    @property
    def labels(self) -> Tensor:
        """[B] int64; -1 is "no label"."""


class MaskedBatch(Batch, Protocol):
    """A batch of images with a class for every pixel."""

    @property
    def masks(self) -> Tensor:
        """[B, H', W'] uint8; 255 is "no class"."""


Batch_co = TypeVar("Batch_co", bound=Batch, covariant=True)


class Batches(Protocol[Batch_co]):
    """What is needed of a `DataLoader`."""

    @property
    def dataset(self) -> Any:
        """All images, of all processes: their number is its length."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch_co]: ...


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
def measuring(
    backbone: nn.Module, loader: Batches[Batch_co], what: str, progress: bool
) -> Iterator[Iterable[Batch_co]]:
    """Freeze `backbone`, compute without gradients, and read `loader` with a progress bar.

    A training around this is not touched: training flags and the states of the random number generators are
    put back. The bar is shown on the first process only.
    """
    with isolate_rng(), frozen(backbone), torch.inference_mode():
        yield track(loader, what, total=len(loader), disable=not (progress and first_process()))
