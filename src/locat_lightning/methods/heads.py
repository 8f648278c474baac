"""Projection heads out of checkpoints: our own, DINO's, iBOT's and DINOv2's, to continue a pre-training."""

import re
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from locat_lightning.backbones.weights import read_state
from locat_lightning.errors import InputError

# What our names are elsewhere: in turn, a pattern and what takes its place.
NAMES = (
    (r"^(module|_orig_mod)\.", ""),
    (r"^teacher\.", ""),
    (r"^dino_head\.", "head."),  # DINOv2
    (r"^ibot_head\.", "patch_head."),
    (r"head\.mlp\.", "head.layers."),  # all of them
    (r"^backbone\.(mask_token|masked_embed)$", "mask_token"),  # DINOv2, iBOT
)


def load_heads(task: Any, weights: str) -> None:
    """Load the heads of a teacher into the student of a task, its mask token and centres, if there are any.

    Raises:
        InputError: there is no head, or it has another shape.
    """
    state = head_state(read_state(weights))
    own = {k: v for k, v in task.student.state_dict().items() if not k.startswith("backbone.")}
    needed = [name for name in own if "head." in name]
    if wrong := [k for k in needed if k not in state or state[k].shape != own[k].shape]:
        given = list(state[wrong[0]].shape) if wrong[0] in state else "missing"
        raise InputError(
            f"model.heads: {weights} has no heads that fit: {wrong[0]} is {given}, and the options make it "
            f"{list(own[wrong[0]].shape)}"
        )
    centres = {k: v for k, v in task.named_buffers(recurse=True) if k.endswith(".center")}
    with torch.no_grad():
        for target in (own, centres):
            for name, value in target.items():
                if name in state and state[name].shape == value.shape:
                    value.copy_(state[name])
    rank_zero_info(f"{weights}: {len(needed)} tensors of projection heads")


def head_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by our names. iBOT's second last layer makes a head of its own for patches."""
    renamed = {}
    for name, value in state.items():
        for pattern, place in NAMES:
            name = re.sub(pattern, place, name)
        renamed[name] = value
    for name in list(renamed):
        if name.startswith("head.last_layer2."):
            renamed[name.replace("head.last_layer2", "patch_head.last_layer")] = renamed[name]
            renamed |= {f"patch_{k}": v for k, v in renamed.items() if k.startswith("head.layers.")}
    return renamed
