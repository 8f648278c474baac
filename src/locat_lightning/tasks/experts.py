"""How experts that share out the tokens of a batch learn from each other (experts' weight averaging)."""

import torch
from torch import Tensor, nn

from locat_lightning.errors import InputError
from locat_lightning.nn.experts import Experts
from locat_lightning.tasks.sharding import part_of


def add_experts(model: nn.Module, number: int) -> None:
    """Have experts instead of every second feed-forward network of a timm model, which all begin as it."""
    if number < 2:
        raise InputError("model.experts: one has no others to learn from: set 2 or more, or null")
    blocks = [each for each in model.modules() if isinstance(getattr(each, "mlp", None), nn.Module)]
    if len(blocks) < 2:
        raise InputError(f"model.experts: {type(model).__name__} has no two blocks with an mlp: leave it out")
    for block in blocks[1::2]:
        block.mlp = Experts(block.mlp, number)  # type: ignore[arg-type]


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
