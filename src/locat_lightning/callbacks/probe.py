"""What all probes share: when a backbone is measured during training, on which images, and what is logged."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from locat_lightning.data.base import ImageModule
from locat_lightning.data.loading import ImageLoader
from locat_lightning.errors import InputError
from locat_lightning.evaluation.features import autocast_type

Data = TypeVar("Data", bound=ImageModule[Any])


class Probe(Callback, ABC, Generic[Data]):
    """Measure `pl_module.backbone` on annotated images, before the first step and at the ends of epochs.

    Args:
        data: the images; None takes the run's own.
        every_n_epochs: epochs from one measurement to the next; 0 for never.
        images: number of training images, see `choose`; None for all.
        seed: seed of the choice of images.
        name: what precedes the slash in the logged names.

    Attributes:
        title: what is measured, in words.
        figure: the headline, in words.
        protocol: what the headline depends on, in words, where the title does not say it.
        metrics: what is logged, the headline first.
        first: the headline before the first step; None if that was not measured.
        last: the headline as last measured.
    """

    title: str
    figure: str
    protocol: str = ""
    metrics: tuple[str, ...]

    def __init__(
        self, data: Data | None, every_n_epochs: int, images: int | None, seed: int, name: str
    ) -> None:
        self.data = data
        self.every_n_epochs = every_n_epochs
        self.images = images
        self.seed = seed
        self.name = name
        self.first: float | None = None
        self.last: float | None = None
        self._measured: Data | None = None
        self._autocast_dtype: torch.dtype | None = None
        self._bank: list[int] = []

    @abstractmethod
    def obstacle(self, data: Any) -> str:
        """Return why these data, which have been set up, cannot be measured; nothing if they can."""

    @abstractmethod
    def measure(self, data: Data, backbone: nn.Module, device: torch.device) -> dict[str, float]:
        """Measure the headline and any other of `metrics`, the same in every process."""

    @property
    def headline(self) -> str:
        """The logged name of the headline."""
        return f"{self.name}/{self.metrics[0]}"

    @property
    def state_key(self) -> str:
        """Return a key of its own for each name, so that one run can have several such probes."""
        return f"{type(self).__name__}.{self.name}"

    def state_dict(self) -> dict[str, Any]:
        return {"first": self.first, "last": self.last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.first, self.last = state_dict["first"], state_dict["last"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the images, and check that they can be measured.

        If they cannot, the run's own switch the probe off, in a line; the probe's own are an error.
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
        if obstacle := self.obstacle(data):
            if self.data is not None:
                raise InputError(f"{self.name}: {obstacle}")
            self._skip(obstacle)
        elif not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._measured = data

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the backbone before the first step, unless the run is resumed."""
        if self._measured is None:
            return
        if not isinstance(getattr(pl_module, "backbone", None), nn.Module):
            self._skip(f"{type(pl_module).__name__} has no backbone")
        elif trainer.global_step == 0 and trainer.current_epoch == 0 and self.first is None:
            metrics = self._measure(self._measured, pl_module)
            self.first = self.last
            rank_zero_info(f"{self.title} {self.figure} before training: {self.first:.4g}")
            for logger in trainer.loggers:
                logger.log_metrics(metrics | {"epoch": 0}, step=0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure every n epochs and after the last, in time for a ModelCheckpoint that monitors it."""
        if self._measured is None:
            return
        if (
            (trainer.current_epoch + 1) % self.every_n_epochs == 0
            or trainer.current_epoch + 1 == trainer.max_epochs
            or trainer.global_step == trainer.max_steps
            or trainer.should_stop
        ):
            for name, value in self._measure(self._measured, pl_module).items():
                # All processes have the same value; sync_dist says so.
                pl_module.log(name, value, prog_bar=name == self.headline, sync_dist=True)
        else:
            # A ModelCheckpoint that monitors it takes NaN for the worst, and a missing metric for a mistake.
            trainer.callback_metrics.setdefault(self.headline, torch.tensor(torch.nan))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.last is not None:
            before = "" if self.first is None else f"{self.first:.4g} before -> "
            manner = f" ({self.protocol})" if self.protocol else ""
            rank_zero_info(f"{self.title} {self.figure} ({self.headline}) {before}{self.last:.4g}{manner}")

    def _skip(self, obstacle: str) -> None:
        self._measured = None
        rank_zero_info(f"{self.title} is not measured: {obstacle}")

    def _measure(self, data: Data, pl_module: LightningModule) -> dict[str, float]:
        """Return metrics by their logged names, the same in every process."""
        backbone: Any = pl_module.backbone
        with isolate_rng():
            metrics = self.measure(data, backbone, pl_module.device)
        self.last = metrics[self.metrics[0]]
        return {f"{self.name}/{metric}": value for metric, value in metrics.items()}

    def choose(self, images: int) -> None:
        """Choose which of so many training images are measured, at random."""
        count = images if self.images is None else min(self.images, images)
        chosen = np.random.default_rng(self.seed).choice(images, count, replace=False)
        self._bank = sorted(chosen.tolist())

    def share(self, data: Data, whole: ImageLoader, *, training: bool) -> ImageLoader:
        """Return a loader of this process's share of the images, of those chosen if `training`."""
        places: Sequence[int] = self._bank if training else range(len(whole.dataset))
        trainer = data.trainer
        assert trainer is not None  # of the run
        return ImageLoader(
            whole.dataset,
            sampler=places[trainer.global_rank :: trainer.world_size],
            batch_size=whole.batch_size,
            num_workers=whole.num_workers,
            pin_memory=whole.pin_memory,
            training=False,
            unreadable=data.unreadable,
            collate=whole.collate,
        )
