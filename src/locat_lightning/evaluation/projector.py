"""Features as TensorBoard's embedding projector reads them, each with a picture and what is known of it."""

from collections.abc import Callable, Sequence
from math import ceil, sqrt
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter

from locat.runs import printable
from locat_lightning.data.dataset import ImageBatch
from locat_lightning.errors import InputError
from locat_lightning.evaluation.feature_files import HEADER, Row

LARGEST = 8192  # pixels a side of the picture of all thumbnails that browsers take


class Projector:
    """Points of the projector, collected batch by batch.

    Args:
        side: of the thumbnails, in pixels.
        most: number of images.
        to_rgb: turns normalised images [B, C, H, W] into B images [H, W, 3] from 0 to 1.
        row_of: describes an image by its position and label.

    Raises:
        InputError: so many thumbnails are larger than the projector takes.
    """

    def __init__(
        self,
        side: int,
        most: int,
        to_rgb: Callable[[Tensor], Sequence[np.ndarray]],
        row_of: Callable[[int, int], Row],
    ) -> None:
        if ceil(sqrt(most)) * side > LARGEST:
            raise InputError(
                f"--thumbnail: {most:,} pictures of {side} pixels are more than the projector takes, "
                f"{LARGEST} x {LARGEST} pixels for all of them: lower --thumbnail or --points"
            )
        self.side, self.row_of, self.to_rgb = side, row_of, to_rgb
        self.features: list[Tensor] = []
        self.thumbnails: list[Tensor] = []
        self.rows: list[Row] = []

    def add(self, batch: ImageBatch, features: Tensor) -> None:
        """Add a batch of images and their features [B, D]."""
        images = torch.from_numpy(np.stack(self.to_rgb(batch.images))).movedim(-1, 1)
        small = F.interpolate(images, (self.side, self.side), mode="bilinear", antialias=True).clamp(0, 1)
        self.features.append(features.float())
        self.thumbnails.append(small)
        known = zip(batch.indices.tolist(), batch.labels.tolist(), strict=True)
        self.rows += [self.row_of(position, label) for position, label in known]

    def write(self, directory: Path) -> None:
        """Write all points for TensorBoard."""
        if not self.rows:
            raise InputError("no features to project: none of the images can be read")
        cells = [[printable(str(each)) for each in row] for row in self.rows]
        with SummaryWriter(str(directory)) as writer:
            writer.add_embedding(
                torch.cat(self.features),
                metadata=cells,
                metadata_header=[*HEADER],
                label_img=torch.cat(self.thumbnails),
                tag="features",
            )
