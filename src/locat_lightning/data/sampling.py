"""The order of images: shuffled for training, as it is for evaluation."""

from collections.abc import Iterator
from itertools import islice

from torch.utils.data.distributed import DistributedSampler


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
