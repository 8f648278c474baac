"""How fast a run trains, and how long it waits for data."""

from time import perf_counter
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Throughput(Callback):
    """Log images per second (over all processes) and the share of time spent waiting for data.

    Both are means over the batches since the last step that was logged: the host runs ahead of a GPU and
    catches up where a step is logged, so that a single batch says little. A batch lasts from the end of the
    one before to its own: waiting, then training. Starting the workers, or a validation, is not training.
    """

    def __init__(self) -> None:
        self._ended: float | None = None
        self._seconds, self._waited, self._images = 0.0, 0.0, 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ended = None

    on_validation_end = on_train_epoch_start

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._ended is not None:
            self._waited += perf_counter() - self._ended

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        ended, self._ended = self._ended, perf_counter()
        if ended is None:
            return
        self._seconds += self._ended - ended
        if isinstance(batch, list | tuple) and len(batch) > 1:  # else nobody knows how many images it has
            self._images += len(batch[1]) * trainer.world_size
            pl_module.log("train/images_per_s", self._images / self._seconds)
        pl_module.log("train/data_wait", self._waited / self._seconds)
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and trainer.global_step % every == 0:
            self._seconds, self._waited, self._images = 0.0, 0.0, 0
