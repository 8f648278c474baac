"""Frozen networks that checkpoints leave out, with a note of where their weights are and a digest."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from locat_lightning.backbones.create import load_backbone, model_of
from locat_lightning.backbones.weights import DECODER_OF, RANDOM, read_checkpoint
from locat_lightning.errors import InputError


class Found(NamedTuple):
    """What weights hold for a segmentation.

    Attributes:
        backbone: with its weights.
        name: timm's name of the backbone, or the source of its weights where that says it all.
        arguments: of the backbone.
        decoder: the weights of a decoder; {} if there is none.
        reference: see `reference_to`; {} where checkpoints hold the backbone.
    """

    backbone: nn.Module
    name: str
    arguments: dict[str, Any]
    decoder: dict[str, Tensor]
    reference: dict[str, str]


def read_weights(
    weights: str,
    name: str | None,
    arguments: dict[str, Any] | None,
    *,
    moved: str | None,
    student: bool,
    saved: bool,
) -> Found:
    """Read a backbone, or a decoder and the backbone that it was trained on.

    Args:
        weights: where the weights come from (see --weights).
        name: timm's name of the model; None takes the one that the weights name.
        arguments: arguments of the model, beside or instead of those that the weights name.
        moved: where the backbone of a decoder is, if it has moved.
        student: whether to take the student of a DINO checkpoint.
        saved: whether checkpoints are to hold the backbone.

    Raises:
        InputError: the weights cannot be read, or the decoder was trained on another backbone.
    """
    contents = contents_of(weights)
    name, arguments = model_of(weights, name, arguments, contents)
    state = (contents or {}).get("state_dict", {})
    decoder = {k.removeprefix("decoder."): v for k, v in state.items() if k.startswith("decoder.")}
    source, recorded = weights, (contents or {}).get(DECODER_OF)
    if recorded is not None:
        source = _find(recorded["weights"], moved, decoder=weights)
        contents = contents_of(source)
        name, arguments = model_of(source, name, arguments, contents)
    backbone = load_backbone(
        source, name, arguments, network="student" if student else "teacher", any_size=True, contents=contents
    )
    left_out = not saved and source != RANDOM
    reference = reference_to(source, backbone) if left_out or recorded is not None else {}
    if recorded is not None and reference["digest"] != recorded["digest"]:
        raise InputError(
            f"the decoder in {weights} was trained on another backbone than {source} (the weights differ): "
            "set model.backbone_weights to that one"
        )
    return Found(backbone, name or source, arguments, decoder, reference if left_out else {})


def contents_of(weights: str) -> dict[str, Any] | None:
    """Read a file of weights; None where they do not come from a file."""
    return read_checkpoint(weights) if Path(weights).is_file() else None


def _find(recorded: str, moved: str | None, *, decoder: str) -> str:
    """Return where the weights of a decoder's backbone are now."""
    source = moved or recorded
    if not Path(source).is_file():
        if source != recorded:
            raise InputError(f"model.backbone_weights: no such file: {Path(source).absolute()}")
        if Path(source).is_absolute():
            raise InputError(
                f"{decoder} is a decoder for the backbone in {source}, which no longer exists: set "
                "model.backbone_weights to where it is now"
            )
    return source


def reference_to(source: str, network: nn.Module) -> dict[str, str]:
    """Return what a checkpoint holds in place of a frozen network: where its weights are, and their digest.

    Args:
        source: where its weights come from (see --weights).
        network: the network with these weights.
    """
    where = str(Path(source).absolute()) if Path(source).is_file() else source
    return {"weights": where, "digest": _digest(network)}


def _digest(network: nn.Module) -> str:
    """Return SHA-256 over the names and values of all weights."""
    found = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def check_same(own: dict[str, str], recorded: dict[str, str], what: str, option: str) -> None:
    """Check that a resumed run has the frozen network that it began with.

    Args:
        own: reference to the network that was read now.
        recorded: the reference in the run's checkpoint.
        what: the network, for the message.
        option: the option that says where it is.

    Raises:
        InputError: it is another one.
    """
    if own["digest"] != recorded["digest"]:
        raise InputError(
            f"{own['weights']} is not {what} that the run began with ({recorded['weights']}): pass that one "
            f"as {option}"
        )


def leave_out(checkpoint: dict[str, Any], prefix: str) -> None:
    """Remove the weights whose names begin with `prefix` from a checkpoint."""
    for state in _states_in(checkpoint):
        for name in [name for name in state if name.startswith(prefix)]:
            del state[name]


def put_back(checkpoint: dict[str, Any], prefix: str, network: nn.Module) -> None:
    """Add the weights of a network to a checkpoint that was saved without them."""
    for state in _states_in(checkpoint):
        state |= {prefix + name: value for name, value in network.state_dict().items()}


def _states_in(checkpoint: dict[str, Any]) -> list[dict[str, Tensor]]:
    """Return the weights, and those that Lightning's averaging of weights keeps beside them."""
    return [checkpoint[key] for key in ("state_dict", "current_model_state") if key in checkpoint]
