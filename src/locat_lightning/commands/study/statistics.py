"""Differences between the seeds of two arms, with their confidence interval."""

from collections.abc import Sequence
from math import inf, sqrt
from statistics import mean, stdev
from typing import NamedTuple

from scipy.stats import t as student


class Difference(NamedTuple):
    """A mean of paired differences and its 95 % interval, which has no ends for a single pair."""

    mean: float
    low: float
    high: float
    pairs: int


def paired_difference(differences: Sequence[float]) -> Difference:
    """Return the mean of paired differences with Student's 95 % interval, mean ± t · s / √n."""
    n, middle = len(differences), mean(differences)
    half = float(student.ppf(0.975, n - 1)) * stdev(differences) / sqrt(n) if n > 1 else inf
    return Difference(middle, middle - half, middle + half, n)
