"""Checks of options before anything is built."""

import argparse
import os
from pathlib import Path
from tempfile import TemporaryFile

from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeFloat, PositiveFloat, PositiveInt

from locat_lightning.errors import InputError

NUMBERS = {
    "accumulate_grad_batches": PositiveInt,
    "check_val_every_n_epoch": PositiveInt,
    "gradient_clip_val": NonNegativeFloat,
    "limit_train_batches": PositiveFloat,
}


def check_numbers(trainer: Namespace) -> None:
    """Check options of a trainer that Lightning takes whatever they are, and fails on later (`NUMBERS`)."""
    for option, type_ in NUMBERS.items():
        try:
            if trainer[option] is not None:
                type_(trainer[option])
        except ValueError as error:
            raise InputError(f"trainer.{option}: {error}") from error


def check_root(options: argparse.Namespace, dataset: str | None) -> None:
    """Check that `data.root` of the decisive options is read by the chosen data set: the digits have none."""
    root, named = getattr(options, "data.root"), getattr(options, "data.dataset")
    if dataset == "digits" and root is not None and named is None:
        raise InputError(
            f"data.root: {root} would not be read, because data.dataset is digits: for the images there add "
            "--data.dataset folder, for the digits leave data.root out"
        )


def check_writable(option: str, directory: Path) -> None:
    """Check that files can be created in the directory of an option, or in the nearest one that exists."""
    there = next(each for each in (directory, *directory.absolute().parents) if os.path.lexists(each))
    try:
        with TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise InputError(f"{option}: cannot write to {directory}: {there}: {error.strerror}") from error


def check_processes(number: int) -> None:
    """Check that a CPU has a core for each process of a run."""
    cores = os.cpu_count() or 1
    if number > cores:
        there = f"there {'is' if cores == 1 else 'are'} {cores}"
        raise InputError(
            f"devices: {number} processes need as many CPU cores, but {there}: use at most {cores}"
        )
