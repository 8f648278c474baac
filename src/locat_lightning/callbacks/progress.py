"""Progress of a command: a bar on a terminal, a line for each epoch in a file."""

from math import inf
from time import perf_counter
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from rich.progress import TimeRemainingColumn

WIDE = 150  # columns of a terminal with room for a full bar, elapsed time and batches per second
SHORT = 6  # columns of the bar on any other terminal
OF_TRAINING = {"train/loss": "loss", "train/lr": "lr", "train/images_per_s": "images/s"}


def metrics_in_order(trainer: Trainer, metrics: dict[str, Any]) -> dict[str, Any]:
    """Return `loss`, `lr`, `images/s`, the monitored metric and the others, by the names that are shown.

    Those of the training are not among the given `metrics`: Lightning would read them in each step
    (`prog_bar=True`), and wait for a GPU.
    """
    found = trainer.callback_metrics
    first = {shown: found[name].item() for name, shown in OF_TRAINING.items() if name in found}
    monitor = getattr(trainer.checkpoint_callback, "monitor", None)
    return first | dict(sorted(metrics.items(), key=lambda item: item[0] != monitor))


def epoch_of_all(trainer: Trainer, epoch: int) -> str:
    """Return the epoch, counted from 1, with the number of epochs where the run has one: `3/10`."""
    return f"{epoch + 1}/{trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else str(epoch + 1)


class EpochLines(Callback):
    """Print a line after each epoch of training, where a bar cannot be drawn.

    It comes after the callbacks that measure, and shows only what was measured in the epoch.
    """

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.progress_bar_metrics.clear()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = metrics_in_order(trainer, trainer.progress_bar_metrics)
        shown = "".join(f"   {name} {value:.4g}" for name, value in metrics.items())
        rank_zero_info(f"epoch {epoch_of_all(trainer, trainer.current_epoch)}{shown}")


class ProgressBar(RichProgressBar):
    """Lightning's rich bar on one line, with the time left and as many metrics as the terminal has room for.

    It counts epochs from 1, and stops before the results of the run are printed. In training it reads the
    metrics no more often than it is drawn, because to read them is to wait for a GPU.
    """

    def __init__(self) -> None:
        super().__init__(theme=RichProgressBarTheme(metrics_format=".4g", progress_bar="cyan"))
        self._read_at = -inf  # seconds
        self._hold_metrics = False

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self._hold_metrics = perf_counter() < self._read_at + 1 / self.refresh_rate
        super().on_train_batch_end(trainer, *args)
        self._hold_metrics = False

    def _update_metrics(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Private, here and below: what RichProgressBar itself calls to update, to redraw and to stop.
        if not self._hold_metrics:
            super()._update_metrics(trainer, pl_module)
            self._read_at = perf_counter()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
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
        columns: list[Any] = super().configure_columns(trainer)
        if self._is_narrow():
            description, bar, batches, *_ = columns
            bar.bar_width = SHORT
            return [description, bar, batches, TimeRemainingColumn(elapsed_when_finished=True)]
        return columns

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._update_metrics(trainer, pl_module)
        self._stop_progress()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_epoch_end(trainer, pl_module)
        if trainer.state.fn != TrainerFn.FITTING:
            self._stop_progress()

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_progress()

    on_predict_epoch_end = on_test_epoch_end

    def _is_narrow(self) -> bool:
        return self._console is not None and self._console.width < WIDE

    def _room(self, trainer: Trainer) -> int:
        """Return the columns left beside the description, the bar, the batches, the times and their gaps."""
        if self._console is None:
            return 0
        description = len(self._get_train_description(trainer.current_epoch))
        batches = 2 * len(str(self.total_train_batches)) + 1
        bar, times = (SHORT, "0:00:00") if self._is_narrow() else (40, "0:00:00 • 0:00:00 1234.56it/s ")
        return int(self._console.width) - description - batches - bar - len(times) - 4

    def _stop_progress(self) -> None:
        """Stop once; Lightning's would print the bar again."""
        if not self._progress_stopped:
            super()._stop_progress()

    def _get_train_description(self, current_epoch: int) -> str:
        """Return the epoch, as wide as the description of a validation."""
        return f"Epoch {epoch_of_all(self.trainer, current_epoch)}".ljust(len(self.validation_description))
