"""What self-supervision learns from: the views of some images."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from locat_lightning.figures.grid import grid, image_column, rgb


def views_figure(
    views: Sequence[Tensor], normalisation: Mapping[str, Any] | None = None, *, side: int = 192
) -> Figure:
    """Draw a row for each image and a column for each of its views: the global ones, then the local ones.

    Views of each size are [V, B, C, H, W], normalised: see `rgb`.
    """
    columns = [
        image_column(f"{kind} {number}", rgb(crops, normalisation), f"{crops.shape[-1]} px")
        for kind, of_size in zip(("global", "local"), views, strict=False)
        for number, crops in enumerate(of_size, 1)
    ]
    return grid(columns, rgb(views[0][0], normalisation), side)
