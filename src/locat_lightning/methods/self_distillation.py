"""Self-distillation: a student learns from a teacher that is the moving average of the student."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveFloat
from lightning.pytorch import Trainer
from timm.layers import DropPath
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from locat_lightning.errors import InputError
from locat_lightning.methods.base import Pretraining
from locat_lightning.schedules import cosine, linear_warmup


class Network(nn.Module):
    """A backbone with a projection head.

    Args:
        backbone: maps images [B, 3, H, W] to features [B, D].
        head: maps features [B, D] to logits [B, out_dim].
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head: Any = head

    def forward(self, views: Iterable[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return features and logits of views, those of one size in one batch.

        Args:
            views: of each size, [V, B, 3, H, W].

        Returns:
            [views · B, D], and of each view [B, out_dim], float32.
        """
        views = list(views)
        features = torch.cat([self.backbone(each.flatten(0, 1)) for each in views])
        # Logits in bfloat16, divided by the temperature, would be off by a tenth.
        with torch.autocast(features.device.type, enabled=False):
            logits = self.head(features.float())
        return features, list(logits.split(views[0].shape[1]))


class SelfDistillation(Pretraining):
    """A student, and a teacher whose weights are the moving average of the student's. A method adds a loss.

    `backbone` is the teacher's, the better of the two at any time.

    Args:
        backbone: timm's name of the model; drop path applies to the student only.
        momentum: the teacher's share of itself in an update at the beginning; it goes to 1 along a cosine.
        teacher_temp: temperature of the teacher's distribution.
        warmup_teacher_temp: temperature of the teacher's distribution in the first epoch.
        warmup_teacher_temp_epochs: epochs of linear change from one to the other; 0 for none.
        options: those of every pre-training (`Pretraining`).

    Raises:
        InputError: an average with `momentum` outside [0, 1], or `teacher_temp` is not above 0.
    """

    def __init__(
        self,
        backbone: str = "locatvit_small",
        *,
        momentum: ClosedUnitInterval = 0.996,
        teacher_temp: PositiveFloat = 0.04,
        warmup_teacher_temp: PositiveFloat = 0.04,
        warmup_teacher_temp_epochs: NonNegativeInt = 0,
        **options: Any,
    ) -> None:
        super().__init__(backbone, **options)
        if not 0 <= momentum <= 1:
            raise InputError(f"model.momentum ({momentum}) must be from 0 to 1")
        self.check_above_zero("teacher_temp", "warmup_teacher_temp")

    def check_above_zero(self, *options: str) -> None:
        """Check that temperatures are above 0: others would train silently towards something else."""
        for name in options:
            if not self.hp[name] > 0:
                raise InputError(f"model.{name} ({self.hp[name]}) must be above 0")

    def make_head(self, width: int) -> nn.Module:
        """Make the projection head of one network for features of a width."""
        raise NotImplementedError

    @property
    def backbone(self) -> nn.Module:  # type: ignore[override]
        """Return the teacher's backbone."""
        return self.teacher.backbone

    def networks(self) -> dict[str, nn.Module]:
        """Return both backbones."""
        return {"student": self.student.backbone, "teacher": self.teacher.backbone}

    def trained(self) -> Iterable[nn.Parameter]:
        """Return the student's parameters."""
        return self.student.parameters()

    def check(self, trainer: Trainer, *, training: bool) -> None:
        """Find mistakes that show without data or a model.

        Raises:
            InputError: see `Pretraining.check`; also, a second average of weights is asked for.
        """
        super().check(trainer, training=training)
        if self.hp.ema is not None:
            raise InputError("model.ema: the teacher is a moving average already (see model.momentum)")

    def build(self, make_backbone: Callable[[], Any]) -> None:
        """Build student and teacher with the same weights."""
        self.student, self.teacher = (self._network(make_backbone()) for _ in range(2))
        for module in self.teacher.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0
        self.start(self.student.backbone)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)

    def _network(self, backbone: Any) -> Network:
        return Network(backbone, self.make_head(backbone.head_hidden_size))

    def configure_optimizers(self) -> Optimizer:
        """Return AdamW over the student.

        Raises:
            InputError: see `Pretraining.configure_optimizers`; also, a warm-up is longer than the run.
        """
        epochs, warmup = self.trainer.max_epochs or 0, self.hp.warmup_teacher_temp_epochs
        if 0 < epochs < warmup:
            raise InputError(
                f"model.warmup_teacher_temp_epochs ({warmup}) is more than trainer.max_epochs ({epochs})"
            )
        return super().configure_optimizers()

    def teacher_temperature(self, epoch: int) -> float:
        """Return the temperature of the teacher's distribution in an epoch, from 0 on."""
        hp = self.hp
        return linear_warmup(
            epoch,
            warmup=hp.warmup_teacher_temp_epochs,
            start=hp.warmup_teacher_temp,
            end=hp.teacher_temp,
        )

    def momentum(self, step: int) -> float:
        """Return the teacher's share of itself in the update after an optimizer step, from 0 on."""
        return cosine(step, steps=self.steps, start=self.hp.momentum, end=1.0)

    def after_step(self, step: int) -> None:
        """Move the teacher towards the student."""
        super().after_step(step)
        move = get_ema_multi_avg_fn(self.momentum(step))
        move(list(self.teacher.parameters()), list(self.student.parameters()), 0)
