"""Sharpness-aware minimisation (SAM): a step follows the gradient at the worst weights nearby."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from jsonargparse.typing import PositiveFloat
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from locat_lightning.errors import InputError
from locat_lightning.tasks.base import Task
from locat_lightning.tasks.sharding import ShardedStrategy


class _LossFirst(Protocol):
    def __getitem__(self, index: int, /) -> Any: ...


Found = TypeVar("Found", bound=_LossFirst)


class SharpnessAware(Task):
    """A task whose steps may be sharpness-aware: ∇L(w + r ∇L(w) / ‖∇L(w)‖) instead of ∇L(w).

    Each process disturbs the weights by the gradient of its own batch, and so does each accumulated batch;
    only the gradients at the disturbed weights are averaged. That needs no communication, and the paper
    finds that fewer images for a disturbance generalise better ("m-sharpness"). A step takes twice as long.

    Source: "Sharpness-Aware Minimization for Efficiently Improving Generalization" (ICLR 2021).

    Args:
        sam: how far the weights are disturbed, r (the paper's rho), 0.05 for example; null for ordinary
            steps.
        options: those of every task (`Task`).
    """

    def __init__(self, *, sam: PositiveFloat | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._undisturbed: list[tuple[Tensor, Tensor]] = []  # weights, and what they were

    def trained(self) -> Iterable[nn.Parameter]:
        """Return the parameters that the optimizer trains."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def check(self, trainer: Trainer, *, training: bool) -> None:
        super().check(trainer, training=training)
        if self.hp.sam is None or not training:
            return
        whole = isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)
        sharded = isinstance(trainer.strategy, ShardedStrategy)
        if sharded or not whole:
            strategy = "fsdp" if sharded else type(trainer.strategy).__name__
            raise InputError(
                f"model.sam: {strategy} may divide weights among processes, but a disturbance needs them "
                "whole: use --trainer.strategy ddp"
            )
        if trainer.precision not in ("32-true", "64-true", "bf16-mixed", "16-mixed"):
            raise InputError(
                f"model.sam: trainer.precision ({trainer.precision}) rounds the disturbance of the weights "
                "away: use bf16-mixed"
            )
        if self.hp.compile == "reduce-overhead":
            raise InputError(
                "model.sam: the second pass would overwrite what reduce-overhead has recorded of the first: "
                "use --model.compile true"
            )

    def sharpened(self, compute: Callable[[], Found]) -> tuple[Found, Tensor]:
        """Return what `compute` finds of a batch, loss first, and the loss whose gradient is to be followed.

        Both passes draw the same random numbers on the device and the CPU; what a batch draws from numpy's
        has to be drawn before. Running statistics are of the first pass alone. What a method adds up until
        the end of a step, as the mean of a teacher's logits, it adds twice, which leaves the mean as it is.
        The weights are disturbed from here until the backward pass has ended.
        """
        if self.hp.sam is None:
            found = compute()
            return found, found[0]
        seed = torch.initial_seed()  # of this batch
        torch.manual_seed(seed)
        found = compute()
        self._disturb(found[0])
        torch.manual_seed(seed)
        with statistics_left(self):
            return found, compute()[0]

    def _disturb(self, loss: Tensor) -> None:
        """Move the weights to w + r ∇L / ‖∇L‖; they stay where the gradient is not finite."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:  # gradients in half precision vanish if they are not scaled
            loss = scaler.scale(loss)
        weights = [weight for weight in self.trained() if weight.requires_grad]
        found = torch.autograd.grad(loss, weights, allow_unused=True)
        pairs = [(weight, own) for weight, own in zip(weights, found, strict=True) if own is not None]
        norm = nn.utils.get_total_norm([gradient for _, gradient in pairs])
        length = self.hp.sam / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        self._undisturbed = [(weight, weight.detach().clone()) for weight, _ in pairs]
        with torch.no_grad():
            for weight, gradient in pairs:
                weight.add_(torch.where(norm.isfinite(), gradient * length, 0.0))
        torch.clear_autocast_cache()  # which holds the weights in half precision

    @torch.no_grad()
    def _restore(self) -> None:
        """Put the weights back exactly: with several processes they would drift apart by rounding."""
        for weight, before in self._undisturbed:
            weight.copy_(before)
        self._undisturbed = []

    def on_after_backward(self) -> None:
        self._restore()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the weights back, which the checkpoint refers to, if a step has failed half-way."""
        self._restore()
        super().on_save_checkpoint(checkpoint)


@contextmanager
def statistics_left(module: nn.Module) -> Iterator[None]:
    """Leave the running statistics of BatchNorm as they are; it normalises by batch all the same."""
    norms = [each for each in module.modules() if isinstance(each, _BatchNorm) and each.track_running_stats]
    try:
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
