"""`locat robustness`: a classifier's top-1 against the number of patches that are corrupted."""

from typing import Any

from jsonargparse import Namespace
from lightning.fabric import Fabric
from rich.table import Column, Table
from torch import nn

from locat_lightning.backbones.weights import contents_of
from locat_lightning.commands.measurement import Measurement
from locat_lightning.data import ImageData
from locat_lightning.errors import InputError
from locat_lightning.evaluation.features import autocast_type
from locat_lightning.evaluation.intervals import Figures
from locat_lightning.evaluation.per_image import Scores, names_of
from locat_lightning.evaluation.robustness import Condition, Robustness, patch_of, rank_perturbed
from locat_lightning.figures.curves import Point, curves_figure
from locat_lightning.tasks.classification import check_same_classes, classes_of


def measure_robustness(
    model: nn.Module, data: ImageData, config: Namespace, settings: Robustness, fabric: Fabric
) -> Measurement:
    """Measure top-1 on the validation images under each condition of the settings."""
    classes = getattr(model, "num_classes", 0)
    if classes != data.num_classes:
        has = f"a classifier of {classes} classes" if classes else "no classifier"
        raise InputError(f"{config.weights} has {has}, and the data have {data.num_classes} classes")
    check_same_classes(classes_of(contents_of(config.weights) or {}), data.class_names)
    loader, dtype = data.eval_dataloader("val"), autocast_type(config.precision)
    options: dict[str, Any] = {"normalisation": data.normalisation, "autocast_dtype": dtype}
    found = rank_perturbed(model, loader, fabric.device, settings, **options)
    hits = {condition.name: ranks < 1 for condition, ranks in found.ranks.items()}
    names = names_of(data, "val", found.indices.tolist())
    figures = Figures(Scores(found.indices, names, found.labels, hits), "robustness")
    patch, number = settings.patch_size or patch_of(model), len(found.indices)
    protocol = f"patches of {patch} px corrupted, severity {settings.severity}, seed {settings.seed}"
    heading = f"robustness: {number:,} images, {protocol}"
    temperatures = settings.temperatures
    titles = [f"top-1 at temperature {t:g}" for t in temperatures] if len(temperatures) > 1 else ["top-1"]
    table = Table("corruption", *(Column(title, justify="right") for title in ("patches", *titles)))
    places = dict.fromkeys((condition.kind, condition.number) for condition in found.ranks)
    for kind, count in places:
        cells = (figures.cell(Condition(kind, count, t).name) for t in temperatures)
        table.add_row(kind, str(count), *cells)
    pictures = {"robustness": _curves(found.ranks, figures)}
    return Measurement(heading, table, figures.metrics(), protocol, figures, pictures=pictures)


def _curves(conditions: Any, figures: Figures) -> Any:
    panels: dict[str, dict[str, list[Point]]] = {}
    for condition in conditions:
        kind, _, temperature = condition
        panel = panels.setdefault(f"attention temperature {temperature:g}", {})
        if kind == "none":
            continue
        start = Condition("none", 0, temperature)
        for each in (condition,) if kind in panel else (start, condition):
            point = Point(each.number, figures.values[each.name], *figures.intervals[each.name])
            panel.setdefault(kind, []).append(point)
    return curves_figure(panels, "corrupted patches", "top-1")
