"""Reading images: from a file to the RGB a viewer shows, from many to batches, and what becomes of the rest.

The order and the augmentation of training follow from (seed, epoch, index) alone: any number of worker
processes gives the same batches, and so does a run that is taken up again.
"""

import logging
import os
import random
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import cycle, islice
from multiprocessing import parent_process
from os import PathLike
from threading import Thread
from types import TracebackType
from typing import IO, Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from torch.utils.data.distributed import DistributedSampler

from locat_lightning.errors import InputError

log = logging.getLogger(__name__)

# Modes of more than 8 bits a channel, and the value that they show as white.
WHITE = {"I": 65535, "I;16": 65535, "I;16B": 65535, "I;16L": 65535, "I;16N": 65535, "F": 1}


def read_image(file: str | PathLike[str] | IO[bytes]) -> Image.Image:
    """Reads an image as a viewer shows it: RGB, 8 bits, upright, transparent parts on white.

    Args:
        file: a path, or an open binary file.

    Raises:
        Exception: of whichever kind the decoder raises when it cannot read the file.
    """
    with open_image(file) as image:
        image.load()
        return image


@contextmanager
def open_image(file: str | PathLike[str] | IO[bytes]) -> Iterator[Image.Image]:
    """Opens an image as `read_image` shows it; a plain JPEG is not decoded yet, so it can be a draft.

    Args:
        file: a path, or an open binary file.

    Raises:
        Exception: of whichever kind the decoder raises when it cannot read the file, now or on first use.
    """
    with Image.open(file) as image:
        yield image if _is_plain(image) else to_rgb(image)


def _is_plain(image: Image.Image) -> bool:
    """Whether the head of the file tells that `to_rgb` would return the image as it is (and decode it)."""
    if image.format != "JPEG" or image.mode != "RGB":
        return False
    try:
        return bool(image.getexif().get(ExifTags.Base.Orientation, 1) == 1)
    except Exception:  # see to_rgb
        return True


def to_rgb(image: Image.Image) -> Image.Image:
    """Turns an image of any mode into the RGB that a viewer shows; may turn `image` itself upright.

    A plain RGB image is returned as it is, not copied. Colour profiles (ICC) are not applied.
    """
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except (
        Exception
    ) as error:  # the parser raises anything on broken EXIF data; the pixels are sound all the same
        log.debug("broken EXIF data, orientation not applied: %s", error)
    if image.mode in WHITE:
        values = np.asarray(image, np.float64)
        white = max(WHITE[image.mode], values.max())
        image = Image.fromarray((values.clip(0) * (255 / white)).round().astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, "white")
        canvas.paste(image, mask=image.getchannel("A"))
        return canvas
    return image if image.mode == "RGB" else image.convert("RGB")


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


class TrainOrder(DistributedSampler):
    """The items of `Images` for one epoch, shuffled anew in each and shared out evenly among processes.

    Attributes:
        skip: so many items of this process are left out at the beginning.
    """

    skip = 0

    def __iter__(self) -> Iterator[int]:
        start = self.epoch * len(self.dataset)  # type: ignore[arg-type]
        return (start + index for index in islice(super().__iter__(), self.skip, None))


class EvaluationOrder(DistributedSampler):
    """Every image once, in order: process r of n reads r, r + n, …, and nobody pads.

    Lightning leaves subclasses of DistributedSampler alone; any other it would replace by one that pads.
    """

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]


class UnreadableImages:
    """The images that this process could not read: counted once each, listed, and at some point too many.

    Args:
        limit: the run stops when there are more.
    """

    LISTED = 10

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.reasons: dict[str, str] = {}
        self._reported = 0

    def add(self, failures: Iterable[Failure]) -> None:
        """Takes note of failures, but for the one that is too many: that is not skipped.

        Raises:
            InputError: there are more than `limit` by now, or one is a mistake.
        """
        for path, reason, mistake in failures:
            if mistake:
                raise InputError(reason)
            if path not in self.reasons and len(self.reasons) >= self.limit:
                skipped = f" and {self.limit} more before" if self.limit else ""
                raise InputError(
                    f"cannot read image {path} ({reason}){skipped}: repair or remove it, or allow more"
                    f" with --data.max_unreadable (now {self.limit})"
                )
            self.reasons[path] = reason

    def report(self) -> None:
        """Lists what was noted since the last report."""
        new = list(self.reasons.items())[self._reported :]
        if new:
            self._reported += len(new)
            lines = [f"  {path}: {reason}" for path, reason in new[: self.LISTED]]
            if len(new) > self.LISTED:
                lines.append(f"  and {len(new) - self.LISTED} more")
            count = f"{len(new)} image{'s' * (len(new) > 1)} could not be read"
            total = f"{len(self.reasons)} in all, the run stops at more than {self.limit}"
            log.warning(
                "\n".join([f"{count} and {'were' if len(new) > 1 else 'was'} skipped ({total}):", *lines])
            )


class ImageLoader(DataLoader):
    """A DataLoader of `ImageBatch`es that leaves out what cannot be read.

    In training a batch keeps its size by repeating its readable images, in evaluation it shrinks. The
    unreadable ones are listed with the last batch, or when the iteration is given up.

    Args:
        dataset: `Images`, or an iterable data set of the same items.
        training: whether batches keep their size.
        unreadable: takes note of what could not be read.
        collate: makes a batch of the items that could be read.
        options: the DataLoader's.

    Raises:
        InputError: while iterating, when too many images, or all of a training batch, cannot be read, or when
            something read, or `collate`, tells of a mistake.
    """

    def __init__(
        self,
        dataset: Images | IterableDataset,
        *,
        training: bool,
        unreadable: UnreadableImages,
        collate: Callable[[Sequence[Any]], Any] | None = None,
        **options: Any,
    ) -> None:
        self.collate = collate or collate_images
        super().__init__(
            dataset,
            collate_fn=partial(_collate, refill=training, collate=self.collate),
            worker_init_fn=_leave_the_end_to_the_run,
            **options,
        )
        self.training = training
        self.unreadable = unreadable

    def seen(self) -> int:
        """Batches that this iteration leaves out at the beginning."""
        return 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator: the workers start at the first batch, after Lightning has set the epoch.
        batches = None
        last, seen = len(self), self.seen()
        if isinstance(self.sampler, TrainOrder):
            self.sampler.skip = seen * (self.batch_size or 1)
        try:
            batches = super().__iter__()
            for number, (batch, failures) in enumerate(batches, seen + 1):
                self.unreadable.add(failures)
                if number == last:  # Lightning does not ask for one more
                    self.unreadable.report()
                if batch is not None:
                    yield batch
                elif self.training:
                    raise InputError(
                        f"no image of a training batch of {len(failures)} can be read, the first being"
                        f" {failures[0].path} ({failures[0].reason}): repair or remove them"
                    )
        except InputError:
            # Whoever shows the error holds the iterator by its traceback: left to the end of the process, its
            # workers would delay that by seconds.
            if isinstance(batches, _MultiProcessingDataLoaderIter):
                batches._shutdown_workers()
                self._iterator = None
            raise
        finally:
            self.unreadable.report()


class ResumableLoader(ImageLoader):
    """An `ImageLoader` of training images that a resumed run takes up where it was cut off.

    Args:
        dataset: `Images`; the sampler, among the options, is their `TrainOrder`.
        trainer: knows how many batches of the epoch it has behind it; None iterates from the beginning.
        options: those of `ImageLoader`.
    """

    def __init__(self, dataset: Images, *, trainer: Trainer | None, **options: Any) -> None:
        super().__init__(dataset, **options)
        self.trainer = trainer

    def seen(self) -> int:
        """Batches of this epoch that the trainer has behind it; 0 for anyone else who iterates a loader."""
        if self.trainer is None or self.trainer.train_dataloader is not self:
            return 0
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def state_dict(self) -> dict[str, Any]:
        """Nothing besides the trainer's progress; Lightning calls a loader with these methods resumable."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing: see `state_dict`."""


def _leave_the_end_to_the_run(worker: int) -> None:
    """A scheduler sends SIGTERM to all processes of a job: a worker heeds only the one that trains.

    A worker that heeded nobody would keep alive a process that ends while it holds an unfinished iterator. On
    macOS and Windows, where the sender cannot be told, a worker heeds all.

    A run that is interrupted while it takes a batch says so itself: its worker, which hands batches over from
    a thread, does not complain as well.
    """
    sys.excepthook = _unless_the_receiver_left
    parent = parent_process()
    if parent is not None and hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        Thread(target=_end_when_told, args=(parent.pid,), daemon=True).start()


def _unless_the_receiver_left(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    if not issubclass(kind, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, traceback)


def _end_when_told(by: int | None) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != by:
        pass
    os._exit(0)


def collate_images(items: Sequence[tuple[Tensor, int, int]]) -> ImageBatch:
    """Make a batch of items of `Images`."""
    return ImageBatch(*default_collate(list(items)))


def _collate(
    items: Sequence[tuple[Any, int, int] | Failure],
    *,
    refill: bool,
    collate: Callable[[Sequence[Any]], Any],
) -> tuple[Any, list[Failure]]:
    """Makes a batch of what was read, which is None if nothing was.

    A mistake that `collate` tells of goes to the process that trains as a failure: raised, it would arrive
    with a worker's traceback in its message.
    """
    failures = [item for item in items if isinstance(item, Failure)]
    read = [item for item in items if not isinstance(item, Failure)]
    if not read:
        return None, failures
    if refill:
        read = list(islice(cycle(read), len(items)))
    try:
        return collate(read), failures
    except InputError as error:
        return None, [*failures, Failure("", str(error), mistake=True)]


def reason(error: Exception) -> str:
    """Says in a line what was wrong with an image."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or of an unknown format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
