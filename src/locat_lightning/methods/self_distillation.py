"""Self-distillation: a student learns from a teacher that is the moving average of the student."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveFloat
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import WeightAveraging
from timm.layers import DropPath
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from locat_lightning.errors import InputError
from locat_lightning.methods.base import Pretraining
from locat_lightning.schedules import cosine, linear_warmup
from locat_lightning.tasks.base import UNFIT

AVERAGED = "the teacher is a moving average already (see model.momentum)"


class Network(nn.Module):
    """A backbone with a projection head.

    The backbone maps images [B, 3, H, W] to features [B, D], the head these to logits [B, out_dim].
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head: Any = head

    @property
    def heads(self) -> list[Any]:
        """Return all projection heads."""
        return [self.head]

    def forward(self, views: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return features [views · B, D] and logits [views, B, out_dim], the latter in float32.

        `views` holds, for each size, [V, B, 3, H, W], which are one batch.
        """
        features = torch.cat([self.backbone(each.flatten(0, 1)) for each in views])
        # Logits in bfloat16, divided by the temperature, would be off by a tenth.
        with torch.autocast(features.device.type, enabled=False):
            logits = self.head(features.float())
        return features, logits.unflatten(0, (-1, views[0].shape[1]))


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
    """

    unfit = UNFIT | {WeightAveraging: AVERAGED}

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
        numbers = {name: value for name, value in self.hp.items() if isinstance(value, int | float)}
        for name, value in numbers.items():  # a subclass's, too; wrong ones would train silently
            if name.endswith("_temp") and not value > 0:
                raise InputError(f"model.{name} ({value}) must be above 0")
            if name.endswith("momentum") and not 0 <= value <= 1:
                raise InputError(f"model.{name} ({value}) must be from 0 to 1")

    def make_network(self, backbone: Any) -> Network:
        """Put a projection head on a backbone: the student, or the teacher."""
        return Network(backbone, self.make_head(backbone.head_hidden_size))

    def make_head(self, width: int) -> nn.Module:
        """Make the projection head of one network for features of a width."""
        raise NotImplementedError

    @property
    def backbone(self) -> nn.Module:  # type: ignore[override]
        return self.teacher.backbone

    def networks(self) -> dict[str, nn.Module]:
        return {"student": self.student.backbone, "teacher": self.teacher.backbone}

    def to_compile(self) -> Iterable[nn.Module]:
        return self.student, self.teacher  # backbones and heads; what looks at a backbone alone stays eager

    def trained(self) -> Iterable[nn.Parameter]:
        return self.student.parameters()

    def check(self, trainer: Trainer, *, training: bool) -> None:
        super().check(trainer, training=training)
        if self.hp.ema is not None:
            raise InputError(f"model.ema: {AVERAGED}")

    def build(self, make_backbone: Callable[[], Any]) -> None:
        self.student, self.teacher = (self.make_network(make_backbone()) for _ in range(2))
        for module in self.teacher.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0
        self.start(self.student.backbone)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)

    def configure_optimizers(self) -> Optimizer:
        epochs, warmup = self.trainer.max_epochs or 0, self.hp.warmup_teacher_temp_epochs
        if 0 < epochs < warmup:
            raise InputError(
                f"model.warmup_teacher_temp_epochs ({warmup}) is more than trainer.max_epochs ({epochs})"
            )
        return super().configure_optimizers()

    def teacher_temperature(self, epoch: int) -> float:
        """Return the temperature of the teacher's distribution in an epoch, from 0 on."""
        hp = self.hp
        start, end = hp.warmup_teacher_temp, hp.teacher_temp
        return linear_warmup(epoch, warmup=hp.warmup_teacher_temp_epochs, start=start, end=end)

    def momentum(self, step: int) -> float:
        """Return the teacher's share of itself in the update after an optimizer step, from 0 on."""
        return cosine(step, steps=self.steps, start=self.hp.momentum, end=1.0)

    @property
    def tf32(self) -> bool:
        """Whether the head multiplies in TF32: with bf16-mixed on CUDA, whose features are less exact."""
        return self.device.type == "cuda" and self.trainer.precision == "bf16-mixed"

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self._float32 = set_float32_products("tf32") if self.tf32 else None

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._float32 is not None:
            set_float32_products(self._float32)

    def after_step(self, step: int) -> None:
        super().after_step(step)
        move = get_ema_multi_avg_fn(self.momentum(step))
        move(list(self.teacher.parameters()), list(self.student.parameters()), 0)


def set_float32_products(precision: str) -> str:
    """Set how CUDA multiplies matrices in float32 (`tf32`, `ieee`), and return how it did before."""
    cuda: Any = torch.backends.cuda.matmul
    if hasattr(cuda, "fp32_precision"):  # torch 2.9
        before, cuda.fp32_precision = cuda.fp32_precision, precision
    else:
        before, cuda.allow_tf32 = "tf32" if cuda.allow_tf32 else "ieee", precision == "tf32"
    return str(before)
