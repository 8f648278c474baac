"""The order of images: shuffled for training, unchanged for evaluation; shared out among processes."""

from collections.abc import Iterator
from itertools import islice

from torch.utils.data.distributed import DistributedSampler


class TrainOrder(DistributedSampler):
    """The items of `Images` for one epoch, shuffled anew each epoch and shared evenly among processes."""

    skip = 0  # items of this process at the beginning of the epoch

    def __iter__(self) -> Iterator[int]:
        start = self.epoch * len(self.dataset)  # type: ignore[arg-type]
        return (start + index for index in islice(super().__iter__(), self.skip, None))


class EvaluationOrder(DistributedSampler):
    """Every image once, in order and without padding: process r of n reads r, r + n, ….

    Lightning keeps a subclass of DistributedSampler; any other sampler it would replace by one that pads.
    """

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]
