"""What a model makes of images: kernels, attention, patch features, predicted classes."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from locat_lightning.figures.grid import (
    DPI,
    FAINT,
    Box,
    Column,
    feature_column,
    grid,
    heat_column,
    image_column,
)
from locat_lightning.figures.names import Names

PATCHES = ((0.5, 0.5), (0.2, 0.2), (0.8, 0.8))  # whose kernels are drawn: shares of height and width
SHOWN_CLASSES = 3
MARK, RIGHT, WRONG, EMPTY = "#5ce1ff", "#1a7f37", "#cf222e", "#eaeef2"


def validation_figure(
    images: Sequence[np.ndarray],
    labels: Sequence[int],
    class_names: Sequence[str] = (),
    *,
    kernels: Sequence[Tensor] = (),
    attention: Mapping[str, Tensor | None] | None = None,
    features: Tensor | None = None,
    probabilities: Tensor | None = None,
    side: int = 224,
) -> Figure:
    """Draw a row for each image, and a column for the images and for each of the things given.

    Args:
        images: B of them, [height, width, 3] from 0 to 1.
        labels: of each image; -1 where unknown.
        class_names: by label; a label without a name is shown as its number.
        kernels: as `gaussian_kernels` gives them.
        attention: what `cls_attention` gives, by the name of the network; each image has its own scale.
        features: [B, D, H, W], drawn as `pca_colours`.
        probabilities: [B, classes].
        side: shorter side of an image in pixels; small images are enlarged without smoothing.
    """
    columns = [image_column("input", images), *kernel_columns(images, kernels)]
    for name, weights in (attention or {}).items():
        if weights is not None:
            heat = weights.float().mean(1)
            heat = heat / heat.amax((-2, -1), keepdim=True)
            note = f"{name}: last block, mean of heads" if name else "last block, mean of heads"
            columns.append(heat_column("attention of [CLS]", images, list(heat), note))
    if features is not None:
        columns.append(feature_column(features))
    if probabilities is not None:
        columns.append(_prediction_column(probabilities.float().cpu(), labels, Names(class_names)))
    return grid(columns, images, side)


def kernel_columns(
    images: Sequence[np.ndarray], kernels: Sequence[Tensor | Sequence[Tensor]]
) -> list[Column]:
    """Show the kernels of three patches in the first, the middle and the last block, over the images.

    There are kernels [H·W, H, W] for each image of each block; each column has its own scale.
    """
    return [kernel_column(block, images, kernels[block]) for block in drawn_blocks(len(kernels))]


def drawn_blocks(count: int) -> list[int]:
    """Return the first, the middle and the last of so many blocks, each once."""
    return sorted({0, (count - 1) // 2, count - 1}) if count else []


def kernel_column(block: int, images: Sequence[np.ndarray], kernels: Tensor | Sequence[Tensor]) -> Column:
    """Show the kernels of three patches in one block, [H·W, H, W] for each image, over the images."""
    heat, marked = [], []
    for each in kernels:
        rows, columns = each.shape[-2:]
        places = [(int(down * rows), int(right * columns)) for down, right in PATCHES]
        heat.append(each[[i * columns + j for i, j in places]].float().amax(0))
        marked.append([(j / columns, i / rows, 1 / columns, 1 / rows) for i, j in places])
    peak = max(float(each.max()) for each in heat)
    note = f"mean of heads, brightest {peak:.2f}"
    overlaid = heat_column(f"kernels, block {block}", images, [each / peak for each in heat], note)

    def draw(axes: Axes, row: int, box: Box) -> None:
        overlaid.draw(axes, row, box)
        left, right, bottom, top = box
        width, height = right - left, bottom - top
        for x, y, w, h in marked[row]:
            corner, size = (left + x * width, top + y * height), (w * width, h * height)
            axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=MARK, linewidth=1.2))

    return overlaid._replace(draw=draw)


def _prediction_column(probabilities: Tensor, labels: Sequence[int], names: Names) -> Column:
    """Show the likeliest classes as bars: green the true one, red the first if it is wrong."""

    def draw(axes: Axes, row: int, box: Box) -> None:
        left, right, bottom, top = box
        line, label = min(right - left, bottom - top) / 11, labels[row]
        style = names.style | {"fontsize": 0.75 * line * 72 / DPI, "va": "top"}
        values, classes = probabilities[row].topk(min(SHOWN_CLASSES, probabilities.shape[1]))
        for rank, (share, predicted) in enumerate(zip(values.tolist(), classes.tolist(), strict=True)):
            y = top + 2.6 * rank * line
            colour = RIGHT if predicted == label else WRONG if rank == 0 and label >= 0 else FAINT
            axes.text(left, y, names[predicted], color=colour, **style)
            axes.text(right, y, f"{share:.0%}", color=colour, ha="right", **style)
            widths = [right - left, share * (right - left)]
            axes.barh([y + 1.45 * line] * 2, widths, 0.5 * line, left, color=[EMPTY, colour])
        if label >= 0:
            axes.text(left, top + 9 * line, f"true: {names[label]}", **style)

    return Column("prediction", draw)
