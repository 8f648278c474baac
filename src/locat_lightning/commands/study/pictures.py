"""The pictures of a report: charts of the results, and all arms side by side on the same images."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from locat_lightning.backbones.create import load_backbone
from locat_lightning.callbacks.pictures import spaced_items
from locat_lightning.commands.study.differences import Place
from locat_lightning.commands.study.plan import TRAIN, Step, Study
from locat_lightning.commands.study.steps import LAYERS, Results, by_seed, checkpoint_of
from locat_lightning.errors import InputError
from locat_lightning.evaluation.dense import patch_features
from locat_lightning.evaluation.layers import ByLayer
from locat_lightning.figures.grid import feature_column, grid, image_column, rgb
from locat_lightning.figures.layers import layers_figure
from locat_lightning.figures.segmentation import class_column, class_legend

IMAGES, SIDE = 4, 120  # rows, and the shorter side of a tile in pixels
LEGEND: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1, 1), "frameon": False}  # beside the axes
Points = Sequence[tuple[float, float]]
Places = Mapping[str, Path]  # of the runs of each arm
Courses = Mapping[str, Mapping[str, Sequence[Place]]]  # by arm and title of the measure, by epoch


def draw(
    study: Study, results: Results, courses: Courses, directory: Path, folders: Mapping[str, str]
) -> dict[str, Figure]:
    """Draw what can be drawn of the results so far: figures by name (see `write_report`).

    What needs the runs of the first seed is drawn only where those of all finished arms are in `directory`.
    """
    chosen, figures = study.pictures, {}
    if chosen.quality is not None:
        points = {}
        for arm in study.arms:
            across, up = (by_seed(arm, name, results) for name in chosen.quality)
            points[arm] = [(100 * across[seed], 100 * up[seed]) for seed in across.keys() & up.keys()]
        if any(points.values()):
            axes = (f"{study.measures[name].title}, per cent" for name in chosen.quality)
            figures["quality"] = points_figure(points, *axes)
    found = {arm: [r["kernel_widths"] for r in results if r["arm"] == arm] for arm in study.arms}
    widths = {arm: [mean(block) for block in zip(*each, strict=True)] for arm, each in found.items()}
    if any(widths.values()):
        figures["kernels"] = lines_figure(widths, "block", "kernel width, in patches", level=1.0)
    if any(len(places) > 1 for of_arm in courses.values() for places in of_arm.values()):
        names = {arm: f"{arm} − {study.baseline_of(arm)}" for arm in courses}
        figures["curves"] = differences_figure({names[arm]: of_arm for arm, of_arm in courses.items()})
    if by_epoch := layers_by_epoch(study, results):
        figures["layers"] = layers_figure({f"epoch {epoch}": each for epoch, each in by_epoch.items()})
    seed = study.seeds[0]
    steps = {step.name: step for step in study.steps(next(iter(study.arms)), seed)}
    arms = {r["arm"]: directory / r["arm"] / f"seed_{seed}" for r in results if r["seed"] == seed}
    if chosen.features in steps and _have(arms, checkpoint_of(Path(), TRAIN), steps[chosen.features].run):
        figures["features"] = features_figure(arms, steps[chosen.features], folders)
    if chosen.predictions in steps:
        step = steps[chosen.predictions]
        if _have(arms, step.run / "predictions", steps[step.weights].run):
            colours = None if chosen.colours is None else np.array(chosen.colours, np.uint8)
            figures["predictions"] = predictions_figure(arms, step, steps[step.weights], folders, colours)
    return figures


def layers_by_epoch(study: Study, results: Results) -> dict[int, dict[str, ByLayer]]:
    """Return what was found of the layers of each arm after each epoch, means over the seeds."""
    found: dict[int, dict[str, ByLayer]] = {}
    for epoch in sorted({epoch for result in results for epoch in result[LAYERS]}):
        for arm in study.arms:
            seeds = [r[LAYERS][epoch] for r in results if r["arm"] == arm and epoch in r[LAYERS]]
            if seeds:
                found.setdefault(epoch, {})[arm] = {
                    measure: {layer: mean(seed[measure][layer] for seed in seeds) for layer in of_layer}
                    for measure, of_layer in seeds[0].items()
                }
    return found


def _have(arms: Places, *paths: Path) -> bool:
    """Return whether there are arms, and all have these files or folders."""
    return bool(arms) and all((own / path).exists() for own in arms.values() for path in paths)


def points_figure(arms: Mapping[str, Points], x: str, y: str) -> Figure:
    """Plot a circle for each point (x, y) of an arm and a dot for their mean; `x` and `y` name the axes."""
    figure, axes = _axes(x, y)
    for number, (arm, points) in enumerate(arms.items()):
        if points:
            across, up = zip(*points, strict=True)
            axes.scatter(across, up, 25, facecolors="none", edgecolors=f"C{number}")
            axes.scatter(mean(across), mean(up), 90, f"C{number}", label=arm)
    axes.legend(**LEGEND)
    return figure


def differences_figure(arms: Mapping[str, Mapping[str, Sequence[Place]]]) -> Figure:
    """Plot differences over epochs, in percentage points: a row for each measure, a column for each arm."""
    titles = list(next(iter(arms.values())))
    figure = Figure((1 + 2.6 * len(arms), 0.6 + 2.1 * len(titles)), layout="constrained")
    grid_ = figure.subplots(len(titles), len(arms), sharex=True, sharey="row", squeeze=False)
    for column, (name, of_arm) in enumerate(arms.items()):
        for row, title in enumerate(titles):
            axes = grid_[row, column]
            axes.axhline(0, color="grey", linewidth=1)
            axes.grid(alpha=0.3)
            places = of_arm[title]
            epochs = [place.epoch for place in places]
            axes.plot(epochs, [100 * place.difference.mean for place in places], f"C{column + 1}o-")
            seeds = [place.difference[1:3] if place.difference.pairs > 2 else None for place in places]
            for ends, alpha in ((seeds, 0.15), ([place.over_images for place in places], 0.35)):
                low, high = zip(*(np.multiply(100, each or (np.nan, np.nan)) for each in ends), strict=True)
                axes.fill_between(epochs, low, high, color=f"C{column + 1}", alpha=alpha, linewidth=0)
            axes.set_title(name if row == 0 else "")
            axes.set_ylabel(title if column == 0 else "")
            axes.set_xlabel("epoch" if row == len(titles) - 1 else "")
    return figure


def lines_figure(arms: Mapping[str, Sequence[float]], x: str, y: str, *, level: float) -> Figure:
    """Plot a line for each arm over 0, 1, 2, …, and a grey one at a level; `x` and `y` name the axes."""
    figure, axes = _axes(x, y)
    axes.margins(y=0.2)
    axes.axhline(level, color="grey")
    for number, (arm, values) in enumerate(arms.items()):
        if values:
            axes.plot(values, f"C{number}o-", label=arm)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(**LEGEND)
    return figure


def features_figure(arms: Places, step: Step, folders: Mapping[str, str]) -> Figure:
    """Draw the principal components of each arm's patch features on the validation images of a step."""
    data = _data(next(iter(arms.values())) / step.run, step, folders)
    images = torch.stack([image for image, *_ in spaced_items(data.val_dataloader(), IMAGES)])
    shown = list(rgb(images, data.normalisation))
    columns = [image_column("input", shown)]
    for arm, directory in arms.items():
        backbone = load_backbone(str(checkpoint_of(directory, TRAIN)), any_size=True)
        columns.append(feature_column(patch_features(backbone, images), arm))
    return grid(columns, shown, SIDE)


def predictions_figure(
    arms: Places,
    predicted: Step,
    trained: Step,
    folders: Mapping[str, str],
    colours: np.ndarray | None = None,
) -> Figure:
    """Draw the label maps that a step of each arm predicted for some validation images of another.

    The classes have their colours [C, 3] in the data, or those that are given.
    """
    data = _data(next(iter(arms.values())) / trained.run, trained, folders)
    source, colours = data.source("val"), data.colours if colours is None else colours
    if len(colours) != len(data.colours):
        raise InputError(f"pictures.colours: {len(colours)} colours for {len(data.colours)} classes")
    indices = [index for *_, index in spaced_items(data.val_dataloader(), IMAGES)]
    images, masks = zip(*map(source.read, indices), strict=True)
    shown = [np.asarray(image) / 255 for image in images]
    maps = {"annotation": [np.array(mask) for mask in masks]}
    for arm, directory in arms.items():
        found = directory / predicted.run / "predictions"
        files = [next(found.rglob(f"{Path(source.path(index)).stem}.png")) for index in indices]
        maps[arm] = [np.array(Image.open(file)) for file in files]
    columns = [class_column(title, shown, each, colours) for title, each in maps.items()]
    legend = class_legend([each for of in maps.values() for each in of], data.class_names, colours)
    return grid([image_column("input", shown), *columns], shown, SIDE, legend)


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure((8, 5), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return figure, axes


def _data(run: Path, step: Step, folders: Mapping[str, str]) -> Any:
    """Return the data of a step as recorded by its run, from where the folders are now."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    recorded = yaml.safe_load((run / "config.yaml").read_text())["data"]
    here, unmoved = step.arguments(folders), step.arguments({})
    moved = [text for text in here if text.startswith("--data.") and text not in unmoved]
    return parser.instantiate_classes(parser.parse_args([f"--data={json.dumps(recorded)}", *moved])).data
