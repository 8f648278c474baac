"""Load weights into a model from every kind of checkpoint, without executing anything in a file."""

import argparse
import json
import pickle
import re
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, get_args
from zipfile import ZipFile, is_zipfile

import timm
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from safetensors.torch import load_file
from timm.models import adapt_input_conv
from torch import Tensor, nn

from locat_lightning.backbones.channelvit import ChannelViT
from locat_lightning.backbones.parts import assemble
from locat_lightning.backbones.registry import checkpoint_filter_fn
from locat_lightning.errors import InputError, in_a_line, near
from locat_lightning.nn import GaussianAugmentation, GaussianMixture, PatchRefinement
from locat_lightning.nn.experts import without_experts
from locat_lightning.records import check_like, plain

RANDOM = "random"

DECODER_OF = "decoder_of"  # key of a decoder's checkpoint: the frozen backbone that it was trained on

# Keys of the weights in the checkpoints of training scripts, best first; DINO's two networks come before.
CONTAINERS = (
    *("state_dict_ema", "ema_state_dict", "state_dict", "model_state_dict"),
    *("model_ema", "model", "net"),
)

CHUNK = re.compile(r"(?<=blocks\.)\d+\.(?=\d+\.)")  # DINOv2's: blocks.0.7 is block 7

HUBS = ("hf-hub:", "hf_hub:")

CHANNELS = "patch_embed.channel_embed"  # which weights of other models lack

LOCAT = (GaussianAugmentation, GaussianMixture, PatchRefinement)

Role = Literal["teacher", "student"]


def load_weights(
    model: nn.Module,
    weights: str,
    *,
    warm_start: bool = False,
    network: Role = "teacher",
    contents: dict[str, Any] | None = None,
) -> None:
    """Load weights into a timm model and report what matched.

    Args:
        model: Gets the weights.
        weights: `random` (leaves the model as it is), a file (checkpoint of Lightning, timm or DINO, plain
            state dict, safetensors), a folder that `locat export` wrote, or a name that timm knows
            (`vit_small_patch16_224.augreg_in21k`, `hf-hub:…`, `local-dir:…`).
        warm_start: Keep what the weights cannot have: a classifier of another size, and LocAt's parameters
            where a model without LocAt was trained.
        network: Which network of a checkpoint with a teacher and a student.
        contents: Of the file, if `read_checkpoint` has read it already.

    Raises:
        InputError: there is no such file or name, the file cannot be read safely, or it holds less than half
            of the model.
    """
    if weights == RANDOM:
        rank_zero_warn(f"--weights {RANDOM}: the model has not been trained")
        return
    state = state_for(model, weights, network=network, contents=contents)
    own = model.state_dict()
    for name, value in state.items():
        if name in own and own[name].is_floating_point() and not value.is_floating_point():
            raise InputError(f"{weights}: {name} holds {value.dtype}, not floating-point numbers")
    other_shape = sorted(k for k, v in state.items() if k in own and v.shape != own[k].shape)
    matched = {k: v for k, v in state.items() if k in own and k not in other_shape}
    missing = sorted(own.keys() - matched.keys() - set(other_shape))
    unexpected = sorted(state.keys() - own.keys())
    summary = f"{weights}: {len(matched)} of the model's {len(own)} tensors matched"
    heads = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    classifier = tuple(f"{name}." for name in ([heads] if isinstance(heads, str) else heads))
    if left := [name for name in unexpected if name.startswith(classifier)] if classifier else []:
        unexpected = [name for name in unexpected if name not in left]
        summary += ", without the classifier"
    for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", other_shape)):
        if names:
            summary += f", {len(names)} {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
    new: set[str] = set()
    if warm_start:
        given = model.get_classifier()  # type: ignore[operator]
        own_heads = given if isinstance(given, tuple) else (given,)  # two, with a distillation token
        new = _names_in(
            model, (m for head in own_heads if isinstance(head, nn.Module) for m in head.modules())
        )
        of_locat = _names_in(model, (each for each in model.modules() if isinstance(each, LOCAT)))
        new |= of_locat if state.keys().isdisjoint(of_locat) else set()
        if isinstance(model, ChannelViT) and CHANNELS not in state:
            new.add(CHANNELS)
    if 2 * len(matched) < len(own):
        raise InputError(f"less than half of the model matched: {summary}; is it of another model?")
    if wrong := [k for k in (*missing, *other_shape) if k not in new]:
        raise InputError(f"weights do not fit ({', '.join(wrong[:3])}): {summary}")
    model.load_state_dict(matched, strict=False)
    rank_zero_info(summary)


def state_for(
    model: nn.Module, weights: str, *, network: Role = "teacher", contents: dict[str, Any] | None = None
) -> dict[str, Tensor]:
    """Return weights by the names that a timm model has for them, converted to its size.

    Position embeddings and GAug's kernels follow its grid, the patch embedding its patches and channels. The
    model is not changed; other arguments and errors are those of `load_weights`, without `random`.
    """
    state = _below_prefix(read_state(weights, network, contents), model, network)
    try:
        state = checkpoint_filter_fn(state, model)
    except (AttributeError, KeyError, IndexError, RuntimeError, ValueError) as error:
        raise InputError(f"{weights} is not of a {type(model).__name__}: {error}") from error
    first = getattr(model, "pretrained_cfg", {}).get("first_conv")
    own = model.state_dict()
    for name in (f"{each}.weight" for each in ([first] if isinstance(first, str) else first or ())):
        if name in state and name in own and state[name].shape[1] == 3 != own[name].shape[1]:
            state[name] = adapt_input_conv(own[name].shape[1], state[name])
    return state


def check_source(weights: str, option: str = "--weights") -> None:
    """Check that there is such a source of weights, without reading it: `InputError` if not."""
    remote = local_dir(weights).startswith((*HUBS, "local-dir:"))
    if not (weights == RANDOM or remote or Path(weights).is_file() or timm.is_model(weights)):
        raise InputError(
            f"{option}: no such file: {Path(weights).absolute()}; timm knows no such model either"
            f"{near(weights, timm.list_models())}"
        )


def local_dir(weights: str) -> str:
    """Return weights with timm's prefix if they are a folder."""
    return f"local-dir:{weights}" if Path(weights).is_dir() else weights


def check_here(weights: Any, file: object, option: str) -> None:
    """Check that weights that a file names are on this machine: only what a user types is downloaded."""
    name = str(weights)
    known = None if name.startswith(HUBS) else timm.get_pretrained_cfg(name, allow_unregistered=True)
    hub = name.partition(":")[2] if known is None else known.hf_hub_id
    cached = Path(HF_HUB_CACHE) / f"models--{(hub or '').partition('@')[0].replace('/', '--')}"
    if (
        name != RANDOM
        and not Path(name.removeprefix("local-dir:")).exists()
        and not (hub and cached.is_dir())
    ):
        raise InputError(
            f"{file} needs the weights {name!r}, which are not on this machine: set {option} to where they "
            "are now, or to this name if they are to be downloaded"
        )


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU without executing anything in it.

    Raises:
        InputError: the file is missing or damaged, or holds more than tensors and plain values, or weights
            that are not finite.
    """
    path = Path(path)
    contents = _read(path)
    if not isinstance(contents, dict):
        raise InputError(f"{path} holds a {type(contents).__name__}, not a checkpoint")
    contents = assemble(contents, path, _read)
    for key in {"hyper_parameters", DECODER_OF} & contents.keys():
        if not isinstance(contents[key], dict):
            raise InputError(f"{path}: {key} is a {type(contents[key]).__name__}, not a dictionary")
    for weights in (contents, *(contents.get(name) for name in (*get_args(Role), *CONTAINERS))):
        for name, value in weights.items() if isinstance(weights, dict) else ():
            if isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all():
                raise InputError(f"{path} holds weights that are not finite numbers ({name}): use others")
    return contents


def _read(path: Path) -> Any:
    """Read one file of weights; errors are those of `read_checkpoint`."""
    if not path.is_file():
        raise InputError(f"no such file: {path.absolute()}")
    damaged = None
    try:
        if path.suffix == ".safetensors":
            contents: Any = load_file(path)
        else:
            if is_zipfile(path):  # torch writes a checksum of each tensor, but does not look at it
                damaged = ZipFile(path).testzip()
            # The original DINO code stores its command line beside the weights.
            with torch.serialization.safe_globals([argparse.Namespace]):
                contents = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error):
            raise InputError(
                f"{path} holds Python objects besides weights, and loading them could execute code: save its "
                "state dict alone, or as safetensors"
            ) from error
        raise InputError(f"{path} is not a checkpoint that can be read safely") from error
    except Exception as error:  # of any kind, if the file is not a pickle
        said = str(error).partition(". ")[0] or "it is empty"
        reason = said if " " in said else type(error).__name__  # of KeyError, a number
        raise InputError(f"{path} cannot be read (truncated, or no checkpoint?): {reason}") from error
    if damaged is not None:
        raise InputError(f"{path} is damaged ({damaged} has another checksum than when it was written)")
    return contents


def digest_of(weights: Mapping[str, Tensor]) -> str:
    """Return SHA-256 over names and values."""
    digest = sha256()
    for name, value in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def contents_of(weights: str) -> dict[str, Any] | None:
    """Read a file of weights; None where they do not come from a file."""
    return read_checkpoint(weights) if Path(weights).is_file() else None


def exported_config(weights: str) -> dict[str, Any]:
    """Return `config.json` of a folder that `locat export` wrote (`DIR` or `local-dir:DIR`), {} of others.

    Raises:
        InputError: it is no such file, or holds more than data: see `records`.
    """
    file = Path(weights.removeprefix("local-dir:")) / "config.json"
    if not file.is_file():
        return {}
    try:
        config = dict(json.loads(file.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise InputError(f"{file} is not the config of an exported model: {in_a_line(error)}") from error
    own: dict[str, Any] = {"architecture": "", "num_classes": 0}
    own |= {key: {} for key in ("model_args", "pretrained_cfg") if key in config}
    check_like(config, own, file, "config")
    return dict(plain(config, file))


def read_state(
    weights: str, network: Role = "teacher", contents: dict[str, Any] | None = None
) -> dict[str, Tensor]:
    """Return all tensors of a source of weights (see `load_weights`) by name, with experts averaged."""
    contents = contents or contents_of(weights)
    if contents is not None:
        for container in (network, *CONTAINERS):
            if isinstance(contents.get(container), dict):
                contents = contents[container]
                break
        if network == "student" and container != network and not any("student" in name for name in contents):
            raise InputError(f"{weights} holds no student: leave --student out")
        tensors = {name: value for name, value in contents.items() if isinstance(value, Tensor)}
        try:
            return without_experts(tensors)
        except RuntimeError as error:
            raise InputError(f"{weights}: its experts have no mean: {in_a_line(error)}") from error
    check_source(weights)
    return pretrained(weights).state_dict()


def pretrained(name: str, **arguments: Any) -> nn.Module:
    """Build a timm model with the weights of a name or of a folder; `InputError` if timm cannot."""
    try:
        model: nn.Module = timm.create_model(local_dir(name), pretrained=True, **arguments)
    except Exception as error:  # each source has its own exceptions
        raise InputError(f"--weights: timm cannot load {name}: {in_a_line(error)}") from error
    return model


def _below_prefix(state: dict[str, Tensor], model: nn.Module, network: Role) -> dict[str, Tensor]:
    """Return the part of a state dict below the prefix (`module.`, `backbone.`, …) with most of the model."""
    own = list(model.state_dict())
    state = {name.replace("_orig_mod.", ""): value for name, value in state.items()}  # torch.compile's
    if not any(CHUNK.search(name) for name in own):
        state = {CHUNK.sub("", name): value for name, value in state.items()}
    prefixes = {name.removesuffix(own[0]) for name in state if name.endswith(own[0])} | {""}
    best = max(
        sorted(prefixes),
        key=lambda prefix: (sum(prefix + name in state for name in own), network in prefix),
    )
    return {name.removeprefix(best): value for name, value in state.items() if name.startswith(best)}


def _names_in(model: nn.Module, modules: Iterable[nn.Module]) -> set[str]:
    """Return the names of the weights that some of a model's modules have."""
    chosen = set(modules)
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if module in chosen
        for name in module.state_dict()
    }
