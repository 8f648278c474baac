"""Frozen networks that checkpoints leave out, with a note of where their weights are and a digest."""

import hashlib
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from locat_lightning.backbones.create import load_backbone, model_of
from locat_lightning.backbones.weights import DECODER_OF, RANDOM, read_checkpoint
from locat_lightning.errors import InputError
from locat_lightning.nn.decoder import MlpDecoder
from locat_lightning.tasks.base import Task


class Found(NamedTuple):
    """What weights hold for a segmentation."""

    backbone: nn.Module
    name: str  # timm's, or the source of the weights where that says it all
    arguments: dict[str, Any]  # of the backbone
    decoder: dict[str, Tensor]  # its weights; {} without one
    reference: dict[str, str]  # see `reference_to`; {} where checkpoints hold the backbone


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
        source = moved or recorded["weights"]
        if Path(source).is_absolute() and not Path(source).is_file():
            raise InputError(
                f"{weights} is a decoder for the backbone in {source}, which does not exist: set "
                "model.backbone_weights to where it is now"
            )
        contents = contents_of(source)
        name, arguments = model_of(source, name, arguments, contents)
    backbone = load_backbone(
        source, name, arguments, network="student" if student else "teacher", any_size=True, contents=contents
    )
    left_out = not saved and source != RANDOM
    reference = reference_to(source, backbone) if left_out or recorded is not None else {}
    if recorded is not None:
        learnt = f"the backbone that the decoder in {weights} was trained on"
        check_same(reference, recorded, learnt, "model.backbone_weights")
    return Found(backbone, name or source, arguments, decoder, reference if left_out else {})


def contents_of(weights: str) -> dict[str, Any] | None:
    """Read a file of weights; None where they do not come from a file."""
    return read_checkpoint(weights) if Path(weights).is_file() else None


def load_decoder(decoder: MlpDecoder, state: dict[str, Tensor]) -> str:
    """Load a decoder's weights, or return why they do not fit."""
    if not state:
        return "it holds no decoder"
    own, given = (
        {name: list(value.shape) for name, value in each.items()} for each in (decoder.state_dict(), state)
    )
    if own != given:
        return f"its decoder has other features or classes ({given} instead of {own})"
    decoder.load_state_dict(state)
    return ""


def reference_to(source: str, network: nn.Module) -> dict[str, str]:
    """Return what a checkpoint holds in place of a network: the source of its weights, and a digest."""
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
    """Check that two references are to the same weights.

    Args:
        own: reference to the network that was read now.
        recorded: the reference in a checkpoint.
        what: the network that is needed, for the message.
        option: the option that says where it is.

    Raises:
        InputError: they are not.
    """
    if own["digest"] != recorded["digest"]:
        raise InputError(
            f"{own['weights']} is not {what} ({recorded['weights']}, the weights differ): pass that one as "
            f"{option}"
        )


class FrozenNetwork(Task):
    """A task with a network that may be frozen, and that checkpoints leave out where `_reference` is set.

    Attributes:
        frozen: name of the attribute that holds the network.
        recorded_as: a checkpoint's key of the reference to it.
        read_from: the option that says where its weights are.
    """

    frozen: ClassVar[str]
    recorded_as: ClassVar[str]
    read_from: ClassVar[str]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._reference: dict[str, str] = {}

    def train(self, mode: bool = True) -> Self:
        """Set training mode; a frozen network stays in evaluation mode."""
        super().train(mode)
        network = getattr(self, self.frozen, None)
        if network is not None and not any(parameter.requires_grad for parameter in network.parameters()):
            network.eval()
        return self

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out the network, and save where its weights are."""
        super().on_save_checkpoint(checkpoint)
        if self._reference:
            for state in _states_in(checkpoint):
                for name in [name for name in state if name.startswith(f"{self.frozen}.")]:
                    del state[name]
            checkpoint[self.recorded_as] = self._reference

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the network, which has been read already.

        Raises:
            InputError: it is not the one that the run began with.
        """
        super().on_load_checkpoint(checkpoint)
        if (recorded := checkpoint.get(self.recorded_as)) is None:
            return
        if self._reference:
            check_same(self._reference, recorded, "the one that the run began with", self.read_from)
        own = getattr(self, self.frozen).state_dict()
        for state in _states_in(checkpoint):
            state |= {f"{self.frozen}.{name}": value for name, value in own.items()}


def _states_in(checkpoint: dict[str, Any]) -> list[dict[str, Tensor]]:
    """Return the weights, and those that Lightning's averaging of weights keeps beside them."""
    return [checkpoint[key] for key in ("state_dict", "current_model_state") if key in checkpoint]
