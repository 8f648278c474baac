"""DINO: a student learns what the average of its past sees in other views, without labels."""

from typing import Any

import torch
from lightly.loss import DINOLoss
from torch import Tensor

from locat_lightning.data.views import ViewBatch
from locat_lightning.methods.base import Output
from locat_lightning.methods.self_distillation import SelfDistillation
from locat_lightning.methods.targets import MovingCentre


class Dino(SelfDistillation):
    """Train a timm model on images without labels, by self-distillation.

    The defaults are those of "Emerging Properties in Self-Supervised Vision Transformers" (ICCV 2021) as
    "Locality-Attending Vision Transformer" (ICLR 2026) uses them.

    Args:
        backbone: timm's name of the model; drop path applies to the student only.
        options: those of every self-distillation (`SelfDistillation`).
    """

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
        self.watch_for_collapse(entropy, divergence, lambda: log_p.exp().mean((0, 1)))
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
    """lightly's `DINOLoss`, whose centre moves once an optimizer step (`move_center`).

    lightly moves it in every forward pass: more than once a step under accumulation.
    """

    def __init__(self, out_dim: int, **options: Any) -> None:
        super().__init__(out_dim, warmup_teacher_temp_epochs=0, **options)

    def update_center(self, teacher_out: Tensor) -> None:
        """Add up logits [V, B, out_dim], at the end of each forward pass."""
        if self.training:
            self.add_to_center(teacher_out.float().sum((0, 1)), teacher_out.shape[0] * teacher_out.shape[1])

    @torch.no_grad()
    def teacher_log_probabilities(self, teacher_out: list[Tensor], temperature: float) -> Tensor:
        """Return the teacher's log-probabilities [views, B, out_dim] of logits [B, out_dim] of each view."""
        log_p: Tensor = ((torch.stack(teacher_out) - self.center) / temperature).log_softmax(-1)
        return log_p
