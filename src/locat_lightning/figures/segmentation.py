"""Classes of pixels: over images, and how well they were predicted.

Images are [height, width, 3], from 0 to 1; classes [H, W], integers in a size of their own, `IGNORE` for
none; colours [C, 3] uint8, by label.
"""

from collections.abc import Sequence
from math import isnan

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from locat_lightning.evaluation.iou import IoU
from locat_lightning.figures.grid import DPI, FAINT, Box, Colour, Column, grid, image_column, show, show_grey
from locat_lightning.figures.names import Names
from locat_lightning.figures.validation import EMPTY, kernel_columns
from locat_lightning.labels import IGNORE

OPACITY = 0.6  # of the colours of classes over an image
ROWS_OF_BARS = 40  # of a column of IoU by class
NAMED = 40  # classes whose names fit beside a confusion matrix
COUNTED = 20  # classes whose shares fit into its cells


def painted(classes: np.ndarray | Tensor, colours: np.ndarray) -> np.ndarray:
    """Give each pixel the colour of its class, translucent: [H, W, 4] uint8, RGBA."""
    labels = np.asarray(classes)
    opacity = np.where(labels == IGNORE, 0, round(255 * OPACITY))
    return np.dstack([colours[np.where(labels == IGNORE, 0, labels)], opacity]).astype(np.uint8)


def class_column(
    title: str, images: Sequence[np.ndarray], classes: Sequence[np.ndarray | Tensor], colours: np.ndarray
) -> Column:
    """Show classes over grey images."""

    def draw(axes: Axes, row: int, box: Box) -> None:
        show_grey(axes, images[row], box)
        show(axes, painted(classes[row], colours), box)

    return Column(title, draw)


def class_legend(
    classes: Sequence[np.ndarray | Tensor], class_names: Sequence[str], colours: np.ndarray
) -> dict[str, Colour]:
    """Collect the colours of the classes that occur, by name, for `grid`."""
    occurring = sorted({label for each in classes for label in np.unique(np.asarray(each)).tolist()})
    return {class_names[label]: tuple(colours[label].tolist()) for label in occurring if label != IGNORE}


def segmentation_figure(
    images: Sequence[np.ndarray],
    masks: Sequence[Tensor],
    predictions: Sequence[Tensor],
    class_names: Sequence[str],
    colours: np.ndarray,
    *,
    kernels: Sequence[Sequence[Tensor]] = (),
    side: int = 224,
) -> Figure:
    """Draw a row for each image: input, annotation, prediction, GAug's kernels; and a legend below.

    Predictions have each mask's size; kernels are those of `kernel_columns`, none for a model without. `side`
    is the shorter side of a tile in pixels.
    """
    columns = [
        image_column("input", images),
        class_column("annotation", images, masks, colours),
        class_column("prediction", images, predictions, colours),
        *kernel_columns(images, kernels),
    ]
    return grid(columns, images, side, class_legend([*masks, *predictions], class_names, colours))


def iou_figure(iou: IoU, class_names: Sequence[str], colours: np.ndarray, *, title: str) -> Figure:
    """Draw IoU by class as bars, below the mean and `title`."""
    values, names = iou.per_class.float().cpu().numpy(), Names(class_names)
    rows = min(ROWS_OF_BARS, len(values))
    parts = -(-len(values) // rows)
    figure = Figure(figsize=(5.7 * parts, 0.22 * rows + 0.8), dpi=DPI, layout="constrained")
    figure.suptitle(f"mIoU {float(iou.miou):.4f}   {title}", x=0.01, ha="left")
    for number, axes in enumerate(figure.subplots(1, parts, squeeze=False)[0]):
        labels = range(number * rows, min((number + 1) * rows, len(values)))
        shares = values[labels.start : labels.stop]
        axes.barh(labels, 1, 0.7, color=EMPTY)
        axes.barh(labels, np.nan_to_num(shares), 0.7, color=colours[labels] / 255, edgecolor=FAINT)
        for label, share in zip(labels, shares, strict=True):
            text, x = ("does not occur", 0.01) if isnan(share) else (f"{share:.3f}", 1.02)
            axes.text(x, label, text, va="center", fontsize=9, color=FAINT if isnan(share) else "black")
        axes.set(xlim=(0, 1), ylim=(number * rows + rows - 0.5, number * rows - 0.5), xticks=[])
        axes.set_yticks(labels, [names[label] for label in labels], fontsize=9, **names.style)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return figure


def confusion_figure(confusion: Tensor, class_names: Sequence[str]) -> Figure:
    """Draw the shares of an annotated class's pixels (row) by predicted class (column), from counts [C, C].

    Names and shares are written where there is room.
    """
    counts = confusion.float().cpu()
    shares = (counts / counts.sum(1, keepdim=True).clamp_min(1)).numpy()
    figure = Figure(figsize=(8.4, 7.6), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, "inferno", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xlabel="predicted", ylabel="annotated", xticks=[], yticks=[])
    axes.xaxis.set_label_position("top")
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    figure.colorbar(image, shrink=0.6, format="{x:.0%}")
    if len(shares) <= NAMED:
        names, every = Names(class_names), range(len(shares))
        size = 10 if len(shares) <= COUNTED else 7
        axes.set_xticks(every, [names[i] for i in every], rotation=90, fontsize=size, **names.style)
        axes.set_yticks(every, [names[i] for i in every], fontsize=size, **names.style)
    if len(shares) <= COUNTED:
        for label, share in enumerate(shares.diagonal()):
            colour = "black" if share > 0.5 else "white"
            axes.text(label, label, f"{share:.0%}", color=colour, ha="center", va="center", fontsize=9)
    return figure
