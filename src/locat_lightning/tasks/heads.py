"""The heads of a segmentation: which there are, several trained at once, and their weights in files."""

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from locat_lightning.errors import InputError
from locat_lightning.nn.decoder import LinearDecoder, MlpDecoder
from locat_lightning.nn.pyramid import LEVELS, PyramidDecoder

Head = Literal["mlp", "linear", "pyramid"]
NORMED = ("linear",)  # heads that read features behind the backbone's final norm
BEST = "best_head"  # a checkpoint's key of the number of a grid's best head


def make_head(
    head: Head, width: int, classes: int, *, hidden: int, layers: int, patch: int, dropout: float = 0.0
) -> MlpDecoder | LinearDecoder | PyramidDecoder:
    """Build a head for patch features [B, width, h, w] of `layers` blocks, `patch` pixels apart."""
    if head == "linear":
        return LinearDecoder(width, classes, dropout)
    if dropout:
        raise InputError(f"model.dropout ({dropout}) is an option of model.head linear, not of {head}")
    if head == "mlp":
        return MlpDecoder(width, classes, hidden)
    if layers not in (1, LEVELS):
        raise InputError(f"model.head pyramid takes 1 or {LEVELS} layers: model.layers gives {layers}")
    return PyramidDecoder(width, classes, hidden, layers=layers, patch=patch)


class HeadGrid(nn.Module):
    """Copies of a head, one for each learning rate, on the same features.

    Maps features [B, D, h, w] to the logits of all heads, one after the other, [B, heads · classes, H, W].
    """

    def __init__(self, head: nn.Module, number: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(copy.deepcopy(head) for _ in range(number))

    def forward(self, features: Tensor) -> Tensor:
        return torch.cat([head(features) for head in self.heads], 1)


def head_in(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights of a checkpoint's head, of a grid those of the best one; {} if it has none."""
    state: dict[str, Tensor] = checkpoint.get("state_dict", {})
    is_grid = any(name.startswith("decoder.heads.") for name in state)
    prefix = f"decoder.heads.{checkpoint.get(BEST)}." if is_grid else "decoder."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def load_head(head: nn.Module, state: Mapping[str, Tensor]) -> str:
    """Load a head's weights, or return why they do not fit; on the meta device they become the head's."""
    if not state:
        return "it holds no decoder"
    own, given = (
        {name: list(value.shape) for name, value in each.items()} for each in (head.state_dict(), state)
    )
    if own != given:
        differ = sorted(set(own) ^ set(given)) or [name for name in own if own[name] != given[name]]
        name = differ[0]
        return (
            f"its decoder has other features or classes, or is another head ({name}: {given.get(name)} "
            f"instead of {own.get(name)})"
        )
    head.load_state_dict(state, assign=any(each.is_meta for each in head.parameters()))
    return ""
