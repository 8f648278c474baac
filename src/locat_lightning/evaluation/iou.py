"""Intersection over union (IoU) of a segmentation, from one confusion matrix over the whole data set."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from locat_lightning.errors import InputError
from locat_lightning.evaluation.gather import gather_rows
from locat_lightning.labels import IGNORE


class ImageAreas(NamedTuple):
    """The areas of classes in each image, whose sums over images decide IoU and accuracies."""

    indices: list[int]  # N positions in the data set, ascending
    areas: Tensor  # [N, 3, C] int64, see `class_areas`


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
        images: areas of each image, on the CPU; None where it is not known which image a pixel is of.
    """

    SCALARS: ClassVar[tuple[str, ...]] = ("miou", "pixel_accuracy", "mean_accuracy")

    miou: Tensor
    per_class: Tensor
    pixel_accuracy: Tensor
    mean_accuracy: Tensor
    confusion: Tensor
    images: ImageAreas | None = None


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
        self._images: list[tuple[Tensor, Tensor]] = []  # indices and areas of a batch each

    def update(self, predictions: Tensor, annotations: Tensor, indices: Tensor | None = None) -> None:
        """Count the pixels of an image or batch, of any size; see `count_pixels`.

        `indices` [B] are the positions of a batch's images in the data set: then the result has their areas.
        """
        if indices is None:
            self.pixels += count_pixels(predictions, annotations, self.num_classes)
            return
        counts = [
            count_pixels(*pair, self.num_classes) for pair in zip(predictions, annotations, strict=True)
        ]
        of_images = torch.stack(counts)
        self.pixels += of_images.sum(0)
        self._images.append((indices, class_areas(of_images)))

    @property
    def last_areas(self) -> Tensor:
        """The areas [B, 3, C] of the images of the last batch."""
        return self._images[-1][1]

    def compute(self) -> IoU:
        """Return the result over the images of all processes, which call this together."""
        none = torch.empty(0, dtype=torch.int64)
        batches = self._images or [(none, none.view(0, 0, 0))]
        indices, areas = (torch.cat(column).cpu() for column in zip(*batches, strict=True))
        indices, areas = gather_rows(indices, indices, areas, device=self.device)
        return iou(self.pixels, ImageAreas(indices.tolist(), areas) if len(indices) else None)

    def reset(self) -> None:
        super().reset()
        self._images.clear()


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


def class_areas(pixels: Tensor) -> Tensor:
    """Return areas [..., 3, C] of pixels [..., C · C + 1], counted by `count_pixels`.

    They are the pixels of each class that are predicted rightly, annotated, and predicted.
    """
    num_classes = math.isqrt(pixels.shape[-1] - 1)
    confusion = pixels[..., :-1].unflatten(-1, (num_classes, num_classes))
    return torch.stack([confusion.diagonal(dim1=-2, dim2=-1), confusion.sum(-1), confusion.sum(-2)], -2)


def image_areas(pixels: Mapping[int, Tensor], device: torch.device) -> ImageAreas:
    """Return the areas of the images of all processes, each once, from `count_pixels` of this one's by index.

    All processes call it; `device` is that of their group.
    """
    indices = torch.tensor(list(pixels), dtype=torch.int64)
    areas = [class_areas(each.to_dense()) for each in pixels.values()]
    of_this = torch.stack(areas) if areas else indices.view(0, 0, 0)
    indices, areas_of_all = gather_rows(indices, indices, of_this, device=device)
    return ImageAreas(indices.tolist(), areas_of_all)


def shares(areas: Tensor) -> dict[str, Tensor]:
    """Return the figures of `IoU` by name: [...], `per_class` [..., C], of areas [..., 3, C].

    Areas are sums over images, of a floating-point type.
    """
    right, annotated, predicted = areas.unbind(-2)
    per_class = right / (annotated + predicted - right)  # 0 / 0 is NaN
    return {
        "miou": per_class.nanmean(-1),
        "per_class": per_class,
        "pixel_accuracy": right.sum(-1) / annotated.sum(-1),
        "mean_accuracy": (right / annotated).nanmean(-1),
    }


def iou(pixels: Tensor, images: ImageAreas | None = None) -> IoU:
    """Compute IoU and accuracies of pixels [C · C + 1], the sum of `count_pixels` over images."""
    num_classes = math.isqrt(len(pixels) - 1)
    if unknown := int(pixels[-1]):
        raise InputError(
            f"{unknown} pixels are of none of the classes 0..{num_classes - 1}: check the number of classes, "
            f"and that pixels without one are annotated as {IGNORE}"
        )
    confusion = pixels[:-1].view(num_classes, num_classes)
    return IoU(**shares(class_areas(pixels).float()), confusion=confusion, images=images)
