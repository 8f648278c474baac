"""Batches of the images that can be read, and a list of the others."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import cycle, islice
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from locat_lightning.data.dataset import Failure, ImageBatch, Images
from locat_lightning.data.decoding import log
from locat_lightning.data.sampling import TrainOrder
from locat_lightning.data.workers import _leave_the_end_to_the_run
from locat_lightning.errors import InputError


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
