"""`locat export`: a model in a common format, with a card that says how it was made."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
import yaml
from jsonargparse import ArgumentParser
from timm.data import resolve_model_data_config
from timm.models import get_model_input_config
from timm.models._hub import generate_readme
from torch import nn

from locat_lightning.backbones.create import load_backbone
from locat_lightning.backbones.formats import FILES, OPSET, Format, check_format, write_model
from locat_lightning.backbones.locate import architecture_of
from locat_lightning.backbones.weights import DECODER_OF, Role, read_checkpoint
from locat_lightning.commands.messages import errors_in_a_line
from locat_lightning.commands.parsing import (
    add_weights_options,
    check_weights,
    command_parser,
    local_dir,
    parse,
    record_of_run,
)
from locat_lightning.errors import InputError
from locat_lightning.evaluation.cost import count_parameters

DESCRIPTION = (
    "Write a model and its card into a folder: for a classification the backbone and classifier, for a "
    "self-supervised run the teacher's backbone, for a segmentation the backbone. What was written is loaded "
    "again, and its outputs are compared"
)
CITATION = """@inproceedings{locatvit2026,
  title     = {Locality-Attending Vision Transformer},
  booktitle = {International Conference on Learning Representations},
  year      = {2026},
  note      = {arXiv:2603.04892}
}"""
USAGE = {
    "timm": """import timm
import locat_lightning  # registers the LocAt models

model = timm.create_model("local-dir:DIR", pretrained=True).eval()  # hf-hub:NAME, once it is there""",
    "onnx": """from onnxruntime import InferenceSession

session = InferenceSession("DIR/model.onnx")
(output,) = session.run(None, {"images": images})  # float32 [batch, *IMAGE]""",
    "torchscript": """import torch

model = torch.jit.load("DIR/model.pt")
output = model(images)  # [batch, *IMAGE]""",
    "export": """import torch

model = torch.export.load("DIR/model.pt2").module()
output = model(images)  # [batch, *IMAGE]""",
}
# What of a run's config is its recipe, besides the model's own options.
OF_TRAINER = ("max_epochs", "max_steps", "precision", "accumulate_grad_batches", "gradient_clip_val")
OF_DATA = (
    "dataset",
    "batch_size",
    "auto_augment",
    "scale",
    "ratio",
    "hflip",
    "color_jitter",
    "random_erasing",
)


@errors_in_a_line
def main(arguments: list[str]) -> None:
    """Run `locat export …`."""
    config = parse(_parser(), arguments[1:])
    check_weights(config.weights)
    config.weights = local_dir(config.weights)
    check_format(config.format)
    to = Path(config.to)
    _check_target(to, config.overwrite)
    network: Role = "student" if config.student else "teacher"
    read = read_checkpoint(config.weights) if Path(config.weights).is_file() else None
    model = load_backbone(
        config.weights, config.backbone, config.backbone_args, network=network, classifier=True, contents=read
    )
    of_timm: Any = model
    contents = read or {}
    weights = contents.get(DECODER_OF, {}).get("weights", config.weights)  # of a decoder, its frozen backbone
    what = _what(model, contents, network)
    if Path(weights).is_file():  # what timm notes of the weights that it has under this name
        noted = ("license", "tag", "notes", "origin_url", "paper_ids", "paper_name")
        of_timm.pretrained_cfg = {k: v for k, v in of_timm.pretrained_cfg.items() if k not in noted}
    record = record_of_run(Path(weights))
    run = yaml.safe_load(record.read_text()) if record else {}
    with _beside(to) as name:
        directory = Path(name)
        names = contents.get("hyper_parameters", {}).get("class_names") or []
        written = write_model(
            model,
            directory,
            config.format,
            classes=names if len(names) == of_timm.num_classes else None,
            images=_images(run),
        )
        card = _card(model, config.format, what, Path(weights), run)
        readme = directory / "README.md"
        task = "image-classification" if of_timm.num_classes else "image-feature-extraction"
        readme.write_text(generate_readme(card, to.absolute().name, task), encoding="utf-8")
        files = sorted(directory.iterdir())
        to.mkdir(parents=True, exist_ok=True)
        for file in files:
            file.chmod(readme.stat().st_mode)  # safetensors keeps its files to their owner
        for file in files:
            file.replace(to / file.name)
    same = f"differ by {written:.1g} of the largest" if written else "are the same as before"
    print(f"{what} -> {to}: {', '.join(file.name for file in files)}\nread again: its outputs {same}")


def _parser() -> ArgumentParser:
    parser = command_parser("export", DESCRIPTION)
    add = parser.add_argument
    add_weights_options(parser)
    add("--to", type=str, required=True, help="folder for the files")
    add(
        "--format",
        type=Format,
        default="timm",
        help="timm: config.json and model.safetensors, as model hubs have them. onnx: model.onnx, opset "
        f"{OPSET}. torchscript: model.pt. export: model.pt2, of torch.export. The last three take images of "
        "one size, in batches of any size",
    )
    add("--overwrite", action="store_true", help="replace files of the same names in the folder")
    return parser


def _check_target(to: Path, overwrite: bool) -> None:
    if to.exists() and not to.is_dir():
        raise InputError(f"--to: {to} is a file: give a folder")
    if to.is_dir() and any(to.iterdir()) and not overwrite:
        raise InputError(f"--to: {to} is not empty: give another folder, or add --overwrite")


def _beside(to: Path) -> "TemporaryDirectory[str]":
    """Create a folder on the same disk, from which finished files are moved."""
    existing = next(folder for folder in (to, *to.absolute().parents) if folder.is_dir())
    if existing == to:
        existing = to.absolute().parent
    try:
        return TemporaryDirectory(prefix=".locat-export-", dir=existing)
    except OSError as error:
        raise InputError(f"--to: {existing} cannot be written to ({error.strerror})") from error


def _what(model: nn.Module, contents: dict[str, Any], network: Role) -> str:
    """Return what is exported, in words."""
    state = contents.get("state_dict") or contents
    if DECODER_OF in contents:
        return "the frozen backbone of a segmentation (its decoder stays behind)"
    if isinstance(state, dict) and any(name.startswith("decoder.") for name in state):
        return "the backbone of a segmentation (its decoder stays behind)"
    if isinstance(state, dict) and any("teacher" in name for name in (*state, *contents)):
        return f"the {network}'s backbone"
    classes = getattr(model, "num_classes", 0)
    return f"a model with {classes} classes" if classes else "a backbone without classifier"


def _images(run: dict[str, Any]) -> dict[str, Any]:
    """Return how a run's images were normalised and resized, by timm's names."""
    data = run.get("data", {}).get("init_args", {})
    names = {"mean": "mean", "std": "std", "crop_pct": "crop_pct", "eval_interpolation": "interpolation"}
    return {names[key]: data[key] for key in names if data.get(key) is not None}


def _card(model: nn.Module, form: Format, what: str, weights: Path, run: dict[str, Any]) -> dict[str, Any]:
    """Return what timm's `generate_readme` makes a model card of."""
    of_timm: Any = model
    images = resolve_model_data_config(model) | _images(run)
    size = list(get_model_input_config(model)["input_size"])
    details: dict[str, Any] = {
        "Architecture": architecture_of(model),
        "Parameters": f"{count_parameters(model)[0]:,}",
        "What": f"{what}; from {weights.name if weights.is_file() else weights}",
        "Images": {
            "channels, height, width": size,
            **{key: images[key] for key in ("mean", "std", "crop_pct", "interpolation")},
        },
    }
    if form != "timm":
        details["File"] = f"{FILES[form]}, any number of images of this size"
        details["Written by"] = f"torch {torch.__version__}, timm {timm.__version__}"
    if form == "onnx":
        details["Opset"] = OPSET
    if run:
        details |= _of_run(run, weights)
    return {
        "tags": ["timm", "locat-lightning"],
        "license": of_timm.pretrained_cfg.get("license") or "unknown",
        "description": f"{what.capitalize()}, written by locat-lightning.",
        "details": details,
        "usage": f"```python\n{USAGE[form].replace('*IMAGE', ', '.join(map(str, size)))}\n```",
        "citation": CITATION,
    }


def _of_run(run: dict[str, Any], weights: Path) -> dict[str, Any]:
    """Return data, recipe and metrics of a run, without any path of the machine."""
    model, data = run["model"], run["data"]
    recipe = {"task": model["class_path"].rpartition(".")[2], **model["init_args"]}
    recipe |= {key: run.get("trainer", {}).get(key) for key in OF_TRAINER}
    told = {key: data["init_args"].get(key) for key in OF_DATA}
    if (root := data["init_args"].get("root")) is not None:
        told["folder"] = Path(root).name
    for key in ("class_names", "backbone_weights"):
        recipe.pop(key, None)
    recipe["seed"] = run.get("seed_everything")
    if (start := run.get("weights")) is not None:
        recipe["started from"] = Path(start).name if Path(start).suffix else start
    file = weights.parent.parent / "metrics.json"
    metrics = json.loads(file.read_text()) if file.is_file() else {"none": "the run was not finished"}
    return {
        "Data": {key: value for key, value in told.items() if value is not None},
        "Recipe": {key: value for key, value in recipe.items() if value not in (None, -1)},
        "Metrics (at the end of the run, and the best)": {
            key: f"{value:.4g}" if isinstance(value, float) else value for key, value in metrics.items()
        },
    }
