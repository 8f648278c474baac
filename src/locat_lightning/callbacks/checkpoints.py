"""Checkpoints of a run: its best weights, and its last state, from which it resumes."""

import signal
import threading
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from locat.runs import replaced
from locat_lightning.errors import InputError

PATHS = ("best_model_path", "kth_best_model_path", "last_model_path")  # in the state of ModelCheckpoint


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's files of checkpoints, each replaced at once, and the one to resume from read only once.

    Lightning writes by way of the system's temporary folder. From another disk that is a copy, and a run that
    is killed meanwhile leaves half a checkpoint in place of a whole one.

    Args:
        resumed: contents of the checkpoint that the run resumes from, if they have been read already. They
            are handed out once.
    """

    def __init__(self, resumed: Mapping[str, Any] | None = None) -> None:
        self._resumed = resumed

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if "://" in str(path):  # an object store, which shows a file when it is complete
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with replaced(Path(path)) as part:
            part.parent.mkdir(parents=True, exist_ok=True)
            torch.save(checkpoint, contents := BytesIO())  # torch's own file would not say why it failed
            part.write_bytes(contents.getbuffer())

    def load_checkpoint(self, path: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        contents, self._resumed = self._resumed, None
        return super().load_checkpoint(path, *arguments, **options) if contents is None else dict(contents)


class Checkpoints(ModelCheckpoint):
    """Lightning's ModelCheckpoint, whose `last.ckpt` is written after every epoch and on interruption.

    Lightning's own writes `last.ckpt` only along with a new best checkpoint, and overwrites the best one when
    a run is interrupted.

    On SIGTERM, Lightning's handler calls a collective wherever its process is, and waits for others that are
    elsewhere. Here several processes agree after each batch on whether one of them was told to stop.
    """

    _told_to_stop = False

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what the state says of checkpoints that are in this run's directory, wherever it is now.

        A new best checkpoint deletes the one before it: a state from elsewhere must not name the file.
        """
        scores = {
            own: score for path, score in state_dict["best_k_models"].items() if (own := self._own(path))
        }
        paths = {name: self._own(state_dict[name]) for name in PATHS}
        here = {"dirpath": self.dirpath} if scores else {}
        super().load_state_dict(state_dict | paths | here | {"best_k_models": scores})

    def _own(self, path: str) -> str:
        """Return the path of the file of that name in this run's directory; "" if there is none."""
        own = Path(str(self.dirpath)) / Path(path).name
        return str(own) if own.is_file() else ""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.world_size > 1 and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._record)  # Lightning restores what was there before the run

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.world_size > 1 and trainer.strategy.reduce_boolean_decision(self._told_to_stop, all=False):
            # Private: the flag that Lightning's own handler sets, and its loop reads after each batch.
            trainer._signal_connector.received_sigterm = True

    def _record(self, *_: Any) -> None:
        self._told_to_stop = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        # Private, here and below: ModelCheckpoint has no public way to write `last.ckpt` alone.
        if self._every_n_epochs >= 1 and (trainer.current_epoch + 1) % self._every_n_epochs == 0:
            self._save_last(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save_last(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the last checkpoint, and say so. A batch that was under way counts as not begun."""
        if is_worthless(trainer, exception):
            return
        try:
            if self._should_save_on_exception(trainer):
                progress: Any = trainer.fit_loop.epoch_loop.batch_progress
                # Between the two counts the batch has been trained on: Lightning resumes from there.
                if progress.current.processed == progress.current.completed:
                    progress.current.reset_on_restart()
                    progress.total.reset_on_restart()
                self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        finally:  # on a full disk there is the one before
            if Path(self.last_model_path).is_file():
                rank_zero_info(f"interrupted; resume with: locat fit --ckpt_path {self.last_model_path}")

    def _save_last(self, trainer: Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let a run interrupted between the batches of a step repeat them: gradients are not saved."""
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        processed = progress["current"]["processed"]
        surplus = processed % trainer.accumulate_grad_batches
        if surplus and processed != trainer.num_training_batches:  # the last batches are a step, however few
            for count in ("current", "total"):
                behind = progress[count]["processed"] - surplus
                progress[count] = dict.fromkeys(progress[count], behind)


def is_worthless(trainer: Trainer, exception: BaseException) -> bool:
    """Check whether a user's mistake ends a run before it logged a step, so that nothing is worth keeping."""
    fresh = trainer.ckpt_path is None
    return fresh and isinstance(exception, InputError) and trainer.global_step < trainer.log_every_n_steps  # type: ignore[attr-defined]
