"""How experts that share out the tokens of a batch learn from each other (experts' weight averaging)."""

from typing import Any

import torch
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import Tensor, nn

from locat_lightning.errors import InputError
from locat_lightning.nn.experts import Experts
from locat_lightning.tasks.sharding import part_of


def check_number(number: int | None) -> None:
    """Check that experts have others to learn from, where there are any: `InputError` if not."""
    if number == 1:
        raise InputError("model.experts: one has no others to learn from: set 2 or more, or null")


def add_experts(model: nn.Module, number: int) -> None:
    """Have experts instead of every second feed-forward network of a timm model, which all begin as it."""
    check_number(number)
    blocks: list[Any] = [each for each in model.modules() if _has_feed_forward(each)]
    if len(blocks) < 2:
        raise InputError(
            f"model.experts: {type(model).__name__} has no two blocks with a feed-forward network that takes "
            "tokens one by one: leave it out"
        )
    for block in blocks[1::2]:
        block.mlp = Experts(block.mlp, number)


def _has_feed_forward(block: nn.Module) -> bool:
    """Return whether a module is a block, whose MLP takes tokens [..., C] one by one."""
    mlp = getattr(block, "mlp", None) if hasattr(block, "norm2") else None  # also part of a position bias
    return isinstance(mlp, Mlp | GluMlp | SwiGLU) and not any(isinstance(m, nn.Conv2d) for m in mlp.modules())


@torch.no_grad()
def share(model: nn.Module, rate: float) -> None:
    """Move the weights of each expert by a share of the way to the mean of the others': wᵢ + β (m₋ᵢ - wᵢ).

    Source: "Experts Weights Averaging: A New General Training Scheme for Vision Transformers" (arXiv
    2308.06093).
    """
    for experts in (each.experts for each in model.modules() if isinstance(each, Experts)):
        number, own, means = len(experts), list[Tensor](), list[Tensor]()
        for weights in zip(*(expert.parameters() for expert in experts), strict=True):
            parts = [part_of(each.detach()) for each in weights]
            own += parts
            means += [torch.stack(parts).mean(0)] * number
        # m₋ᵢ - wᵢ = n / (n - 1) (m - wᵢ), of the mean m of all.
        torch._foreach_lerp_(own, means, rate * number / (number - 1))  # private: all tensors in one kernel
