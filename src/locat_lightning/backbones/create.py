"""Build backbones by timm's name, or from their weights alone."""

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from locat_lightning.backbones.channels import with_channels
from locat_lightning.backbones.locate import LOCATED, add_locat
from locat_lightning.backbones.weights import (
    DECODER_OF,
    RANDOM,
    Role,
    check_here,
    check_source,
    contents_of,
    load_weights,
    pretrained,
    state_for,
)
from locat_lightning.data.bands import Channels
from locat_lightning.errors import InputError, near
from locat_lightning.records import plain


@contextmanager
def without_values() -> Iterator[None]:
    """Build models on the meta device: of shapes alone, in no memory."""
    with torch.device("meta"), _Unclamped():
        yield


class _Unclamped(TorchFunctionMode):
    """Leaves out the last step of truncated initial values, for whose shapes torch needs most of the time."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return args[0] if func is Tensor.clamp_ else func(*args, **(kwargs or {}))


def check_arguments(name: str, arguments: dict[str, Any] | None) -> None:
    """Check that timm knows a model and that it takes these arguments, without memory for its weights.

    Models that cannot be built on the meta device are not checked.
    """
    try:
        with without_values():
            create_backbone(name, arguments, num_classes=0)
    except (InputError, RuntimeError) as error:
        if "meta" not in str(error):  # torch's message for an operation that needs a tensor's values
            raise


def create_backbone(name: str, arguments: dict[str, Any] | None, num_classes: int | None) -> nn.Module:
    """Build a timm model with random weights.

    Args:
        name: timm's.
        arguments: of the model; also `locat`, the arguments of `add_locat`.
        num_classes: of its classifier; 0 for none, None for timm's default.

    Raises:
        InputError: timm knows no such model, it does not take these arguments, or they ask for weights.
    """
    if not timm.is_model(name):
        raise InputError(f"model.backbone: timm knows no model {name!r}{near(name, timm.list_models(), n=5)}")
    own = dict(arguments or {})
    for key in ("pretrained", "checkpoint_path"):
        if own.get(key):
            raise InputError(f"model.backbone_args.{key}: use --weights, which says where weights come from")
    # Unlike dropout, timm's drop path only fails when it first draws.
    if isinstance(rate := own.get("drop_path_rate"), int | float) and not 0 <= rate <= 1:
        raise InputError(f"model.backbone_args.drop_path_rate: {rate} is not between 0 and 1")
    locat = None if name == LOCATED else own.pop("locat", None)
    if num_classes is not None:
        own["num_classes"] = num_classes
    try:
        model: nn.Module = timm.create_model(name, **own)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise InputError(f"model.backbone_args do not fit {name}: {str(error) or arguments}") from error
    except (LookupError, ArithmeticError, AttributeError) as error:  # whose messages alone say nothing
        raise InputError(f"model.backbone_args do not fit {name}: {error!r} of {arguments}") from error
    if 0 in (getattr(getattr(model, "patch_embed", None), "grid_size", None) or ()):
        raise InputError(f"model.backbone_args: a patch of {name} is larger than its images ({arguments})")
    try:
        return model if locat is None else add_locat(model, **locat)
    except (TypeError, ValueError) as error:
        raise InputError(f"model.locat does not fit {name}: {error}") from error


def create_for_any_size(
    name: str, arguments: dict[str, Any] | None, num_classes: int | None = 0
) -> nn.Module:
    """Build a timm model for images of any size if it can take them; see `create_backbone`."""
    try:
        return create_backbone(name, {"dynamic_img_size": True} | (arguments or {}), num_classes)
    except InputError:  # the model has no such argument, unless others are wrong
        return create_backbone(name, arguments, num_classes)


def noted_arguments(hyper_parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `create_backbone` in a task's hyper-parameters: `backbone_args` and `locat`."""
    locat, arguments = hyper_parameters.get("locat"), hyper_parameters.get("backbone_args")
    if not isinstance(arguments, Mapping | None):
        raise InputError(f"backbone_args has to be a dictionary, not a {type(arguments).__name__}")
    return dict(arguments or {}) | ({} if locat is None else {"locat": locat})


class Source(NamedTuple):
    """Where the weights of a backbone are, and which model they belong to, as far as that is known."""

    weights: str  # as for `load_weights`
    name: str | None  # timm's
    arguments: dict[str, Any]
    contents: dict[str, Any] | None  # of the file, if the weights are in one


def find_backbone(
    weights: str,
    name: str | None = None,
    arguments: dict[str, Any] | None = None,
    *,
    moved: str | None = None,
    contents: dict[str, Any] | None = None,
) -> Source:
    """Find a backbone's weights and model; a decoder leads to the frozen backbone that it was trained on.

    `moved` is where the backbone of a decoder is now, if it has moved; other arguments are those of
    `load_backbone`.
    """
    contents = contents_of(weights) if contents is None else contents
    arguments = arguments or {}
    if name is None and contents is not None:
        name, recorded = _recorded_model(weights, contents)
        arguments = recorded | arguments
    elif name is None and timm.is_model(weights):
        name = weights
    if contents is None or (reference := contents.get(DECODER_OF)) is None:
        return Source(weights, name, arguments, contents)
    source = where_recorded(reference, weights, moved)
    check_source(source)
    return find_backbone(source, name, arguments)


def where_recorded(reference: object, file: object, moved: str | None) -> str:
    """Return where the frozen network is that a file refers to in place of its weights.

    That is where the reference (see `tasks.frozen.reference_to`) says, or where the network has `moved`.
    """
    weights = str(reference.get("weights") if isinstance(reference, Mapping) else None)
    if moved is None:
        check_here(weights, file, "model.backbone_weights")
    return moved or weights


def _recorded_model(weights: str, contents: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    own = contents.get("hyper_parameters", {})
    if isinstance(own.get("backbone"), str):
        return own["backbone"], plain(noted_arguments(own), weights, "backbone_args")
    architecture = contents.get("arch")  # as timm's training script has it
    if not isinstance(architecture, str):
        return None, {}
    line = vars(contents["args"]) if isinstance(contents.get("args"), argparse.Namespace) else {}
    told = {"in_chans": line.get("in_chans"), "global_pool": line.get("gp")}
    told = {key: value for key, value in told.items() if value is not None}
    return architecture, told | (line.get("model_kwargs") or {})


def load_backbone(
    weights: str,
    name: str | None = None,
    arguments: dict[str, Any] | None = None,
    *,
    network: Role = "teacher",
    any_size: bool = False,
    classifier: bool = False,
    contents: dict[str, Any] | None = None,
    channels: Channels | None = None,
) -> nn.Module:
    """Build a timm model from any source of weights, and report what matched.

    Args:
        weights: as for `load_weights`; the decoder of a frozen backbone leads to that backbone.
        name: timm's name of the model; None takes the one that is recorded in the weights.
        arguments: of the model, in addition to or instead of those recorded in the weights.
        network: which network of a checkpoint with a teacher and a student.
        any_size: take images of other sizes than the model was built for, where timm can.
        classifier: keep the classifier that the weights have, if they have one.
        contents: of the weights' file, if `read_checkpoint` has read it already.
        channels: of the images, to which the patch embedding of RGB weights is adapted; None takes the model
            as it is.

    Raises:
        InputError: the model is not recorded in the weights, timm does not know it or it does not take the
            arguments, or the weights cannot be read or do not fit.
    """
    given = weights
    weights, name, arguments, contents = find_backbone(weights, name, arguments, contents=contents)
    arguments = with_channels(name, arguments, channels)
    classifier = classifier and weights == given  # the backbone of a decoder has none
    known_to_timm = contents is None and weights != RANDOM  # or to a model hub
    if known_to_timm and (name is None or (classifier and name == weights)):
        check_source(weights)
        arguments = ({} if classifier else {"num_classes": 0}) | arguments
        if any_size:
            with suppress(InputError):  # not every model takes the argument
                return pretrained(weights, **{"dynamic_img_size": True} | arguments)
        return pretrained(weights, **arguments)
    if name is None:
        raise InputError(
            f"{weights} does not record its model: add --backbone with timm's name of it (--model.backbone "
            "for fit, validate, test and predict)"
        )
    create = create_for_any_size if any_size else create_backbone
    model = create(name, arguments, 0)
    if classifier and weights != RANDOM:
        of_timm: Any = model
        head = of_timm.pretrained_cfg.get("classifier") or ""
        rows = f"{head if isinstance(head, str) else head[0]}.weight"
        state = state_for(model, weights, network=network, contents=contents)
        if rows in state:
            model = create(name, arguments, len(state[rows]))
    load_weights(model, weights, network=network, contents=contents)
    return model
