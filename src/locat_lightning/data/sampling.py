"""The order of images: shuffled for training, unchanged for evaluation; shared out among processes."""

from collections.abc import Iterator, Sequence
from math import ceil

import torch
from torch.utils.data.distributed import DistributedSampler

from locat_lightning.data.dataset import Images


class TrainOrder(DistributedSampler):
    """The items of `Images` for one epoch, shuffled anew each epoch and shared evenly among processes.

    An epoch has whole batches only, if it has one. The first `seen` images, of all processes, are left out.
    """

    seen = 0

    def __init__(
        self, images: Images, processes: int, rank: int, *, batch_size: int = 1, seed: int = 0
    ) -> None:
        super().__init__(images, processes, rank, seed=seed)
        self.images = len(images)
        if self.num_samples > batch_size:
            self.num_samples -= self.num_samples % batch_size

    @property
    def rest(self) -> int:
        """The images of this process that are left: of whole batches, or all if those have been seen."""
        whole = self.num_samples * self.num_replicas
        end = whole if self.seen < whole else self.images
        return max(0, ceil((end - self.seen) / self.num_replicas))

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.images, generator=torch.Generator().manual_seed(self.seed + self.epoch))
        mine = torch.arange(self.rest) * self.num_replicas + self.rank + self.seen
        return iter((self.epoch * self.images + order[mine % self.images]).tolist())


class EvaluationOrder(DistributedSampler):
    """Every image once, in order and without padding: process r of n reads r, r + n, ….

    `items` of `Images` are read instead of all, where they are given. Lightning keeps a subclass of
    DistributedSampler; any other sampler it would replace by one that pads.
    """

    def __init__(self, images: Images, processes: int, rank: int, items: Sequence[int] | None = None) -> None:
        super().__init__(images, processes, rank, shuffle=False)
        self.items = (range(len(images)) if items is None else items)[rank::processes]

    def __iter__(self) -> Iterator[int]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)
