"""Predictions as files, which the task writes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info


class Predictions(BasePredictionWriter):
    """Have the task write what it predicts into the run's directory, batch by batch."""

    def __init__(self) -> None:
        super().__init__(write_interval="batch")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # `log_dir` is a collective operation.
        self._directory = Path(trainer.log_dir or trainer.default_root_dir)

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
        if (write := getattr(pl_module, "write_predictions", None)) is not None:
            write(prediction, trainer.datamodule, self._directory)  # type: ignore[attr-defined]

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (finish := getattr(pl_module, "finish_predictions", None)) is not None:
            rank_zero_info(finish(trainer.datamodule, self._directory))  # type: ignore[attr-defined]
        else:
            rank_zero_info(f"nothing is written: {type(pl_module).__name__} has no method write_predictions")
