"""What a teacher's logits become for a student to predict: centred distributions, or balanced ones."""

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from locat_lightning.evaluation.gather import distributed

Centering = Literal["centering", "sinkhorn_knopp"]


class MovingCentre(nn.Module):
    """The moving average of a teacher's mean logits: one update an optimizer step, over all processes.

    A subclass registers the buffer `center`, whose last dimension is that of the logits, and sets
    `center_momentum`, the centre's share of itself in an update.
    """

    center: Tensor
    center_momentum: float

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # No buffers: DDP would overwrite them with those of the first process.
        self._sum: Tensor | None = None
        self._count = 0

    @torch.no_grad()
    def add_to_center(self, total: Tensor, count: int) -> None:
        """Add up `count` logits, whose sum is `total` [K]: those of the batches of this step so far."""
        self._sum = total.float() if self._sum is None else self._sum + total.float()
        self._count += count

    @torch.no_grad()
    def move_center(self) -> None:
        """Move the centre towards the mean of the logits since the last time, if there are any."""
        if self._sum is None:
            return
        total = torch.cat([self._sum, self._sum.new_full((1,), self._count)])
        if distributed():
            dist.all_reduce(total)
        mean, count = total[:-1] / total[-1], total[-1]
        moved = self.center.mul(self.center_momentum).add_(mean, alpha=1 - self.center_momentum)
        self.center.copy_(torch.where(count > 0, moved, self.center))
        self._sum, self._count = None, 0


class Targets(MovingCentre):
    """Distributions over K prototypes from a teacher's logits.

    `centering` is softmax((z − c) / τ) with the moving centre c; `sinkhorn_knopp` gives every prototype the
    same share of all rows.

    Args:
        out_dim: K.
        centering: which of the two.
        center_momentum: the centre's share of itself in an update.
    """

    def __init__(self, out_dim: int, centering: Centering, center_momentum: float) -> None:
        super().__init__()
        self.centering, self.center_momentum = centering, center_momentum
        self.register_buffer("center", torch.zeros(out_dim))

    @torch.no_grad()
    def forward(self, logits: Tensor, temperature: float) -> Tensor:
        """Return the distributions [R, K] of logits [R, K], float32; all processes call it."""
        if self.centering == "sinkhorn_knopp":
            return sinkhorn_knopp(logits, temperature)
        return ((logits - self.center) / temperature).softmax(-1)


def sinkhorn_knopp(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Balance softmax(z / τ) of logits [R, K] so that, over the rows of all processes, prototypes are equal.

    In turns, the columns of exp(z / τ) are scaled to sums of 1 / K and its rows to sums of 1 / R. Each row of
    the result sums to 1.

    Source: "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments" (Caron et al.,
    NeurIPS 2020), as DINOv2 uses it.
    """
    rows = _over_processes(logits.new_full((), len(logits)))
    p = (logits / temperature).exp()
    p = p / _over_processes(p.sum())
    for _ in range(iterations):
        p = p / _over_processes(p.sum(0)) / p.shape[1]
        p = p / p.sum(1, keepdim=True) / rows
    return p * rows


def _over_processes(total: Tensor) -> Tensor:
    if distributed():
        dist.all_reduce(total)
    return total


def cross_view_loss(p: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """Return the mean cross-entropy from the teacher's views to the student's other views.

    Args:
        p: the teacher's distributions [T, B, K] of B images in T views.
        logits: the student's [S, B, K], S ≥ T, of the same T views first.
        temperature: the student's.
    """
    loss: Tensor = _CrossViewEntropy.apply(p, logits, temperature)
    return loss


def masked_patch_loss(targets: Tensor, logits: Tensor, weights: Tensor, crops: int) -> Tensor:
    """Return the mean over crops (masked or not) of the mean cross-entropy of their masked patches.

    Args:
        targets: distributions [M, K] of the teacher, of the masked patches of all crops.
        logits: the student's, [M, K], divided by its temperature.
        weights: [M], one over the number of masked patches of the crop.
        crops: how many there are.
    """
    of_patches = -(targets * logits.log_softmax(-1)).sum(-1)
    return (weights * of_patches).sum() / crops


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
