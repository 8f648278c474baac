"""Intersection over union (IoU) of a segmentation, from one confusion matrix over the whole data set."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from locat_lightning.errors import InputError
from locat_lightning.labels import IGNORE


@dataclass
class IoU:
    """How well predicted classes match the annotated ones; all are shares of pixels, 0 to 1, float32.

    Attributes:
        miou: mean of `per_class` over the classes that occur; NaN if none does.
        per_class: [C], NaN for a class that occurs neither in prediction nor in annotation; of one that is
            predicted but never annotated, 0.
        pixel_accuracy: share of the annotated pixels that are predicted rightly.
        mean_accuracy: the same by annotated class, averaged over the annotated classes.
        confusion: [C, C] int64, counts of pixels: annotated classes as rows, predicted ones as columns.
    """

    SCALARS: ClassVar[tuple[str, ...]] = ("miou", "pixel_accuracy", "mean_accuracy")

    miou: Tensor
    per_class: Tensor
    pixel_accuracy: Tensor
    mean_accuracy: Tensor
    confusion: Tensor


class MeanIoU(Metric):
    """IoU of all pixels of a data set, as mmsegmentation defines it.

    `torchmetrics.segmentation.MeanIoU` averages over images instead. `MulticlassConfusionMatrix` of
    torchmetrics counts the same, but sorts or copies annotated pixels at each update, waiting for the GPU.

    Pixels are counted in int64 and summed over processes: how images are spread over batches and processes
    does not matter.

    Args:
        num_classes: C, 1 to 255.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    pixels: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        check_classes(num_classes)
        self.num_classes = num_classes
        self.add_state("pixels", torch.zeros(num_classes**2 + 1, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, annotations: Tensor) -> None:
        """Count the pixels of an image or batch, of any size; see `count_pixels`."""
        self.pixels += count_pixels(predictions, annotations, self.num_classes)

    def compute(self) -> IoU:
        return iou(self.pixels)


def check_classes(num_classes: int) -> None:
    """Check that annotations of 8 bits can hold so many classes."""
    if not 1 <= num_classes <= IGNORE:
        message = f"{num_classes} classes: give 1 to {IGNORE} (a pixel annotated as {IGNORE} is ignored)"
        raise InputError(message)


def count_pixels(predictions: Tensor, annotations: Tensor, num_classes: int) -> Tensor:
    """Count pixels by their annotated and their predicted class.

    Classes are [..., H, W], of any integer type; pixels annotated as 255 are ignored.

    Returns:
        [C · C + 1] int64: the confusion matrix, with annotated classes as rows, and last the number of pixels
        where a class is not in 0..C-1. To be added up over images, and read by `iou`.
    """
    if predictions.shape != annotations.shape:
        raise ValueError(
            f"predictions {list(predictions.shape)} and annotations {list(annotations.shape)} must have one "
            "shape: upsample the scores to the annotation's size"
        )
    predicted, annotated = predictions.flatten().long(), annotations.flatten().long()
    known = (annotated >= 0) & (annotated < num_classes) & (predicted >= 0) & (predicted < num_classes)
    place = torch.where(known, annotated * num_classes + predicted, num_classes**2)
    place = torch.where(annotated == IGNORE, num_classes**2 + 1, place)
    # Not `bincount`, which waits for the device; on a CPU it takes as long.
    counts = torch.zeros(num_classes**2 + 2, dtype=torch.int64, device=place.device)
    return counts.scatter_add_(0, place, torch.ones_like(place))[:-1]


def image_miou(predictions: Tensor, annotations: Tensor, num_classes: int) -> Tensor:
    """Compute the mIoU of each image by itself, to rank images: not that of a data set, nor its mean.

    Classes are [B, H, W]; pixels annotated as 255 are ignored.

    Returns:
        [B] float32: the mean over the classes that occur in the image; NaN where nothing is annotated.
    """
    counts = [count_pixels(*each, num_classes)[:-1] for each in zip(predictions, annotations, strict=True)]
    confusion = torch.stack(counts).unflatten(-1, (num_classes, num_classes)).float()
    right = confusion.diagonal(dim1=-2, dim2=-1)
    per_class: Tensor = right / (confusion.sum(-1) + confusion.sum(-2) - right)  # 0 / 0 is NaN
    return per_class.nanmean(-1)


def iou(pixels: Tensor) -> IoU:
    """Compute IoU and accuracies of pixels [C · C + 1], the sum of `count_pixels` over images."""
    num_classes = math.isqrt(len(pixels) - 1)
    if unknown := int(pixels[-1]):
        raise InputError(
            f"{unknown} pixels are of none of the classes 0..{num_classes - 1}: check the number of classes, "
            f"and that pixels without one are annotated as {IGNORE}"
        )
    confusion = pixels[:-1].view(num_classes, num_classes)
    right, annotated, predicted = (
        counts.float() for counts in (confusion.diagonal(), confusion.sum(1), confusion.sum(0))
    )
    per_class = right / (annotated + predicted - right)  # 0 / 0 is NaN
    return IoU(
        miou=per_class.nanmean(),
        per_class=per_class,
        pixel_accuracy=right.sum() / annotated.sum(),
        mean_accuracy=(right / annotated).nanmean(),
        confusion=confusion,
    )
