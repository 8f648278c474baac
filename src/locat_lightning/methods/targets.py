"""What a teacher's logits become for a student to predict: centred distributions, or balanced ones."""

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

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


def cross_view_loss(targets: Tensor, logits: Tensor) -> Tensor:
    """Return the mean cross-entropy of the pairs of a teacher's and another of the student's views.

    Args:
        targets: distributions [T, B, K] of the teacher's T views, which are the first of the student's.
        logits: the student's, [S, B, K], divided by its temperature.
    """
    pairs = -torch.einsum("tbk,sbk->ts", targets, logits.log_softmax(-1))
    number = pairs.numel() - len(pairs)
    return (pairs.sum() - pairs.diagonal().sum()) / (number * targets.shape[1])


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
