"""Model soups: the mean of the weights of several models of one architecture."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self

import torch
from timm.models import get_model_args
from torch import Tensor, nn

from locat_lightning.backbones.locate import architecture_of

State = Mapping[str, Tensor]
# Arguments of models that say how they are trained, or that shapes of weights show.
UNSEEN = {"drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate"}
UNSEEN |= {"drop_path_rate", "channel_sampling", "dynamic_img_size", "img_size", "num_classes"}


class Soup:
    """A running sum of weights, in float64: as much memory as two float32 models, however many there are.

    What is no floating-point number (a counter of BatchNorm) is that of the first.
    """

    def __init__(self) -> None:
        self.number = 0
        self._first: dict[str, Tensor] = {}
        self._sum: dict[str, Tensor] = {}

    def with_one_more(self, state: State) -> Self:
        """Return the soup with another model in it; this one stays as it is."""
        soup = type(self)()
        soup.number = self.number + 1
        soup._first = self._first or dict(state)
        added = {name: value.double() for name, value in state.items() if value.is_floating_point()}
        soup._sum = {name: self._sum[name] + value for name, value in added.items()} if self._sum else added
        return soup

    def mean(self) -> dict[str, Tensor]:
        """Return the mean of each tensor, in the type that it has in the first model."""
        return {
            name: (self._sum[name] / self.number).to(value.dtype) if name in self._sum else value
            for name, value in self._first.items()
        }


class Trial(NamedTuple):
    """What a greedy soup has measured of a model: alone, and of the soup with it, and whether it stayed."""

    alone: float
    soup: float
    kept: bool


def uniform_soup(load: Callable[[int], State], number: int) -> Soup:
    """Return the soup of all models; `load` returns the weights of each."""
    soup = Soup()
    for each in range(number):
        soup = soup.with_one_more(load(each))
    return soup


def greedy_soup(
    load: Callable[[int], State], number: int, measure: Callable[[State], float]
) -> tuple[Soup, dict[int, Trial]]:
    """Add one model after the other, the best first, and keep those with which the soup is not worse.

    Args:
        load: returns the weights of a model; it is called twice for each, so that few are in memory.
        number: how many models there are.
        measure: what is better the larger it is, top-1 on validation images for example.

    Returns:
        The soup, and what was measured, best model first.

    Source: "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing
    inference time" (ICML 2022), recipe 1.
    """
    alone = [measure(load(each)) for each in range(number)]
    found = dict[int, Trial]()
    soup, best = Soup(), -math.inf
    for each in sorted(range(number), key=lambda each: -alone[each]):
        tried = soup.with_one_more(load(each))
        value = measure(tried.mean()) if soup.number else alone[each]
        if kept := value >= best:
            soup, best = tried, value
        found[each] = Trial(alone[each], value, kept)
    return soup, found


def similarity(a: State, b: State) -> float:
    """Return the cosine between all matrices and kernels of two models, the rest left out.

    Unrelated models have about 0. Vectors are left out: those of norms begin at 1 in all models.
    """
    product = torch.zeros(3, dtype=torch.float64)
    for name, value in a.items():
        if value.ndim > 1 and value.is_floating_point():
            x, y = value.double().flatten(), b[name].double().flatten()
            product += torch.stack([x @ y, x @ x, y @ y])
    return float(product[0] / (product[1] * product[2]).sqrt().clamp_min(torch.finfo(torch.float64).tiny))


def first_difference(a: nn.Module, b: nn.Module) -> str:
    """Say what differs first between two models whose weights are to be averaged; nothing if they fit."""
    if (names := [architecture_of(each) for each in (a, b)])[0] != names[1]:
        return f"{names[1]}, not {names[0]}"
    states = a.state_dict(), b.state_dict()
    for name, value in states[0].items():
        if name not in states[1]:
            return f"no {name}"
        if (shape := list(states[1][name].shape)) != list(value.shape):
            return f"{name} of shape {shape}, not {list(value.shape)}"
    if more := sorted(states[1].keys() - states[0].keys()):
        return f"{more[0]}, which the first lacks"
    arguments = [_flat(get_model_args(each) or {}) for each in (a, b)]
    for name in sorted(arguments[0].keys() | arguments[1].keys()):
        own, other = (each.get(name, "its default") for each in arguments)
        if name.rpartition(".")[2] not in UNSEEN and own != other:
            return f"{name} {other}, not {own}"
    return ""


def _flat(arguments: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = dict[str, Any]()
    for name, value in arguments.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
