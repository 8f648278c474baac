"""How wide and how strong the Gaussian kernels of each block are, while a model trains."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from locat_lightning.data.dataset import ImageBatch
from locat_lightning.inspection import kernel_widths


class KernelWidths(Callback):
    """Logs the means `gaug_variance/block_00`, `gaug_alpha/block_00`, … at each validation of a training.

    Measured on the same few images each time: the first of the first validation batch of the main process.

    Args:
        images: how many, at most.
    """

    def __init__(self, images: int = 32) -> None:
        self.images = images

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measures after the first batch: a moving average of the weights is still in place then."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        if not trainer.is_global_zero or batch_idx or dataloader_idx:
            return
        assert isinstance(pl_module.backbone, nn.Module)
        for block, (variance, alpha) in enumerate(
            kernel_widths(pl_module.backbone, batch.images[: self.images])
        ):
            for name, value in (("gaug_variance", variance), ("gaug_alpha", alpha)):
                # Both flags: no other process takes part, and Lightning does not warn that none does.
                pl_module.log(
                    f"{name}/block_{block:02}", value, batch_size=1, sync_dist=True, rank_zero_only=True
                )
