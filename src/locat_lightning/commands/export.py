"""`locat export`: a model in a common format, with a card that says how it was made."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from jinja2 import Template
from jsonargparse import ArgumentParser
from timm.data import resolve_model_data_config
from timm.models import get_model_input_config

from locat_lightning.backbones.create import load_backbone
from locat_lightning.backbones.formats import FILES, OPSET, Format, check_format, write_model
from locat_lightning.backbones.locate import architecture_of
from locat_lightning.backbones.weights import DECODER_OF, Role, contents_of
from locat_lightning.commands.checks import check_writable
from locat_lightning.commands.defaults import IMAGES
from locat_lightning.commands.messages import errors_in_a_line
from locat_lightning.commands.parsing import add_weights_options, command_parser, parse
from locat_lightning.commands.sources import check_weights, load_record, record_of_run
from locat_lightning.errors import InputError
from locat_lightning.evaluation.cost import count_parameters
from locat_lightning.tasks.long_tail import CLASS_COUNTS, class_counts_of

DESCRIPTION = (
    "Write a model and its card into a folder: for a classification the backbone and classifier, for a "
    "self-supervised run the teacher's backbone, for a segmentation the backbone. What was written is loaded "
    "again, and its outputs are compared"
)
TEMPLATE = Path(__file__).with_name("card.md.jinja")
# What of a run's config is its recipe, besides the model's own options.
OF_TRAINER = ("max_epochs", "max_steps", "precision", "accumulate_grad_batches", "gradient_clip_val")
OF_DATA = (
    *("dataset", "batch_size", "auto_augment", "scale", "ratio", "hflip"),
    *("color_jitter", "random_erasing"),
)


@errors_in_a_line
def main(arguments: list[str]) -> None:
    """Run `locat export …`."""
    config = parse(_parser(), arguments[1:])
    check_weights(config.weights)
    check_format(config.format)
    to = Path(config.to)
    check_target(to, config.overwrite)
    network: Role = "student" if config.student else "teacher"
    contents = contents_of(config.weights) or {}
    options: dict[str, Any] = {"network": network, "classifier": True, "contents": contents or None}
    model: Any = load_backbone(config.weights, config.backbone, config.backbone_args, **options)
    weights = contents.get(DECODER_OF, {}).get("weights", config.weights)  # of a decoder, its frozen backbone
    if Path(weights).is_file():
        forget_notes(model)
    record = record_of_run(Path(weights))
    run = load_record(record) if record else {}  # words for the card
    names = contents.get("hyper_parameters", {}).get("class_names") or []
    classes = names if len(names) == model.num_classes else None
    what, images = _what(model, contents, network), _images(run)
    counts = class_counts_of(config.weights, contents or None, model.num_classes)
    notes = {CLASS_COUNTS: counts} if counts else {}
    with files_for(to) as directory:
        difference = write_model(model, directory, config.format, classes=classes, images=images, notes=notes)
        of_run = _of_run(run, Path(weights)) if run else {}
        write_card(model, directory, to.absolute().name, config.format, what, Path(weights), images, of_run)
        files = sorted(each.name for each in directory.iterdir())
    same = f"differ by {difference:.1g} of the largest" if difference else "are the same as before"
    print(f"{what} -> {to}: {', '.join(files)}\nread again: its outputs {same}")


def _parser() -> ArgumentParser:
    parser = command_parser("export", DESCRIPTION)
    add = parser.add_argument
    add_weights_options(parser)
    add("--to", type=str, required=True, help="folder for the files")
    help_ = (
        f"timm: config.json and model.safetensors, as model hubs have them. onnx: model.onnx, opset {OPSET}. "
        "torchscript: model.pt. export: model.pt2, of torch.export. The last three take images of one size, "
        "in batches of any size"
    )
    add("--format", type=Format, default="timm", help=help_)
    add("--overwrite", action="store_true", help="replace files of the same names in the folder")
    return parser


def check_target(to: Path, overwrite: bool) -> None:
    """Check that `--to` is a folder that can be written to, without files or to be overwritten."""
    if to.suffix in {Path(file).suffix for file in FILES.values()}:
        raise InputError(f"--to: {to} is the name of a file: give a folder, in which export names the files")
    if to.exists() and not to.is_dir():
        raise InputError(f"--to: {to} is a file: give a folder")
    if to.is_dir() and any(to.iterdir()) and not overwrite:
        raise InputError(f"--to: {to} is not empty: give another folder, or add --overwrite")
    check_writable("--to", to.absolute().parent)


def forget_notes(model: Any) -> None:
    """Forget what timm notes of the weights that it has under a model's name."""
    noted = ("license", "tag", "notes", "origin_url", "paper_ids", "paper_name")
    model.pretrained_cfg = {k: v for k, v in model.pretrained_cfg.items() if k not in noted}


@contextmanager
def files_for(to: Path) -> Iterator[Path]:
    """Make a folder for files, which move to `to` when all are written; after an error there are none."""
    above = next(folder for folder in to.absolute().parents if folder.is_dir())
    with TemporaryDirectory(prefix=f".locat-{to.name}-", dir=above) as name:  # on the same disk
        yield Path(name)
        files = sorted(Path(name).iterdir())
        to.mkdir(parents=True, exist_ok=True)
        (own := Path(name) / "mode").touch()
        for file in files:
            file.chmod(own.stat().st_mode)  # safetensors keeps its files to their owner
        for file in files:
            file.replace(to / file.name)


def _what(model: Any, contents: dict[str, Any], network: Role) -> str:
    """Return what is exported, in words."""
    names = [*contents, *contents.get("state_dict", ())]
    if any(name.startswith("decoder.") for name in names):
        frozen = "frozen " if DECODER_OF in contents else ""
        return f"the {frozen}backbone of a segmentation (its decoder stays behind)"
    if any("teacher" in name for name in names):
        return f"the {network}'s backbone"
    return (
        f"a model with {model.num_classes} classes" if model.num_classes else "a backbone without classifier"
    )


def _images(run: dict[str, Any]) -> dict[str, Any]:
    """Return how a run's images were normalised and resized, by timm's names."""
    data = run.get("data", {}).get("init_args", {})
    return {name: data[option] for option, name in IMAGES.items() if data.get(option) is not None}


def write_card(
    model: Any,
    directory: Path,
    name: str,
    form: Format,
    what: str,
    weights: Path,
    images: dict[str, Any],
    told: dict[str, dict[str, Any]],
) -> None:
    """Write the model card, without any path of the machine, into a folder.

    `what` is in it and where it comes from, and what else is `told` by title, `images` by timm's names.
    """
    template = Template(TEMPLATE.read_text(encoding="utf-8"), trim_blocks=True, lstrip_blocks=True)
    card: str = template.render(
        name=name,
        model=model,
        what=what,
        format=form,
        architecture=architecture_of(model),
        parameters=count_parameters(model)[0],
        source=weights.name if weights.is_file() else weights,
        size=list(get_model_input_config(model)["input_size"]),
        images=resolve_model_data_config(model) | images,
        file=FILES[form],
        opset=OPSET,
        versions=f"torch {torch.__version__}, timm {timm.__version__}",
        of_run=told,
    )
    (directory / "README.md").write_text(f"{card}\n", encoding="utf-8")


def _of_run(run: dict[str, Any], weights: Path) -> dict[str, dict[str, Any]]:
    """Return data, recipe and metrics of a run."""
    data, model, start = run["data"]["init_args"], run["model"], run.get("weights")
    told = {key: data.get(key) for key in OF_DATA}
    told["folder"] = Path(data["root"]).name if data.get("root") else None
    recipe = {"task": model["class_path"].rpartition(".")[2], **model["init_args"]}
    recipe |= {key: run.get("trainer", {}).get(key) for key in OF_TRAINER}
    recipe |= {"seed": run.get("seed_everything"), "class_names": None, "backbone_weights": None}
    recipe["started from"] = Path(start).name if start and Path(start).suffix else start
    file = weights.parent.parent / "metrics.json"
    metrics = json.loads(file.read_text()) if file.is_file() else {"none": "the run was not finished"}
    return {
        "Data": {key: value for key, value in told.items() if value is not None},
        "Recipe": {key: value for key, value in recipe.items() if value not in (None, -1)},
        "Metrics (at the end of the run, and the best)": {
            key: f"{value:.4g}" if isinstance(value, float) else value
            for key, value in metrics.items()
            if not isinstance(value, dict | list)
        },
    }
