"""Classes of unequal size: how often each is drawn, and long-tailed parts of a data set."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from locat_lightning.data.dataset import Source

Sampling = Literal["plain", "sqrt", "balanced"]
POWERS: dict[Sampling, float] = {"plain": 1.0, "sqrt": 0.5, "balanced": 0.0}


def labels_of(source: Source) -> np.ndarray | None:
    """Return the labels of a source's images, int64 [N]; None if it does not know all without reading."""
    found = getattr(source, "labels", None)
    labels = None if found is None else np.asarray(found, np.int64)
    return None if labels is None or (labels < 0).any() else labels


def class_shares(counts: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Return the share of the draws that each class of n images has, n^q / Σ n^q: float64 [C].

    q is 1 for `plain`, 1/2 for `sqrt` and 0 for `balanced`. A class without images has none.

    Source: "Decoupling Representation and Classifier for Long-Tailed Recognition" (ICLR 2020), section 3.
    """
    powers = np.where(counts > 0, np.maximum(counts, 1) ** POWERS[sampling], 0.0)
    shares: np.ndarray = powers / powers.sum()
    return shares


def copies(labels: np.ndarray, shares: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw how often each image occurs in an epoch of as many draws as there are images: int64 [N].

    A class of n images has its share s of the N draws: s N, rounded up or down, and each of its images
    s N / n of them, rounded up or down; which ones get more is drawn. This varies less from epoch to epoch
    than independent draws with the same expectation.

    Args:
        labels: [N], from 0 to C - 1.
        shares: of the classes [C], which add up to 1.
        rng: random numbers.
    """
    images = len(labels)
    counts = np.bincount(labels, minlength=len(shares))
    expected = images * (shares / np.maximum(counts, 1))[labels]
    order = rng.permutation(images)
    order = order[labels[order].argsort(kind="stable")]  # class by class, at random within each
    ends = np.minimum(np.floor(expected[order].cumsum() + rng.random()), images)
    ends[-1] = images  # whatever has been rounded
    drawn = np.empty(images, np.int64)
    drawn[order] = np.diff(ends, prepend=0)
    return drawn


def repeats(order: np.ndarray) -> np.ndarray:
    """Return how often each entry has occurred before in an order: int64 [N]."""
    by_value = order.argsort(kind="stable")
    ordered = order[by_value]
    before = np.empty_like(order)
    before[by_value] = np.arange(len(order)) - np.searchsorted(ordered, ordered)
    return before


def long_tail(labels: np.ndarray, imbalance: float) -> np.ndarray:
    """Choose images whose classes, in their order, shrink to 1 / `imbalance`: ascending positions, int64.

    Class c of C keeps ⌊n imbalance^(−c / (C − 1))⌋ of its n images, but at least one. They are the same ones
    in every run.

    Source: the long-tailed CIFAR of "Class-Balanced Loss Based on Effective Number of Samples" (CVPR 2019).
    """
    classes, rng = int(labels.max()) + 1, np.random.default_rng(0)
    kept = []
    for label in range(classes):
        own = rng.permutation(np.flatnonzero(labels == label))
        number = int(len(own) * imbalance ** (-label / max(1, classes - 1)))
        kept.append(own[: max(1, number)])
    return np.sort(np.concatenate(kept))


@dataclass(frozen=True, eq=False)
class Subset(Source[int]):
    """Some images of a source, in their order.

    Args:
        source: of all images.
        places: positions of those in the subset, ascending int64 [N].
    """

    source: Source[int]
    places: np.ndarray

    def __len__(self) -> int:
        return len(self.places)

    @property
    def labels(self) -> np.ndarray | None:
        """The label of each image."""
        labels = labels_of(self.source)
        return None if labels is None else labels[self.places]

    @property
    def digest(self) -> str | None:
        """That of all shards, if the source has shards."""
        return getattr(self.source, "digest", None)

    def path(self, index: int) -> str:
        return self.source.path(int(self.places[index]))

    @contextmanager
    def open(self, index: int) -> Iterator[tuple[Image.Image, int]]:
        with self.source.open(int(self.places[index])) as opened:
            yield opened

    def shuffled(self, seed: int, epoch: int, copies: np.ndarray | None = None) -> np.ndarray:
        of_all = np.zeros(len(self.source), np.int64)
        of_all[self.places] = 1 if copies is None else copies
        return np.searchsorted(self.places, self.source.shuffled(seed, epoch, of_all))

    def following(self, items: Iterable[int]) -> AbstractContextManager[Callable[[int], None]]:
        return self.source.following(self.places[np.fromiter(items, np.int64) % len(self)].tolist())
