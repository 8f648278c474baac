"""Checkpoints of a run: its best weights, and where to go on from."""

import signal
import threading
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

    On SIGTERM, Lightning's handler calls a collective wherever its process is, and waits for others that are
    elsewhere. Here several processes agree after each batch on whether one of them was told to stop.
    """

    _told_to_stop = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have a signal noted only, where there are several processes."""
        super().on_train_start(trainer, pl_module)
        if trainer.world_size > 1 and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._note)  # Lightning restores what was there before the run

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write what is due; then stop all processes, as Lightning stops one, if any was told to."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.world_size > 1 and trainer.strategy.reduce_boolean_decision(self._told_to_stop, all=False):
            trainer._signal_connector.received_sigterm = True

    def _note(self, *_: Any) -> None:
        self._told_to_stop = True

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
