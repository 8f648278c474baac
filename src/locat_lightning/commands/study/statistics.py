"""What can be said of a few seeds: mean, standard deviation, and the paired difference with its interval."""

import statistics
from collections.abc import Sequence
from math import inf, nan, sqrt
from typing import NamedTuple

# 97.5 % quantiles of Student's t distribution with 1, 2, … degrees of freedom; from then on the normal one's.
T_QUANTILES = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)
NORMAL_QUANTILE = 1.96


class Difference(NamedTuple):
    """A mean of paired differences, with its 95 % interval.

    Attributes:
        mean: of the differences.
        low: lower end of the interval; -inf for one pair.
        high: upper end of the interval; inf for one pair.
        pairs: how many there are.
    """

    mean: float
    low: float
    high: float
    pairs: int


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and standard deviation with n - 1 (NaN of one value)."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else nan


def paired_difference(differences: Sequence[float]) -> Difference:
    """Mean of differences of pairs, and Student's 95 % interval of it: mean ± t · s / √n.

    Args:
        differences: at least one.
    """
    n = len(differences)
    mean, deviation = mean_and_deviation(differences)
    if n == 1:
        return Difference(mean, -inf, inf, n)
    quantile = T_QUANTILES[n - 2] if n - 2 < len(T_QUANTILES) else NORMAL_QUANTILE
    half = quantile * deviation / sqrt(n)
    return Difference(mean, mean - half, mean + half, n)
