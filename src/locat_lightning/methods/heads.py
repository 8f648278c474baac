"""Heads out of checkpoints, our own and published ones, to continue a pre-training (`model.heads`)."""

import re
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from locat_lightning.backbones.weights import read_state
from locat_lightning.errors import InputError

# What our names of projection heads are elsewhere: in turn, a pattern and what takes its place.
NAMES = {
    r"^(module|_orig_mod)\.": "",
    r"^teacher\.": "",
    r"^(dino_|c_)head\.": "head.",  # DINOv2, SelfPatch
    r"^(ibot_|p_)head\.": "patch_head.",
    r"head\.mlp\.": "head.layers.",  # all of them
    r"^backbone\.(mask_token|masked_embed)$": "mask_token.token",  # DINOv2, iBOT
}


def renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Return tensors by other names: patterns, in turn, and what takes their place."""
    found = {}
    for name, value in state.items():
        for pattern, place in names.items():
            name = re.sub(pattern, place, name)
        found[name] = value
    return found


def load_heads(heads: Mapping[str, Tensor], state: Mapping[str, Tensor], weights: str) -> None:
    """Copy the tensors of heads out of a state, by name.

    Raises:
        InputError: one is missing, or has another shape; `weights` says where the state comes from.
    """
    for name, value in heads.items():
        if name not in state or state[name].shape != value.shape:
            given = list(state[name].shape) if name in state else "missing"
            raise InputError(
                f"model.heads: {weights} has no heads that fit: {name} is {given}, and the options make it "
                f"{list(value.shape)}"
            )
    for name, value in heads.items():
        value.detach().copy_(state[name])
    rank_zero_info(f"{weights}: {len(heads)} tensors of heads")


def load_projection_heads(task: Any, weights: str) -> None:
    """Load the heads of a teacher into the student of a task, its mask token and centres, if there are any.

    Raises:
        InputError: there is no head, or it has another shape.
    """
    state = by_our_names(read_state(weights))
    own = {k: v for k, v in task.student.state_dict().items() if not k.startswith("backbone.")}
    load_heads({k: v for k, v in own.items() if "head." in k}, state, weights)
    centres = {k: v for k, v in task.named_buffers(recurse=True) if k.endswith(".center")}
    for name, value in (own | centres).items():
        if name in state and state[name].shape == value.shape:
            value.copy_(state[name])


def by_our_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by our names. iBOT's second last layer makes a head of its own for patches."""
    ours = renamed(state, NAMES)
    for name in list(ours):
        if name.startswith("head.last_layer2."):
            ours[name.replace("head.last_layer2", "patch_head.last_layer")] = ours[name]
            ours |= {f"patch_{k}": v for k, v in ours.items() if k.startswith("head.layers.")}
    return ours
