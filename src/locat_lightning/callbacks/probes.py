"""What the backbone's features are worth while it trains: k-NN and linear accuracy."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from locat_lightning.callbacks.probe import Probe
from locat_lightning.data.classification import ImageData
from locat_lightning.data.sources import Stream
from locat_lightning.errors import InputError
from locat_lightning.evaluation.features import Features, extract_features
from locat_lightning.evaluation.knn import knn_classify
from locat_lightning.evaluation.linear import DINOV2_LEARNING_RATES, sweep_linear

__all__ = ["KnnProbe", "LinearProbe"]


class _FeatureProbe(Probe[ImageData]):
    """Measures one vector per image, on images with a class each."""

    figure = "top-1"
    metrics: tuple[str, ...] = ("top1", "top5")

    @abstractmethod
    def accuracy(self, train: Features, val: Features) -> dict[str, float]:
        """Measure `top1`, `top5` (shares of the validation images), and what else is logged."""

    def obstacle(self, data: Any) -> str:
        """Choose the training images, or say why these data cannot be measured."""
        if not isinstance(data, ImageData):
            return f"{type(data).__name__} has no images with a class each"
        if len(data.class_names) < 2:
            return "the images have no labels" if not data.class_names else "the images are of one class"
        train, val = data.source("train"), data.source("val")
        if isinstance(train, Stream) or isinstance(val, Stream):
            return f"data set {data.dataset!r} is a stream, whose images have no positions"
        if train is val:
            return "there is no val/ beside the images of training"
        self.choose(len(train))
        labels: Sequence[int] | None = getattr(train, "labels", None)  # where known without reading images
        if labels is not None and len({labels[place] for place in self._bank}) < 2:
            return (
                f"the {len(self._bank)} training images chosen are of one class: raise images ({self.images})"
            )
        return ""

    def measure(self, data: ImageData, backbone: nn.Module, device: torch.device) -> dict[str, float]:
        """Extract the features of both splits, and score them."""
        # Lightning's progress bar is on the screen: rich has no room for a second one.
        parts = [
            extract_features(
                backbone,
                self.share(data, data.eval_dataloader(split), training=split == "train"),
                device,
                autocast_dtype=self._autocast_dtype,
                progress=False,
            )
            for split in ("train", "val")
        ]
        if device.type == "cuda":  # other accelerators lack some of the operations
            parts = [Features(*(each.to(device) for each in part)) for part in parts]
        metrics = self.accuracy(*parts)
        if len(data.class_names) <= 5:
            metrics.pop("top5")
        return metrics


class KnnProbe(_FeatureProbe):
    """Logs the k-NN accuracy of the backbone while it trains: `knn/top1`, and `knn/top5` of over 5 classes.

    Weighted k-NN as in DINO (Caron et al. 2021), of the validation images among the training images, neither
    augmented: before the first step, every n epochs and after the last. For DINO that is the teacher's
    backbone. Training gives the same weights with and without it. Where the run's own data cannot be measured
    (no labels, no `val/`) it says so and does nothing; nor does it do anything in `fast_dev_run`.

    Args:
        data: labelled images to measure on, which may be of another data set; null takes the run's own.
        every_n_epochs: epochs from one measurement to the next; 0 for never. Where `checkpoint.monitor` is
            `knn/top1`, `checkpoint.every_n_epochs` should be the same.
        images: training images in the bank, chosen at random once; null takes all.
        k: number of neighbours that vote.
        temperature: of the votes.
        seed: of the choice of images.
        name: before the slash in the logged names; several probes need several names.

    Raises:
        InputError: an argument is out of its range, or `data` cannot be measured.
    """

    title = "k-NN"

    def __init__(
        self,
        data: ImageData | None = None,
        *,
        every_n_epochs: int = 1,
        images: int | None = 50_000,
        k: int = 20,
        temperature: float = 0.07,
        seed: int = 0,
        name: str = "knn",
    ) -> None:
        super().__init__(data, every_n_epochs, images, seed, name)
        if k < 1 or temperature <= 0:
            raise InputError(f"{name}: k ({k}) must be at least 1, and temperature ({temperature}) above 0")
        self.k = k
        self.temperature = temperature

    def accuracy(self, train: Features, val: Features) -> dict[str, float]:
        """Top-1 and top-5 by votes of the k nearest training images (see `evaluation.knn`)."""
        found = knn_classify(*train, *val, k=(self.k,), temperature=self.temperature)[self.k]
        return {"top1": found.top1, "top5": found.top5}


class LinearProbe(_FeatureProbe):
    """Logs the accuracy of linear classifiers of the backbone's features, trained anew each time.

    One for each learning rate, all at once on features extracted once (as in DINOv2). The best top-1 is
    `linear/top1`; `linear/top5` (of over 5 classes) and `linear/rate`, its learning rate, go with it. When
    and where it measures is as in `KnnProbe`.

    Args:
        data: labelled images to measure on, which may be of another data set; null takes the run's own.
        every_n_epochs: epochs from one measurement to the next; 0 for never. Where `checkpoint.monitor` is
            `linear/top1`, `checkpoint.every_n_epochs` should be the same.
        images: training images, chosen at random once; null takes all.
        learning_rates: the grid, per 256 images.
        epochs: passes of the classifiers over the features.
        batch_size: images per step of the classifiers.
        seed: of the choice of images, and of the classifiers' initial weights and order.
        name: before the slash in the logged names; several probes need several names.

    Raises:
        InputError: an argument is out of its range, or `data` cannot be measured.
    """

    title = "Linear"
    metrics = ("top1", "top5", "rate")

    def __init__(
        self,
        data: ImageData | None = None,
        *,
        every_n_epochs: int = 10,
        images: int | None = 50_000,
        learning_rates: Sequence[float] = DINOV2_LEARNING_RATES,
        epochs: int = 100,
        batch_size: int = 1024,
        seed: int = 0,
        name: str = "linear",
    ) -> None:
        super().__init__(data, every_n_epochs, images, seed, name)
        if not learning_rates or epochs < 1 or batch_size < 1:
            raise InputError(
                f"{name}: {len(learning_rates)} learning_rates, epochs ({epochs}) and batch_size "
                f"({batch_size}) must each be at least 1"
            )
        self.learning_rates = learning_rates
        self.epochs = epochs
        self.batch_size = batch_size

    def accuracy(self, train: Features, val: Features) -> dict[str, float]:
        """Top-1, top-5 and learning rate of the best classifier (see `evaluation.linear`)."""
        best = sweep_linear(
            *train,
            *val,
            learning_rates=self.learning_rates,
            epochs=self.epochs,
            batch_size=self.batch_size,
            seed=self.seed,
            progress=False,
        ).best
        return {"top1": best.top1, "top5": best.top5, "rate": best.learning_rate}
