"""The images of a source as a data set: read, transformed, each with random numbers of its own."""

import random
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
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
        indices: [B], int64, the images' positions in the data set.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor


class Failure(NamedTuple):
    """An image that could not be read, and the reason in a line."""

    path: str
    reason: str
    mistake: bool = False  # the user's, which stops the run, however many unreadable images are allowed


Label = TypeVar("Label", covariant=True)


class Source(Protocol[Label]):
    """A source of images and of what is known of each: its class (-1 if unknown), or its mask.

    A subclass has `read` or `open`; each is made of the other.
    """

    def __len__(self) -> int: ...

    def path(self, index: int) -> str:
        """Return the name by which a person finds image `index`."""

    def read(self, index: int) -> tuple[Image.Image, Label]:
        """Read image `index` in RGB, and its label."""
        with self.open(index) as (image, label):
            image.load()
            return image, label

    def open(self, index: int) -> AbstractContextManager[tuple[Image.Image, Label]]:
        """Open image `index` in RGB, perhaps without decoding it (see `open_image`), and read its label."""
        return nullcontext(self.read(index))

    def shuffled(self, seed: int, epoch: int, copies: np.ndarray | None = None) -> np.ndarray:
        """Return the positions of all images in the random order of an epoch, int64.

        Each occurs once, or as often as `copies` says, int64 [N] from 0.
        """
        places = np.arange(len(self)) if copies is None else np.arange(len(self)).repeat(copies)
        generator = torch.Generator().manual_seed(seed + epoch)
        order: np.ndarray = places[torch.randperm(len(places), generator=generator).numpy()]
        return order

    def following(self, items: Iterable[int]) -> AbstractContextManager[Callable[[int], None]]:
        """Fetch what is not on this machine ahead of its use, while items of `Images` are read in this order.

        Yields:
            A function that takes how many of them have been read.
        """
        return nullcontext(lambda read: None)


@dataclass(eq=False)
class Images(Dataset):
    """The images of a source, which a transform turns from RGB into tensors.

    Item `epoch · len + index` is image `index` as epoch `epoch` sees it. Its random numbers follow from
    (seed, epoch, index), and those of the process stay as they were.
    """

    source: Source
    transform: Callable[..., Any]
    seed: int = 0

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: int) -> tuple[Any, Any, int] | Failure:
        epoch, index = divmod(item, len(self))
        try:
            image, label = self.source.read(index)
        except InputError as error:
            return Failure(self.source.path(index), str(error), mistake=True)
        except Exception as error:  # decoders raise anything; raised on, it would not name the image
            return Failure(self.source.path(index), reason(error))
        with isolate_rng(include_cuda=False):
            random.seed(f"{self.seed} {epoch} {index}")
            np.random.seed(random.getrandbits(32))  # noqa: NPY002 - timm's transforms draw from the global state
            torch.default_generator.manual_seed(random.getrandbits(63))
            return *self.transformed(image, label), index

    def transformed(self, image: Image.Image, label: Any) -> tuple[Any, Any]:
        """Transform an image, and its label if the transform changes that too."""
        return self.transform(image), label


def digest_of_images(source: Source) -> str:
    """Return a digest of the images: their names in order, and the size and time of files, or the shards'."""
    shards = getattr(source, "digest", None)
    digest = sha256(f"{shards}\0".encode() if shards else b"")
    for index in range(len(source)):
        words = path = source.path(index)
        if shards is None:
            with suppress(OSError):  # no file, or it cannot be read
                file = Path(path).stat()
                words = f"{path}\0{file.st_size}\0{file.st_mtime_ns}"
        digest.update(f"{words}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()
