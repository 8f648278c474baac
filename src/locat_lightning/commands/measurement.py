"""What `locat knn` and its like have measured: printed, and recorded in a run of its own."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Column, Table
from torch import nn

from locat.runs import write_json
from locat_lightning.callbacks.record import versions
from locat_lightning.data import ImageData
from locat_lightning.evaluation.features import autocast_type, check_size
from locat_lightning.evaluation.intervals import Figures
from locat_lightning.evaluation.iou import IoU
from locat_lightning.evaluation.per_image import TABLE, write_table


class Measurement(NamedTuple):
    """A result, to print and to record."""

    heading: str
    table: Table
    metrics: dict[str, float]
    protocol: str  # on which figures depend besides weights and images; equal where they can be compared
    figures: Figures | None
    # Of the table, or their first cells, to stand beside those of other data sets.
    rows: Sequence[tuple[str, ...]] = ()
    pictures: Mapping[str, Figure] = MappingProxyType({})  # by name
    units: str = "images"  # what the figures are means over


def report(measurement: Measurement, run: Path, *, alone: bool = True, **known: Any) -> Path:
    """Print a measurement, and write it with what else is `known` into the directory of a run.

    If it is not `alone`, its table is shown later, with others.
    """
    heading, table, metrics, protocol, figures, _, pictures, units = measurement
    print(heading)
    if alone:
        Console().print(table)
    record = {**known, "measured": heading, **metrics, "protocol": protocol, "versions": versions()}
    if figures is not None:
        for name in filter(figures.values.__contains__, IoU.SCALARS):
            print(f"{figures.group}/{name} {figures.cell(name)}")
        print(f"in brackets: 95 % intervals, bootstrap over {len(figures.results.indices):,} {units}")
        write_table(run / TABLE, figures.results)
        record |= {**figures.record(), "units": units}
    for name, picture in pictures.items():
        picture.savefig(run / f"{name}.png")
    write_json(run / "metrics.json", record)
    print(f"run: {run}")
    return run


def columns(*names: str) -> Table:
    """Return a table without rows, all columns aligned to the right."""
    return Table(*(Column(name, justify="right") for name in names))


def protocol_of(*parts: str, precision: str | None) -> str:
    """Return a protocol of these parts, and of half precision if that is what features are computed in."""
    half = autocast_type(precision)
    return ", ".join([*parts, *([f"in {half}".replace("torch.", "")] if half else [])])


def shape_of(data: ImageData) -> str:
    """Say which part of an image a model is shown, and at what size."""
    how = data.preprocessing
    side, share = how["img_size"], how["crop_pct"]
    channels = f", channels {', '.join(map(str, how['channels']))}" if "channels" in how else ""
    return f"{side} × {side} px, {how['interpolation']}, crop {share:g}{channels}"


def check_images(backbone: nn.Module, data: ImageData, device: torch.device) -> None:
    """Check that a backbone takes images of the data's size: `InputError` if not."""
    advice = f"set --data.img_size, or --backbone_args.img_size {data.img_size}"
    check_size(backbone, data.img_size, device, advice=advice)
