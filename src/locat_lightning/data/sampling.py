"""The order of images: shuffled for training, unchanged for evaluation; shared out among processes."""

from collections.abc import Iterator, Sequence
from math import ceil

import numpy as np
from torch.utils.data.distributed import DistributedSampler

from locat_lightning.data.balance import copies, labels_of, repeats
from locat_lightning.data.dataset import Images

# How many epochs later an image is seen as its second copy in an epoch is.
LATER = 10**5


class TrainOrder(DistributedSampler):
    """The items of `Images` for one epoch, shuffled anew each epoch and shared evenly among processes.

    An epoch has whole batches only, if it has one. The first `seen` images, of all processes, are left out.

    Args:
        images: the data set.
        processes: that share it.
        rank: of this one.
        batch_size: images of a batch in each process.
        seed: of all orders.
        shares: of the draws that each class has [C] (see `copies`); an image that occurs again in an epoch is
            augmented anew. None for each image once.
    """

    seen = 0

    def __init__(
        self,
        images: Images,
        processes: int,
        rank: int,
        *,
        batch_size: int = 1,
        seed: int = 0,
        shares: np.ndarray | None = None,
    ) -> None:
        super().__init__(images, processes, rank, seed=seed)
        self.images = len(images)
        self.source = images.source
        self.shares = shares
        if self.num_samples > batch_size:
            self.num_samples -= self.num_samples % batch_size

    @property
    def rest(self) -> int:
        """The images of this process that are left: of whole batches, or all if those have been seen."""
        whole = self.num_samples * self.num_replicas
        end = whole if self.seen < whole else self.images
        return max(0, ceil((end - self.seen) / self.num_replicas))

    def __iter__(self) -> Iterator[int]:
        mine = (np.arange(self.rest) * self.num_replicas + self.rank + self.seen) % self.images
        return iter(self._items()[mine].tolist())

    def _items(self) -> np.ndarray:
        """Return the items of all processes, int64 [N]."""
        if self.shares is None:
            return self.epoch * self.images + self.source.shuffled(self.seed, self.epoch)
        labels = labels_of(self.source)
        assert labels is not None  # of which there are shares
        rng = np.random.default_rng([self.seed, self.epoch, LATER])
        order = self.source.shuffled(self.seed, self.epoch, copies(labels, self.shares, rng))
        items: np.ndarray = (self.epoch + LATER * repeats(order)) * self.images + order
        return items


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


def laned_order(
    starts: np.ndarray, lanes: int, seed: int, epoch: int, copies: np.ndarray | None = None
) -> np.ndarray:
    """Shuffle images that lie in shards so that few shards are read at once: int64 [N], each position once.

    The shards, in random order, are dealt to so many lanes. A lane reads one shard after the other, the
    images of each in random order, and the lanes take turns: image p of the order comes from lane p mod
    lanes until the first lane has ended. The order follows from (seed, epoch) alone. Where the number of
    processes divides that of the lanes, each process so reads the shards of its own lanes.

    Args:
        starts: position of each shard's first image, and after the last N, ascending.
        lanes: shards that are read at once.
        seed: of all orders.
        epoch: whose order it is.
        copies: how often each image occurs, int64 [N]; None for once.
    """
    rng = np.random.default_rng([seed, epoch])
    shards = rng.permutation(len(starts) - 1)
    lanes = min(lanes, len(shards))
    places = np.arange(starts[-1])
    of_shards = np.split(places, starts[1:-1])
    if copies is not None:
        of_shards = [own.repeat(copies[own]) for own in of_shards]
    within = [rng.permutation(of_shards[shard]) for shard in shards]
    columns = [np.concatenate(within[lane::lanes]) for lane in range(lanes)]
    turns = np.full((max(map(len, columns)), lanes), -1)
    for lane, column in enumerate(columns):
        turns[: len(column), lane] = column
    return turns[turns >= 0]
