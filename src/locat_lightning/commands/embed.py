"""`locat embed`: the features of any folder of images in a file, or in TensorBoard's projector."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt
from lightning.fabric import Fabric
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from locat.runs import claim
from locat_lightning.backbones.channels import channels_of, take_channels
from locat_lightning.backbones.create import load_backbone
from locat_lightning.commands import checks, parsing
from locat_lightning.commands.evaluate import (
    ConfigOfImages,
    add_run_options,
    launched,
    name_of,
    parse_with_weights,
)
from locat_lightning.commands.measurement import check_images
from locat_lightning.commands.messages import errors_in_a_line
from locat_lightning.data import ImageData
from locat_lightning.data.dataset import ImageBatch, digest_of_images
from locat_lightning.errors import InputError
from locat_lightning.evaluation.batches import frozen
from locat_lightning.evaluation.embedding import Waiting, What, embed, embed_images
from locat_lightning.evaluation.feature_files import Dtype, FeatureFile, Row, check_target
from locat_lightning.evaluation.features import autocast_type
from locat_lightning.evaluation.projector import Projector
from locat_lightning.figures.grid import rgb
from locat_lightning.tasks.frozen import reference_to

DESCRIPTION = (
    "Write the features of a folder of images, labelled or not, with the path and the label of each. An "
    "interrupted command continues if it is given again"
)
Split = Literal["predict", "train", "val", "test"]


@errors_in_a_line
def main(arguments: list[str]) -> None:
    """Run `locat embed …`."""
    parser = _parser()
    config = parse_with_weights(parser, arguments[1:])
    file, directory = _target(config)
    autocast_type(config.precision)  # a mistake shows before anything is read
    data: ImageData = parser.instantiate_classes(config).data
    data.source(config.split)  # a mistake in it shows before the model is made
    fabric = Fabric(accelerator=config.accelerator, devices=1)
    backbone = launched(config, fabric, partial(load_backbone, channels=data.model_channels))
    take_channels(backbone, data.model_channels)
    if config.what == "cls":
        check_images(backbone, data, fabric.device)
    if file is None:
        _project(backbone, data, config, fabric.device, directory)
    else:
        _write(backbone, data, config, fabric.device, file)


def _parser() -> ArgumentParser:
    parser = parsing.command_parser("embed", DESCRIPTION)
    add = parser.add_argument
    add("-c", "--config", action=ConfigOfImages, help="any of these options, or a config of locat fit")
    parsing.add_weights_options(parser)
    parser.add_class_arguments(ImageData, "data")
    help_ = "the file to write: .npy or .safetensors, with a .csv of the same name, or .parquet"
    add("--to", type=str | None, default=None, help=help_)
    add("--overwrite", action="store_true", help="replace a file that is there, also an unfinished one")
    help_ = "cls: the classifier's input; patch_mean, patches: patch features of the last block"
    add("--what", type=What, default="cls", help=help_)
    add("--dtype", type=Dtype, default="float32", help="of the numbers in the file")
    help_ = f"which images; predict: any folder's, or those of {' or '.join(('test/', 'val/'))}"
    add("--split", type=Split, default="predict", help=help_)
    add("--projector", action="store_true", help="write TensorBoard's projector into a run, instead of --to")
    add("--points", type=PositiveInt, default=2000, help="of the projector, evenly spaced over the data set")
    add("--thumbnail", type=PositiveInt, default=48, help="side of the projector's pictures, in pixels")
    add_run_options(parser, processes=False)
    return parser


def _target(config: Namespace) -> tuple[Path | None, Path]:
    """Return the file to write, None for the projector, and the directory of the projector's runs."""
    directory = Path(config.runs) / (config.name or f"{name_of(config.weights)}_embed")
    if (config.to is None) == (not config.projector):
        names = "features.npy, features.parquet or features.safetensors"
        raise InputError(f"locat embed needs either --to ({names}) or --projector")
    if config.to is None:
        if config.what == "patches":
            raise InputError("--projector: a point is an image; take --what cls or patch_mean")
        checks.check_writable("--runs", directory)
        return None, directory
    file = Path(config.to)
    check_target(file, overwrite=config.overwrite)
    checks.check_writable("--to", file.absolute().parent)
    return file, directory


def _write(backbone: nn.Module, data: ImageData, config: Namespace, device: torch.device, file: Path) -> None:
    source: Any = data.source(config.split)
    weights = reference_to(config.weights, backbone)
    side, images = data.img_size, len(source)
    with frozen(backbone), torch.no_grad():
        blank = torch.zeros(1, channels_of(backbone), side, side, device=device)
        shape = tuple(embed(backbone, blank, config.what).shape[1:])
    record = {
        "weights": weights["digest"],
        "what": config.what,
        "precision": str(config.precision),
        "images": images,
        "paths": digest_of_images(source),
        "preprocessing": data.preprocessing,
    }
    notes = {"weights": weights["weights"][-1000:], "what": config.what, "img_size": str(side)}
    options: dict[str, Any] = {"shape": shape, "dtype": config.dtype, "record": record, "notes": notes}
    with FeatureFile(file, overwrite=config.overwrite, **options) as rows:

        def add(batch: ImageBatch, features: torch.Tensor) -> None:
            if not (finite := features.isfinite().flatten(1).all(1)).all():
                path = source.path(int(batch.indices[~finite][0]))
                remedy = "--dtype float32" if config.dtype == "float16" else "--precision 32-true"
                raise InputError(f"features of {path} are not finite: check the weights, or try {remedy}")
            rows.add(batch.indices.numpy(), batch.labels.numpy(), features.numpy())

        if rows.start:
            print(f"continuing after {rows.start:,} of {images:,} images")
        try:
            clock = _embed(backbone, data, config, device, range(rows.start, images), add)
        except (SystemExit, KeyboardInterrupt):
            done = f"{rows.rows:,} of {images:,} images are done: the same command continues"
            none = f"interrupted before any of {images:,} images was done: the same command begins again"
            print(done if rows.rows else none, file=sys.stderr)
            raise
        written = rows.finish(_describe(data, source))
        size = " × ".join(map(str, (rows.rows, *shape)))
    print(f"{config.what}, {size}, {config.dtype}: {', '.join(map(str, written))}")
    _print_pace(clock, images - rows.start)


def _project(
    backbone: nn.Module, data: ImageData, config: Namespace, device: torch.device, directory: Path
) -> None:
    source: Any = data.source(config.split)
    count = min(config.points, len(source))
    places = torch.linspace(0, len(source) - 1, count, dtype=torch.float64).round().long().tolist()
    projector = Projector(
        config.thumbnail, count, partial(rgb, normalisation=data.normalisation), _describe(data, source)
    )
    clock = _embed(backbone, data, config, device, places, projector.add)
    run = claim(directory)
    with SummaryWriter(str(run)) as writer:
        projector.write(writer)
    print(f"{config.what} of {count:,} images\nrun: {run}\nlook: tensorboard --logdir {run}")
    _print_pace(clock, count)


def _embed(
    backbone: nn.Module,
    data: ImageData,
    config: Namespace,
    device: torch.device,
    places: Sequence[int],
    write: Callable[[ImageBatch, torch.Tensor], None],
) -> Waiting:
    loader = data.loader_of(config.split, places, pin_memory=device.type == "cuda")
    dtypes = {"dtype": getattr(torch, config.dtype), "autocast_dtype": autocast_type(config.precision)}
    return embed_images(backbone, loader, device, write, what=config.what, **dtypes)


def _describe(data: ImageData, source: Any) -> Callable[[int, int], Row]:
    """Return what tells path, label and class of an image from its position and label.

    Without splits, the class of an image is the folder, in that of the data set, that holds the image.
    """
    if names := data.class_names:
        return lambda position, label: Row(source.path(position), label, names[label] if label >= 0 else "")
    root, paths = data.stream or str(data.root), map(source.path, range(len(source)))

    def folder(path: str) -> str:
        within = Path(path.removeprefix(root).lstrip("/")).parts
        return within[0] if len(within) > 1 else ""

    classes = {name: label for label, name in enumerate(sorted({*map(folder, paths)} - {""}))}

    def describe(position: int, label: int) -> Row:
        path = source.path(position)
        return Row(path, classes.get(folder(path), -1), folder(path))

    return describe


def _print_pace(clock: Waiting, images: int) -> None:
    if images and clock.seconds:
        pace = f"{images / clock.seconds:,.0f} images/s, {clock.waited / clock.seconds:.1%} of it waiting"
        print(f"{images:,} images in {clock.seconds:,.0f} s: {pace}")
