"""`locat robustness`: top-1 or mIoU of a model against the number of patches that are corrupted."""

from collections.abc import Iterable
from typing import Any

from jsonargparse import Namespace
from lightning.fabric import Fabric
from rich.table import Column, Table
from torch import nn

from locat_lightning.backbones.weights import contents_of
from locat_lightning.commands.measurement import Measurement, check_images, protocol_of, shape_of
from locat_lightning.data import ImageData, SegmentationData
from locat_lightning.errors import InputError
from locat_lightning.evaluation.features import autocast_type
from locat_lightning.evaluation.intervals import Figures
from locat_lightning.evaluation.per_image import ConditionAreas, Scores, names_of
from locat_lightning.evaluation.robustness import (
    Condition,
    Robustness,
    count_perturbed,
    patch_of,
    rank_perturbed,
)
from locat_lightning.figures.curves import Point, curves_figure
from locat_lightning.tasks.class_names import check_same_classes, classes_of

TITLES = {"top1": "top-1", "miou": "mIoU"}


def measure_robustness(
    model: nn.Module,
    data: ImageData | SegmentationData,
    config: Namespace,
    settings: Robustness,
    fabric: Fabric,
) -> Measurement:
    """Measure on the validation images under each condition: top-1, or mIoU where the images have masks."""
    classes = getattr(model, "num_classes", 0)
    if classes != data.num_classes:
        has = f"a classifier of {classes} classes" if classes else "no classifier"
        raise InputError(f"{config.weights} has {has}, and the data have {data.num_classes} classes")
    check_same_classes(classes_of(contents_of(config.weights) or {}), data.class_names)
    options: dict[str, Any] = {
        "normalisation": data.normalisation if data.channels is None else None,
        "autocast_dtype": autocast_type(config.precision),
    }
    patch, conditions = settings.patch_size or patch_of(model), list[Condition]()
    protocol = f"patches of {patch} px corrupted, severity {settings.severity}, seed {settings.seed}"
    results: Scores | ConditionAreas
    if isinstance(data, SegmentationData):
        figure, side = "miou", config.image_size or data.crop_size
        protocol += f", images resized to {side} × {side}"
        loader = data.square_dataloader("val", side)
        counted = count_perturbed(
            model, loader, fabric.device, settings, num_classes=data.num_classes, **options
        )
        names, conditions = names_of(data, "val", counted.indices.tolist()), [*counted.areas]
        areas = {condition.named(figure): each for condition, each in counted.areas.items()}
        results = ConditionAreas(counted.indices, names, data.class_names, areas)
    else:
        figure = "top1"
        check_images(model, data, fabric.device)
        protocol += f", {shape_of(data)}"
        ranked = rank_perturbed(model, data.eval_dataloader("val"), fabric.device, settings, **options)
        names, conditions = names_of(data, "val", ranked.indices.tolist()), [*ranked.ranks]
        hits = {condition.named(figure): ranks < 1 for condition, ranks in ranked.ranks.items()}
        results = Scores(ranked.indices, names, ranked.labels, hits)
    protocol = protocol_of(protocol, precision=config.precision)
    figures = Figures(results, "robustness")
    heading = f"robustness: {len(results.indices):,} images, {protocol}"
    table = _table(conditions, settings.temperatures, figures, figure)
    pictures = {"robustness": _curves(conditions, figures, figure)}
    return Measurement(heading, table, figures.metrics(), protocol, figures, pictures=pictures)


def _table(
    conditions: Iterable[Condition], temperatures: Iterable[float], figures: Figures, figure: str
) -> Table:
    temperatures, title = list(temperatures), TITLES[figure]
    titles = [f"{title} at temperature {t:g}" for t in temperatures] if len(temperatures) > 1 else [title]
    table = Table("corruption", *(Column(each, justify="right") for each in ("patches", *titles)))
    for kind, count in dict.fromkeys((condition.kind, condition.number) for condition in conditions):
        cells = (figures.cell(Condition(kind, count, t).named(figure)) for t in temperatures)
        table.add_row(kind, str(count), *cells)
    return table


def _curves(conditions: Iterable[Condition], figures: Figures, figure: str) -> Any:
    panels: dict[str, dict[str, list[Point]]] = {}
    for condition in conditions:
        kind, _, temperature = condition
        panel = panels.setdefault(f"attention temperature {temperature:g}", {})
        if kind == "none":
            continue
        start = Condition("none", 0, temperature)
        for each in (condition,) if kind in panel else (start, condition):
            name = each.named(figure)
            panel.setdefault(kind, []).append(
                Point(each.number, figures.values[name], *figures.intervals[name])
            )
    return curves_figure(panels, "corrupted patches", TITLES[figure])
