"""Confidence intervals of a figure and of a difference of two: the bootstrap over images."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from locat_lightning.evaluation.per_image import PerImage, fingerprint
from locat_lightning.evaluation.shots import is_comparable

RESAMPLES = 2000
LEVEL = 0.95
ENTRIES = 2**20  # of the table of counts at a time, 8 MiB
# Figures that are errors, the lower the better, with their units; all others are shares, shown in percent.
ERRORS = {"rmse": " m", "abs_rel": "", "log10": ""}


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float

    def __str__(self) -> str:
        """Return it in percent, as it stands behind a figure: [79.2, 86.7]."""
        return f"[{100 * self.low:.1f}, {100 * self.high:.1f}]"


class Figures:
    """The figures of a result with their intervals, to print and to record.

    Args:
        results: what was found of each image.
        group: what precedes the slash in the recorded names.

    Attributes:
        values: figures by name, without those that are not a number.
        intervals: see `intervals`.
    """

    def __init__(self, results: PerImage, group: str) -> None:
        self.results, self.group = results, group
        self.intervals = intervals(results)
        found = results.figures(results.statistics().sum(0), len(results.indices))
        self.values = {name: float(value) for name, value in found.items() if not value.isnan()}

    def cell(self, name: str) -> str:
        """Return a figure and its interval: 83.06% [79.2, 86.7], of an error 0.4312 m [0.4101, 0.4530]."""
        if name in ERRORS:
            low, high = self.intervals[name]
            return f"{self.values[name]:.4f}{ERRORS[name]} [{low:.4f}, {high:.4f}]"
        return f"{self.values[name]:.2%} {self.intervals[name]}"

    def metrics(self) -> dict[str, float]:
        """Return the figures by their recorded names."""
        return {f"{self.group}/{name}": value for name, value in self.values.items()}

    def record(self) -> dict[str, Any]:
        """Return what `metrics.json` says besides: how many images, which, and the intervals."""
        return {
            "images": len(self.results.indices),
            "fingerprint": fingerprint(self.results) or None,
            "intervals": {f"{self.group}/{name}": list(each) for name, each in self.intervals.items()},
        }


class Paired(NamedTuple):
    """A figure of two models on the same images."""

    first: float
    second: float
    difference: float  # first - second
    interval: Interval  # of the difference
    first_better: int  # images of which the first model's figure is better: higher, or lower of an error
    second_better: int


def intervals(results: PerImage, *, seed: int = 0) -> dict[str, Interval]:
    """Return 95 % intervals of the figures by name: percentiles of bootstrap samples of the images.

    A sample has as many images, drawn with replacement, and its figure is computed like the figure itself:
    IoU from the areas of all its images, over the classes that occur in it. A figure that no sample has is
    left out.

    Source: "An Introduction to the Bootstrap" (Efron & Tibshirani 1993), chapter 13.
    """
    statistics = results.statistics()
    found = results.figures(resampled_sums(statistics, seed=seed), len(statistics))
    return {name: Interval(*ends) for name, values in found.items() if (ends := _percentiles(values))}


def paired_differences(first: PerImage, second: PerImage, *, seed: int = 0) -> dict[str, Paired]:
    """Compare the figures that two results on the same images have in common, by name.

    Each bootstrap sample (see `intervals`) has the same images of both: what makes an image hard for both
    models is not taken for chance, so the interval is narrower than those of the two figures suggest.
    """
    both = [first.statistics(), second.statistics()]
    images, width = both[0].shape
    sums = resampled_sums(torch.cat(both, 1), seed=seed)
    samples = [
        results.figures(part, images)
        for results, part in zip((first, second), sums.split([width, both[1].shape[1]], 1), strict=True)
    ]
    whole = [
        results.figures(each.sum(0), images) for results, each in zip((first, second), both, strict=True)
    ]
    alone = [results.figures(each, 1) for results, each in zip((first, second), both, strict=True)]
    shots = getattr(first, "shots", None), getattr(second, "shots", None)
    common = [name for name in whole[0].keys() & whole[1].keys() if is_comparable(name, *shots)]
    found = {}
    for name in common:
        ends = _percentiles(samples[0][name] - samples[1][name])
        if ends:
            values = float(whole[0][name]), float(whole[1][name])
            more = [int((alone[i][name] > alone[1 - i][name]).sum()) for i in (0, 1)]
            better = reversed(more) if name in ERRORS else more
            found[name] = Paired(*values, values[0] - values[1], Interval(*ends), *better)
    return {name: found[name] for name in whole[0] if name in found}


def mean_difference(
    pairs: Sequence[tuple[PerImage, PerImage]], figure: str, *, seed: int = 0
) -> Interval | None:
    """Return the 95 % interval of the mean of first - second over pairs of results, all on the same images.

    Each bootstrap sample (see `intervals`) has the same images of all results. The interval is for other
    images, and says nothing of other runs. None if a result lacks the figure, or it is not a number in any
    sample.
    """
    results = [each for pair in pairs for each in pair]
    statistics = [each.statistics() for each in results]
    sums = resampled_sums(torch.cat(statistics, 1), seed=seed).split(
        [each.shape[1] for each in statistics], 1
    )
    samples = [each.figures(part, len(statistics[0])) for each, part in zip(results, sums, strict=True)]
    if not all(figure in each for each in samples):
        return None
    found = [each[figure] for each in samples]
    ends = _percentiles((torch.stack(found[::2]) - torch.stack(found[1::2])).mean(0))
    return Interval(*ends) if ends else None


def resampled_sums(statistics: Tensor, *, resamples: int = RESAMPLES, seed: int = 0) -> Tensor:
    """Sum rows of statistics [N, S] over bootstrap samples: N rows drawn with replacement.

    They are drawn in chunks of `ENTRIES` numbers, so memory is bounded, and follow from N and the seed.

    Returns:
        [resamples, S] float64.
    """
    images, rng = len(statistics), np.random.default_rng(seed)
    rows = max(1, min(resamples, ENTRIES // images))
    sums = []
    for start in range(0, resamples, rows):
        samples = min(rows, resamples - start)
        places = rng.integers(images, size=(samples, images)) + np.arange(samples)[:, None] * images
        counts = np.bincount(places.ravel(), minlength=samples * images).reshape(samples, images)
        sums.append(torch.from_numpy(counts).double() @ statistics.double())
    return torch.cat(sums)


def _percentiles(values: Tensor) -> list[float]:
    """Return the ends of the interval of bootstrapped values, [] if none is a number."""
    values = values[~values.isnan()]
    tail = (1 - LEVEL) / 2
    return np.quantile(values.numpy(), [tail, 1 - tail]).tolist() if len(values) else []
