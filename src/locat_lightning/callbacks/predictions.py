"""Predictions as a table."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch import distributed as dist

from locat_lightning.errors import InputError
from locat_lightning.tasks import Segmentation


class PredictionTable(BasePredictionWriter):
    """Writes `predictions.csv` into the run's directory: path, class, and the probability of every class."""

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[tuple[Tensor, Tensor]],
        batch_indices: Sequence[Any],
    ) -> None:
        """Gather the predictions of all processes and write them in the order of the data set."""
        if isinstance(pl_module, Segmentation):  # whose maps are files of their own
            return
        parts = [(indices.cpu(), probabilities.cpu()) for indices, probabilities in predictions]
        if trainer.world_size > 1:
            of_all: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(of_all, parts)
            parts = [part for parts in of_all for part in parts]
        directory = trainer.log_dir  # in every process: they agree on it
        if not trainer.is_global_zero:
            return
        if not parts:
            raise InputError("nothing is predicted: none of the images can be read")
        indices = torch.cat([indices for indices, _ in parts])
        probabilities = torch.cat([probabilities for _, probabilities in parts])
        names: list[str] = pl_module.class_names or [str(i) for i in range(probabilities.shape[1])]  # type: ignore[assignment]
        paths: list[str] = trainer.datamodule.predict_paths  # type: ignore[attr-defined]
        assert directory is not None
        table = Path(directory) / "predictions.csv"
        table.parent.mkdir(parents=True, exist_ok=True)
        with table.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "class", *names])
            for position in indices.argsort().tolist():
                p = probabilities[position]
                row = (f"{value:.6f}" for value in p.tolist())
                writer.writerow([paths[int(indices[position])], names[int(p.argmax())], *row])
        rank_zero_info(f"{len(indices)} predictions: {table}")
