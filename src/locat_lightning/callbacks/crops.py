"""Pictures of what DINO learns from: the views of the first images of a run."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from locat_lightning.callbacks.pictures import Column, resized, table, tensorboards
from locat_lightning.data.multiview import MultiCropBatch
from locat_lightning.data.views import Views
from locat_lightning.errors import InputError

__all__ = ["CropPictures", "draw_crops"]


def draw_crops(views: list[Views], *, images: int = 4, side: int = 192) -> Tensor:
    """A row for each image, a column for each of its views: the global ones, then the local ones.

    Args:
        views: of each size; `crops` are [V, B, 3, H, W], coloured and normalised.
        images: how many, at most: the first ones.
        side: of each view in the picture, in pixels; small views are enlarged without smoothing.

    Returns:
        [3, height, width] uint8.
    """
    # What `Views.coloured` normalises with.
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    columns = []
    for kind, each in zip(("global", "local"), views, strict=False):
        shown = each.crops[:, :images].detach().float().cpu() * std + mean
        for number, crops in enumerate(shown, 1):
            tiles = [to_pil_image(tile) for tile in resized(crops, side)]
            columns.append(Column(f"{kind} {number}", f"{crops.shape[-1]} px", tiles))
    return pil_to_tensor(table(columns, side))  # type: ignore[no-any-return]


class CropPictures(Callback):
    """Draws the views of the first images in TensorBoard as `pictures/crops`, as the model sees them.

    Once, before the first step of a run; a resumed run has them already. Other batches than `MultiCropBatch`
    are not drawn, and without a TensorBoard logger nothing is.

    Args:
        images: how many, at most: the first of the main process's first batch.
        side: of each view in the picture, in pixels; small views are enlarged without smoothing.

    Raises:
        InputError: an argument is out of its range.
    """

    def __init__(self, images: int = 4, side: int = 192) -> None:
        for name, value in (("images", images), ("side", side)):
            if value < 1:
                raise InputError(f"{name} ({value}) must be at least 1")
        self.images = images
        self.side = side

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Draws before the first batch, whose colours the device has finished."""
        if trainer.current_epoch or batch_idx or not trainer.is_global_zero:
            return
        loggers = tensorboards(trainer)
        if not loggers or trainer.ckpt_path or not isinstance(batch, MultiCropBatch):
            return
        picture = draw_crops(batch.views, images=self.images, side=self.side)
        for logger in loggers:
            logger.experiment.add_image("pictures/crops", picture, global_step=0)
