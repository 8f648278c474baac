"""Images of a source as a data set: transformed, each with random numbers of its own."""

import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from locat_lightning.data.decoding import reason
from locat_lightning.errors import InputError


class ImageBatch(NamedTuple):
    """Images as a model takes them.

    Attributes:
        images: [B, 3, H, W], float32, normalised.
        labels: [B], int64; -1 where unknown.
        indices: [B], int64, the images' positions in the data set; -1 in a stream.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor


class Failure(NamedTuple):
    """An image that could not be read.

    Attributes:
        path: the image's.
        reason: what was wrong, in a line.
        mistake: whether the reason is a mistake that a person has to put right, so that it stops the run
            however many unreadable images are allowed.
    """

    path: str
    reason: str
    mistake: bool = False


Label = TypeVar("Label", covariant=True)


class Source(Protocol[Label]):
    """Where images and what is known of each come from: its class (-1 if unknown), or a mask."""

    def __len__(self) -> int: ...

    def path(self, index: int) -> str:
        """The name by which a person finds image `index`."""

    def read(self, index: int) -> tuple[Image.Image, Label]:
        """Image `index` in RGB, and its label."""

    def open(self, index: int) -> AbstractContextManager[tuple[Image.Image, Label]]:
        """Image `index` in RGB, perhaps still undecoded (see `open_image`), and its label."""
        return nullcontext(self.read(index))


class Images(Dataset):
    """The images of a source, transformed.

    Item `epoch · len + index` is image `index` as epoch `epoch` sees it, so `images[index]` is what the first
    epoch sees. Each item has its own random numbers, and those of the process are left as they were.

    Args:
        source: where the images come from.
        transform: makes a tensor (or several, for several views) of an RGB image.
        seed: of the transform's random numbers.
    """

    def __init__(self, source: Source, transform: Callable[..., Any], seed: int = 0) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: int) -> tuple[Any, Any, int] | Failure:
        epoch, index = divmod(item, len(self))
        try:
            image, label = self.source.read(index)
        except InputError as error:
            return Failure(self.source.path(index), str(error), mistake=True)
        except (
            Exception
        ) as error:  # decoders raise anything; a worker that raises would hide which image it was
            return Failure(self.source.path(index), reason(error))
        with isolate_rng(include_cuda=False):
            random.seed(f"{self.seed} {epoch} {index}")
            np.random.seed(random.getrandbits(32))  # noqa: NPY002 - timm's transforms draw from the global state
            torch.default_generator.manual_seed(random.getrandbits(63))
            return *self.transformed(image, label), index

    def transformed(self, image: Image.Image, label: Any) -> tuple[Any, Any]:
        """Transforms an image, and its label where that goes with it."""
        return self.transform(image), label
