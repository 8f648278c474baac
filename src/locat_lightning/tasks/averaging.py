"""A moving average of the weights, which is validated and saved in their place."""

from itertools import chain

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor


class Averaging(EMAWeightAveraging):
    """Lightning's EMAWeightAveraging, also for a run that is interrupted in a validation.

    Lightning's exchanges weights and average for a validation, and would save them exchanged. Here the
    average stays where it is, and the weights come back from a copy.
    """

    _trained: list[Tensor] = []  # noqa: RUF012 - the copy during a validation; never changed in place

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._average_model is not None:  # private, as what copies it
            self._trained = [each.detach().clone() for each in _tensors(pl_module)]
            self._copy_average_to_current(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for tensor, trained in zip(_tensors(pl_module), self._trained, strict=False):
            tensor.data.copy_(trained)
        self._trained = []

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_validation_epoch_end(trainer, pl_module)


def _tensors(module: LightningModule) -> "chain[Tensor]":
    return chain(module.parameters(), module.buffers())
