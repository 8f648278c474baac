"""`locat stats`: mean and standard deviation of each channel of a folder of images, for `--data.stats`."""

from pathlib import Path

from jsonargparse import ArgumentParser
from jsonargparse.typing import NonNegativeInt
from lightning.fabric.utilities.data import suggested_max_num_workers
from rich.console import Console

from locat_lightning.commands import checks, parsing
from locat_lightning.commands.measurement import columns
from locat_lightning.commands.messages import errors_in_a_line
from locat_lightning.data.bands import READERS
from locat_lightning.data.files import files_beneath
from locat_lightning.data.statistics import moments_of_files, write_statistics
from locat_lightning.errors import InputError

DESCRIPTION = (
    f"Measure mean and standard deviation of each channel of the images ({', '.join(READERS)}) beneath a "
    "folder's train/ or images/train/, or beneath the folder without these, and write them to a file for "
    "--data.stats. Values that are not finite are left out"
)
TRAINING = ("train", "images/train", "images/training")  # the first of these that exists


@errors_in_a_line
def main(arguments: list[str]) -> None:
    """Run `locat stats …`."""
    config = parsing.parse(_parser(), arguments[1:])
    root, to = Path(config.data.root).expanduser(), Path(config.to)
    if to.exists() and not config.overwrite:
        raise InputError(f"--to: {to} exists: give another file, or add --overwrite")
    checks.check_writable("--to", to.absolute().parent)
    if not root.is_dir():
        raise InputError(f"--data.root: no such folder: {root.absolute()}")
    folder = next((root / name for name in TRAINING if (root / name).is_dir()), root)
    if not (paths := files_beneath(folder, tuple(READERS))):
        raise InputError(
            f"no images beneath {folder}: files ending in {', '.join(READERS)} count; RGB needs no statistics"
        )
    workers = config.data.num_workers
    found = moments_of_files(paths, min(16, suggested_max_num_workers(1)) if workers is None else workers)
    write_statistics(to, found, len(paths))
    print(f"{len(paths):,} images of {len(found.mean)} channels beneath {folder}")
    table = columns("channel", "mean", "std", "least", "most")
    for channel, row in enumerate(zip(found.mean, found.std, found.least, found.most, strict=True)):
        table.add_row(str(channel), *(f"{value:.6g}" for value in row))
    Console().print(table)
    print(f"use them: --data.stats {to}")


def _parser() -> ArgumentParser:
    parser = parsing.command_parser("stats", DESCRIPTION)
    add = parser.add_argument
    add("--data.root", type=str, required=True, help="folder of the data set")
    help_ = "processes that read images; null uses all available processors but one (at most 16)"
    add("--data.num_workers", type=NonNegativeInt | None, default=None, help=help_)
    add("--to", type=str, default="stats.yaml", help="the file to write")
    add("--overwrite", action="store_true", help="replace a file that is there")
    return parser
