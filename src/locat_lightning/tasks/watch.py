"""A watch over the numbers of a run: it stops at a loss, a weight or an output that is not finite."""

import math
from typing import Any, NoReturn

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from locat_lightning.errors import InputError
from locat_lightning.tasks.sharding import part_of


class Watched(LightningModule):
    """A LightningModule that stops all processes of a run, and keeps the last good checkpoint.

    Losses are looked at in every step on a CPU. Elsewhere looking means waiting for the device: they are
    looked at where a step is logged or ends an epoch, and before a checkpoint is written.

    Attributes:
        steps: optimizer steps of the run.
        peak_lr: peak of its learning rate.
    """

    steps: int = 0
    peak_lr: float = math.nan

    def __init__(self) -> None:
        super().__init__()
        self._losses: list[tuple[int, Tensor]] = []  # not yet known to be finite, with their steps
        self._finite: Tensor | None = None  # whether all outputs of this evaluation so far are

    def is_logged(self) -> bool:
        """Return whether the scalars of this optimizer step are written down."""
        # `_trainer` is private, but `trainer` is an error where there is none.
        every = 0 if self._trainer is None else self._trainer.log_every_n_steps  # type: ignore[attr-defined]
        return every > 0 and (self.global_step + 1) % every == 0

    def may_wait(self) -> bool:
        """Return whether this step may wait for a GPU: it is logged, or ends an epoch or the run."""
        return self.is_logged() or self.trainer.is_last_batch or self.global_step + 1 == self.steps

    def log(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        """Log a value; a number stays on the CPU, since to copy it to a GPU would be to wait for it."""
        if isinstance(value, int | float) and not options.get("sync_dist"):
            value = torch.tensor(float(value))
        super().log(name, value, *args, **options)

    def on_before_backward(self, loss: Tensor) -> None:
        self._losses.append((self.global_step, loss.detach()))
        if self._has_to_look():
            self._look_at_losses()

    def _has_to_look(self) -> bool:
        return self.device.type == "cpu" or self.may_wait()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that losses and weights are finite, before a file is touched: `InputError` if not."""
        self._look_at_losses()
        parts = [part_of(parameter.detach()) for parameter in self.parameters()]
        weights = [part for part in parts if part.numel()]
        finite = nn.utils.get_total_norm(weights, math.inf).isfinite()
        # In each process, which may have a part of them only; `_stop` is for all.
        if not self.trainer.strategy.reduce(finite.float(), reduce_op="min"):
            self._stop("a weight is not finite", self.global_step)

    def watched(self, outputs: Tensor) -> Tensor:
        """Return outputs of an evaluation, and note for `check_outputs` whether they are finite."""
        finite = outputs.isfinite().all()
        self._finite = finite if self._finite is None else self._finite & finite
        return outputs

    def check_outputs(self) -> None:
        """Check that all `watched` outputs since the last time are finite: `InputError` if not."""
        finite, self._finite = self._finite, None
        if finite is not None and not finite:
            raise InputError(
                "the model's outputs are not finite numbers, so they say nothing: use other weights, or "
                "--trainer.precision 32-true"
            )

    def on_validation_epoch_end(self) -> None:
        self.check_outputs()
        self._conclude("val")

    def on_test_epoch_end(self) -> None:
        self.check_outputs()
        self._conclude("test")

    def _conclude(self, split: str) -> None:
        """Log what the evaluation of a split has found; a task that measures says how."""

    def _look_at_losses(self) -> None:
        """Stop all processes if the mean of their losses is not finite."""
        if not self._losses:
            return
        steps, losses = zip(*self._losses, strict=True)
        self._losses.clear()
        means = self.trainer.strategy.reduce(torch.stack(losses), reduce_op="mean")
        for step, loss in zip(steps, means.tolist(), strict=True):
            if not math.isfinite(loss):
                self._stop(f"the loss is {loss}", step)

    def _stop(self, reason: str, step: int) -> NoReturn:
        last = ""
        for callback in self.trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                callback.save_on_exception = False  # the weights may be spoilt already
                written = (callback.last_model_path, callback.best_model_path, *callback.best_k_models)
                # A checkpoint that was about to be written has its name already, but no file.
                last = next((path for path in written if path and get_filesystem(path).exists(path)), last)
        raise InputError(
            f"{reason} at optimizer step {step} (epoch {self.current_epoch}): lower model.lr (its peak is "
            f"{self.peak_lr:.3g}), lengthen the warm-up, or train with trainer.precision 32-true; "
            f"last good checkpoint: {last or 'none yet'}"
        )
