"""k-NN and linear accuracy of the backbone's features during training."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from locat_lightning.callbacks.pictures import giving_up
from locat_lightning.callbacks.probe import Probe
from locat_lightning.data.labelled import LabelledData
from locat_lightning.errors import InputError
from locat_lightning.evaluation.feature_files import Row
from locat_lightning.evaluation.features import Features, extract_features
from locat_lightning.evaluation.knn import knn_classify
from locat_lightning.evaluation.linear import DINOV2_LEARNING_RATES, sweep_linear
from locat_lightning.evaluation.projector import Projector
from locat_lightning.figures.grid import rgb

__all__ = ["KnnProbe", "LinearProbe"]

THUMBNAIL = 48  # side of the projector's pictures, in pixels
MOST_POINTS = 10_000


class _FeatureProbe(Probe[LabelledData]):
    """Measure one vector per image, on images with a class each.

    Until the next epoch, features are kept for the other probes of the same images.
    """

    figure = "top-1"
    metrics: tuple[str, ...] = ("top1", "top5")

    def __init__(
        self, data: LabelledData | None, every_n_epochs: int, images: int | None, seed: int, name: str
    ) -> None:
        super().__init__(data, every_n_epochs, images, seed, name)
        self._kept: list[tuple[LabelledData, str, Sequence[int], Features]] = []  # of images of a split

    @abstractmethod
    def accuracy(self, train: Features, val: Features) -> dict[str, float]:
        """Measure `top1` and `top5` (shares of the validation images), and what else is logged."""

    def obstacle(self, data: Any) -> str:
        if not isinstance(data, LabelledData):
            return f"{type(data).__name__} has no images with a class each"
        if len(data.class_names) < 2:
            return "the images have no labels" if not data.class_names else "the images are of one class"
        train, val = data.source("train"), data.source("val")
        if train is val:
            return "there is no val/ beside the images of training"
        self.choose(len(train))
        labels: Sequence[int] | None = getattr(train, "labels", None)  # where known without reading images
        if labels is not None and len({labels[place] for place in self._bank}) < 2:
            chosen = f"the {len(self._bank)} training images chosen"
            return f"{chosen} are of one class: raise images ({self.images})"
        return ""

    def measure(self, data: LabelledData, backbone: nn.Module, device: torch.device) -> dict[str, float]:
        # Accelerators other than CUDA lack some of the operations.
        parts = [self._features(data, split, backbone, device) for split in ("train", "val")]
        metrics = self.accuracy(*(part.to(device) if device.type == "cuda" else part for part in parts))
        if len(data.class_names) <= 5:
            metrics.pop("top5")
        return metrics

    def _features(
        self, data: LabelledData, split: str, backbone: nn.Module, device: torch.device
    ) -> Features:
        """Return the features that this or another probe has of these images, or else extract them."""
        places: Sequence[int] = self._bank if split == "train" else range(len(data.source(split)))
        trainer: Any = data.trainer
        for probe in trainer.callbacks:
            for of, named, chosen, found in probe._kept if isinstance(probe, _FeatureProbe) else ():
                if _same(of, data) and (named, chosen) == (split, places):
                    self._kept.append((data, split, places, found))
                    return found
        loader = self.share(data, data.eval_dataloader(split), training=split == "train")
        # Lightning's progress bar is on the screen: rich has no room for a second one.
        found = extract_features(
            backbone, loader, device, autocast_dtype=self._autocast_dtype, progress=False
        )
        self._kept.append((data, split, places, found))
        return found

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the features: the backbone changes now."""
        self._kept.clear()

    on_fit_start = on_train_end = on_train_epoch_start


def _same(data: LabelledData, other: LabelledData) -> bool:
    """Return whether two data modules give the same images."""
    return data is other or (type(data) is type(other) and data.hparams == other.hparams)


class KnnProbe(_FeatureProbe):
    """Log the k-NN accuracy of the backbone during training: `knn/top1`, and `knn/top5` of over 5 classes.

    Weighted k-NN as in DINO (Caron et al. 2021), of the validation images among the training images, not
    augmented: before the first step, every n epochs and after the last. For DINO the backbone is the
    teacher's. Training gives the same weights with and without the probe. It switches itself off, in a line,
    where the run's own data cannot be measured (no labels, no `val/`), and in `fast_dev_run`.

    Args:
        data: labelled images to measure on, perhaps of another data set; null takes the run's own.
        every_n_epochs: epochs from one measurement to the next; 0 for never. Where `checkpoint.monitor` is
            `knn/top1`, `checkpoint.every_n_epochs` should be the same.
        images: training images in the bank, chosen at random once; null takes all.
        k: number of neighbours that vote.
        temperature: temperature of the votes.
        points: validation images in TensorBoard's projector, evenly spaced; 0 for no projector.
        project: when they are written: after the `last` measurement, or after `each`.
        seed: seed of the choice of images.
        name: what precedes the slash in the logged names; several probes need several names.
    """

    title = "k-NN"

    def __init__(
        self,
        data: LabelledData | None = None,
        *,
        every_n_epochs: NonNegativeInt = 1,
        images: PositiveInt | None = 50_000,
        k: PositiveInt = 20,
        temperature: PositiveFloat = 0.07,
        points: NonNegativeInt = 1000,
        project: Literal["last", "each"] = "last",
        seed: int = 0,
        name: str = "knn",
    ) -> None:
        super().__init__(data, every_n_epochs, images, seed, name)
        if points > MOST_POINTS:
            raise InputError(f"{name}.points is {points:,}: the projector takes at most {MOST_POINTS:,}")
        self.k = k
        self.temperature = temperature
        self.points, self.project = points, project
        self.active = points > 0

    def accuracy(self, train: Features, val: Features) -> dict[str, float]:
        found = knn_classify(*train[:2], *val[:2], k=(self.k,), temperature=self.temperature)[self.k]
        return {"top1": found.top1, "top5": found.top5}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if self.project == "each":
            self._project(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.project == "last":
            self._project(trainer)
        super().on_train_end(trainer, pl_module)

    def _project(self, trainer: Trainer) -> None:
        """Write the features just measured into TensorBoard's projector, with a picture of each image."""
        writers = [each.experiment for each in trainer.loggers if isinstance(each, TensorBoardLogger)]
        if not (self.active and writers and trainer.is_global_zero):
            return
        for data, _, _, found in (each for each in self._kept if each[1] == "val"):
            source, names, last = data.source("val"), data.class_names, len(found.indices) - 1
            describe = partial(_row, source.path, names)
            draw = partial(rgb, normalisation=data.normalisation)
            rows = torch.linspace(0, last, min(self.points, last + 1), dtype=torch.float64).round().long()
            projector = Projector(THUMBNAIL, len(rows), draw, describe)
            with giving_up(self, "points of the projector"), isolate_rng():
                for batch in data.loader_of("val", found.indices[rows].tolist()):
                    own = torch.searchsorted(found.indices, batch.indices)
                    projector.add(batch, found.features[own])
                for writer in writers:
                    projector.write(writer, max(0, trainer.global_step - 1))


def _row(path_of: Callable[[int], str], names: Sequence[str], position: int, label: int) -> Row:
    return Row(path_of(position), label, names[label])


class LinearProbe(_FeatureProbe):
    """Log the accuracy of linear classifiers on the backbone's features, trained anew each time.

    There is one for each learning rate, all trained at once on features extracted once (as in DINOv2). The
    best top-1 is `linear/top1`; `linear/top5` (of over 5 classes) and `linear/rate` are those of the same
    classifier. When and where it measures is as in `KnnProbe`.

    Args:
        data: labelled images to measure on, perhaps of another data set; null takes the run's own.
        every_n_epochs: epochs from one measurement to the next; 0 for never. Where `checkpoint.monitor` is
            `linear/top1`, `checkpoint.every_n_epochs` should be the same.
        images: training images, chosen at random once; null takes all.
        learning_rates: the learning rates, per 256 images.
        epochs: passes of the classifiers over the features.
        batch_size: images per step of the classifiers.
        seed: seed of the choice of images, and of the classifiers' initial weights and order.
        name: what precedes the slash in the logged names; several probes need several names.
    """

    title = "Linear"
    metrics = ("top1", "top5", "rate")

    def __init__(
        self,
        data: LabelledData | None = None,
        *,
        every_n_epochs: NonNegativeInt = 10,
        images: PositiveInt | None = 50_000,
        learning_rates: Sequence[PositiveFloat] = DINOV2_LEARNING_RATES,
        epochs: PositiveInt = 100,
        batch_size: PositiveInt = 1024,
        seed: int = 0,
        name: str = "linear",
    ) -> None:
        super().__init__(data, every_n_epochs, images, seed, name)
        self._sweep = partial(
            sweep_linear,
            learning_rates=learning_rates,
            epochs=epochs,
            batch_size=batch_size,
            seed=seed,
            progress=False,
        )

    def accuracy(self, train: Features, val: Features) -> dict[str, float]:
        best = self._sweep(*train[:2], *val[:2]).best
        return {"top1": best.top1, "top5": best.top5, "rate": best.learning_rate}
