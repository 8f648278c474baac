"""Curves with bands of their intervals."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter


class Point(NamedTuple):
    """A figure at a place, with its interval."""

    x: float
    y: float
    low: float
    high: float


def curves_figure(panels: Mapping[str, Mapping[str, Sequence[Point]]], x: str, y: str) -> Figure:
    """Draw curves by name, shares from 0 to 1, in panels by title side by side.

    `x` and `y` name the axes. Steps along x grow with it (a symmetric logarithm), so that 0 has a place.
    """
    figure = Figure((1 + 4 * len(panels), 3.6), layout="constrained", dpi=120)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        for (name, points), marker in zip(curves.items(), cycle("osD^v<>"), strict=False):
            places, values, lows, highs = zip(*points, strict=True)
            (line,) = axis.plot(places, values, marker=marker, markersize=4, label=name)
            axis.fill_between(places, lows, highs, color=line.get_color(), alpha=0.15, linewidth=0)
        ticks = sorted({point.x for points in curves.values() for point in points})
        axis.set_xscale("symlog", linthresh=1, base=2)
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], rotation=60, fontsize="small")
        axis.minorticks_off()
        axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axis.set(title=title, xlabel=x)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(y)
    axes[-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure
