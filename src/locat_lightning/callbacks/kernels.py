"""How wide and how strong the Gaussian kernels of each block are, while a model trains."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from locat_lightning.data.dataset import ImageBatch
from locat_lightning.evaluation.dense import padded
from locat_lightning.evaluation.features import frozen
from locat_lightning.nn import GaussianAugmentation

__all__ = ["Call", "KernelWidths", "kernel_widths", "observe"]


class Call(NamedTuple):
    """One call of a module."""

    inputs: tuple[Any, ...]
    output: Any


def observe(backbone: nn.Module, images: Tensor, modules: Iterable[nn.Module]) -> list[Call]:
    """Runs a backbone in evaluation mode and listens to some of its modules; leaves it as it was.

    Args:
        backbone: what takes the images; a compiled one runs uncompiled here, for the sake of the hooks.
        images: [B, 3, height, width], normalised.
        modules: parts of the backbone, or itself.

    Returns:
        Their calls, in the order in which the backbone made them.
    """
    calls: list[Call] = []

    def listen(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        calls.append(Call(inputs, output))

    hooks = [module.register_forward_hook(listen) for module in modules]
    try:
        with frozen(backbone), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            backbone(images)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def kernel_widths(backbone: nn.Module, images: Tensor) -> list[tuple[float, float]]:
    """Mean variance and mean alpha of each block, over images, heads, patches and both directions.

    Args:
        backbone: a timm model; one without GAug has none.
        images: [B, 3, height, width], normalised; padded to whole patches.

    Returns:
        (variance in squared patches, alpha), from the first block to the last.
    """
    gaugs = [module for module in backbone.modules() if isinstance(module, GaussianAugmentation)]
    if not gaugs:
        return []
    with torch.no_grad():
        kernels = []
        for gaug, call in zip(gaugs, observe(backbone, padded(backbone, images), gaugs), strict=True):
            q, grid, built_for = call.inputs
            kernels.append(gaug.variance_and_alpha(q[..., -math.prod(grid) :, :], grid, built_for))
        return [(variance.mean().item(), alpha.mean().item()) for variance, alpha in kernels]


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
