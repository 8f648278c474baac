"""What a method that predicts hidden pixels makes of images."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from locat_lightning.figures.grid import grid, image_column


def reconstruction_figure(
    images: Sequence[np.ndarray], visible: Sequence[np.ndarray], predicted: Sequence[np.ndarray], *, side: int
) -> Figure:
    """Draw a row for each image [H, W, 3], from 0 to 1: itself, what is shown of it, and the prediction."""
    columns = [
        image_column("input", images),
        image_column("visible", visible),
        image_column("reconstruction", predicted, "hidden pixels as predicted"),
    ]
    return grid(columns, images, side)
