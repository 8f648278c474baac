"""`locat knn`, `locat linear` and `locat retrieve`: how good the features of a frozen backbone are."""

from dataclasses import fields
from math import isnan
from pathlib import Path
from typing import Any, Literal, NamedTuple

import timm
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from lightning.fabric import Fabric
from rich.console import Console
from rich.table import Column, Table
from timm.models import load_model_config_from_hf
from torch import nn

from locat.runs import claim, write_json
from locat_lightning.backbones.create import load_backbone
from locat_lightning.backbones.weights import Role
from locat_lightning.commands import checks, parsing, sources
from locat_lightning.commands.defaults import of_images
from locat_lightning.commands.messages import errors_in_a_line
from locat_lightning.data import ImageData, SegmentationData
from locat_lightning.errors import InputError
from locat_lightning.evaluation.features import Features, autocast_type, check_size, extract_features
from locat_lightning.evaluation.iou import IoU
from locat_lightning.evaluation.knn import knn_classify
from locat_lightning.evaluation.linear import DINOV2_LEARNING_RATES, LinearSweep, sweep_linear, train_linear
from locat_lightning.evaluation.retrieval import Retrieval, segment_by_retrieval

DESCRIPTIONS = {
    "knn": "Accuracy of weighted k-nearest-neighbour classification with a frozen backbone's features",
    "linear": "Accuracy of a linear classifier on a frozen backbone's features",
    "retrieve": "mIoU of dense retrieval (Hummingbird): each patch takes the classes of the training patches "
    "most similar to it; nothing is trained",
}
# What an evaluation takes over from the data of a run of the same kind: which images, their size and their
# normalisation, but not how strongly they were augmented.
OF_ANY_KIND = ("mean", "std")
OF_BOTH = (*OF_ANY_KIND, "dataset", "root", "classes", "num_workers")
OF_IMAGES = (*OF_BOTH, "img_size", "crop_pct", "eval_interpolation", "scale", "ratio", "hflip")
OF_MASKS = (*OF_BOTH, "images", "masks", "splits", "mask_suffix", "ignore_index", "reduce_zero_label")


class Measurement(NamedTuple):
    """A result, to print and to record."""

    heading: str
    table: Table
    metrics: dict[str, float]


class ConfigOfImages(parsing.ConfigByName):
    """`--config` takes options of the command, or a config of `locat fit`, of which the images count."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        data = yaml.safe_load(Path(parsing.find_config(str(values))).read_text()).get("data")
        if not (isinstance(data, dict) and "class_path" in data):
            super().__call__(parser, cfg, values, option_string)
            return
        images = _of_data(parser.prog.split()[-1], data)
        text = yaml.safe_dump({"data": {key.removeprefix("data."): value for key, value in images.items()}})
        ActionConfigFile.__call__(self, parser, cfg, text, option_string)


@errors_in_a_line
def main(arguments: list[str]) -> None:
    """Run `locat knn …`, `locat linear …` or `locat retrieve …`."""
    command, *arguments = arguments
    parser = _parser(command)
    config = parse_with_weights(parser, arguments)
    autocast_type(config.precision)  # a mistake shows before anything is read
    directory = Path(config.runs) / (config.name or f"{name_of(config.weights)}_{command}")
    checks.check_writable("--runs", directory)
    fabric = Fabric(accelerator=config.accelerator, devices=config.devices, strategy=config.strategy)
    if fabric.device.type == "cpu":
        checks.check_processes(fabric.world_size)
    data: ImageData | SegmentationData = parser.instantiate_classes(config).data
    data.setup("fit")

    fabric.launch()
    fabric.seed_everything(config.seed, verbose=False)
    network: Role = "student" if config.student else "teacher"
    model = config.weights, config.backbone, config.backbone_args
    backbone = load_backbone(*model, network=network, any_size=True).to(fabric.device)
    if isinstance(data, SegmentationData):
        measurement = _retrieve(backbone, data, config, fabric)
    else:
        advice = f"set --data.img_size, or --backbone_args.img_size {data.img_size}"
        check_size(backbone, data.img_size, fabric.device, advice=advice)
        measurement = (_knn if command == "knn" else _linear)(backbone, data, config, fabric)
    if fabric.is_global_zero:
        print(measurement.heading)
        Console().print(measurement.table)
        run = claim(directory)
        record = {"weights": config.weights, "seed": config.seed, "measured": measurement.heading}
        write_json(run / "metrics.json", record | measurement.metrics)
        print(f"run: {run}")


def parse_with_weights(parser: ArgumentParser, arguments: list[str]) -> Namespace:
    """Parse the options of a command, after those that its weights record of their images."""
    command = parser.prog.split()[-1]
    given, recorded = parsing.decisive_options(arguments), list[str]()
    if given.weights is not None:
        sources.check_weights(given.weights)
        typed = {argument.partition("=")[0] for argument in arguments}
        recorded = parsing.as_arguments(images_of(command, given.weights, typed))
        arguments = [*recorded, *arguments]  # before what is typed, and checked like it
    elif not (given.config or {"--help", "-h"} & set(arguments)):
        raise InputError(f"locat {command} needs --weights: a checkpoint of a run, a file or a timm name")
    config = parsing.parse(parser, arguments, recorded=recorded)
    config.weights = sources.local_dir(config.weights)
    checks.check_name(config.name)
    checks.check_root(given, config.data.get("dataset"))
    return config


def _parser(command: str) -> ArgumentParser:
    parser = parsing.command_parser(command, DESCRIPTIONS[command])
    add = parser.add_argument
    add("-c", "--config", action=ConfigOfImages, help="any of these options, or a config of locat fit")
    parsing.add_weights_options(parser)
    if command == "retrieve":
        parser.add_class_arguments(SegmentationData, "data")
        add("--image_size", type=PositiveInt, default=224, help="height and width of the images, in pixels")
        parser.add_class_arguments(Retrieval, skip={"seed"})
    else:
        parser.add_class_arguments(ImageData, "data")
        # The linear protocol crops and flips, no more.
        parser.set_defaults({"data.auto_augment": None, "data.color_jitter": 0.0, "data.random_erasing": 0.0})
    if command == "knn":
        add("--k", type=PositiveInt, nargs="+", default=[10, 20, 100, 200], help="numbers of neighbours")
        add("--temperature", type=PositiveFloat, default=0.07, help="of the votes, exp(cosine / temperature)")
    if command == "linear":
        help_ = "paper: SGD on augmented images; sweep: many learning rates, on features extracted once"
        add("--protocol", type=Literal["paper", "sweep"], default="paper", help=help_)
        add("--epochs", type=PositiveInt, default=100, help="passes over the training images")
        add("--learning_rate", type=PositiveFloat, default=0.001, help="of paper, for 256 images a step")
        rates, help_ = list(DINOV2_LEARNING_RATES), "of sweep, for 256 features a step"
        add("--learning_rates", type=PositiveFloat, nargs="+", default=rates, help=help_)
        add("--sweep_batch_size", type=PositiveInt, default=1024, help="features per step of the sweep")
    add("--runs", type=str, default="runs", help="directory of all runs")
    add("--name", type=str | None, default=None, help="name of the run; by default from the weights")
    add("--accelerator", type=str, default="auto", help="as the trainer's")
    add("--devices", type=int | str, default=1, help="as the trainer's")
    add("--strategy", type=str, default="auto", help="as the trainer's")
    add("--precision", type=str | None, default=parsing.mixed_precision(), help="as the trainer's")
    add("--seed", type=NonNegativeInt, default=0, help="seed of everything that is drawn")
    return parser


def images_of(command: str, weights: str, typed: set[str]) -> dict[str, Any]:
    """Return what the weights say of the images that they are for, by option."""
    if (record := sources.record_of_run(Path(weights))) is not None:
        return _of_data(command, sources.read_record(record, ["data"], typed)["data"])
    if exported := sources.exported_config(weights):
        images = of_images(exported)
    else:
        images = of_images({"pretrained_cfg": _pretrained_cfg(weights)})
        images.pop("img_size", None)
    keys = OF_ANY_KIND if command == "retrieve" else images
    return {f"data.{key}": images[key] for key in keys if key in images}


def _of_data(command: str, recorded: dict[str, Any]) -> dict[str, Any]:
    """Return what the data of a training say of their images, by option."""
    data, has_masks = dict(recorded["init_args"]), recorded["class_path"].endswith("SegmentationData")
    if views := data.get("views", {}).get("init_args"):
        data |= {"img_size": views.get("global_size"), "hflip": views.get("hflip")}
    of_a_kind = has_masks == (command == "retrieve")
    keys = (OF_MASKS if has_masks else OF_IMAGES) if of_a_kind else OF_ANY_KIND
    if data.get("dataset") == "digits":  # of either kind
        keys = (*keys, "dataset")
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


def _knn(backbone: nn.Module, data: ImageData, config: Namespace, fabric: Fabric) -> Measurement:
    bank, queries = (_features(backbone, data, split, config, fabric) for split in ("train", "val"))
    found = knn_classify(*bank, *queries, k=config.k, temperature=config.temperature)
    table, metrics = _table("k", "top-1", "top-5"), dict[str, float]()
    for k, accuracy in found.items():
        voters = f"{k}" if accuracy.neighbours == k else f"{k} (all {accuracy.neighbours})"
        table.add_row(voters, f"{accuracy.top1:.2%}", f"{accuracy.top5:.2%}")
        metrics |= {f"knn/top1_k{k}": accuracy.top1, f"knn/top5_k{k}": accuracy.top5}
    heading = f"k-NN: {len(queries.labels):,} images, each by its nearest among {len(bank.labels):,}"
    return Measurement(heading, table, metrics)


def _linear(backbone: nn.Module, data: ImageData, config: Namespace, fabric: Fabric) -> Measurement:
    if config.protocol == "paper":
        images = min(data.batch_size * fabric.world_size, len(data.source("train")))
        result = train_linear(
            backbone,
            data.train_dataloader(),
            data.val_dataloader(),
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
        train, val = (_features(backbone, data, split, config, fabric) for split in ("train", "val"))
        sweep = sweep_linear(
            *train,
            *val,
            learning_rates=config.learning_rates,
            epochs=config.epochs,
            batch_size=config.sweep_batch_size,
            seed=config.seed,
            progress=fabric.is_global_zero,
        )
        features = min(config.sweep_batch_size, len(train.labels))
        manner = f"{features} features a step, best top-1 {sweep.best.top1:.2%}"
    best, table = sweep.best, _table("learning rate", "effective", "top-1", "top-5")
    metrics = {"linear/top1": best.top1, "linear/top5": best.top5, "linear/learning_rate": best.learning_rate}
    for r in sweep.results:
        rates = f"{r.learning_rate:g}", f"{r.effective_learning_rate:.3g}"
        table.add_row(*rates, f"{r.top1:.2%}", f"{r.top5:.2%}")
        if len(sweep.results) > 1:
            metrics[f"linear/top1_rate{r.learning_rate:g}"] = r.top1
    return Measurement(f"linear, {config.protocol}: {config.epochs} epochs, {manner}", table, metrics)


def _retrieve(backbone: nn.Module, data: SegmentationData, config: Namespace, fabric: Fabric) -> Measurement:
    train, val = (data.square_dataloader(split, config.image_size) for split in ("train", "val"))
    settings = Retrieval(**{field.name: config[field.name] for field in fields(Retrieval)})
    dtype, classes = autocast_type(config.precision), data.num_classes
    found = segment_by_retrieval(
        backbone, train, val, fabric.device, settings, num_classes=classes, autocast_dtype=dtype
    )
    table = _table("class", "IoU")
    metrics = {f"retrieval/{name}": float(getattr(found, name)) for name in IoU.SCALARS}
    for name, iou in zip(data.class_names, found.per_class.tolist(), strict=True):
        table.add_row(name, "absent" if isnan(iou) else f"{iou:.2%}")
        if not isnan(iou):
            metrics[f"retrieval/iou_{name}"] = iou
    kept = f"{config.memory_size:,} patches kept" if config.memory_size else "all patches kept"
    protocol = f"images resized to {config.image_size} × {config.image_size}, {kept}"
    heading = f"dense retrieval: mIoU {float(found.miou):.4f} ({protocol}, {config.neighbours} neighbours)"
    return Measurement(heading, table, metrics)


def _features(
    backbone: nn.Module, data: ImageData, split: str, config: Namespace, fabric: Fabric
) -> Features:
    loader, dtype = data.eval_dataloader(split), autocast_type(config.precision)
    return extract_features(backbone, loader, fabric.device, autocast_dtype=dtype).to(fabric.device)


def _table(*columns: str) -> Table:
    return Table(*(Column(name, justify="right") for name in columns))


def name_of(weights: str) -> str:
    """Return a name for the directory: that of the weights' own run, of their file, or of the model."""
    path = Path(weights)
    if (record := sources.record_of_run(path)) is not None:
        return record.parent.parent.name
    return path.stem if path.is_file() else weights.replace("/", "_").replace(":", "_")
