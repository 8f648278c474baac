"""Two charts, drawn by Pillow: points with their means, and lines over depth."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from math import ceil, floor, log10
from statistics import mean
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from locat_lightning.callbacks.pictures import FAINT, INK, PAPER

SIZE, MARGIN, KEY = (900, 560), 90, 190  # pixels: the whole, around the axes, and the key at their right
COLOURS = (
    "#1f77b4",
    "#ff7f0e",
    "#2ca02c",
    "#d62728",
    "#9467bd",
    "#8c564b",
    "#e377c2",
    "#17becf",
)  # matplotlib's
GRID = "#d8dee4"
TICKS = 5  # about so many on an axis


def colours_of(arms: Iterable[str]) -> dict[str, str]:
    """A colour for each arm, the same in all charts."""
    return dict(zip(arms, cycle(COLOURS), strict=False))


class Point(NamedTuple):
    """A place in a chart."""

    x: float
    y: float


def draw_points(
    arms: Mapping[str, Sequence[Point]], x: str, y: str, *, colours: Mapping[str, str]
) -> Image.Image:
    """A small dot for each point of an arm, and a large one for their mean.

    Args:
        arms: points by name, at least one each.
        x: title of the horizontal axis.
        y: title of the vertical axis.
        colours: of the arms.
    """
    chart = _Chart(
        [point for points in arms.values() for point in points], x, y, {arm: colours[arm] for arm in arms}
    )
    for arm, points in arms.items():
        colour = colours[arm]
        for point in points:
            chart.dot(point, 4, colour, filled=False)
        chart.dot(Point(mean(p.x for p in points), mean(p.y for p in points)), 9, colour)
    return chart.image


def draw_lines(
    arms: Mapping[str, Sequence[float]], x: str, y: str, *, colours: Mapping[str, str], level: float
) -> Image.Image:
    """A line for each arm, over the places 0, 1, 2 and so on, and over 0.

    Args:
        arms: values by name, at least one each.
        x: title of the horizontal axis.
        y: title of the vertical axis.
        colours: of the arms.
        level: height of a grey line.
    """
    lines = {name: [Point(i, value) for i, value in enumerate(values)] for name, values in arms.items()}
    points = [point for line in lines.values() for point in line]
    points += [Point(0, level), Point(0, 0)]
    chart = _Chart(points, x, y, {arm: colours[arm] for arm in arms}, whole_x=True)
    chart.line([Point(chart.x[0], level), Point(chart.x[1], level)], FAINT)
    for arm, line in lines.items():
        chart.line(line, colours[arm])
        for point in line:
            chart.dot(point, 5, colours[arm])
    return chart.image


class _Chart:
    """Axes around all points, and what is drawn between them."""

    def __init__(
        self, points: Sequence[Point], x: str, y: str, key: Mapping[str, str], *, whole_x: bool = False
    ) -> None:
        self.image = Image.new("RGB", SIZE, PAPER)
        self.pen = ImageDraw.Draw(self.image)
        self.x, x_ticks = _axis([point.x for point in points], whole=whole_x)
        self.y, y_ticks = _axis([point.y for point in points])
        font, title = (ImageFont.load_default(size=size) for size in (17, 20))
        left, top, right, bottom = MARGIN, MARGIN // 2, SIZE[0] - KEY, SIZE[1] - MARGIN
        self.box = (left, top, right, bottom)
        for value, text in x_ticks:
            across, _ = self._place(Point(value, self.y[0]))
            self.pen.line((across, top, across, bottom), GRID)
            self.pen.text((across, bottom + 8), text, FAINT, font, anchor="ma")
        for value, text in y_ticks:
            _, down = self._place(Point(self.x[0], value))
            self.pen.line((left, down, right, down), GRID)
            self.pen.text((left - 8, down), text, FAINT, font, anchor="rm")
        self.pen.rectangle(self.box, outline=FAINT)
        self.pen.text(((left + right) / 2, SIZE[1] - 20), x, INK, title, anchor="ms")
        self.pen.text((left, top - 10), y, INK, title, anchor="ls")
        for row, (name, colour) in enumerate(key.items()):
            down = top + 16 + 30 * row
            self.pen.ellipse((right + 20, down - 7, right + 34, down + 7), colour)
            self.pen.text((right + 44, down), name, INK, font, anchor="lm")

    def dot(self, point: Point, radius: float, colour: str, *, filled: bool = True) -> None:
        x, y = self._place(point)
        box = (x - radius, y - radius, x + radius, y + radius)
        self.pen.ellipse(box, colour if filled else None, outline=colour, width=2)

    def line(self, points: Sequence[Point], colour: str) -> None:
        self.pen.line([self._place(point) for point in points], colour, width=3)

    def _place(self, point: Point) -> tuple[float, float]:
        left, top, right, bottom = self.box
        shares = (
            (value - low) / (high - low) for value, (low, high) in zip(point, (self.x, self.y), strict=True)
        )
        x, y = shares
        return left + x * (right - left), bottom - y * (bottom - top)


def _axis(
    values: Sequence[float], *, whole: bool = False
) -> tuple[tuple[float, float], list[tuple[float, str]]]:
    """The ends of an axis, and its ticks with their texts, at round numbers."""
    low, high = min(values), max(values)
    room = (high - low) / 10 or abs(high) / 10 or 1.0
    low, high = low - room, high + room
    rough = (high - low) / TICKS
    power = 10.0 ** floor(log10(rough))
    step = next(power * each for each in (1, 2, 5, 10) if power * each >= rough)
    step = max(1.0, step) if whole else step
    digits = max(0, -floor(log10(step)))
    ticks = [step * number for number in range(ceil(low / step), floor(high / step) + 1)]
    return (low, high), [(tick, f"{tick:.{digits}f}") for tick in ticks]
