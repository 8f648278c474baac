"""The result of a command that measures a frozen backbone: printed, and recorded in a run's directory."""

from pathlib import Path
from typing import NamedTuple

from jsonargparse import Namespace
from rich.console import Console
from rich.table import Column, Table

from locat.runs import write_json


class Measurement(NamedTuple):
    """A result, to print and to record."""

    heading: str
    table: Table
    metrics: dict[str, float]


def report(measurement: Measurement, run: Path, config: Namespace) -> None:
    """Print a measurement, and write it into a run's directory."""
    print(measurement.heading)
    Console().print(measurement.table)
    record = {"weights": config.weights, "seed": config.seed, "measured": measurement.heading}
    write_json(run / "metrics.json", record | measurement.metrics)
    print(f"run: {run}")


def columns(*names: str) -> Table:
    """Return a table without rows, all columns aligned to the right."""
    return Table(*(Column(name, justify="right") for name in names))
