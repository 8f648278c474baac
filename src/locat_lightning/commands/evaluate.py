"""`locat knn`, `linear`, `retrieve` and `robustness`: how good a model is, or its features, as it stands."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from lightning.fabric import Fabric
from torch import Tensor, nn

from locat.runs import claim
from locat_lightning.backbones.create import load_backbone
from locat_lightning.backbones.weights import Role, contents_of
from locat_lightning.commands import checks, parsing, sources
from locat_lightning.commands.datasets import ending_of, options_of, show_together
from locat_lightning.commands.defaults import Kind, of_data, of_evaluation
from locat_lightning.commands.measurement import Measurement, columns, report
from locat_lightning.commands.messages import errors_in_a_line
from locat_lightning.commands.retrieval import add_retrieval_options, retrieve
from locat_lightning.commands.robustness import measure_robustness
from locat_lightning.data import ImageData, SegmentationData
from locat_lightning.errors import InputError
from locat_lightning.evaluation.features import Features, autocast_type, check_size, extract_features
from locat_lightning.evaluation.intervals import Figures
from locat_lightning.evaluation.knn import knn_ranks
from locat_lightning.evaluation.linear import DINOV2_LEARNING_RATES, LinearSweep, sweep_linear, train_linear
from locat_lightning.evaluation.per_image import Scores, names_of
from locat_lightning.evaluation.robustness import Robustness
from locat_lightning.tasks.segmenter import holds_segmentation, load_segmenter

DESCRIPTIONS = {
    "knn": "Accuracy of weighted k-nearest-neighbour classification with a frozen backbone's features",
    "linear": "Accuracy of a linear classifier on a frozen backbone's features",
    "retrieve": "mIoU of dense retrieval (Hummingbird): each patch takes the classes of the training patches "
    "most similar to it; nothing is trained",
    "robustness": "Top-1 of a classifier, or mIoU of a segmentation, against the number of patches that are "
    "corrupted, as curves",
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
    """Run `locat knn …`, `locat linear …`, `locat retrieve …` or `locat robustness …`."""
    evaluate(arguments)


def evaluate(arguments: list[str]) -> Path | None:
    """Run the command, and return the directory of its run, in the first process."""
    command, *arguments = arguments
    masks = command == "retrieve" or (command == "robustness" and _names_segmentation(arguments))
    parser = _parser(command, masks=masks)
    config, directory, fabric = prepared(command, parser, arguments)
    images = _data(parser, config)
    load: Callable[..., nn.Module] = load_backbone
    if command == "robustness":
        segmenter = partial(load_segmenter, moved=config.backbone_weights) if masks else None
        load = segmenter or partial(load_backbone, classifier=True)
    model = launched(config, fabric, load)
    measured, run = dict[str, Measurement](), None
    for dataset, data in images.items():
        if isinstance(data, ImageData):
            advice = f"set --data.img_size, or --backbone_args.img_size {data.img_size}"
            check_size(model, data.img_size, fabric.device, advice=advice)
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
    network: Role = "student" if config.student else "teacher"
    model = config.weights, config.backbone, config.backbone_args
    return load(*model, network=network, any_size=True).to(fabric.device)


def _data(parser: ArgumentParser, config: Namespace) -> dict[str, ImageData | SegmentationData]:
    """Return the images by what `--datasets` names, "" for those of the other options; all are found now."""
    found: dict[str, ImageData | SegmentationData] = {}
    for dataset, options in options_of(config.get("datasets") or []).items() or [("", {})]:
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
    config.weights = sources.local_dir(config.weights)
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
    if command in ("knn", "linear"):
        help_ = "measure on each of these instead: folders, digits, or timm's names; one table, a run each"
        add("--datasets", type=str, nargs="+", default=None, help=help_)
    if command == "retrieve":
        add_retrieval_options(parser)
    if command == "knn":
        add("--k", type=PositiveInt, nargs="+", default=[10, 20, 100, 200], help="numbers of neighbours")
        add("--temperature", type=PositiveFloat, default=0.07, help="of the votes, exp(cosine / temperature)")
    if command == "robustness":
        parser.add_class_arguments(Robustness, skip={"seed"})
        if masks:
            help_ = "height and width of the images, in pixels; null takes those of the training crops"
            add("--image_size", type=PositiveInt | None, default=None, help=help_)
            help_ = "where the frozen backbone of the decoder is, if it has moved"
            add("--backbone_weights", type=str | None, default=None, help=help_)
    if command == "linear":
        help_ = "paper: SGD on augmented images; sweep: many learning rates, on features extracted once"
        add("--protocol", type=Literal["paper", "sweep"], default="paper", help=help_)
        add("--epochs", type=PositiveInt, default=100, help="passes over the training images")
        add("--learning_rate", type=PositiveFloat, default=0.001, help="of paper, for 256 images a step")
        rates, help_ = list(DINOV2_LEARNING_RATES), "of sweep, for 256 features a step"
        add("--learning_rates", type=PositiveFloat, nargs="+", default=rates, help=help_)
        add("--sweep_batch_size", type=PositiveInt, default=1024, help="features per step of the sweep")
    add_run_options(parser)
    return parser


def add_run_options(parser: ArgumentParser) -> None:
    """Add options of where a measurement is computed and written."""
    add = parser.add_argument
    add("--runs", type=str, default="runs", help="directory of all runs")
    add("--name", type=str | None, default=None, help="name of the run; by default from the weights")
    add("--accelerator", type=str, default="auto", help="as the trainer's")
    add("--devices", type=int | str, default=1, help="as the trainer's")
    add("--strategy", type=str, default="auto", help="as the trainer's")
    add("--precision", type=str | None, default=parsing.mixed_precision(), help="as the trainer's")
    add("--seed", type=NonNegativeInt, default=0, help="seed of everything that is drawn")


def _knn(backbone: nn.Module, data: ImageData, config: Namespace, fabric: Fabric) -> Measurement:
    bank, queries = (_features(backbone, data, split, config, fabric) for split in ("train", "val"))
    found = knn_ranks(*bank[:2], *queries[:2], k=config.k, temperature=config.temperature)
    hits = dict[str, Tensor]()
    for k, (neighbours, ranks) in found.items():
        hits |= {f"top1_k{k}": ranks < 1, f"top5_k{k}": ranks < min(5, neighbours)}
    figures = Figures(_scores(data, queries, hits), "knn")
    rows, table = list[tuple[str, ...]](), columns("k", "top-1", "top-5")
    for k, (neighbours, _) in found.items():
        voters = f"{k}" if neighbours == k else f"{k} (all {neighbours})"
        rows.append((voters, figures.cell(f"top1_k{k}"), figures.cell(f"top5_k{k}")))
        table.add_row(*rows[-1])
    heading = f"k-NN: {len(queries.labels):,} images, each by its nearest among {len(bank.labels):,}"
    protocol = f"k-NN at temperature {config.temperature:g} among {len(bank.labels):,} images"
    return Measurement(heading, table, figures.metrics(), protocol, figures, rows)


def _linear(backbone: nn.Module, data: ImageData, config: Namespace, fabric: Fabric) -> Measurement:
    val = _features(backbone, data, "val", config, fabric)
    if config.protocol == "paper":
        number, rates = len(data.source("train")), [config.learning_rate]
        images = min(data.batch_size * fabric.world_size, number)
        result = train_linear(
            backbone,
            data.train_dataloader(),
            val,
            fabric.device,
            num_classes=data.num_classes,
            batch_size=images,
            epochs=config.epochs,
            learning_rate=config.learning_rate,
            seed=config.seed,
            autocast_dtype=autocast_type(config.precision),
        )
        sweep, manner = LinearSweep((result,)), f"{images} augmented images a step"
    else:
        train = _features(backbone, data, "train", config, fabric)
        number, rates = len(train.labels), config.learning_rates
        sweep = sweep_linear(
            *train[:2],
            *val[:2],
            learning_rates=rates,
            epochs=config.epochs,
            batch_size=config.sweep_batch_size,
            seed=config.seed,
            progress=fabric.is_global_zero,
        )
        features = min(config.sweep_batch_size, number)
        manner = f"{features} features a step, best top-1 {sweep.best.top1:.2%}"
    best, hits = sweep.best, {"top1": sweep.best.ranks < 1, "top5": sweep.best.ranks < 5}
    several = len(sweep.results) > 1
    for r in sweep.results if several else ():
        hits |= {f"top1_rate{r.learning_rate:g}": r.ranks < 1, f"top5_rate{r.learning_rate:g}": r.ranks < 5}
    figures = Figures(_scores(data, val, hits), "linear")
    rows, table = list[tuple[str, ...]](), columns("learning rate", "effective", "top-1", "top-5")
    for r in sweep.results:
        ending = f"_rate{r.learning_rate:g}" if several else ""
        tops = figures.cell(f"top1{ending}"), figures.cell(f"top5{ending}")
        rows += [(f"{r.learning_rate:g}", f"{r.effective_learning_rate:.3g}", *tops)]
        table.add_row(*rows[-1])
    heading = f"linear, {config.protocol}: {config.epochs} epochs, {manner}"
    listed = ", ".join(f"{rate:g}" for rate in rates)
    protocol = f"linear, {config.protocol}, {config.epochs} epochs of {number:,} images at {listed}"
    metrics = figures.metrics() | {"linear/learning_rate": best.learning_rate}
    of_best = [row for row, r in zip(rows, sweep.results, strict=True) if r is best]
    return Measurement(heading, table, metrics, protocol, figures, of_best)


def _robustness(
    model: nn.Module, data: ImageData | SegmentationData, config: Namespace, fabric: Fabric
) -> Measurement:
    settings = Robustness(**{field.name: config[field.name] for field in fields(Robustness)})
    return measure_robustness(model, data, config, settings, fabric)


MEASURES: dict[str, Callable[..., Measurement]] = {
    "knn": _knn,
    "linear": _linear,
    "retrieve": retrieve,
    "robustness": _robustness,
}


def _features(
    backbone: nn.Module, data: ImageData, split: str, config: Namespace, fabric: Fabric
) -> Features:
    loader, dtype = data.eval_dataloader(split), autocast_type(config.precision)
    return extract_features(backbone, loader, fabric.device, autocast_dtype=dtype).to(fabric.device)


def _scores(data: ImageData, of: Features, hits: Mapping[str, Tensor]) -> Scores:
    """Return hits [N] by name as results of the validation images."""
    return Scores(of.indices, names_of(data, "val", of.indices.tolist()), of.labels.cpu(), hits)


def name_of(weights: str) -> str:
    """Return a name for the directory: that of the weights' own run, of their file, or of the model."""
    path = Path(weights)
    if (record := sources.record_of_run(path)) is not None:
        return record.parent.parent.name
    return path.stem if path.is_file() else weights.replace("/", "_").replace(":", "_")
