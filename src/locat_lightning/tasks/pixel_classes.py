"""Classes of pixels, measured, predicted and drawn: what a task of segmentation has besides its training."""

from collections.abc import Sequence
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from locat_lightning.data.bands import Bands
from locat_lightning.data.class_lists import distinct_colours
from locat_lightning.data.segmentation import MaskBatch
from locat_lightning.evaluation.iou import IoU, MeanIoU, shares
from locat_lightning.evaluation.per_image import Areas
from locat_lightning.figures.grid import rgb
from locat_lightning.figures.segmentation import confusion_figure, iou_figure, segmentation_figure
from locat_lightning.inspection import gaussian_kernels
from locat_lightning.nn.decoder import upsampled_argmax
from locat_lightning.tasks.dense import DenseTask
from locat_lightning.tasks.prediction_files import file_names, write_classes


class PixelClasses(DenseTask):
    """A task whose heads name the class of each pixel; `logits` computes them.

    The heads are measured side by side. The best of the last validation is the one that predicts, and the
    one whose figures are the task's; with one head, that is the one.

    Attributes:
        iou: result of the last evaluation.
        results: the same by image.
        best: number of the best head.
    """

    iou: IoU | None = None
    results: Areas | None = None
    best = 0
    counts: Any  # of the pixels, for each head

    def __init__(self, backbone: str | None = None, **options: Any) -> None:
        super().__init__(backbone, **options)
        self._file_names: list[str] = []  # of the images that are predicted

    def logits(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return what each head makes of normalised images [B, 3, H, W]: logits [B, classes, H, W]."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Return the best head's logits [B, classes, H, W] of normalised images [B, 3, H, W]."""
        return self.logits(images)[self.best]

    def measure_heads(self, names: Sequence[str]) -> None:
        """Prepare to measure heads, of which each has a name; where there is one, the name is not used."""
        self._names = list(names)
        self.counts = nn.ModuleList(MeanIoU(self.hp.num_classes) for _ in names)

    def predicted(self, images: Tensor, masks: Tensor) -> Tensor:
        """Return classes [B, H, W] int64 of images [B, 3, H', W'], at the size of their masks [.., H, W]."""
        return self._predicted(images, masks)[self.best]

    def _predicted(self, images: Tensor, masks: Tensor) -> list[Tensor]:
        height, width = masks.shape[-2:]
        return [upsampled_argmax(self.watched(each), (height, width)) for each in self.logits(images)]

    def validation_step(self, batch: MaskBatch, batch_idx: int) -> Tensor:
        """Count the pixels of each pair of classes at the annotation's size, and return the prediction."""
        predicted = self._predicted(batch.images, batch.masks)
        for counts, of_head in zip(self.counts, predicted, strict=True):
            counts.update(of_head, batch.masks, batch.indices)
        return predicted[self.best]

    test_step = validation_step

    def hardness(self, outputs: Tensor, batch: MaskBatch) -> Tensor:
        """Return 1 - mIoU of each image of the last batch by itself, [B]; NaN where none is annotated."""
        areas: Tensor = self.counts[self.best].last_areas
        return 1 - shares(areas.float())["miou"]

    def _conclude(self, split: str) -> None:
        """Log IoU from one confusion matrix over the whole set, of all processes."""
        found = [counts.compute() for counts in self.counts]
        for counts in self.counts:
            counts.reset()
        if self.trainer.sanity_checking:
            return
        if split == "val":
            self.best = int(torch.stack([each.miou for each in found]).nan_to_num(-1).argmax())
        if len(found) > 1:
            for name, each in zip(self._names, found, strict=True):
                self.log(f"{split}/miou_{name}", each.miou, sync_dist=True)
        self.iou = iou = found[self.best]
        for name in IoU.SCALARS:
            self.log(f"{split}/{name}", getattr(iou, name), prog_bar=name == "miou", sync_dist=True)
        by_class = zip(self.class_names, iou.per_class.tolist(), strict=True)
        known = {f"iou/{name}": share for name, share in by_class if not isnan(share)}
        for logger in self.trainer.loggers:
            logger.log_metrics(known, step=max(0, self.global_step - 1))
        self.results = Areas.of(iou, self.class_names, self.trainer.datamodule, split)  # type: ignore[attr-defined]

    def predict_step(self, batch: MaskBatch, batch_idx: int) -> tuple[Tensor, Tensor]:
        """Return positions in the data set [B], and classes [B, H, W] uint8 at the image's own size."""
        predicted = self.predicted(batch.images, batch.masks).byte()
        self.check_outputs()
        return batch.indices, predicted

    def write_predictions(self, prediction: tuple[Tensor, Tensor], data: Any, directory: Path) -> None:
        """Write the classes of each image as PNGs: their indices, and their colours over the image."""
        self._file_names = self._file_names or file_names(data.predict_paths)
        colours = data.colours if len(data.colours) else distinct_colours(self.hp.num_classes)
        indices, maps = prediction
        for index, classes in zip(indices.tolist(), maps.cpu().numpy(), strict=True):
            image, _ = data.source("predict").read(index)
            if isinstance(image, Bands):
                shown = rgb(image.pixels[None], data.normalisation)[0]
                image = Image.fromarray((shown * 255).round().astype(np.uint8))
            write_classes(directory, self._file_names[index], image, classes, colours)

    def finish_predictions(self, data: Any, directory: Path) -> str:
        self._file_names = []
        return f"predictions and overlays: {directory}"

    def pictures(self, samples: Sequence[Any], data: Any, side: int) -> dict[str, Figure]:
        """Draw input, annotation, prediction and kernels of some samples, each in its own size."""
        inputs = [sample[0][None].to(self.device) for sample in samples]
        masks = [sample[1] for sample in samples]
        pairs = zip(inputs, masks, strict=True)
        predictions = [self.predicted(image, mask)[0].cpu() for image, mask in pairs]
        kernels = [gaussian_kernels(self.backbone, image) for image in inputs]
        figure = segmentation_figure(
            [rgb(image, data.normalisation)[0] for image in inputs],
            masks,
            predictions,
            self.class_names,
            data.colours,
            kernels=[[each[0] for each in block] for block in zip(*kernels, strict=True)],
            side=side,
        )
        return {"validation": figure}

    def result_pictures(self, data: Any) -> dict[str, Figure]:
        if self.iou is None:
            return {}
        return {
            "iou": iou_figure(self.iou, self.class_names, data.colours, title=self.summary()),
            "confusion": confusion_figure(self.iou.confusion, self.class_names),
        }
