"""The measurement of `locat retrieve`: dense retrieval over seeds and sizes of the memory."""

from collections.abc import Sequence
from math import isnan
from statistics import fmean, stdev

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.fabric import Fabric
from torch import nn

from locat_lightning.commands.defaults import images_for
from locat_lightning.commands.measurement import Measurement, columns, protocol_of
from locat_lightning.data import SegmentationData
from locat_lightning.evaluation.features import autocast_type
from locat_lightning.evaluation.intervals import Figures
from locat_lightning.evaluation.iou import IoU
from locat_lightning.evaluation.per_image import Areas, ConditionAreas
from locat_lightning.evaluation.retrieval import SEEDS, Retrieval, compare_retrievals


def add_retrieval_options(parser: ArgumentParser) -> None:
    """Add the options of dense retrieval to those of the data."""
    add = parser.add_argument
    help_ = "height and width of the images, in pixels; null takes those that the model is for"
    add("--image_size", type=PositiveInt | None, default=None, help=help_)
    parser.add_class_arguments(Retrieval, skip={"seed", "memory_size"})
    help_ = "patches in the memory, or several such numbers; null takes all"
    add("--memory_size", type=PositiveInt | list[PositiveInt | None] | None, default=None, help=help_)
    help_ = "augmented passes over the training images that fill the memory; 0: one, not augmented"
    add("--augmentation_epochs", type=NonNegativeInt, default=0, help=help_)
    help_ = "seeds to measure with; by default --seed, and Hummingbird's five with --fraction"
    add("--seeds", type=list[NonNegativeInt] | None, default=None, help=help_)


def retrieve(backbone: nn.Module, data: SegmentationData, config: Namespace, fabric: Fabric) -> Measurement:
    """Measure with every size of the memory and every seed; the features are extracted once."""
    sizes = config.memory_size if isinstance(config.memory_size, list) else [config.memory_size]
    seeds = config.seeds or (SEEDS if config.fraction > 1 else [config.seed])
    settings = {key: config[key] for key in ("neighbours", "temperature", "search", "fraction")}
    variants = [Retrieval(memory_size=size, seed=seed, **settings) for size in sizes for seed in seeds]
    images = range(len(data.source("train")))
    side = config.image_size or images_for(config.weights, backbone)["img_size"]
    places = sorted({place for variant in variants for place in variant.split(images)})
    passes = range(1, config.augmentation_epochs + 1) or [0]
    found = compare_retrievals(
        backbone,
        [data.square_dataloader("train", side, places=places, augmented=number) for number in passes],
        data.square_dataloader("val", side),
        fabric.device,
        variants,
        num_classes=data.num_classes,
        autocast_dtype=autocast_type(config.precision),
        progress=fabric.is_global_zero,
    )
    names = [_figure_of(variant, sizes, seeds) for variant in variants]
    areas = [Areas.of(each, data.class_names, data, "val") for each in found]
    first, several = areas[0], len(variants) > 1
    assert first is not None  # of one loader's images
    by_name = {name: each.areas for name, each in zip(names, areas, strict=True) if each}
    results = ConditionAreas(first.indices, first.names, first.classes, by_name) if several else first
    figures = Figures(results, "retrieval")
    metrics, headlines, table = dict[str, float](), list[str](), columns("memory", "seed", "mIoU")
    for size in sizes:
        own = [place for place, variant in enumerate(variants) if variant.memory_size == size]
        kept, ending = _patches(size), _ending(size, sizes)
        metrics |= _over_seeds([found[place] for place in own], data.class_names, seeds, ending)
        for place in own:
            table.add_row(kept, str(variants[place].seed), figures.cell(names[place]))
        spread = ""
        if len(seeds) > 1:
            deviation = metrics[f"retrieval/miou_std{ending}"]
            spread = f" ± {deviation:.4f} over {len(seeds)} seeds"
            mean = f"{figures.cell(f'miou{ending}')} ± {100 * deviation:.2f}"
            table.add_row(kept, "mean", mean, end_section=True)
        of_size = f" with {kept}" if len(sizes) > 1 else ""
        headlines.append(f"{metrics[f'retrieval/miou{ending}']:.4f}{spread}{of_size}")
    if not several:
        table = columns("class", "IoU")
        for name in data.class_names:
            known = f"iou_{name}" in figures.values
            table.add_row(name, figures.cell(f"iou_{name}") if known else "absent")
    share = len(variants[0].split(images))
    protocol = _conditions(config, data, side, sizes, seeds, share)
    heading = f"dense retrieval: mIoU {', '.join(headlines)} ({protocol})"
    return Measurement(heading, table, metrics, f"dense retrieval, {protocol}", figures)


def _conditions(
    config: Namespace,
    data: SegmentationData,
    side: int,
    sizes: Sequence[int | None],
    seeds: Sequence[int],
    images: int,
) -> str:
    """Say what the figures depend on besides weights and images, of which so many fill the memory."""
    parts = [f"images resized to {side} × {side}"]
    if config.fraction > 1:
        parts.append(f"1/{config.fraction} of the training images ({images:,})")
    if config.augmentation_epochs:
        parts.append(f"{config.augmentation_epochs} augmented passes of seed {data.seed}")
    if len(sizes) == 1:
        parts.append(f"{_patches(sizes[0])} kept")
    parts.append(f"{config.neighbours} neighbours at temperature {config.temperature:g}")
    parts.append(f"seed{'s' if len(seeds) > 1 else ''} {' '.join(map(str, seeds))}")
    return protocol_of(*parts, precision=config.precision)


def _patches(size: int | None) -> str:
    return f"{size:,} patches" if size else "all patches"


def _ending(size: int | None, sizes: Sequence[int | None]) -> str:
    return f"_memory{size or 'all'}" if len(sizes) > 1 else ""


def _figure_of(variant: Retrieval, sizes: Sequence[int | None], seeds: Sequence[int]) -> str:
    """Return the name of a variant's mIoU."""
    seed = f"_seed{variant.seed}" if len(seeds) > 1 else ""
    return f"miou{seed}{_ending(variant.memory_size, sizes)}"


def _over_seeds(
    found: Sequence[IoU], classes: Sequence[str], seeds: Sequence[int], ending: str
) -> dict[str, float]:
    """Return the metrics of one memory size.

    Of several seeds it is the mean and the sample's standard deviation; of a class, the mean over the seeds
    in which it occurs.
    """
    metrics = dict[str, float]()
    for name in IoU.SCALARS:
        values = [float(getattr(each, name)) for each in found]
        metrics[f"retrieval/{name}{ending}"] = fmean(values)
        if len(values) > 1:
            metrics[f"retrieval/{name}_std{ending}"] = stdev(values)
    if len(seeds) > 1:
        metrics |= {
            f"retrieval/miou_seed{seed}{ending}": float(each.miou)
            for seed, each in zip(seeds, found, strict=True)
        }
    for name, *values in zip(classes, *(each.per_class.tolist() for each in found), strict=True):
        if occurring := [value for value in values if not isnan(value)]:
            metrics[f"retrieval/iou_{name}{ending}"] = fmean(occurring)
    return metrics
