"""Columns of tiles side by side, a row for each image."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from locat_lightning.figures.names import Names
from locat_lightning.inspection import pca_colours

DPI = 100
BRIGHTNESS = 0.7  # of the images below heat
FAINT = "#6e7781"
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601
IMAGENET = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]  # left, right, bottom, top of a tile in its column, in pixels


class Column(NamedTuple):
    """A title, how to draw the tile of a row into a box of the column's axes, and a smaller second line."""

    title: str
    draw: Callable[[Axes, int, Box], None]
    note: str = ""


def rgb(images: Tensor, normalisation: Mapping[str, Any] | None = None) -> list[np.ndarray]:
    """Turn normalised images [B, C, H, W] into B images [H, W, 3], float32 from 0 to 1.

    Their `mean` and `std` by channel are ImageNet's by default. A normalisation with `show` is that of other
    channels than RGB: the three that it names, black and white at two standard deviations, or for None the
    first three principal components of the pixels of all images together (one channel is grey).
    """
    if normalisation is not None and "show" in normalisation:
        chosen = normalisation["show"] or ((0, 0, 0) if images.shape[1] == 1 else None)
        standard = images.detach().float().cpu()
        if chosen is None:
            return list(pca_colours(standard).movedim(1, -1).numpy())
        return list((0.5 + standard[:, list(chosen)].movedim(1, -1) / 4).clamp(0, 1).numpy())
    mean, std = (torch.tensor((normalisation or IMAGENET)[name]).view(3, 1, 1) for name in ("mean", "std"))
    shown = (images.detach().float().cpu() * std + mean).clamp(0, 1).movedim(-3, -1)
    return list(shown.numpy())


def grid(
    columns: Sequence[Column],
    images: Sequence[np.ndarray],
    side: int,
    legend: Mapping[str, Colour] | None = None,
) -> Figure:
    """Draw columns side by side under their titles, and a legend of colours by name below them.

    The tiles of a row have the shape of its image [H, W, ...], and `side` is their shorter side in pixels,
    which gaps and text follow.
    """
    gap, line = max(4, side // 20), max(16, side // 11)
    sizes = [[round(length * side / min(image.shape[:2])) for length in image.shape[:2]] for image in images]
    header = 2.5 * gap + side / 14 + side / 20
    tops = np.cumsum([0, *(height + gap for height, _ in sizes)])
    width, height = max(width for _, width in sizes), int(tops[-1]) - gap
    across = gap + len(columns) * (width + gap)
    per_row = max(1, int(across / (8 * line)))
    footer = gap + (-(-len(legend) // per_row) * line + gap if legend else 0)
    total = header + height + footer
    figure = Figure(figsize=(across / DPI, total / DPI), dpi=DPI)
    for number, column in enumerate(columns):
        left = gap + number * (width + gap)
        axes = figure.add_axes((left / across, footer / total, width / across, height / total))
        axes.set(xlim=(0, width), ylim=(height, 0), autoscale_on=False)
        axes.set_axis_off()
        pad = _points(side / 20 + 1.3 * gap)
        axes.set_title(column.title, loc="left", fontsize=_points(side / 14), pad=pad)
        axes.text(0, -gap / 2, column.note, fontsize=_points(side / 20), color=FAINT)
        for row, (high, wide) in enumerate(sizes):
            column.draw(axes, row, (0, wide, tops[row] + high, tops[row]))
    if legend:
        _add_legend(figure, legend, per_row, line)
    return figure


def image_column(title: str, images: Sequence[np.ndarray], note: str = "") -> Column:
    """Show images [H, W, 3], from 0 to 1 or uint8; small ones are enlarged without smoothing."""
    return Column(title, lambda axes, row, box: show(axes, images[row], box), note)


def feature_column(features: Tensor, title: str = "PCA of patch features") -> Column:
    """Show the principal components of patch features [B, D, H, W] as colours (see `pca_colours`)."""
    colours = list(pca_colours(features).movedim(1, -1).numpy())
    return image_column(title, colours, "last block, first three as RGB")


def heat_column(title: str, images: Sequence[np.ndarray], heat: Sequence[Tensor], note: str = "") -> Column:
    """Show heat [H, W] from 0 to 1 over dimmed images; the hotter, the less shows through."""

    def draw(axes: Axes, row: int, box: Box) -> None:
        hot = heat[row].float().cpu().nan_to_num().clamp(0, 1).numpy()
        show_grey(axes, images[row], box, BRIGHTNESS)
        options = {"cmap": "inferno", "vmin": 0, "vmax": 1, "alpha": 0.4 + 0.5 * hot}
        show(axes, hot, box, interpolation="catrom", **options)

    return Column(title, draw, note)


def show(axes: Axes, image: np.ndarray, box: Box, **options: Any) -> None:
    """Draw an image into a box; a small one is enlarged without smoothing."""
    smoothing = "nearest" if box[1] > image.shape[1] else "antialiased"
    axes.imshow(image, extent=box, aspect="auto", **({"interpolation": smoothing} | options))


def show_grey(axes: Axes, image: np.ndarray, box: Box, brightness: float = 1) -> None:
    """Draw an image [H, W, 3], from 0 to 1, without its colours."""
    show(axes, image @ LUMA, box, cmap="gray", vmin=0, vmax=1 / brightness)


def _add_legend(figure: Figure, legend: Mapping[str, Colour], columns: int, line: float) -> None:
    shares = [(red / 255, green / 255, blue / 255) for red, green, blue in legend.values()]
    patches, names = [Patch(facecolor=share, edgecolor=FAINT) for share in shares], Names(list(legend))
    options: dict[str, Any] = {"loc": "lower left", "ncols": columns, "frameon": False}
    key = figure.legend(patches, [" "] * len(patches), fontsize=_points(0.6 * line), **options)
    for label, text in enumerate(key.get_texts()):
        text.set(text=names[label], **names.style)


def _points(pixels: float) -> float:
    return pixels * 72 / DPI
