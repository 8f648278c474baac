"""Features as TensorBoard's embedding projector reads them, each with a picture and what is known of it."""

import shutil
from collections.abc import Callable, Sequence
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from google.protobuf import text_format
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig
from torch import Tensor
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter

from locat.runs import printable, replaced
from locat_lightning.data.dataset import ImageBatch
from locat_lightning.errors import InputError
from locat_lightning.evaluation.feature_files import HEADER, Row

TAG = "features"
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

    def write(self, writer: SummaryWriter, step: int = 0) -> None:
        """Write all points for TensorBoard, beside those of other steps, or in place of those of this one."""
        if not self.rows:
            raise InputError("no features to project: none of the images can be read")
        directory = Path(writer.log_dir)
        listed, place = directory / "projector_config.pbtxt", directory / f"{step:05}" / TAG
        before = listed.read_text(encoding="utf-8") if listed.is_file() else ""
        shutil.rmtree(place, ignore_errors=True)
        writer.add_embedding(
            torch.cat(self.features),
            metadata=[[printable(str(each)) for each in row] for row in self.rows],
            metadata_header=[*HEADER],
            label_img=torch.cat(self.thumbnails),
            global_step=step,
            tag=TAG,
        )
        # A writer lists what it has written itself, not what it found there.
        both = (before, listed.read_text(encoding="utf-8"))
        known = {each.tensor_path: each for text in both for each in _embeddings(text)}
        with replaced(listed) as part:
            part.write_text(text_format.MessageToString(ProjectorConfig(embeddings=known.values())))


def _embeddings(text: str) -> list[Any]:
    """Return what a list of the projector's names; nothing if it is no such list."""
    try:
        return list(text_format.Parse(text, ProjectorConfig()).embeddings)
    except text_format.ParseError:
        return []
