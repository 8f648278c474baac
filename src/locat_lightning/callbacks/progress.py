"""The progress bar of every command."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme


class ProgressBar(RichProgressBar):
    """Lightning's rich bar, with time left, and the metrics under short names with four digits."""

    def __init__(self) -> None:
        super().__init__(theme=RichProgressBarTheme(metrics_format=".4g", progress_bar="cyan"))

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What the bar shows: `loss`, `lr`, `images/s`, … of training, `val/…` of validation."""
        names = {"train/images_per_s": "images/s"}
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return {names.get(name, name.removeprefix("train/")): value for name, value in metrics.items()}

    def _get_train_description(self, current_epoch: int) -> str:
        """Lightning's, but for a run that ends with a step: it has no last epoch."""
        if self.trainer.max_epochs == -1:
            return f"Epoch {current_epoch}".ljust(len(self.validation_description))
        description: str = super()._get_train_description(current_epoch)
        return description
