"""Data loaders: batches of the images that can be read, a list of the others, and where a run resumes."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import cycle, islice
from math import ceil
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from locat_lightning.data.dataset import Failure, ImageBatch, Images
from locat_lightning.data.sampling import TrainOrder
from locat_lightning.data.workers import check_temporary_folder, end_with_the_run
from locat_lightning.errors import InputError

log = logging.getLogger(__name__)

LISTED = 10  # unreadable images in one warning


class UnreadableImages:
    """Counts and lists the images that this process could not read, up to a limit (None for any number)."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.reasons: dict[str, str] = {}
        self._reported = 0

    def add(self, failures: Iterable[Failure]) -> None:
        """Record failures; raise an `InputError` at one too many, or at a mistake of the user's."""
        for path, reason, mistake in failures:
            if mistake:
                raise InputError(reason)
            if self.limit is not None and path not in self.reasons and len(self.reasons) >= self.limit:
                skipped = f" and {self.limit} more before" if self.limit else ""
                raise InputError(
                    f"cannot read image {path} ({reason}){skipped}: repair or remove it, or allow more"
                    f" with --data.max_unreadable (now {self.limit})"
                )
            self.reasons[path] = reason

    def report(self) -> None:
        """List the failures since the last report in a warning."""
        if not (new := [f"  {path}: {reason}" for path, reason in self.reasons.items()][self._reported :]):
            return
        self._reported += len(new)
        skipped = "image could not be read and was" if len(new) == 1 else "images could not be read and were"
        limit = "" if self.limit is None else f", the run stops at more than {self.limit}"
        more = [f"  and {len(new) - LISTED} more"] if len(new) > LISTED else []
        lines = [f"{len(new)} {skipped} skipped ({len(self.reasons)} in all{limit}):", *new[:LISTED], *more]
        log.warning("\n".join(lines))


def collate_images(items: Sequence[tuple[Tensor, int, int]]) -> ImageBatch:
    """Make a batch of items of `Images`."""
    return ImageBatch(*default_collate(list(items)))


class ImageLoader(DataLoader):
    """A DataLoader that skips the images that cannot be read, and has those of streams fetched ahead.

    In training a batch keeps its size by repeating its readable images; in evaluation it shrinks. The
    unreadable ones are listed with the last batch, or when the iteration ends early. The iteration raises an
    `InputError` if too many images or all of a training batch cannot be read, or the user made a mistake.
    """

    dataset: Images

    def __init__(
        self,
        dataset: Images,
        *,
        training: bool,
        unreadable: UnreadableImages,
        collate: Callable[[Sequence[Any]], Any] = collate_images,
        **options: Any,
    ) -> None:
        read = partial(_collate, refill=training, collate=collate)
        super().__init__(dataset, collate_fn=read, worker_init_fn=end_with_the_run, **options)
        if self.num_workers:
            check_temporary_folder()
        self.training = training
        self.unreadable = unreadable
        self.collate = collate
        self._size: int = options["batch_size"]

    def begin(self) -> int:
        """Prepare an epoch, and return how many of its batches are left out, as a run has seen them."""
        return 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator: the workers start at the first batch, after Lightning has set the epoch.
        batches = None
        last, begun = len(self), self.begin()
        try:
            batches = super().__iter__()
            with self.dataset.source.following(self.sampler) as reached:  # its thread starts after workers
                for number, (batch, failures) in enumerate(batches, 1):
                    reached(number * self._size)
                    self.unreadable.add(failures)
                    if number + begun == last:  # Lightning does not ask for one more
                        self.unreadable.report()
                    if batch is not None:
                        yield batch
                    elif self.training:
                        raise InputError(
                            f"no image of a training batch of {len(failures)} can be read, the first being"
                            f" {failures[0].path} ({failures[0].reason}): repair or remove them"
                        )
        except InputError:
            # The error's traceback keeps the iterator alive: its workers would delay the end of the process
            # by seconds. Torch has no public way to end them.
            if isinstance(batches, _MultiProcessingDataLoaderIter):
                batches._shutdown_workers()
                self._iterator = None
            raise
        finally:
            self.unreadable.report()


class ResumableLoader(ImageLoader):
    """An `ImageLoader` in `TrainOrder` that a resumed run continues where its trainer was interrupted."""

    sampler: TrainOrder

    def __init__(self, dataset: Images, *, trainer: Trainer | None, **options: Any) -> None:
        super().__init__(dataset, **options)
        self.trainer = trainer
        # Of the epoch in which a run resumed: the images seen before, and as how many batches they count.
        self._before: dict[int, tuple[int, int]] = {}

    def seen(self, batches: int) -> int:
        """Return how many images all processes have seen when so many batches of the epoch have ended."""
        assert self.trainer is not None  # whose run it is
        images, before = self._before.get(self.trainer.current_epoch, (0, 0))
        return images + max(0, batches - before) * self._size * self.sampler.num_replicas

    def resume(self, epoch: int, images: int) -> int:
        """Have an epoch begin after so many images; return how many batches that makes."""
        self.sampler.seen = images
        before = len(self) - ceil(self.sampler.rest / self._size)
        self._before = {epoch: (images, before)}
        return before

    def begin(self) -> int:
        if self.trainer is None or self.trainer.train_dataloader is not self:
            return super().begin()  # someone else iterates
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        self.sampler.seen = self.seen(batches)
        return batches

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the trainer's progress says it all. Lightning asks for it in mid-epoch."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore nothing: see `state_dict`."""


def _collate(
    items: Sequence[tuple[Any, int, int] | Failure], *, refill: bool, collate: Callable[[Sequence[Any]], Any]
) -> tuple[Any, list[Failure]]:
    """Make a batch of the items that were read, None if there are none, and list the failures.

    A mistake that `collate` reports travels as a failure: raised, it would reach the training process with a
    worker's traceback in its message.
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
