"""How many channels a model takes, and which: those of the images."""

from collections.abc import Mapping
from typing import Any

from timm.models import get_model_input_config
from torch import nn

from locat_lightning.backbones.channelvit import ChannelViT
from locat_lightning.backbones.registry import SUBSETS
from locat_lightning.data.bands import Channels
from locat_lightning.errors import InputError


def channels_of(model: nn.Module) -> int:
    """Return how many channels the images of a model have now; 3 of a module that does not say."""
    if isinstance(model, ChannelViT):
        taken = model.patch_embed.taken
        return len(model.patch_embed.channel_embed) if taken is None else len(taken)
    return int(get_model_input_config(model)["input_size"][0])


def with_channels(
    name: str | None, arguments: Mapping[str, Any] | None, channels: Channels | None
) -> dict[str, Any]:
    """Return the arguments of a model by timm's name for images of these channels; None leaves them alone.

    A model that takes subsets (ChannelViT) is made for all channels of the files.

    Raises:
        InputError: the arguments are for another number.
    """
    known = dict(arguments or {})
    if channels is None:
        return known
    number = channels.of_files if name in SUBSETS else len(channels.taken)
    if (own := known.setdefault("in_chans", number)) != number:
        raise _other(own, number, name)
    return known


def take_channels(model: nn.Module, channels: Channels | None) -> None:
    """Tell a model which channels its images have; None is RGB: `InputError` if it takes others."""
    of_files, number = (3, 3) if channels is None else (channels.of_files, len(channels.taken))
    if isinstance(model, ChannelViT):
        if (known := len(model.patch_embed.channel_embed)) != of_files:
            raise _other(known, of_files, None)
        model.take_channels(None if channels is None else channels.taken)
    elif hasattr(model, "pretrained_cfg") and (own := channels_of(model)) != number:
        raise _other(own, number, None)


def _other(own: int, number: int, name: str | None) -> InputError:
    return InputError(
        f"{name or 'the model'} takes {own} channel{'s' * (own != 1)}, but the images have {number}: give "
        "those that it was trained on (data.channels, data.stats), or set model.backbone_args.in_chans"
    )
