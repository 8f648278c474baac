"""How far a command is: a bar on a terminal, a line for each epoch in a file."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from rich.progress import TimeRemainingColumn

WIDE = 150  # columns of a terminal that has room for a bar of full length, time taken and batches per second
SHORT = 6  # columns of the bar of any other terminal
NAMES = {"train/images_per_s": "images/s"}


def metrics_in_order(trainer: Trainer, metrics: dict[str, Any]) -> dict[str, Any]:
    """`loss`, `lr`, `images/s`, what the run goes by, and the others, by the names that are shown."""
    monitor = getattr(trainer.checkpoint_callback, "monitor", None)
    first = ("train/loss", "train/lr", "train/images_per_s", monitor)
    order = sorted(metrics, key=lambda name: first.index(name) if name in first else len(first))
    return {NAMES.get(name, name.removeprefix("train/")): metrics[name] for name in order}


def of_all_epochs(trainer: Trainer, epoch: int) -> str:
    """The epoch, counted from 1; a run that ends with a step has no last one."""
    return f"{epoch + 1}/{trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else str(epoch + 1)


class EpochLines(Callback):
    """A line after each epoch of a training, for where a bar cannot be drawn."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The epoch and its metrics."""
        metrics = metrics_in_order(trainer, trainer.progress_bar_metrics)
        shown = "".join(f"   {name} {value:.4g}" for name, value in metrics.items())
        rank_zero_info(f"epoch {of_all_epochs(trainer, trainer.current_epoch)}{shown}")


class ProgressBar(RichProgressBar):
    """Lightning's rich bar in one line, with time left, and as many metrics as the terminal has room for.

    It counts epochs from 1, and stands still before the run says what came of it.
    """

    def __init__(self) -> None:
        super().__init__(theme=RichProgressBarTheme(metrics_format=".4g", progress_bar="cyan"))

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What the bar shows: `loss`, `lr`, `images/s`, what the run goes by, …, as far as they fit."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        shown: dict[str, Any] = {}
        room = self._room(trainer)
        for name, value in metrics_in_order(trainer, metrics).items():
            room -= len(f"{name}: {value:.4g} ")
            if room < 0:
                break
            shown[name] = value
        return shown

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """Lightning's, but for a short bar and the time left alone where the terminal is narrow."""
        columns: list[Any] = super().configure_columns(trainer)
        if self._is_narrow():
            description, bar, batches, *_ = columns
            bar.bar_width = SHORT
            return [description, bar, batches, TimeRemainingColumn(elapsed_when_finished=True)]
        return columns

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stand still, with the last metrics."""
        self._update_metrics(trainer, pl_module)
        self._stop_progress()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stand still, where validation is all there is to do."""
        super().on_validation_epoch_end(trainer, pl_module)
        if trainer.state.fn != TrainerFn.FITTING:
            self._stop_progress()

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stand still."""
        self._stop_progress()

    on_predict_epoch_end = on_test_epoch_end

    def _is_narrow(self) -> bool:
        return self._console is not None and self._console.width < WIDE

    def _room(self, trainer: Trainer) -> int:
        """Columns that are left beside the description, the bar, the batches, the times and their gaps."""
        if self._console is None:
            return 0
        description = len(self._get_train_description(trainer.current_epoch))
        batches = 2 * len(str(self.total_train_batches)) + 1
        if self._is_narrow():
            bar_and_times = SHORT + 1 + len("0:00:00")
        else:
            bar_and_times = 40 + 1 + len("0:00:00 • 0:00:00 1234.56it/s") + 1
        return int(self._console.width) - description - batches - bar_and_times - 3

    def _stop_progress(self) -> None:
        """Lightning's, once."""
        if not self._progress_stopped:
            super()._stop_progress()

    def _get_train_description(self, current_epoch: int) -> str:
        """The epoch, as wide as what stands there in a validation."""
        return f"Epoch {of_all_epochs(self.trainer, current_epoch)}".ljust(len(self.validation_description))
