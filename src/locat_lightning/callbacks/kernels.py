"""How wide and how strong the Gaussian kernels of each block are, while a model trains."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from locat_lightning.callbacks.pictures import giving_up, watched_images
from locat_lightning.inspection import kernel_widths
from locat_lightning.nn import GaussianAugmentation


class KernelWidths(Callback):
    """Log the means `gaug_variance/block_00`, `gaug_alpha/block_00`, … of a module with a `backbone`.

    They are measured at each validation of a training on the first images of the main process's first batch;
    without validation at the end of each epoch, on samples of `val`, or else of `train`.

    Args:
        images: how many, at most.
    """

    def __init__(self, images: int = 32) -> None:
        self.images = images

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        backbone = getattr(pl_module, "backbone", None)
        parts = backbone.modules() if isinstance(backbone, nn.Module) else ()
        self.active = trainer.is_global_zero and any(isinstance(p, GaussianAugmentation) for p in parts)
        self._samples: Tensor | None = None

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measure after the first batch: averaged weights are still in place then."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or batch_idx or dataloader_idx:
            return
        if self.active:
            with giving_up(self, "kernel widths"):
                self._measure(pl_module, batch[0])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.enable_validation or not self.active:
            return
        with giving_up(self, "kernel widths"):
            if self._samples is None:
                self._samples = watched_images(trainer, self.images)
            if len(self._samples):
                self._measure(pl_module, self._samples.to(pl_module.device))

    def _measure(self, module: LightningModule, images: Tensor) -> None:
        backbone: Any = module.backbone
        # The last two: no other process takes part, and Lightning does not warn that none does.
        options: dict[str, Any] = {"batch_size": 1, "sync_dist": True, "rank_zero_only": True}
        for block, (variance, alpha) in enumerate(kernel_widths(backbone, images[: self.images])):
            module.log(f"gaug_variance/block_{block:02}", variance, **options)
            module.log(f"gaug_alpha/block_{block:02}", alpha, **options)
