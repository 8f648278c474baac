"""Several feed-forward networks in training, one of their mean weights in use (experts' weight averaging).

Source: "Experts Weights Averaging: A New General Training Scheme for Vision Transformers" (arXiv 2308.06093).
"""

import re
from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.func import functional_call

EXPERT = re.compile(r"(?<=\bmlp\.)experts\.\d+\.")  # in the names of weights


class Experts(nn.Module):
    """Copies of a network that share out the tokens of a training batch: each token meets one, at random.

    All have equally many tokens, up to one, so that a step computes as much as with one network. In
    evaluation, one with the mean weights has all tokens.

    Args:
        network: takes tokens [N, C], each by itself.
        number: of the copies.
    """

    def __init__(self, network: nn.Module, number: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(deepcopy(network) for _ in range(number))

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [..., C] to tokens [..., C]."""
        if not self.training:
            weights = zip(*(expert.named_parameters() for expert in self.experts), strict=True)
            mean = {each[0][0]: torch.stack([own for _, own in each]).mean(0) for each in weights}
            found: Tensor = functional_call(self.experts[0], mean, (x,))
            return found
        tokens = x.flatten(0, -2)
        order = torch.randperm(len(tokens), device=x.device)
        parts = tokens.index_select(0, order).tensor_split(len(self.experts))
        found = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        return torch.empty_like(found).index_copy(0, order, found).view(x.shape)


def without_experts(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights of a model with those of experts averaged, by the names of a model without."""
    together: dict[str, list[Tensor]] = {}
    for name, value in weights.items():
        together.setdefault(EXPERT.sub("", name), []).append(value)
    return {
        name: values[0] if len(values) == 1 else torch.stack(values).mean(0)
        for name, values in together.items()
    }
