"""Checks of options before anything is built."""

import argparse
import os
from pathlib import Path
from tempfile import TemporaryFile

from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeFloat, PositiveFloat, PositiveInt

from locat_lightning.backbones.weights import RANDOM
from locat_lightning.errors import InputError
from locat_lightning.records import LARGEST

LONGEST = 200  # bytes of the name of a run, which is the beginning of a folder's name

NUMBERS = {
    "accumulate_grad_batches": PositiveInt,
    "check_val_every_n_epoch": PositiveInt,
    "gradient_clip_val": NonNegativeFloat,
    "limit_train_batches": PositiveFloat,
    "val_check_interval": PositiveFloat,
}


def check_numbers(config: Namespace) -> None:
    """Check numbers that Lightning takes whatever they are, and fails on later (`NUMBERS`, and huge ones)."""
    for option, value in config.items():
        if isinstance(value, int) and abs(value) > LARGEST:
            raise InputError(f"{option.replace('.init_args.', '.')}: {value} is above {LARGEST:,}")
    for option, type_ in NUMBERS.items():
        value = config.trainer[option]
        try:
            if isinstance(value, int | float):
                type_(value)
        except ValueError as error:
            raise InputError(f"trainer.{option}: {error}") from error


def check_name(name: str | None) -> None:
    """Check that the name of a run, or of nested folders, is one of a folder below that of all runs."""
    parts = Path(name or "run").parts
    long = max(len(os.fsencode(part)) for part in parts) > LONGEST
    if name and (long or ".." in parts or Path(name).is_absolute() or not name.isprintable()):
        raise InputError(
            f"--name: {name[:40]!r} is not the name of a folder in --runs: take at most {LONGEST} letters, "
            "without '..' or control characters"
        )


def check_root(options: argparse.Namespace, dataset: str | None, stream: str | None) -> None:
    """Check that `data.root` of the decisive options is read, as it is not with a stream or the digits."""
    root, named = getattr(options, "data.root"), getattr(options, "data.dataset")
    if stream is not None and root is not None:
        raise InputError(
            f"data.root: {root} would not be read, because data.stream is {stream}: give only one of them "
            "(--data.stream null)"
        )
    if dataset == "digits" and root is not None and named is None:
        raise InputError(
            f"data.root: {root} would not be read, because data.dataset is digits: for the images there add "
            "--data.dataset folder, for the digits leave data.root out"
        )


def check_start(config: Namespace) -> None:
    """Check that a model that begins as a trained one has its weights."""
    locat = (config.get("model.init_args.locat") if "model" in config else None) or {}
    if locat.get("start") == "identity" and config.weights is None and config.ckpt_path is None:
        raise InputError(
            "--weights is missing: the model that LocAt is put into, because model.locat has start: identity "
            f"('{RANDOM}' for an untrained one)"
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
