"""How fast a run trains, and how long it waits for data."""

from time import perf_counter
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Throughput(Callback):
    """Log images per second (over all processes) and the share of time spent waiting for data.

    Both from the end of one batch to the end of the next: waiting, then training. Starting the workers, or a
    validation, is not training.
    """

    def __init__(self) -> None:
        self._ended: float | None = None
        self._waited = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ended = None

    on_validation_end = on_train_epoch_start

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._ended is not None:
            self._waited = perf_counter() - self._ended

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = perf_counter()
        if self._ended is not None:
            seconds = now - self._ended
            if isinstance(batch, list | tuple) and len(batch) > 1:  # else nobody knows how many images it has
                images = len(batch[1]) * trainer.world_size
                pl_module.log("train/images_per_s", images / seconds, prog_bar=True)
            pl_module.log("train/data_wait", self._waited / seconds)
        self._ended = now
