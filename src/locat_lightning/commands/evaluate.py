"""`locat knn`, `linear`, `retrieve`, `robustness`, `layers`: a model, or its features, as it stands."""

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.fabric import Fabric
from torch import nn

from locat.runs import claim
from locat_lightning.backbones.channels import take_channels
from locat_lightning.backbones.create import load_backbone
from locat_lightning.backbones.weights import Role, contents_of, local_dir
from locat_lightning.commands import checks, parsing, sources
from locat_lightning.commands.accuracy import add_knn_options, add_linear_options, measure_knn, measure_linear
from locat_lightning.commands.datasets import ending_of, options_of, show_together, subsets_of
from locat_lightning.commands.defaults import Kind, of_data, of_evaluation
from locat_lightning.commands.layers import add_layers_options, look_at_layers
from locat_lightning.commands.measurement import Measurement, report
from locat_lightning.commands.messages import errors_in_a_line
from locat_lightning.commands.retrieval import add_retrieval_options, retrieve
from locat_lightning.commands.robustness import measure_robustness
from locat_lightning.data import ImageData, SegmentationData
from locat_lightning.errors import InputError
from locat_lightning.evaluation.features import autocast_type
from locat_lightning.evaluation.robustness import Robustness
from locat_lightning.tasks.segmenter import holds_segmentation, load_segmenter

DESCRIPTIONS = {
    "knn": "Accuracy of weighted k-nearest-neighbour classification with a frozen backbone's features",
    "linear": "Accuracy of a linear classifier on a frozen backbone's features",
    "retrieve": "mIoU of dense retrieval (Hummingbird): each patch takes the classes of the training patches "
    "most similar to it; nothing is trained",
    "robustness": "Top-1 of a classifier, or mIoU of a segmentation, against the number of patches that are "
    "corrupted, as curves",
    "layers": "How far attention reaches in each layer of a Vision Transformer, and how alike its patches "
    "are to [CLS] and to each other",
}


class ConfigOfImages(parsing.ConfigByName):
    """`--config` takes options of the command, or a config of `locat fit`, of which the images count."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        data = yaml.safe_load(Path(parsing.find_config(str(values))).read_text()).get("data")
        if not (isinstance(data, dict) and "class_path" in data):
            super().__call__(parser, cfg, values, option_string)
            return
        images = of_data(_kind_of(parser), data)
        text = yaml.safe_dump({"data": {key.removeprefix("data."): value for key, value in images.items()}})
        ActionConfigFile.__call__(self, parser, cfg, text, option_string)


@errors_in_a_line
def main(arguments: list[str]) -> None:
    """Run `locat knn …`, `locat linear …`, `locat retrieve …`, `locat robustness …` or `locat layers …`."""
    evaluate(arguments)


def evaluate(arguments: list[str]) -> Path | None:
    """Run the command, and return the directory of its run, in the first process."""
    command, *arguments = arguments
    masks = command == "retrieve" or (command == "robustness" and _names_segmentation(arguments))
    parser = _parser(command, masks=masks)
    config, directory, fabric = prepared(command, parser, arguments)
    images = _data(parser, config)
    channels = next(iter(images.values())).model_channels
    load: Callable[..., nn.Module] = partial(load_backbone, channels=channels)
    if command == "robustness":
        segmenter = partial(load_segmenter, moved=config.backbone_weights) if masks else None
        load = segmenter or partial(load_backbone, classifier=True)
    model = launched(config, fabric, load)
    measured, run = dict[str, Measurement](), None
    for dataset, data in images.items():
        take_channels(model, data.model_channels)
        measured[dataset] = measurement = MEASURES[command](model, data, config, fabric)
        if fabric.is_global_zero:
            place = directory.with_name(directory.name + ending_of(dataset)) if dataset else directory
            known = {"weights": config.weights, "seed": config.seed}
            run = report(measurement, claim(place), alone=len(images) == 1, **known)
    if fabric.is_global_zero and len(images) > 1:
        show_together(measured)
    return run


def prepared(command: str, parser: ArgumentParser, arguments: list[str]) -> tuple[Namespace, Path, Fabric]:
    """Return the options of a command, the directory of its runs, and the processes, not launched yet."""
    config = parse_with_weights(parser, arguments)
    autocast_type(config.precision)  # a mistake shows before anything is read
    directory = Path(config.runs) / (config.name or f"{name_of(config.weights)}_{command}")
    checks.check_writable("--runs", directory)
    fabric = Fabric(accelerator=config.accelerator, devices=config.devices, strategy=config.strategy)
    if fabric.device.type == "cpu":
        checks.check_processes(fabric.world_size)
    return config, directory, fabric


def launched(config: Namespace, fabric: Fabric, load: Callable[..., nn.Module] = load_backbone) -> nn.Module:
    """Launch the processes, and return the model on the device of this one; `load` is as `load_backbone`."""
    fabric.launch()
    fabric.seed_everything(config.seed, verbose=False)
    return loaded(config.weights, config, load).to(fabric.device)


def loaded(weights: str, config: Namespace, load: Callable[..., nn.Module] = load_backbone) -> nn.Module:
    """Return the model of these weights, by the options that say which it is; `load`: as `load_backbone`."""
    network: Role = "student" if config.student else "teacher"
    return load(weights, config.backbone, config.backbone_args, network=network, any_size=True)


def _data(parser: ArgumentParser, config: Namespace) -> dict[str, ImageData | SegmentationData]:
    """Return the images by what `--datasets` or `--subsets` names, "" without these; all are found now."""
    found: dict[str, ImageData | SegmentationData] = {}
    sets, subsets = config.get("datasets") or [], config.get("subsets") or []
    if sets and subsets:
        raise InputError("--datasets and --subsets: give one of them")
    for dataset, options in (options_of(sets) | subsets_of(subsets)).items() or [("", {})]:
        own = config.clone()
        for key, value in options.items():
            own.data[key] = value
        found[dataset] = data = parser.instantiate_classes(own).data
        data.prepare_data()
        data.setup("fit")
    return found


def parse_with_weights(parser: ArgumentParser, arguments: list[str]) -> Namespace:
    """Parse the options of a command, after those that its weights record of their images."""
    command = parser.prog.split()[-1]
    given, recorded = parsing.decisive_options(arguments), list[str]()
    if given.weights is not None:
        sources.check_weights(given.weights)
        typed = {argument.partition("=")[0] for argument in arguments}
        typed |= {"--data.dataset"} if "--datasets" in typed else set()
        recorded = parsing.as_arguments(of_evaluation(_kind_of(parser), given.weights, typed))
        arguments = [*recorded, *arguments]  # before what is typed, and checked like it
    elif not (given.config or {"--help", "-h"} & set(arguments)):
        raise InputError(f"locat {command} needs --weights: a checkpoint of a run, a file or a timm name")
    config = parsing.parse(parser, arguments, recorded=recorded)
    checks.check_name(config.name)
    checks.check_root(given, config.data.get("dataset"), config.data.get("stream"))
    return config


def _kind_of(parser: ArgumentParser) -> Kind:
    """Return which kind of data a command takes, by the options that it has for them."""
    options = parser.get_defaults()
    return "masks" if "data.masks" in options else "images" if "data.img_size" in options else "videos"


def _names_segmentation(arguments: list[str]) -> bool:
    """Return whether the weights among the arguments are the checkpoint of a segmentation."""
    weights = parsing.decisive_options(arguments).weights
    return weights is not None and holds_segmentation(contents_of(weights))


def _parser(command: str, *, masks: bool) -> ArgumentParser:
    parser = parsing.command_parser(command, DESCRIPTIONS[command])
    add = parser.add_argument
    add("-c", "--config", action=ConfigOfImages, help="any of these options, or a config of locat fit")
    parsing.add_weights_options(parser)
    if masks:
        parser.add_class_arguments(SegmentationData, "data")
    else:
        parser.add_class_arguments(ImageData, "data")
        # The linear protocol crops and flips, no more.
        parser.set_defaults({"data.auto_augment": None, "data.color_jitter": 0.0, "data.random_erasing": 0.0})
    if command == "retrieve":
        add_retrieval_options(parser)
    if command == "knn":
        add_knn_options(parser)
    if command == "robustness":
        parser.add_class_arguments(Robustness, skip={"seed"})
        if masks:
            help_ = "height and width of the images, in pixels; null takes those of the training crops"
            add("--image_size", type=PositiveInt | None, default=None, help=help_)
            help_ = "where the frozen backbone of the decoder is, if it has moved"
            add("--backbone_weights", type=str | None, default=None, help=help_)
    if command == "linear":
        add_linear_options(parser)
    if command == "layers":
        add_layers_options(parser)
    add_run_options(parser)
    return parser


def add_run_options(parser: ArgumentParser, *, processes: bool = True, precision: bool = True) -> None:
    """Add options of where a measurement is computed and written, perhaps by several processes."""
    add = parser.add_argument
    add("--runs", type=str, default="runs", help="directory of all runs")
    add("--name", type=str | None, default=None, help="name of the run; by default from the weights")
    add("--accelerator", type=str, default="auto", help="as the trainer's")
    if processes:
        add("--devices", type=int | str, default=1, help="as the trainer's")
        add("--strategy", type=str, default="auto", help="as the trainer's")
    if precision:
        add("--precision", type=str | None, default=parsing.mixed_precision(), help="as the trainer's")
    add("--seed", type=NonNegativeInt, default=0, help="seed of everything that is drawn")


def _robustness(
    model: nn.Module, data: ImageData | SegmentationData, config: Namespace, fabric: Fabric
) -> Measurement:
    settings = Robustness(**{field.name: config[field.name] for field in fields(Robustness)})
    return measure_robustness(model, data, config, settings, fabric)


MEASURES: dict[str, Callable[..., Measurement]] = {
    "knn": measure_knn,
    "linear": measure_linear,
    "retrieve": retrieve,
    "robustness": _robustness,
    "layers": look_at_layers,
}


def name_of(weights: str) -> str:
    """Return a name for the directory: that of the weights' own run, of their file, or of the model."""
    path = Path(weights)
    if (record := sources.record_of_run(path)) is not None:
        return record.parent.parent.name
    return path.stem if path.is_file() else local_dir(weights).replace("/", "_").replace(":", "_")
