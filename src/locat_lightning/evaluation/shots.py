"""Accuracy by how many training images the classes have: many, medium and few shot, and balanced.

Source: the groups are those of "Large-Scale Long-Tailed Recognition in an Open World" (CVPR 2019).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

MANY, FEW = 100, 20  # many-shot classes have more training images, few-shot classes fewer
UNBALANCED = 2  # times as many images as the smallest class has the largest at least
FIGURES = ("balanced", "many", "medium", "few")


def is_comparable(figure: str, first: Tensor | None, second: Tensor | None) -> bool:
    """Return whether a figure is of the same images for two models, of these training images [N]."""
    same = first is None or second is None or torch.equal(first, second)
    return same or figure.partition("_")[0] not in {*FIGURES} - {"balanced"}


def is_unbalanced(counts: Sequence[int]) -> bool:
    """Return whether classes of so many training images are worth telling apart; no if none are known."""
    return bool(counts) and max(counts) >= UNBALANCED * min(counts)


def shots_of(labels: Tensor, counts: Sequence[int]) -> Tensor | None:
    """Return the training images of each label's class [N]; None where classes are of about one size."""
    return torch.tensor(counts)[labels] if is_unbalanced(counts) else None


def figures_of(counts: Sequence[int]) -> list[str]:
    """Return the names of the figures that there are, if these are the training images of each class."""
    if not is_unbalanced(counts):
        return []
    return list(weights_by_group(torch.arange(len(counts)), torch.tensor(counts)))


def weights_by_group(labels: Tensor, shots: Tensor) -> dict[str, Tensor]:
    """Return the weight of each image in the accuracy of each group that has images: float64 [N] by figure.

    An image weighs 1 / n in its group, where n is the number of evaluated images of its class, so that the
    weighted mean of hits is the mean of the classes' accuracies; 0 elsewhere. `balanced` has all classes.

    Args:
        labels: [N] int64.
        shots: training images of each image's class, [N] int64.
    """
    _, place, evaluated = labels.unique(return_inverse=True, return_counts=True)
    own = 1 / evaluated[place].double()
    groups = {
        "balanced": torch.ones_like(labels, dtype=torch.bool),
        "many": shots > MANY,
        "medium": (shots >= FEW) & (shots <= MANY),
        "few": shots < FEW,
    }
    return {name: own * held for name, held in groups.items() if held.any()}
