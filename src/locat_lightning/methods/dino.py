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
from torch.autograd.function import once_differentiable

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
        if self.is_logged():
            of_mean = torch.special.entr(p.mean((0, 1))).sum()
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
    """lightly's `DINOLoss`, in less memory, with a centre that moves once an optimizer step (`move_center`).

    lightly holds the logits of all views four times over, and moves the centre in every forward pass: more
    than once a step under accumulation.
    """

    def __init__(self, out_dim: int, **options: Any) -> None:
        super().__init__(out_dim, warmup_teacher_temp_epochs=0, **options)
        # No buffers: DDP would overwrite them with those of the first process.
        self._sum: Tensor | float = 0.0
        self._count = 0

    def forward(self, p: Tensor, logits: Tensor) -> Tensor:
        """Return the mean cross-entropy from the teacher's views to the student's other views.

        Args:
            p: the teacher's distributions [T, B, K] of B images in T views.
            logits: the student's [S, B, K], S ≥ T, of the same T views first.
        """
        loss: Tensor = _CrossViewEntropy.apply(p, logits, self.student_temp)
        return loss

    @torch.no_grad()
    def teacher_probabilities(self, logits: Tensor, temperature: float) -> Tensor:
        """Return the teacher's distributions of its logits [T, B, K], and note these for the centre."""
        self.update_center(logits)
        p: Tensor = (logits - self.center).div_(temperature).softmax(-1)
        return p

    @torch.no_grad()
    def update_center(self, teacher_out: Tensor) -> None:
        """Add up logits [V, B, out_dim] of a batch."""
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


class _CrossViewEntropy(torch.autograd.Function):
    """Σ_s n_s · logsumexp(z_s / τ) − q_s · z_s / τ over the student's views s, by number of pairs and images.

    q_s is the sum of the teacher's distributions of the n_s views other than s. The gradient of z_s is
    (n_s · softmax(z_s / τ) − q_s) / τ: the backward pass needs no more than what came in, and takes one view
    after another.
    """

    @staticmethod
    def forward(ctx: Any, p: Tensor, logits: Tensor, temperature: float) -> Tensor:
        of_all, total = p.sum(0), p.new_zeros(())
        for view, z in enumerate(logits):
            count, q = _others(p, of_all, view)
            log_sum = (z / temperature).logsumexp(-1)
            total += count * log_sum.sum() - (q * z).sum() / temperature
        ctx.save_for_backward(p, logits)
        ctx.temperature, ctx.terms = temperature, p.shape[1] * len(p) * (len(logits) - 1)
        loss: Tensor = total / ctx.terms
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        p, logits = ctx.saved_tensors
        of_all, grads = p.sum(0), torch.empty_like(logits)
        for view, (z, out) in enumerate(zip(logits, grads, strict=True)):
            count, q = _others(p, of_all, view)
            torch.softmax(z / ctx.temperature, -1, out=out)
            out.mul_(count).sub_(q)
        return None, grads.mul_(grad / (ctx.terms * ctx.temperature)), None


def _others(p: Tensor, of_all: Tensor, view: int) -> tuple[int, Tensor]:
    """Return how many of the teacher's views [T, B, K] are others than a view, and the sum of these."""
    return (len(p) - 1, of_all - p[view]) if view < len(p) else (len(p), of_all)
