"""Image files in folders: those of each class, all beneath a folder, and what is wrong with a layout."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from locat_lightning.data.dataset import Source
from locat_lightning.data.decoding import open_image
from locat_lightning.errors import InputError

EXTENSIONS = f"files ending in {', '.join(IMG_EXTENSIONS)} count"


@dataclass(frozen=True)
class Files(Source[int]):
    """Image files and their labels."""

    paths: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> str:
        return self.paths[index]

    @contextmanager
    def open(self, index: int) -> Iterator[tuple[Image.Image, int]]:
        with open_image(self.paths[index]) as image:
            yield image, self.labels[index]


def labelled_files(folder: Path, class_names: list[str], named_by: str, complete: bool) -> Files:
    """Find the images of a split in its folders of classes; if `complete`, every class must have one.

    The class names are in the order of their labels, and come from the folder `named_by`.
    """
    if unknown := sorted(set(class_folders(folder)) - set(class_names)):
        raise InputError(
            f"{folder} has classes that {named_by} lacks: {listed(unknown)}; remove or rename them"
        )
    files = [files_beneath(folder / name) for name in class_names]
    if not any(files):
        raise InputError(f"no images in the class folders of {folder}: {EXTENSIONS}")
    if complete and (empty := [name for name, paths in zip(class_names, files, strict=True) if not paths]):
        raise InputError(f"class folders without an image in {folder}: {listed(empty)}; {EXTENSIONS}")
    labels = [label for label, paths in enumerate(files) for _ in paths]
    return Files([path for paths in files for path in paths], labels)


def unlabelled_files(folder: Path) -> Files:
    """Find every image beneath a folder."""
    if not (paths := files_beneath(folder)):
        raise InputError(f"no images beneath {folder}: {EXTENSIONS}")
    return Files(paths, [-1] * len(paths))


def class_folders(folder: Path) -> list[str]:
    """Return the names of the folders in a folder, sorted: each is a class."""
    if not (names := subfolders(folder)):
        raise InputError(
            f"no class folders in {folder}: the images of each class belong in a folder of its name"
        )
    return names


def subfolders(folder: Path) -> list[str]:
    """Return the names of the folders in a folder, sorted, without hidden ones."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")


def files_beneath(folder: Path, endings: tuple[str, ...] = IMG_EXTENSIONS) -> list[str]:
    """Return the images beneath a folder, or files of other endings (in lower case), sorted, not hidden."""
    return sorted(
        os.path.join(parent, name)  # noqa: PTH118 - a Path for each of a million files takes seconds
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.lower().endswith(endings) and name[0] != "."
    )


def listed(names: list[str], most: int = 10) -> str:
    """List the first few names and the number of the others, for an error."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
