"""Depths, measured and predicted, beside their images."""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from locat_lightning.figures.grid import grid, image_column


def depth_figure(
    images: Sequence[np.ndarray],
    depths: Sequence[Tensor],
    predictions: Sequence[Tensor],
    *,
    farthest: float,
    side: int,
) -> Figure:
    """Draw a row for each image [H, W, 3], from 0 to 1: itself, its measured and its predicted depth.

    Depths [H, W] are in metres; what is not measured is black.
    """
    colours = mpl.colormaps["turbo_r"]

    def painted(depth: Tensor) -> np.ndarray:
        values = depth.float().numpy()
        shown: np.ndarray = np.where(values[..., None] > 0, colours(values / farthest)[..., :3], 0)
        return shown

    columns = [
        image_column("input", images),
        image_column("depth", [painted(each) for each in depths], f"red is near, blue is {farthest:g} m"),
        image_column("prediction", [painted(each) for each in predictions]),
    ]
    return grid(columns, images, side)
