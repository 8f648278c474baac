"""How an arm of a study differs from its baseline: over seeds, over images, and in words."""

from collections.abc import Mapping, Sequence
from math import inf, sqrt
from statistics import mean, stdev
from typing import Any, NamedTuple

from scipy.stats import t as student

from locat_lightning.commands.study.plan import Study
from locat_lightning.commands.study.steps import IMAGES, Results, by_seed
from locat_lightning.evaluation.intervals import Interval, mean_difference
from locat_lightning.evaluation.packed import unpacked


class Difference(NamedTuple):
    """A mean of paired differences and its 95 % interval, which has no ends for a single pair."""

    mean: float
    low: float
    high: float
    pairs: int


class Place(NamedTuple):
    """A difference after some epochs of training, with its intervals over seeds and over images."""

    epoch: int
    difference: Difference
    over_images: Interval | None  # None where nothing is known of single images


def paired_difference(differences: Sequence[float]) -> Difference:
    """Return the mean of paired differences with Student's 95 % interval, mean ± t · s / √n."""
    n, middle = len(differences), mean(differences)
    half = float(student.ppf(0.975, n - 1)) * stdev(differences) / sqrt(n) if n > 1 else inf
    return Difference(middle, middle - half, middle + half, n)


def difference_between(
    baseline: str, arm: str, measure: str, results: Results, epoch: int | None = None
) -> Difference | None:
    """Return the mean difference of a measure between runs of the same seed; None without a pair.

    It is that after an epoch, or after the last one.
    """
    before, after = (by_seed(name, measure, results, epoch) for name in (baseline, arm))
    differences = [after[seed] - before[seed] for seed in sorted(before.keys() & after.keys())]
    return paired_difference(differences) if differences else None


def course(study: Study, arm: str, measure: str, results: Results) -> list[Place]:
    """Return the difference of an arm to its baseline by epoch."""
    baseline, figure = study.baseline_of(arm), study.measures[measure].metric.rpartition("/")[2]
    epochs = {
        epoch for result in results if result["arm"] == arm for epoch in result["curves"].get(measure, ())
    }
    places = []
    for epoch in sorted(epochs):
        if difference := difference_between(baseline, arm, measure, results, epoch):
            records = [_images_by_seed(name, measure, results, epoch) for name in (arm, baseline)]
            pairs = [
                (unpacked(records[0][seed]), unpacked(records[1][seed]))
                for seed in records[0].keys() & records[1].keys()
                if records[0][seed]["fingerprint"] == records[1][seed]["fingerprint"]
            ]
            over_images = mean_difference(pairs, figure) if len(pairs) == difference.pairs else None
            places.append(Place(epoch, difference, over_images))
    return places


def _images_by_seed(arm: str, measure: str, results: Results, epoch: int) -> dict[int, Mapping[str, Any]]:
    found = {r["seed"]: r[IMAGES].get(measure, {}).get(epoch) for r in results if r["arm"] == arm}
    return {seed: record for seed, record in found.items() if record}


def in_words(differences: Mapping[str, Difference | None], over_images: Mapping[str, Interval | None]) -> str:
    """Say by title of the measure where an arm is better, where worse, and where no difference is shown.

    One is shown where the interval over the seeds excludes 0 and, if it is known, that over the images, too.
    """
    titles: dict[str, list[str]] = {}
    for title, difference in differences.items():
        if difference is not None:
            titles.setdefault(_verdict(difference, over_images.get(title)), []).append(title)
    return "; ".join(f"{verdict} in {', '.join(names)}" for verdict, names in sorted(titles.items()))


def _verdict(difference: Difference, over_images: Interval | None) -> str:
    if difference.pairs == 1:
        return "no interval with one seed"
    intervals = [difference, over_images or difference]
    if all(each.low > 0 for each in intervals):
        return "better"
    if all(each.high < 0 for each in intervals):
        return "worse"
    return "no difference shown (an interval includes 0)"
