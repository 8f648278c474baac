"""`--datasets`, `--subsets`: one command measures on several data sets, or subsets of channels: one table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from locat_lightning.commands.measurement import Measurement
from locat_lightning.data.shards import INDEX
from locat_lightning.data.stores import is_remote
from locat_lightning.data.timm_sources import KINDS
from locat_lightning.errors import InputError


def options_of(datasets: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the options of the data of `--datasets`: folders, URLs of shards, names of timm's."""
    if again := [each for each in datasets if datasets.count(each) > 1]:
        raise InputError(f"--datasets: {again[0]} is named twice")
    return {each: _options_of(each) for each in datasets}


def subsets_of(subsets: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the options of the data that each of `--subsets`, the indices of some channels, stands for."""
    found = {}
    for each in subsets:
        parts = each.split(",")
        if not all(part.isdecimal() for part in parts):
            raise InputError(f"--subsets: {each!r} is not the indices of channels, such as 0,1,4")
        found["channels_" + "_".join(parts)] = {"channels": [int(part) for part in parts]}
    return found


def _options_of(dataset: str) -> dict[str, str | None]:
    if is_remote(dataset) or any(Path(dataset).glob(f"*/{INDEX}")):
        return {"stream": dataset}
    if Path(dataset).is_dir():
        return {"root": dataset, "dataset": "folder", "stream": None}
    if dataset == "digits" or dataset.partition("/")[0].lower() in KINDS:
        return {"dataset": dataset, "stream": None}
    known = ", ".join(f"{kind}/…" for kind in KINDS)
    raise InputError(
        f"--datasets: {dataset} is not a folder, a URL of shards, 'digits' or a data set of timm's ({known})"
    )


def ending_of(dataset: str) -> str:
    """Return what is added to the name of a run on one of `--datasets`."""
    if Path(dataset).is_dir():
        return f"_{Path(dataset).resolve().name}"
    return f"_{dataset.rstrip('/').partition('://')[2] or dataset}".replace("/", "_").replace(":", "_")


def show_together(measured: Mapping[str, Measurement]) -> None:
    """Print the rows of several measurements of one kind in one table."""
    first = next(iter(measured.values()))
    titles = [str(column.header) for column in first.table.columns[: len(first.rows[0])]]
    table = Table("data set", *(Column(title, justify="right") for title in titles))
    for dataset, measurement in measured.items():
        for row in measurement.rows:
            table.add_row(Text(ending_of(dataset)[1:]), *row)
    Console().print(table)
