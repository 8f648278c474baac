"""Differences between the seeds of two arms, with their confidence interval."""

from collections.abc import Sequence
from math import inf, sqrt
from statistics import mean, stdev
from typing import NamedTuple

from scipy.stats import t as student


class Difference(NamedTuple):
    """A mean of paired differences and its 95 % interval.

    Attributes:
        mean: of the differences.
        low: lower end of the interval; -inf for one pair.
        high: upper end of the interval; inf for one pair.
        pairs: number of differences.
    """

    mean: float
    low: float
    high: float
    pairs: int


def paired_difference(differences: Sequence[float]) -> Difference:
    """Return the mean of paired differences with Student's 95 % interval, mean ± t · s / √n.

    Args:
        differences: at least one.
    """
    n, middle = len(differences), mean(differences)
    half = float(student.ppf(0.975, n - 1)) * stdev(differences) / sqrt(n) if n > 1 else inf
    return Difference(middle, middle - half, middle + half, n)
