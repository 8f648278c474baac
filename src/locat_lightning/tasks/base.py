"""What the tasks share: a timm backbone with its weights, and the scalars that every run logs."""

from typing import Any

import timm
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.optim import Optimizer

from locat_lightning.errors import InputError


class Task(LightningModule):
    """A LightningModule that knows the size of its run and logs what every optimizer step has."""

    backbone: nn.Module
    class_names: list[str]

    @property
    def hp(self) -> Any:
        """The hyper-parameters: what the constructor was given."""
        return self.hparams

    def global_batch_size(self) -> int:
        """Images per optimizer step, over all processes and accumulated batches."""
        images: int = self.trainer.datamodule.batch_size  # type: ignore[attr-defined]
        return images * self.trainer.world_size * self.trainer.accumulate_grad_batches

    def optimizer_steps(self) -> int:
        """Optimizer steps of the whole run."""
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise InputError("the schedule needs an end: set trainer.max_epochs or trainer.max_steps")
        return int(steps)

    def warmup_steps(self, warmup_epochs: float) -> int:
        """Optimizer steps of the warm-up.

        Raises:
            InputError: the warm-up is longer than the run.
        """
        steps = self.optimizer_steps()
        epochs = self.trainer.max_epochs
        batches = self.trainer.num_training_batches // self.trainer.accumulate_grad_batches
        warmup = round(warmup_epochs * (steps / epochs if epochs and epochs > 0 else batches))
        if warmup >= steps:
            raise InputError(
                f"model.warmup_epochs ({warmup_epochs:g}) is {warmup} optimizer steps, but the whole run has "
                f"only {steps}: shorten the warm-up or raise trainer.max_epochs ({epochs})"
            )
        return warmup

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the global norm, and log the norm before it, from one computation."""
        if gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        norm = nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val or float("inf"))
        self.log("train/grad_norm", norm)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the learning rate and the weight decay with which this step is taken."""
        self.log("train/lr", max(group["lr"] for group in optimizer.param_groups), prog_bar=True)
        self.log("train/weight_decay", max(group["weight_decay"] for group in optimizer.param_groups))


def create_backbone(name: str, arguments: dict[str, Any] | None, num_classes: int) -> nn.Module:
    """A timm model by name, with random weights.

    Raises:
        InputError: timm knows no such model, or the model does not take these arguments.
    """
    if not timm.is_model(name):
        close = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        hint = f"; near it: {', '.join(close)}" if close else ""
        raise InputError(f"model.backbone: timm knows no model {name!r}{hint}")
    try:
        model: nn.Module = timm.create_model(name, num_classes=num_classes, **(arguments or {}))
    except (TypeError, ValueError, AssertionError) as error:
        raise InputError(f"model.backbone_args do not fit {name}: {error or arguments}") from error
    return model


def announce_learning_rate(lr: float, global_batch: int) -> None:
    """Say which learning rate the run has, since it follows the batch."""
    rank_zero_info(f"learning rate {lr:.3g} at {global_batch} images a step")


def announce_size(name: str, model: nn.Module) -> None:
    """Say what is trained."""
    rank_zero_info(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters")
