"""Checkpoints of a run: its best weights, and its last state, from which it resumes."""

import shlex
from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from jsonargparse.typing import PositiveInt
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from locat.runs import replaced
from locat_lightning.backbones.parts import PARTS, remove_parts
from locat_lightning.backbones.weights import read_checkpoint
from locat_lightning.data.loading import ResumableLoader
from locat_lightning.errors import InputError
from locat_lightning.tasks.sharding import ShardedStrategy


class AgreedEnd(SystemExit):
    """All processes of a run end, before the same batch."""


METRICS = "metrics"  # a checkpoint's key of the results measured last, by name
SEEN = "images_seen"  # and of how many images of an epoch have been seen, where it has not ended
PATHS = ("best_model_path", "kth_best_model_path", "last_model_path")  # in the state of ModelCheckpoint
# What only a resumed run needs of a checkpoint; the last two are of a moving average of the weights.
STATES = ("optimizer_states", "lr_schedulers", "callbacks", "loops", "current_model_state", "averaging_state")


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
        remove_parts(Path(path), keep=checkpoint.get(PARTS, {}).get("folder"))

    def remove_checkpoint(self, path: Any) -> None:
        super().remove_checkpoint(path)
        remove_parts(Path(path))

    def load_checkpoint(self, path: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        contents, self._resumed = self._resumed, None
        return read_checkpoint(path) if contents is None else dict(contents)


class Checkpoints(ModelCheckpoint):
    """Lightning's ModelCheckpoint, whose `last.ckpt` is written after every epoch and on interruption.

    Lightning's own writes `last.ckpt` only along with a new best checkpoint, and overwrites the best one when
    a run is interrupted. This one waits until what follows the batch has been logged and measured: the next
    batch, the next epoch or the end of the run. When a run of several processes ends by an exception, the
    first writes it without the others, which may be anywhere: after a step each has the same state.

    Args:
        keep: Epochs, counted from 1, after which the weights are kept as `epoch_N.ckpt`, without what a
            resumed run needs besides.
    """

    def __init__(self, *arguments: Any, keep: Sequence[PositiveInt] = (), **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.keep = keep

    _is_stepping = False  # in a step that has not been taken completely
    _last_is_due = False
    _last_step = 0  # the step of `last.ckpt`
    # Of the checkpoint that the run resumes from.
    _metrics: Mapping[str, float] = MappingProxyType({})
    _seen: int | None = None

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
        self._defer_save_until_validation = state_dict.get("deferred", False)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"deferred": self._defer_save_until_validation}  # private

    def _own(self, path: str) -> str:
        """Return the path of the file of that name in this run's directory; "" if there is none."""
        own = Path(str(self.dirpath)) / Path(path).name
        return str(own) if own.is_file() else ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        # Before other callbacks end: the averaging of weights then puts the average in their place.
        trainer.callbacks = [LambdaCallback(on_train_end=self._write_at_the_end), *trainer.callbacks]  # type: ignore[attr-defined]

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._last_step = checkpoint["global_step"]
        self._metrics, self._seen = checkpoint.get(METRICS, {}), checkpoint.get(SEEN)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have Lightning take up what `on_save_checkpoint` noted: its private loops, as they are restored."""
        super().on_train_start(trainer, pl_module)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in self._metrics.items()})
        loop: Any = trainer.fit_loop
        epochs, batches = loop.epoch_progress.current, loop.epoch_loop.batch_progress
        if epochs.ready == epochs.processed:
            loop.epoch_loop.restarting = False  # also where max_steps ends the run
            return
        begun, number = batches.current.processed, trainer.num_training_batches
        if batches.is_last_batch:
            # Private, but what Lightning asks whether the rest of the epoch is to be measured.
            loop._data_fetcher.done = True
            begun = number
        elif isinstance(loader := trainer.train_dataloader, ResumableLoader) and self._seen is not None:
            begun = min(loader.resume(trainer.current_epoch, self._seen), int(number) - 1)
        more = begun - batches.current.processed  # not 0 if batches have another size than before
        for count, value in batches.current.state_dict().items():
            setattr(batches.current, count, value + more)

    def on_before_optimizer_step(self, *_: Any) -> None:
        self._is_stepping = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._is_stepping = False
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write_last(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._write_last(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last checkpoint of a sharded run: while its processes validate, none can be written."""
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if fitting and isinstance(trainer.strategy, ShardedStrategy) and self.save_on_exception:
            step = self._last_global_step_saved  # private: it would take the best for written
            self._last_is_due = True
            self._write_last(trainer)
            self._last_global_step_saved = step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._last_is_due = True
        if trainer.current_epoch + 1 in self.keep and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            # Private: Lightning's own checkpoint of weights alone does not hold their average.
            contents = trainer._checkpoint_connector.dump_checkpoint()
            file = Path(str(self.dirpath)) / f"epoch_{trainer.current_epoch + 1}.ckpt"
            trainer.strategy.save_checkpoint({k: v for k, v in contents.items() if k not in STATES}, file)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing: see `setup`."""

    def _write_at_the_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_is_due = True
        self._write_last(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the last checkpoint, and say so."""
        together = isinstance(exception, AgreedEnd)
        if dist.is_available() and dist.is_initialized() and not together:
            dist.group.WORLD = None  # what follows waits for no other process
        if not (trainer.is_global_zero or together) or is_worthless(trainer, exception):
            return
        try:
            is_new = self._last_step != trainer.global_step and not self._is_stepping
            has_all = together or not isinstance(trainer.strategy, ShardedStrategy)
            if self.save_on_exception and is_new and has_all:
                batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
                if batches.processed != batches.completed:  # it is not logged yet
                    trainer._logger_connector.update_train_step_metrics()  # private
                self._last_is_due = True
                self._write_last(trainer)
        finally:  # on a full disk there is the one before
            if Path(self.last_model_path).is_file():
                options = getattr(trainer.datamodule, "typed_again", {})  # type: ignore[attr-defined]
                words = shlex.join(chain(["--ckpt_path", self.last_model_path], *options.items()))
                rank_zero_info(f"interrupted; resume with: locat fit {words}")

    # Private: ModelCheckpoint has no public way to write `last.ckpt` alone.
    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Any]) -> None:
        self._last_is_due = True

    def _write_last(self, trainer: Trainer) -> None:
        if self._last_is_due and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._last_is_due = False
            super()._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
            self._last_step = trainer.global_step

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Set the counts of Lightning's loops so that a resumed run does what has not been done.

        A batch under way counts as not begun, and so do the batches of a step that was not taken, as
        gradients are not saved. In an epoch that has not ended, what follows its last batch is repeated:
        validation, probes, and the choice of the best weights.
        """
        metrics = trainer.callback_metrics.items()
        checkpoint[METRICS] = {k: float(v) for k, v in metrics if not k.startswith("train/")}
        loops: dict[str, Any] = checkpoint["loops"]["fit_loop"]
        epochs, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
        processed = batches["current"]["processed"]
        is_last = processed == trainer.num_training_batches
        surplus = 0 if is_last else processed % trainer.accumulate_grad_batches  # the last ones are a step
        begun = epochs["total"]["started"] > epochs["total"]["completed"] and processed > surplus
        # Private: whether a validation follows this batch.
        follows = begun and trainer.fit_loop.epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]
        validates = follows and (is_last or trainer.validating)
        goes_on = begun and not is_last and not validates
        for count in ("current", "total"):
            ended = epochs[count]["completed"]
            epochs[count] = {"ready": ended + begun, "started": ended + begun}
            epochs[count] |= {"processed": ended, "completed": ended}
            trained = batches[count]["processed"] - surplus
            batches[count] = dict.fromkeys(batches[count], trained) | {"completed": trained - goes_on}
            if validates:  # from its first batch on
                validation = loops["epoch_loop.val_loop.batch_progress"]
                validation[count] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
        batches["is_last_batch"] = is_last
        if begun and not is_last and isinstance(loader := trainer.train_dataloader, ResumableLoader):
            checkpoint[SEEN] = loader.seen(batches["current"]["processed"])
        if pl_module.automatic_optimization:  # Lightning adds a step as it resumes
            steps = checkpoint["global_step"] - (goes_on or validates)
            loops["epoch_loop.state_dict"]["_batches_that_stepped"] = steps


def is_worthless(trainer: Trainer, exception: BaseException) -> bool:
    """Check whether a run ends before its first step, or by a user's mistake before it logged one."""
    steps = trainer.log_every_n_steps if isinstance(exception, InputError) else 1  # type: ignore[attr-defined]
    return trainer.ckpt_path is None and trainer.global_step < steps
