"""What a run or an exported model records of itself, as the defaults of a command that is given no config."""

from collections.abc import Container
from pathlib import Path
from typing import Any, Literal

import timm
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import load_model_config_from_hf
from torch import nn

from locat import configs
from locat_lightning.backbones.weights import check_here, exported_config, read_checkpoint
from locat_lightning.commands.parsing import decisive_options
from locat_lightning.commands.sources import check_weights, read_record, record_of_run
from locat_lightning.errors import InputError
from locat_lightning.records import check_like, plain, refused

Kind = Literal["images", "masks", "videos"]  # of data: with labels, with masks, of objects in videos
GROUPS = ("trainer", "checkpoint", "pictures", "knn", "linear", "retrieval")
SIZE = 224  # of the images, where neither the weights nor the model say theirs
# How options of the data are named by timm.
IMAGES = {"mean": "mean", "std": "std", "crop_pct": "crop_pct", "eval_interpolation": "interpolation"}
SOURCES = {"teacher", "backbone_weights"}  # options of models that say where weights are
# What an evaluation takes over from the data of a run of the same kind: which images, their size and their
# normalisation, but not how strongly they were augmented.
OF_ANY_KIND = ("channels", "mean", "std")
OF_BOTH = (*OF_ANY_KIND, "dataset", "root", "stream", "shards_at_once", "classes", "num_workers")
OF_IMAGES = (*OF_BOTH, "img_size", "crop_pct", "eval_interpolation", "scale", "ratio", "hflip", "imbalance")
OF_FOLDER = ("images", "masks", "splits", "image_suffix", "mask_suffix", "ignore_index", "reduce_zero_label")
OF_MASKS = (*OF_BOTH, *OF_FOLDER, "crop_size", "eval_batch_size")
# A command with one of these needs no defaults: it has a config, or only prints.
WITHOUT = {"--help", "-h", "--print_config", "--model.help", "--data.help"}


def of_command(command: str, arguments: list[str]) -> dict[str, Any]:
    """Return what the weights or the checkpoint of a command record of themselves, by dotted option.

    So `locat validate --weights runs/…/best.ckpt` and `locat fit --ckpt_path runs/…/last.ckpt` need no more.
    """
    given = decisive_options(arguments)
    typed = {argument.partition("=")[0] for argument in arguments}
    if given.config or WITHOUT & typed:
        return {}
    checkpoint = _checkpoint(command, given)
    if (record := record_of_run(checkpoint)) is not None:
        return _of_run(command, record, checkpoint, typed)
    if given.weights is not None:
        check_weights(given.weights)
    if checkpoint.is_file():
        read_checkpoint(checkpoint)  # report an unreadable file as such, before asking for a config
    if given.model is not None or getattr(given, "model.class_path") is not None:
        return {}
    if given.weights is not None and (exported := exported_config(given.weights)):
        return _of_export(command, exported)
    if command != "fit" and given.weights is None:
        needed = "--weights: a checkpoint of a run, or other weights with --config"
        raise InputError(f"locat {command} needs {needed}")
    raise InputError(f"locat {command} needs --config, a file or one of {', '.join(configs.names())}")


def _checkpoint(command: str, given: Any) -> Path:
    if command != "fit":
        return Path(given.weights or "")
    if given.ckpt_path is None:
        return Path()
    runs = Path(given.runs or "runs")
    if given.ckpt_path == "last" and given.name is None:
        names = sorted({path.parents[2].name for path in runs.glob("*/*/checkpoints/last.ckpt")})
        known = f" ({', '.join(names)})" if names else ""
        raise InputError(f"--ckpt_path last needs --name, the name of the run{known}, or its --config")
    return checkpoint_to_resume(given.ckpt_path, runs, given.name)


def checkpoint_to_resume(given: str, runs: str | Path, name: str | None) -> Path:
    """Return the checkpoint that --ckpt_path names: by its path, or `last` of the newest run of a name."""
    if given != "last":
        if not Path(given).is_file():
            raise InputError(f"--ckpt_path: no such file: {Path(given).absolute()}")
        return Path(given)
    directory = Path(runs) / str(name)
    found = sorted(directory.glob("*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise InputError(f"--ckpt_path last: no run in {directory.absolute()} has a last.ckpt")
    return found[-1]


def _of_run(command: str, record: Path, checkpoint: Path, typed: set[str]) -> dict[str, Any]:
    keys, groups = ["model", "data"], GROUPS if command == "fit" else ()
    if command == "fit":
        keys += ["seed_everything", "weights"]
    config = read_record(record, (*keys, *groups), typed)
    if config["left_out"]:
        raise refused(record, f"sets {', '.join(sorted(config['left_out']))}")
    found = {f"{group}.{key}": v for group in groups for key, v in config.get(group, {}).items()}
    arguments = config["model"]["init_args"]
    if command != "fit":
        # The data of a run decide how many classes it has; the data to predict may have none.
        known = plain(read_checkpoint(checkpoint).get("hyper_parameters", {}), checkpoint)
        arguments |= {key: known[key] for key in arguments.keys() & known.keys()}
        if config["model"]["class_path"].endswith("Classification"):
            arguments.pop("teacher", None)  # which training alone needs
    for option in SOURCES - {each.removeprefix("--model.") for each in typed}:
        if arguments.get(option) is not None:
            check_here(arguments[option], record, f"--model.{option}")
    return found | {key: config[key] for key in (*keys, "name", "runs") if config.get(key) is not None}


def _of_export(command: str, config: dict[str, Any]) -> dict[str, Any]:
    arguments = {"backbone": config["architecture"], "backbone_args": config.get("model_args", {})}
    if command != "fit":
        arguments |= {"num_classes": config["num_classes"], "class_names": config.get("label_names")}
    return {
        "model": {"class_path": "locat_lightning.tasks.Classification", "init_args": arguments},
        "data": {"class_path": "locat_lightning.data.ImageData", "init_args": of_images(config)},
    }


def of_images(config: dict[str, Any]) -> dict[str, Any]:
    """Return what an exported model says of its images, by the names of data's options."""
    known = config.get("pretrained_cfg", {})
    found = {option: known[name] for option, name in IMAGES.items() if known.get(name) is not None}
    if isinstance(mean := found.get("mean"), list) and len(mean) != 3:
        found["channels"] = len(mean)
    size = config.get("model_args", {}).get("img_size") or known.get("input_size")
    return found | ({"img_size": size[-1] if isinstance(size, list | tuple) else size} if size else {})


def of_evaluation(kind: Kind, weights: str, typed: set[str]) -> dict[str, Any]:
    """Return what the weights say of the images that they are for, by option of a kind of data."""
    if (record := record_of_run(Path(weights))) is not None:
        return of_data(kind, read_record(record, ["data"], typed)["data"], typed)
    if exported := exported_config(weights):
        images = of_images(exported)
    else:
        images = of_images({"pretrained_cfg": _pretrained_cfg(weights)})
        images.pop("img_size", None)
    keys = images if kind == "images" else OF_ANY_KIND
    return {f"data.{key}": images[key] for key in keys if key in images}


def images_for(weights: str, backbone: nn.Module | None = None) -> dict[str, Any]:
    """Return mean, std, channels and `img_size` of the images that a model is for.

    Where its weights do not say them they are ImageNet's, and the size that the model was built for.
    """
    built_for = getattr(getattr(backbone, "patch_embed", None), "img_size", None) or (SIZE, SIZE)
    own: dict[str, Any] = {"mean": [*IMAGENET_DEFAULT_MEAN], "std": [*IMAGENET_DEFAULT_STD]}
    own |= {"channels": None, "img_size": min(built_for)}
    recorded = of_evaluation("images", weights, {"--data.dataset"})  # whose images are not read
    if isinstance(channels := recorded.get("data.channels"), int | list):
        number = len(recorded["data.mean"]) if isinstance(recorded.get("data.mean"), list) else 0
        own |= {"mean": [0.0] * number, "std": [1.0] * number}
        own |= {"channels": [0] * len(channels) if isinstance(channels, list) else 0}
    known = {key: recorded.get(f"data.{key}", value) for key, value in own.items()}
    check_like(known, own, weights, "data")
    std, taken = known["std"], known["channels"]
    if isinstance(taken, list):  # one that is constant may have been left out
        std = [std[channel] for channel in taken if channel < len(std)]
    if min(std, default=0.0) <= 0 or not known["img_size"]:
        raise InputError(f"{weights}: data.std and data.img_size must be above 0")
    return known


def of_data(kind: Kind, recorded: dict[str, Any], typed: Container[str] = ()) -> dict[str, Any]:
    """Return what the data of a training say of their images, by option of a kind of data.

    `typed` are the options that the user gave.
    """
    data, has_masks = dict(recorded["init_args"]), recorded["class_path"].endswith("SegmentationData")
    if views := data.get("views", {}).get("init_args"):
        data |= {"img_size": views.get("global_size"), "hflip": views.get("hflip")}
    of_a_kind = kind == ("masks" if has_masks else "images")
    keys = (OF_MASKS if has_masks else OF_IMAGES) if of_a_kind else OF_ANY_KIND
    if any(option in typed for option in ("--data.root", "--data.dataset", "--data.stream")):
        data.pop("imbalance", None)  # which was that of other images
    if data.get("dataset") == "digits" and kind != "videos" and "--data.root" not in typed:
        keys = (*keys, "dataset")  # there are digits of either kind
    return {f"data.{key}": data[key] for key in keys if data.get(key) is not None}


def _pretrained_cfg(weights: str) -> dict[str, Any]:
    """Return what timm or a hub notes beside the weights that they name; {} of others."""
    source, _, place = weights.partition(":")
    if source not in ("hf-hub", "hf_hub"):
        return dict(timm.get_pretrained_cfg(weights).to_dict()) if timm.is_model(weights) else {}
    try:
        return dict(load_model_config_from_hf(place)[0])
    except Exception:  # of many kinds, which are reported when the weights are loaded
        return {}
