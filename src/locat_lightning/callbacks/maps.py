"""What a segmentation sees and says: pictures in TensorBoard, and its predictions as files."""

import os
from collections.abc import Sequence
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from locat_lightning.callbacks.pictures import (
    FAINT,
    INK,
    PAPER,
    Column,
    fitted,
    inferno,
    is_due,
    kernel_columns,
    resized,
    spaced_items,
    table,
    tensorboards,
)
from locat_lightning.data.class_lists import distinct_colours
from locat_lightning.data.segmentation import SegmentationData
from locat_lightning.evaluation.iou import IoU
from locat_lightning.inspection import gaussian_kernels
from locat_lightning.nn.decoder import IGNORED
from locat_lightning.tasks import Segmentation

__all__ = [
    "MapWriter",
    "SegmentationPictures",
    "draw_confusion",
    "draw_iou",
    "draw_segmentation",
    "legend",
    "overlay",
]

OPACITY = 0.6  # of the colours of classes over an image
ROWS_OF_BARS = 40  # of a column in the picture of IoU by class


def overlay(image: Image.Image, classes: np.ndarray, colours: np.ndarray) -> Image.Image:
    """An image, in grey, under the colours of its pixels' classes; those without one stay as they are.

    Args:
        image: RGB.
        classes: [H, W] of the same size, integers; `IGNORED` for none.
        colours: [C, 3] uint8.
    """
    labelled = (classes != IGNORED)[..., None]
    painted = colours[np.where(classes == IGNORED, 0, classes)]
    grey = np.asarray(image.convert("L"))[..., None]
    mixed = np.where(labelled, OPACITY * painted + (1 - OPACITY) * grey, np.asarray(image))
    return Image.fromarray(mixed.round().astype(np.uint8))


def draw_segmentation(
    images: Sequence[Tensor],
    masks: Sequence[Tensor],
    predictions: Sequence[Tensor],
    class_names: Sequence[str],
    colours: np.ndarray,
    *,
    kernels: Sequence[Sequence[Tensor]] = (),
    side: int = 224,
) -> Tensor:
    """A row for each image: itself, its annotation, the prediction, GAug's kernels; and a legend beneath.

    Args:
        images: each [3, height, width], RGB from 0 to 1.
        masks: each [H, W], in a size of its own; `IGNORED` where not annotated.
        predictions: each of its mask's size.
        class_names: by label.
        colours: [C, 3] uint8, by label.
        kernels: for each image what `gaussian_kernels` gives; none for a model without.
        side: height and width of a tile in pixels.

    Returns:
        [3, height, width] uint8.
    """
    inputs = [resized(image[None], side)[0] for image in images]
    size = (max(each.shape[-2] for each in inputs), max(each.shape[-1] for each in inputs))
    tiles = [to_pil_image(each) for each in inputs]
    columns = [Column("input", "", tiles)]
    for title, maps in (("annotation", masks), ("prediction", predictions)):
        painted = []
        for tile, each in zip(tiles, maps, strict=True):
            shrunk = F.interpolate(
                each[None, None].float().cpu(), (tile.height, tile.width), mode="nearest-exact"
            )
            painted.append(overlay(tile, shrunk[0, 0].long().numpy(), colours))
        columns.append(Column(title, "", painted))
    if kernels and kernels[0]:
        of_images = [kernel_columns(tile[None], each) for tile, each in zip(inputs, kernels, strict=True)]
        columns += [
            Column(parts[0].title, parts[0].note, [part.tiles[0] for part in parts])
            for parts in zip(*of_images, strict=True)
        ]
    columns = [column._replace(tiles=[_on_paper(tile, size) for tile in column.tiles]) for column in columns]
    drawn = table(columns, side)
    shown = torch.cat([each.flatten().cpu().long() for each in (*masks, *predictions)]).unique().tolist()
    key = legend([label for label in shown if label != IGNORED], class_names, colours, drawn.width, side)
    whole = Image.new("RGB", (drawn.width, drawn.height + key.height), PAPER)
    whole.paste(drawn, (0, 0))
    whole.paste(key, (0, drawn.height))
    return pil_to_tensor(whole)  # type: ignore[no-any-return]


def draw_iou(
    iou: IoU, class_names: Sequence[str], colours: np.ndarray, *, title: str, line: int = 22
) -> Tensor:
    """IoU by class as bars.

    Args:
        iou: what `MeanIoU` gives.
        class_names: by label.
        colours: [C, 3] uint8, by label.
        title: above the bars, after the mean.
        line: height of a bar with its room, in pixels.

    Returns:
        [3, height, width] uint8.
    """
    values = iou.per_class.float().cpu().tolist()
    rows = min(ROWS_OF_BARS, len(values))
    parts = -(-len(values) // rows)
    width, name_width, bar_width = 26 * line, 10 * line, 12 * line
    picture = Image.new("RGB", (parts * width + line, (rows + 3) * line), PAPER)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=0.6 * line)
    title = title.replace("×", "x")  # which Pillow's font lacks
    pen.text(
        (line, line // 2),
        f"mIoU {float(iou.miou):.4f}   {title}",
        INK,
        ImageFont.load_default(size=0.8 * line),
    )
    for label, value in enumerate(values):
        left, top = line + label // rows * width, (2 + label % rows) * line
        name = fitted(class_names[label], name_width - line // 2, font)
        pen.text((left, top), name, FAINT if isnan(value) else INK, font)
        begin = left + name_width
        if not isnan(value):
            box = (begin, top, begin + value * bar_width, top + 0.7 * line)
            pen.rectangle((begin, top, begin + bar_width, top + 0.7 * line), "#eaeef2")
            pen.rectangle(box, tuple(colours[label].tolist()), outline=FAINT)
            pen.text((begin + bar_width + line / 3, top), f"{value:.3f}", INK, font)
        else:
            pen.text((begin, top), "does not occur", FAINT, font)
    return pil_to_tensor(picture)  # type: ignore[no-any-return]


def draw_confusion(confusion: Tensor, class_names: Sequence[str], *, side: int = 720) -> Tensor:
    """Of each annotated class (rows) the share of its pixels by predicted class (columns).

    Args:
        confusion: [C, C], counts: row the annotation, column the prediction.
        class_names: by label; written where there is room.
        side: height and width of the matrix, in pixels.

    Returns:
        [3, height, width] uint8.
    """
    counts = confusion.float().cpu()
    shares = counts / counts.sum(1, keepdim=True).clamp_min(1)
    matrix = to_pil_image(inferno(shares).movedim(-1, 0)).resize((side, side), Image.Resampling.NEAREST)
    cell, names = side / len(shares), len(shares) <= 40
    font = ImageFont.load_default(size=min(16.0, max(8.0, 0.6 * cell)))
    margin = 150 if names else 30
    picture = Image.new("RGB", (side + margin + 20, side + margin + 20), PAPER)
    picture.paste(matrix, (margin, margin))
    pen = ImageDraw.Draw(picture)
    pen.text((margin, 6), "predicted", INK, font)
    pen.text((6, margin - 20), "annotated", INK, font)
    for label in range(len(shares) if names else 0):
        name = fitted(class_names[label], margin - 36, font)
        middle = margin + (label + 0.5) * cell
        pen.text((margin - 8, middle), name, INK, font, anchor="rm")
        column = Image.new("RGB", (margin - 34, round(cell) + 6), PAPER)
        ImageDraw.Draw(column).text((0, column.height / 2), name, INK, font, anchor="lm")
        picture.paste(column.rotate(90, expand=True), (round(middle - column.height / 2), 26))
        if cell >= 30:
            share = float(shares[label, label])
            place_of = (middle, margin + (label + 0.5) * cell)
            pen.text(place_of, f"{share:.0%}", INK if share > 0.5 else PAPER, font, anchor="mm")
    return pil_to_tensor(picture)  # type: ignore[no-any-return]


class SegmentationPictures(Callback):
    """Draws the same validation images in TensorBoard at each validation, and what the validation counted.

    `pictures/validation`: input, annotation, prediction, GAug's kernels at three depths, with a legend;
    `pictures/iou`: IoU by class; `pictures/confusion`: the confusion matrix. Other
    tasks than `Segmentation` are left alone, and without a TensorBoard logger nothing is drawn.

    Args:
        images: how many, evenly spaced over the validation set.
        every_n_epochs: epochs from one picture to the next; 0 for never.
        side: shorter side of an image in the picture, in pixels.
    """

    def __init__(self, images: int = 8, every_n_epochs: int = 1, side: int = 224) -> None:
        self.images = images
        self.every_n_epochs = every_n_epochs
        self.side = side

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reads the images, in the main process."""
        if stage not in ("fit", "validate") or not self.every_n_epochs or not tensorboards(trainer):
            return
        if isinstance(pl_module, Segmentation) and trainer.is_global_zero:
            self.items = spaced_items(trainer.datamodule.val_dataloader(), self.images)  # type: ignore[attr-defined]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws before the module concludes: its counts are those of the whole set then."""
        if trainer.sanity_checking or not isinstance(pl_module, Segmentation) or not tensorboards(trainer):
            return
        if not is_due(trainer, self.every_n_epochs):
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        iou = pl_module.val_iou.compute()  # in all processes: they bring their parts together
        if not trainer.is_global_zero:
            return
        step = max(0, trainer.global_step - 1)
        pictures = {
            "validation": self._picture(data, pl_module),
            "iou": draw_iou(iou, pl_module.class_names, data.colours, title=pl_module.protocol),
            "confusion": draw_confusion(iou.confusion, pl_module.class_names),
        }
        for board in tensorboards(trainer):
            for name, picture in pictures.items():
                board.experiment.add_image(f"pictures/{name}", picture, global_step=step)

    def _picture(self, data: SegmentationData, module: Segmentation) -> Tensor:
        mean, std = (torch.tensor(data.normalisation[name]).view(3, 1, 1) for name in ("mean", "std"))
        predictions, kernels = [], []
        for image, mask, *_ in self.items:
            inputs = image[None].to(module.device)
            predictions.append(module.predicted(inputs, tuple(mask.shape[-2:]))[0].cpu())
            kernels.append(gaussian_kernels(module.backbone, inputs))
        return draw_segmentation(
            [item[0] * std + mean for item in self.items],
            [item[1] for item in self.items],
            predictions,
            module.class_names,
            data.colours,
            kernels=kernels,
            side=self.side,
        )


class MapWriter(BasePredictionWriter):
    """Writes what a segmentation predicts into the run's directory, as each batch is done.

    `predictions/NAME.png` has the index of each pixel's class, with the classes' colours as its palette;
    `overlays/NAME.png` has the colours over the image. NAME is the image's path within the folder, with its
    ending where another image differs in nothing else.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Name the files, and choose the colours."""
        if isinstance(pl_module, Segmentation):
            data = trainer.datamodule  # type: ignore[attr-defined]
            self._names = _file_names(data.predict_paths)
            self._colours = data.colours if len(data.colours) else distinct_colours(pl_module.hp.num_classes)

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the maps of a batch."""
        if not isinstance(pl_module, Segmentation):
            return
        source = trainer.datamodule.source("predict")  # type: ignore[attr-defined]
        indices, maps = prediction
        for place, classes in zip(indices.tolist(), maps.cpu().numpy(), strict=True):
            index_map, overlaid = (
                self._directory(trainer) / kind / f"{self._names[place]}.png"
                for kind in ("predictions", "overlays")
            )
            for file in (index_map, overlaid):
                file.parent.mkdir(parents=True, exist_ok=True)
            indexed = Image.fromarray(classes)
            indexed.putpalette(self._colours.tobytes())
            indexed.save(index_map)
            overlay(source.read(place)[0], classes, self._colours).save(overlaid)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where they are."""
        if isinstance(pl_module, Segmentation):
            rank_zero_info(f"predictions and overlays: {self._directory(trainer)}")

    def _directory(self, trainer: Trainer) -> Path:
        directory = trainer.log_dir  # in every process: they agree on it
        assert directory is not None
        return Path(directory)


def _file_names(paths: Sequence[str]) -> list[str]:
    """A name for each image: its path in the folder that holds all, with its ending where it needs one."""
    root = os.path.commonpath([Path(path).parent for path in paths])
    within = [Path(path).relative_to(root) for path in paths]
    bare = [str(path.with_suffix("")) for path in within]
    return bare if len(set(bare)) == len(bare) else [str(path) for path in within]


def _on_paper(tile: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A tile on as much paper as the largest takes."""
    height, width = size
    if (tile.height, tile.width) == size:
        return tile
    paper = Image.new("RGB", (width, height), PAPER)
    paper.paste(tile, (0, 0))
    return paper


def legend(
    labels: Sequence[int], class_names: Sequence[str], colours: np.ndarray, width: int, side: int
) -> Image.Image:
    """The colours of classes with their names.

    Args:
        labels: that are in it.
        class_names: by label.
        colours: [C, 3] uint8, by label.
        width: of the picture in pixels.
        side: height and width of the tiles above, which letters follow.
    """
    line, gap = max(16, side // 11), max(4, side // 20)
    font = ImageFont.load_default(size=0.7 * line)
    columns = max(1, width // (8 * line))
    rows = -(-len(labels) // columns)
    key = Image.new("RGB", (width, rows * line + 2 * gap), PAPER)
    pen = ImageDraw.Draw(key)
    for number, label in enumerate(labels):
        left, top = gap + number % columns * 8 * line, gap + number // columns * line
        pen.rectangle((left, top + 2, left + line - 4, top + line - 3), tuple(colours[label].tolist()), FAINT)
        pen.text((left + line, top), fitted(class_names[label], 6.8 * line, font), INK, font)
    return key
