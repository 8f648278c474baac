"""Where a study's images are: in folders, in archives of such folders, or only some of them."""

import shutil
import tarfile
from pathlib import Path

import numpy as np

from locat_lightning.errors import InputError


def unpacked(source: Path, beneath: Path, option: str) -> Path:
    """A folder as it is, or what an archive of it holds, unpacked once.

    Args:
        source: a folder, or a .tar, .tar.gz, …
        beneath: where to unpack.
        option: that says the source, for errors.

    Returns:
        The folder; of an archive with a single folder at the top, that.

    Raises:
        InputError: there is neither.
    """
    if source.is_dir():
        return source
    if not source.is_file():
        raise InputError(f"{option}: no such folder or archive: {source.absolute()}")
    folder = beneath / source.name.partition(".")[0]
    if not folder.is_dir():
        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        try:
            with tarfile.open(source) as archive:
                archive.extractall(part, filter="data")
        except tarfile.TarError as error:
            raise InputError(f"{option}: {source} is neither a folder nor a .tar: {error}") from error
        part.rename(folder)
    tops = list(folder.iterdir())
    return tops[0] if len(tops) == 1 else folder


def some_of_each_class(root: Path, count: int, to: Path, *, seed: int = 0) -> Path:
    """A folder of classes with fewer training images, as links: for all arms the same, chosen at random once.

    Args:
        root: has `train/` with a folder per class, and others, which are linked as they are.
        count: training images of each class; a class that has fewer keeps all.
        to: the folder to make, unless it is there.
        seed: of the choice.
    """
    if to.is_dir():
        return to
    if not (root / "train").is_dir():
        raise InputError(f"--images: no train/ in {root}: it should hold a folder per class, with its images")
    part = to.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    rng = np.random.default_rng(seed)
    for folder in sorted(path for path in (root / "train").iterdir() if path.is_dir()):
        files = sorted(folder.iterdir())
        (part / "train" / folder.name).mkdir(parents=True)
        for place in rng.permutation(len(files))[:count]:
            file = files[place]
            (part / "train" / folder.name / file.name).symlink_to(file.absolute())
    for other in root.iterdir():
        if other.name != "train":
            (part / other.name).symlink_to(other.absolute())
    part.rename(to)
    return to
