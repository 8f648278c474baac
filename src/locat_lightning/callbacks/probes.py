"""What the backbone's features are worth while it trains: k-NN and linear accuracy."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng

from locat_lightning.data.images import ImageData, Stream
from locat_lightning.data.reading import ImageLoader
from locat_lightning.errors import InputError
from locat_lightning.evaluation.features import Features, autocast_type, extract_features
from locat_lightning.evaluation.knn import knn_classify
from locat_lightning.evaluation.linear import DINOV2_LEARNING_RATES, sweep_linear

__all__ = ["KnnProbe", "LinearProbe"]


class _Probe(Callback, ABC):
    """Measures `pl_module.backbone` on labelled images, before the first step and at the ends of epochs.

    Attributes:
        first: top-1 before the first step; None if that was not measured.
        last: top-1 as last measured.
    """

    title: str
    metrics: tuple[str, ...] = ("top1", "top5")

    def __init__(
        self, data: ImageData | None, every_n_epochs: int, images: int | None, seed: int, name: str
    ) -> None:
        if every_n_epochs < 0:
            raise InputError(f"{name}: every_n_epochs ({every_n_epochs}) must be at least 1, or 0 for never")
        if images is not None and images < 1:
            raise InputError(f"{name}: images ({images}) must be at least 1")
        self.data = data
        self.every_n_epochs = every_n_epochs
        self.images = images
        self.seed = seed
        self.name = name
        self.first: float | None = None
        self.last: float | None = None
        self._measured: ImageData | None = None
        self._autocast_dtype: torch.dtype | None = None
        self._bank: list[int] = []

    @property
    def logged(self) -> list[str]:
        """The names that it logs; none where it is switched off."""
        return [f"{self.name}/{metric}" for metric in self.metrics] if self.every_n_epochs else []

    @abstractmethod
    def accuracy(self, train: Features, val: Features) -> dict[str, float]:
        """Measure `top1`, `top5` (shares of the validation images), and what else is logged."""

    @property
    def state_key(self) -> str:
        """One for each name, so that probes of several data sets stand side by side."""
        return f"{type(self).__name__}.{self.name}"

    def state_dict(self) -> dict[str, Any]:
        """The top-1 accuracies that the last line of the run reports."""
        return {"first": self.first, "last": self.last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with those of the run that is resumed."""
        self.first, self.last = state_dict["first"], state_dict["last"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the images, and see that they can be measured.

        Raises:
            InputError: the probe's own data cannot (those of the run switch it off instead, in a line), or
                not in the trainer's precision.
        """
        if stage != "fit" or not self.every_n_epochs:
            return
        self._autocast_dtype = autocast_type(trainer.precision)
        self.first = self.last = self._measured = None
        if self.data is not None:
            self.data.trainer = trainer  # for its number of workers
            if trainer.local_rank == 0:
                self.data.prepare_data()
            trainer.strategy.barrier(f"{self.name}: data")
            self.data.setup("fit")
        data = trainer.datamodule if self.data is None else self.data  # type: ignore[attr-defined]
        if obstacle := self._choose(data):
            if self.data is not None:
                raise InputError(f"{self.name}: {obstacle}")
            rank_zero_info(f"{self.title} is not measured: {obstacle}")
        else:
            self._measured = data

    def _choose(self, data: Any) -> str:
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
        count = len(train) if self.images is None else min(self.images, len(train))
        chosen = np.random.default_rng(self.seed).choice(len(train), count, replace=False)
        self._bank = sorted(chosen.tolist())
        labels: Sequence[int] | None = getattr(train, "labels", None)  # where known without reading images
        if labels is not None and len({labels[place] for place in self._bank}) < 2:
            return f"the {count} training images chosen are of one class: raise images ({self.images})"
        return ""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the untrained backbone; a run that is resumed has that behind it."""
        if trainer.global_step == 0 and trainer.current_epoch == 0 and self.first is None:
            metrics = self._measure(trainer, pl_module)
            self.first = self.last
            for logger in trainer.loggers if metrics else ():
                logger.log_metrics(metrics | {"epoch": 0}, step=0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure every n epochs and after the last, in time for a ModelCheckpoint that monitors it."""
        due = self._active(trainer) and (
            (trainer.current_epoch + 1) % self.every_n_epochs == 0
            or trainer.current_epoch + 1 == trainer.max_epochs
            or trainer.global_step == trainer.max_steps
            or trainer.should_stop
        )
        if due:
            metrics = self._measure(trainer, pl_module)
            headline = f"{self.name}/top1"
            for name, value in metrics.items():
                # All processes have the same value; sync_dist says so.
                pl_module.log(name, value, prog_bar=name == headline, sync_dist=True)
        elif self._active(trainer):
            # A ModelCheckpoint that monitors it takes NaN for the worst, and a missing metric for a mistake.
            trainer.callback_metrics.setdefault(f"{self.name}/top1", torch.tensor(torch.nan))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what the training brought."""
        if self.last is not None:
            untrained = "" if self.first is None else f"{self.first:.4g} untrained -> "
            rank_zero_info(f"{self.title} top-1 ({self.name}/top1) {untrained}{self.last:.4g}")

    def _active(self, trainer: Trainer) -> bool:
        return self._measured is not None and not trainer.fast_dev_run  # type: ignore[attr-defined]

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Metrics by the names they are logged under, the same in every process; none if switched off."""
        data = self._measured
        if data is None or not self._active(trainer):
            return {}
        backbone: Any = pl_module.backbone
        parts = []
        # Lightning's progress bar is on the screen: rich has no room for a second one.
        with isolate_rng():
            for split in ("train", "val"):
                found = extract_features(
                    backbone,
                    self._loader(data, split, trainer),
                    pl_module.device,
                    autocast_dtype=self._autocast_dtype,
                    progress=False,
                )
                parts.append(found)
            metrics = self.accuracy(*(self._placed(part, pl_module.device) for part in parts))
        self.last = metrics["top1"]
        if len(data.class_names) <= 5:
            metrics.pop("top5")
        return {f"{self.name}/{metric}": value for metric, value in metrics.items()}

    def _loader(self, data: ImageData, split: str, trainer: Trainer) -> ImageLoader:
        """This process's share of a split, not augmented; its workers end with the iteration."""
        whole = data.eval_dataloader(split)
        places = self._bank if split == "train" else range(len(whole.dataset))  # type: ignore[arg-type]
        return ImageLoader(
            whole.dataset,  # type: ignore[arg-type]
            sampler=places[trainer.global_rank :: trainer.world_size],
            batch_size=whole.batch_size,
            num_workers=whole.num_workers,
            pin_memory=whole.pin_memory,
            training=False,
            unreadable=data.unreadable,
        )

    def _placed(self, part: Features, device: torch.device) -> Features:
        """On the GPU, where there is one of NVIDIA's: others lack some of the operations."""
        return Features(*(each.to(device) for each in part)) if device.type == "cuda" else part


class KnnProbe(_Probe):
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


class LinearProbe(_Probe):
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
