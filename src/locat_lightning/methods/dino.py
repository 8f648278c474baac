"""DINO: a student learns what the average of its past sees in other views, without labels."""

import math
import warnings
from typing import Any

import torch
import torch.distributed as dist
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveFloat, PositiveInt
from lightly.loss import DINOLoss
from lightly.models.modules import DINOProjectionHead
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from locat_lightning.data.views import ViewBatch
from locat_lightning.evaluation.gather import distributed
from locat_lightning.methods.base import Output
from locat_lightning.methods.self_distillation import SelfDistillation

COLLAPSED = 0.01  # share of the largest possible entropy that counts as none


class Dino(SelfDistillation):
    """Train a timm model on images without labels, by self-distillation.

    The defaults are those of "Emerging Properties in Self-Supervised Vision Transformers" (ICCV 2021) as
    "Locality-Attending Vision Transformer" (ICLR 2026) uses them.

    Args:
        backbone: timm's name of the model; drop path applies to the student only.
        out_dim: number of prototypes, over which student and teacher give a distribution.
        hidden_dim: width of the two hidden layers of the head.
        bottleneck_dim: width of the head before the prototypes.
        norm_last_layer: whether the prototypes keep length 1, which is more stable.
        student_temp: temperature of the student's distribution.
        center_momentum: the centre's share of itself in an update.
        freeze_last_layer_epochs: epochs in which the prototypes stay as they are.
        options: those of every self-distillation (`SelfDistillation`).
    """

    def __init__(
        self,
        backbone: str = "locatvit_small",
        *,
        out_dim: PositiveInt = 65536,
        hidden_dim: PositiveInt = 2048,
        bottleneck_dim: PositiveInt = 256,
        norm_last_layer: bool = True,
        student_temp: PositiveFloat = 0.1,
        center_momentum: ClosedUnitInterval = 0.9,
        freeze_last_layer_epochs: NonNegativeInt = 1,
        **options: Any,
    ) -> None:
        super().__init__(backbone, **options)
        self.collapse = ""
        self.loss = Loss(out_dim, student_temp=student_temp, center_momentum=center_momentum)

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

    def compute_loss(self, batch: ViewBatch) -> Output:
        """Compute the cross-entropy from the teacher's global views to the student's other views."""
        views = [each.crops for each in batch.views]
        with torch.no_grad():
            features, taught = self.teacher(views[:1])
        _, learnt = self.student(views)
        return Output(*self.compare_views(taught, learnt), features)

    def compare_views(self, taught: list[Tensor], learnt: list[Tensor]) -> tuple[Tensor, dict[str, Any]]:
        """Return the cross-entropy between logits [B, out_dim] of each view, and what is logged beside it.

        It is the mean entropy of the teacher's distributions, plus the KL divergence from the student's.
        """
        temperature = self.teacher_temperature(self.current_epoch)
        with torch.autocast(self.device.type, enabled=False):
            loss: Tensor = self.loss(taught, learnt, teacher_temp=temperature)
            log_p = self.loss.teacher_log_probabilities(taught, temperature)
            entropy = -(log_p.exp() * log_p).sum(-1).mean()
        divergence = loss.detach() - entropy
        if self.is_logged(self.trainer.fit_loop.batch_idx):
            of_mean = torch.special.entr(log_p.exp().mean((0, 1))).sum()
            self._warn_of_collapse(entropy.item(), of_mean.item(), divergence.item())
        scalars = {
            "teacher_entropy": entropy,
            "kl": divergence,
            "centre_norm": self.loss.center.norm(),
            "teacher_temp": temperature,
            "momentum": self.momentum(self.step),
            "last_layer_frozen": float(self.current_epoch < self.hp.freeze_last_layer_epochs),
        }
        return loss, scalars

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        """Clip; then drop the gradients of a frozen last layer (zeroed, AdamW would still decay it)."""
        super().configure_gradient_clipping(*args, **kwargs)
        for head in self.student.heads:
            head.cancel_last_layer_gradients(self.current_epoch)

    def after_step(self, step: int) -> None:
        super().after_step(step)
        self.loss.move_center()

    def _warn_of_collapse(self, entropy: float, of_mean: float, divergence: float) -> None:
        """Warn, once, that the training has collapsed; `of_mean` is the entropy of the mean distribution."""
        most = math.log(self.hp.out_dim)
        collapse = ""
        if entropy > (1 - COLLAPSED) * most and abs(divergence) < COLLAPSED * most:
            collapse = "uniform: the teacher finds every prototype equally likely and the student agrees"
            advice = "lower model.teacher_temp"
        elif of_mean < COLLAPSED * most:
            collapse = "constant: the teacher is certain of a single prototype, whatever the image"
            advice = "raise model.teacher_temp, or lower model.center_momentum or model.lr"
        if collapse and collapse != self.collapse:
            rank_zero_warn(
                f"{type(self).__name__} has collapsed at step {self.global_step}, {collapse} (teacher "
                f"entropy {entropy:.3g}, at most {most:.3g}; KL {divergence:.3g}). If it stays so, it learns "
                f"no more: {advice}"
            )
        self.collapse = collapse


class Loss(DINOLoss):
    """lightly's `DINOLoss`, whose centre moves once an optimizer step (`move_center`).

    lightly moves it in every forward pass: more than once a step under accumulation.
    """

    def __init__(self, out_dim: int, **options: Any) -> None:
        super().__init__(out_dim, warmup_teacher_temp_epochs=0, **options)
        # No buffers: DDP would overwrite them with those of the first process.
        self._sum: Tensor | float = 0.0
        self._count = 0

    @torch.no_grad()
    def update_center(self, teacher_out: Tensor) -> None:
        """Add up logits [V, B, out_dim], at the end of each forward pass."""
        if not self.training:
            return
        self._sum = self._sum + teacher_out.float().sum((0, 1))
        self._count += teacher_out.shape[0] * teacher_out.shape[1]

    @torch.no_grad()
    def move_center(self) -> None:
        """Move the centre towards the mean of the logits since the last time, over all processes."""
        if not isinstance(self._sum, Tensor):
            return
        mean = self._sum / self._count
        if distributed():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        self.center.mul_(self.center_momentum).add_(mean, alpha=1 - self.center_momentum)
        self._sum, self._count = 0.0, 0

    @torch.no_grad()
    def teacher_log_probabilities(self, teacher_out: list[Tensor], temperature: float) -> Tensor:
        """Return the teacher's log-probabilities [views, B, out_dim] of logits [B, out_dim] of each view."""
        log_p: Tensor = ((torch.stack(teacher_out) - self.center) / temperature).log_softmax(-1)
        return log_p
