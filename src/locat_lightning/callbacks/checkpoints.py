"""Checkpoints of a run: its best weights, and where to go on from."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from locat_lightning.errors import InputError


class Checkpoints(ModelCheckpoint):
    """Lightning's ModelCheckpoint, whose `last.ckpt` is that of the last epoch, and also of a run cut off.

    Lightning's own writes `last.ckpt` only along with a new best one, and a run cut off over the best one. It
    also writes by way of the system's temporary folder: from another disk that is a copy, and a run that is
    killed meanwhile leaves half a checkpoint in place of a whole one.
    """

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the best, and the last in any case."""
        super().on_train_epoch_end(trainer, pl_module)
        due = self._every_n_epochs >= 1 and (trainer.current_epoch + 1) % self._every_n_epochs == 0
        if due and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last, if the run ended between two times to do so."""
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the last, and say so. A batch that was under way counts as not begun."""
        if came_to_nothing(trainer, exception):
            return
        if self._should_save_on_exception(trainer):
            progress = trainer.fit_loop.epoch_loop.batch_progress
            current = progress.current.state_dict()
            # Between the two it has been learnt from: Lightning goes on as from a checkpoint of that moment.
            if current["processed"] == current["completed"]:
                progress.current.reset_on_restart()
                progress.total.reset_on_restart()
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        if self.last_model_path:
            rank_zero_info(f"cut off; to go on: locat fit --ckpt_path {self.last_model_path}")

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Have a run cut off between the batches of one step repeat them: no gradients are saved."""
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        processed = progress["current"]["processed"]
        surplus = processed % trainer.accumulate_grad_batches
        if surplus and processed != trainer.num_training_batches:  # the last batches are a step, however few
            for count in ("current", "total"):
                behind = progress[count]["processed"] - surplus
                progress[count] = dict.fromkeys(progress[count], behind)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Write it beside the one that it replaces, which stays whole until the new one is."""
        if "://" in filepath:  # an object store, which shows a file when it is complete
            super()._save_checkpoint(trainer, filepath)
            return
        part = f"{filepath}.part"
        super()._save_checkpoint(trainer, part)
        if trainer.is_global_zero:
            Path(part).replace(filepath)
        self._last_checkpoint_saved = filepath


def came_to_nothing(trainer: Trainer, exception: BaseException) -> bool:
    """Whether a run ends by a mistake before it logged a step: nothing of it is worth keeping."""
    fresh = trainer.ckpt_path is None
    return fresh and isinstance(exception, InputError) and trainer.global_step < trainer.log_every_n_steps  # type: ignore[attr-defined]
