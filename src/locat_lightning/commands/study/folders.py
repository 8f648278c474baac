"""The folders that a study reads: as given, unpacked from an archive, or with fewer images."""

import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from locat_lightning.errors import InputError


def unpacked(source: Path, beneath: Path, option: str) -> Path:
    """Return a folder as it is, or what a .tar, .tar.gz, … of it holds, unpacked once into `beneath`."""
    if source.is_dir():
        return source
    if not source.is_file():
        raise InputError(f"{option}: no such folder or archive: {source.absolute()}")
    folder = beneath / source.name.partition(".")[0]
    if not folder.is_dir():
        try:
            with _whole(folder) as part, tarfile.open(source) as archive:
                archive.extractall(part, filter="data")
        except tarfile.TarError as error:
            raise InputError(f"{option}: {source} is neither a folder nor a .tar: {error}") from error
    tops = list(folder.iterdir())
    return tops[0] if len(tops) == 1 else folder


def some_of_each_class(root: Path, count: int, beneath: Path, option: str) -> Path:
    """Return a folder in `beneath` with links to some training images of each class, chosen at random once.

    What `root` has beside `train/` is linked as it is. A class with fewer than `count` images keeps all.
    """
    chosen = beneath / f"{root.name}_{count}_per_class"
    if chosen.is_dir():
        return chosen
    if not (root / "train").is_dir():
        raise InputError(f"{option}: {root} has no train/ with a folder of images for each class")
    rng = np.random.default_rng(0)
    with _whole(chosen) as part:
        for folder in sorted(path for path in (root / "train").iterdir() if path.is_dir()):
            files = sorted(folder.iterdir())
            own = part / "train" / folder.name
            own.mkdir(parents=True)
            for place in rng.permutation(len(files))[:count]:
                (own / files[place].name).symlink_to(files[place].absolute())
        for other in root.iterdir():
            if other.name != "train":
                (part / other.name).symlink_to(other.absolute())
    return chosen


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """Give a place to build a folder, which gets its name when it is complete."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    part.rename(folder)
