"""Image files in folders: those of each class, all beneath a folder, and what is wrong with a layout."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from unicodedata import normalize

from lightning.pytorch.utilities import rank_zero_info
from PIL import Image

from locat_lightning.data.dataset import Source
from locat_lightning.data.decoding import RGB, Reader
from locat_lightning.errors import InputError

# Folders that file systems and archives of other machines leave in a folder.
LITTER = {"@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}


@dataclass(frozen=True)
class Files(Source[int]):
    """Image files and their labels."""

    paths: list[str]
    labels: list[int]
    reader: Reader = RGB

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> str:
        return self.paths[index]

    @contextmanager
    def open(self, index: int) -> Iterator[tuple[Image.Image, int]]:
        with self.reader(self.paths[index]) as image:
            yield image, self.labels[index]


def labelled_files(
    folder: Path, class_names: list[str], named_by: str, complete: bool, reader: Reader = RGB
) -> Files:
    """Find the images of a split in its folders of classes; if `complete`, every class must have one.

    The class names are in the order of their labels, and come from the folder `named_by`.
    """
    folders = class_folders(folder)
    if unknown := sorted(folders.keys() - set(class_names)):
        raise InputError(
            f"{folder} has classes that {named_by} lacks: {listed(unknown)}; remove or rename them"
        )
    read = {os.path.realpath(each) for own in folders.values() for each in own}  # no class reads another's
    files = [
        [path for each in folders.get(name, []) for path in files_beneath(each, reader.endings, read)]
        for name in class_names
    ]
    if not any(files):
        raise InputError(f"no images in the class folders of {folder}: {counted(reader)}")
    if empty := [name for name, paths in zip(class_names, files, strict=True) if not paths]:
        if complete:
            raise InputError(
                f"class folders without an image in {folder}: {listed(empty)}; {counted(reader)}"
            )
        rank_zero_info(f"{folder} has no image of {len(empty)} of {len(files)} classes: {listed(empty)}")
    labels = [label for label, paths in enumerate(files) for _ in paths]
    return Files([path for paths in files for path in paths], labels, reader)


def unlabelled_files(folder: Path, reader: Reader = RGB) -> Files:
    """Find every image beneath a folder."""
    if not (paths := files_beneath(folder, reader.endings)):
        raise InputError(f"no images beneath {folder}: {counted(reader)}")
    return Files(paths, [-1] * len(paths), reader)


def counted(reader: Reader) -> str:
    """Say which files are images, for an error."""
    others = (
        "; with --data.stats (locat stats), also .npy, .dcm and TIFF of any channels" if reader is RGB else ""
    )
    return f"files ending in {', '.join(reader.endings)} count{others}"


def class_folders(folder: Path) -> dict[str, list[Path]]:
    """Return the folders of each class of a folder by its name: one, or those that Unicode takes for one."""
    classes: dict[str, list[Path]] = {}
    for name in subfolders(folder):
        classes.setdefault(normalize("NFC", name), []).append(folder / name)
    if not classes:
        raise InputError(
            f"no class folders in {folder}: the images of each class belong in a folder of its name"
        )
    return dict(sorted(classes.items()))


def is_data(name: str) -> bool:
    """Return whether a file or folder is the user's: not hidden, and not what other tools leave behind."""
    return name[0] != "." and name not in LITTER


def subfolders(folder: Path) -> list[str]:
    """Return the names of the folders in a folder that `is_data`, sorted, without links to what holds it."""
    return sorted(
        entry.name
        for entry in os.scandir(folder)
        if is_data(entry.name) and entry.is_dir() and not (entry.is_symlink() and _holds(entry.path, folder))
    )


def files_beneath(
    folder: Path, endings: tuple[str, ...] = RGB.endings, read: set[str] | None = None
) -> list[str]:
    """Return the images beneath a folder, or files of other endings (in lower case), if they are `is_data`.

    Links are followed, but each real folder is read once, and none that holds the given one.

    Args:
        folder: to look in.
        endings: of the names.
        read: real paths of the folders that count as read, to which those found are added.
    """
    found, read = [], set() if read is None else read
    for parent, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        real = os.path.realpath(parent)
        if parent != str(folder) and (real in read or _holds(real, folder)):
            folders.clear()
            continue
        read.add(real)
        folders[:] = filter(is_data, folders)
        # A Path for each of a million files takes seconds.
        found += [
            os.path.join(parent, name)  # noqa: PTH118
            for name in names
            if name.lower().endswith(endings) and is_data(name)
        ]
    return sorted(found)


def _holds(other: str, folder: Path) -> bool:
    """Return whether a folder is the other one, or lies in it."""
    return folder.resolve().is_relative_to(os.path.realpath(other))


def _refuse(error: OSError) -> NoReturn:
    raise InputError(f"cannot read the folder {error.filename}: {error.strerror}") from error


def listed(names: list[str], most: int = 10) -> str:
    """List the first few names and the number of the others, for an error."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
