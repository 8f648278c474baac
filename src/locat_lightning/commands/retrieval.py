"""The measurement of `locat retrieve`: dense retrieval over seeds and sizes of the memory."""

from collections.abc import Sequence
from math import isnan
from statistics import fmean, stdev

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.fabric import Fabric
from torch import nn

from locat_lightning.commands.measurement import Measurement, columns
from locat_lightning.data import SegmentationData
from locat_lightning.evaluation.features import autocast_type
from locat_lightning.evaluation.intervals import Figures
from locat_lightning.evaluation.iou import IoU
from locat_lightning.evaluation.per_image import Areas
from locat_lightning.evaluation.retrieval import SEEDS, Retrieval, compare_retrievals


def add_retrieval_options(parser: ArgumentParser) -> None:
    """Add the options of dense retrieval to those of the data."""
    add = parser.add_argument
    add("--image_size", type=PositiveInt, default=224, help="height and width of the images, in pixels")
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
    images, side = range(len(data.source("train"))), config.image_size
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
    table, metrics, headlines = columns("memory", "seed", "mIoU"), dict[str, float](), list[str]()
    for size in sizes:
        of_seeds = [iou for iou, variant in zip(found, variants, strict=True) if variant.memory_size == size]
        kept, ending = f"{size:,} patches" if size else "all patches", f"_memory{size or 'all'}"
        own, miou, spread = _over_seeds(of_seeds, data.class_names, seeds, ending if len(sizes) > 1 else "")
        metrics |= own
        headlines.append(f"{miou}{spread}" + (f" with {kept}" if len(sizes) > 1 else ""))
        for seed, each in zip(seeds, of_seeds, strict=True):
            table.add_row(kept, str(seed), f"{float(each.miou):.4f}")
        if spread:
            table.add_row(kept, "mean", f"{miou}{spread}", end_section=True)
    results = Areas.of(found[0], data.class_names, data, "val") if len(variants) == 1 else None
    figures = Figures(results, "retrieval") if results else None
    if figures:
        table = columns("class", "IoU")
        for name in data.class_names:
            known = f"iou_{name}" in figures.values
            table.add_row(name, figures.cell(f"iou_{name}") if known else "absent")
    protocol = [f"images resized to {side} × {side}"]
    if config.fraction > 1:
        protocol.append(f"1/{config.fraction} of the training images ({len(variants[0].split(images)):,})")
    if config.augmentation_epochs:
        protocol.append(f"{config.augmentation_epochs} augmented passes")
    if len(sizes) == 1:
        protocol.append(f"{kept} kept")
    protocol.append(f"{config.neighbours} neighbours")
    heading = f"dense retrieval: mIoU {', '.join(headlines)} ({', '.join(protocol)})"
    return Measurement(heading, table, metrics, f"dense retrieval, {', '.join(protocol)}", figures)


def _over_seeds(
    found: Sequence[IoU], classes: Sequence[str], seeds: Sequence[int], ending: str
) -> tuple[dict[str, float], str, str]:
    """Return the metrics of one memory size, and mIoU and its deviation in words.

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
    spread = (
        f" ± {metrics[f'retrieval/miou_std{ending}']:.4f} over {len(seeds)} seeds" if len(seeds) > 1 else ""
    )
    return metrics, f"{metrics[f'retrieval/miou{ending}']:.4f}", spread
