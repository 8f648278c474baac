"""Frozen networks that checkpoints leave out, with a note of where their weights are and a digest."""

from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from locat_lightning.backbones.weights import digest_of
from locat_lightning.errors import InputError
from locat_lightning.tasks.average import frozen_in
from locat_lightning.tasks.base import Task


def reference_to(source: str | Path, network: nn.Module) -> dict[str, str]:
    """Return what a checkpoint holds in place of a network: the source of its weights, and a digest.

    The digest is that of all weights (`digest_of`).
    """
    path = Path(str(source).removeprefix("local-dir:"))
    where = str(path.absolute()) if path.exists() else str(source)
    return {"weights": where, "digest": digest_of(network.state_dict())}


def check_same(own: dict[str, str], recorded: dict[str, str], what: str, option: str) -> None:
    """Check that the reference in a checkpoint is to the weights that were read now: `InputError` if not.

    `what` is the network that is needed, and `option` says where it is, for the message.
    """
    if own["digest"] != recorded.get("digest"):
        recorded_as = recorded.get("weights")
        raise InputError(
            f"{own['weights']} is not {what} ({recorded_as}, the weights differ): pass that one as {option}"
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
        super().train(mode)
        if (network := frozen_in(self)) is not None:
            network.eval()
        return self

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self._reference:
            for state in _states_in(checkpoint):
                for name in [name for name in state if name.startswith(f"{self.frozen}.")]:
                    del state[name]
            checkpoint[self.recorded_as] = self._reference

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        network = getattr(self, self.frozen, None)  # which has been read already, where it is needed
        if (recorded := checkpoint.get(self.recorded_as)) is None or network is None:
            return
        if not isinstance(recorded, dict):
            is_a = type(recorded).__name__
            raise InputError(
                f"the checkpoint's {self.recorded_as} is a {is_a}, not a dictionary: take another"
            )
        if self._reference:
            check_same(self._reference, recorded, "the one that the run began with", self.read_from)
        own = network.state_dict()
        for state in _states_in(checkpoint):
            state |= {f"{self.frozen}.{name}": value for name, value in own.items()}


def _states_in(checkpoint: dict[str, Any]) -> list[dict[str, Tensor]]:
    """Return the weights, and those that Lightning's averaging of weights keeps beside them."""
    return [checkpoint[key] for key in ("state_dict", "current_model_state") if key in checkpoint]
