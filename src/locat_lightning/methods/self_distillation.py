"""Self-distillation: a student learns from a teacher that is the moving average of the student."""

import math
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveFloat, PositiveInt
from lightly.models.modules import DINOProjectionHead
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from timm.layers import DropPath
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from locat_lightning.backbones.channelvit import ChannelPatchEmbed
from locat_lightning.errors import InputError
from locat_lightning.evaluation.precision import float32_products
from locat_lightning.methods.base import Pretraining
from locat_lightning.methods.heads import load_projection_heads
from locat_lightning.schedules import cosine, linear_warmup
from locat_lightning.tasks.base import UNFIT
from locat_lightning.tasks.sharding import part_of

COLLAPSED = 0.01  # share of the largest possible entropy that counts as none
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


def without_drop_path(network: nn.Module) -> nn.Module:
    """Return a network with its drop path and its sampling of channels switched off, in training too."""
    for module in network.modules():
        if isinstance(module, ChannelPatchEmbed):
            module.sampling = False
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    return network


class SelfDistillation(Pretraining):
    """A student, and a teacher whose weights are the moving average of the student's. A method adds a loss.

    Both give distributions over prototypes, by a projection head as DINO has it. `backbone` is the teacher's,
    the better of the two at any time.

    Args:
        backbone: timm's name of the model; drop path applies to the student only.
        momentum: the teacher's share of itself in an update at the beginning.
        momentum_end: the same at the end, along a cosine.
        teacher_temp: temperature of the teacher's distribution.
        warmup_teacher_temp: temperature of the teacher's distribution in the first epoch.
        warmup_teacher_temp_epochs: epochs of linear change from one to the other; 0 for none.
        student_temp: temperature of the student's distribution.
        out_dim: number of prototypes, over which student and teacher give a distribution.
        hidden_dim: width of the two hidden layers of the head.
        bottleneck_dim: width of the head before the prototypes.
        norm_last_layer: whether the prototypes keep length 1, which is more stable.
        center_momentum: the centre's share of itself in an update.
        freeze_last_layer_epochs: epochs in which the prototypes stay as they are.
        heads: whether --weights brings the projection heads, too, to continue a pre-training.
        options: those of every pre-training (`Pretraining`).
    """

    unfit = UNFIT | {WeightAveraging: AVERAGED}

    def __init__(
        self,
        backbone: str = "locatvit_small",
        *,
        momentum: ClosedUnitInterval = 0.996,
        momentum_end: ClosedUnitInterval = 1.0,
        teacher_temp: PositiveFloat = 0.04,
        warmup_teacher_temp: PositiveFloat = 0.04,
        warmup_teacher_temp_epochs: NonNegativeInt = 0,
        student_temp: PositiveFloat = 0.1,
        out_dim: PositiveInt = 65536,
        hidden_dim: PositiveInt = 2048,
        bottleneck_dim: PositiveInt = 256,
        norm_last_layer: bool = True,
        center_momentum: ClosedUnitInterval = 0.9,
        freeze_last_layer_epochs: NonNegativeInt = 1,
        heads: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(backbone, **options)
        self.collapse: dict[str, str] = {}  # by what is compared
        self._products = ExitStack()  # how the batch under way multiplies
        numbers = {name: value for name, value in self.hp.items() if isinstance(value, int | float)}
        for name, value in numbers.items():  # a subclass's, too; wrong ones would train silently
            if name.endswith("_temp") and not value > 0:
                raise InputError(f"model.{name} ({value}) must be above 0")
            if "momentum" in name and not 0 <= value <= 1:
                raise InputError(f"model.{name} ({value}) must be from 0 to 1")

    def make_network(self, backbone: Any) -> Network:
        """Put a projection head on a backbone: the student, or the teacher."""
        return Network(backbone, self.make_head(backbone.head_hidden_size))

    def make_head(self, width: int, **options: Any) -> nn.Module:
        """Make a projection head for features of a width; `options` replace those of the method."""
        hp = self.hp
        own = {
            "hidden_dim": hp.hidden_dim,
            "bottleneck_dim": hp.bottleneck_dim,
            "output_dim": hp.out_dim,
            "norm_last_layer": hp.norm_last_layer,
            "freeze_last_layer": hp.freeze_last_layer_epochs,
        }
        with warnings.catch_warnings():
            # The old weight norm keeps the parameters' names those of the original code.
            warnings.filterwarnings("ignore", ".*weight_norm.* is deprecated", FutureWarning)
            head: nn.Module = DINOProjectionHead(width, **(own | options))
        return head

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
        without_drop_path(self.teacher)
        self.start(self.student.backbone)
        if self.hp.heads and self.weights is not None:
            load_projection_heads(self, self.weights)
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
        return cosine(step, steps=self.steps, start=self.hp.momentum, end=self.hp.momentum_end)

    @property
    def tf32(self) -> bool:
        """Whether the head multiplies in TF32: with bf16-mixed on CUDA, whose features are less exact."""
        return self.device.type == "cuda" and self.trainer.precision == "bf16-mixed"

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        if self.tf32:
            self._products.enter_context(float32_products("tf32"))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._products.close()

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        """Clip; then drop the gradients of a frozen last layer (zeroed, AdamW would still decay it)."""
        super().configure_gradient_clipping(*args, **kwargs)
        for head in self.student.heads:
            head.cancel_last_layer_gradients(self.current_epoch)

    def after_step(self, step: int) -> None:
        super().after_step(step)
        move = get_ema_multi_avg_fn(self.momentum(step))
        teacher, student = (
            [part_of(each) for each in network.parameters()] for network in (self.teacher, self.student)
        )
        move(teacher, student, 0)

    def watch_for_collapse(
        self, p: Tensor, entropy: Tensor, divergence: Tensor, what: str = "image", temp: str = "teacher_temp"
    ) -> None:
        """Warn once if the training has collapsed, in a step that is logged: the host waits for a GPU.

        Args:
            p: the teacher's distributions, [.., K].
            entropy: their mean entropy.
            divergence: mean KL divergence of the student's from them.
            what: what each is of.
            temp: the option that is the teacher's temperature for them.
        """
        if not (self.is_logged() and p.numel()):
            return
        most, of_each, kl = math.log(p.shape[-1]), entropy.item(), divergence.item()
        collapse = ""
        if of_each > (1 - COLLAPSED) * most and abs(kl) < COLLAPSED * most:
            collapse = "uniform: the teacher finds every prototype equally likely and the student agrees"
            advice = f"lower model.{temp}"
        elif torch.special.entr(p.flatten(0, -2).mean(0)).sum().item() < COLLAPSED * most:
            collapse = f"constant: the teacher is certain of a single prototype, whatever the {what}"
            advice = f"raise model.{temp}, or lower model.center_momentum or model.lr"
        if collapse and collapse != self.collapse.get(what):
            rank_zero_warn(
                f"{type(self).__name__} has collapsed at step {self.global_step}, {collapse} ({what}: "
                f"teacher entropy {of_each:.3g}, at most {most:.3g}; KL {kl:.3g}). If it stays so, it learns "
                f"no more: {advice}"
            )
        self.collapse[what] = collapse
