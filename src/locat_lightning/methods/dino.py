"""DINO: a student learns what the average of its past sees in other views, without labels."""

from typing import Any

import torch
from lightly.loss import DINOLoss
from torch import Tensor

from locat_lightning.data.views import ViewBatch
from locat_lightning.methods.base import Output
from locat_lightning.methods.self_distillation import SelfDistillation
from locat_lightning.methods.targets import MovingCentre, cross_view_loss


class Dino(SelfDistillation):
    """Train a timm model on images without labels, by self-distillation.

    The defaults are those of "Emerging Properties in Self-Supervised Vision Transformers" (ICCV 2021) as
    "Locality-Attending Vision Transformer" (ICLR 2026) uses them.

    Args:
        backbone: timm's name of the model; drop path applies to the student only.
        options: those of every self-distillation (`SelfDistillation`).
    """

    by_channel = True

    def __init__(self, backbone: str = "locatvit_small", **options: Any) -> None:
        super().__init__(backbone, **options)
        hp = self.hp
        self.loss = Loss(hp.out_dim, student_temp=hp.student_temp, center_momentum=hp.center_momentum)

    def compute_loss(self, batch: ViewBatch) -> Output:
        """Compute the cross-entropy from the teacher's global views to the student's other views."""
        views = [each.crops for each in batch.views]
        with torch.no_grad():
            features, taught = self.teacher(views[:1])
        _, learnt = self.student(views)
        return Output(*self.compare_views(taught, learnt), features)

    def compare_views(self, taught: Tensor, learnt: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Return the cross-entropy between logits [views, B, out_dim], and what is logged beside it.

        It is the mean entropy of the teacher's distributions, plus the KL divergence from the student's.
        """
        temperature = self.teacher_temperature(self.current_epoch)
        with torch.autocast(self.device.type, enabled=False):
            p = self.loss.teacher_probabilities(taught, temperature)
            loss: Tensor = self.loss(p, learnt)
            entropy = torch.special.entr(p).sum(-1).mean()
        divergence = loss.detach() - entropy
        self.watch_for_collapse(p, entropy, divergence)
        scalars = {
            "teacher_entropy": entropy,
            "kl": divergence,
            "centre_norm": self.loss.center.norm(),
            "teacher_temp": temperature,
            "momentum": self.momentum(self.step),
            "last_layer_frozen": float(self.current_epoch < self.hp.freeze_last_layer_epochs),
        }
        return loss, scalars

    def after_step(self, step: int) -> None:
        super().after_step(step)
        self.loss.move_center()


class Loss(MovingCentre, DINOLoss):
    """lightly's `DINOLoss`, in less memory, with a centre that moves once an optimizer step (`move_center`).

    lightly holds the logits of all views four times over, and moves the centre in every forward pass: more
    than once a step under accumulation.
    """

    student_temp: float

    def __init__(self, out_dim: int, **options: Any) -> None:
        super().__init__(out_dim, warmup_teacher_temp_epochs=0, **options)

    def forward(self, p: Tensor, logits: Tensor) -> Tensor:
        """Return `cross_view_loss` of the teacher's distributions and the student's logits."""
        return cross_view_loss(p, logits, self.student_temp)

    @torch.no_grad()
    def teacher_probabilities(self, logits: Tensor, temperature: float) -> Tensor:
        """Return the teacher's distributions of its logits [T, B, K], and note these for the centre."""
        self.update_center(logits)
        p: Tensor = (logits - self.center).div_(temperature).softmax(-1)
        return p

    def update_center(self, teacher_out: Tensor) -> None:
        """Note logits [V, B, out_dim] of a batch for the centre."""
        if self.training:
            self.add_to_center(teacher_out.float().sum((0, 1)), teacher_out.shape[0] * teacher_out.shape[1])
