"""Where labelled images come from: folders of classes, and timm's data sets."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import IterableDataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from locat_lightning.data.decoding import open_image, read_image, to_rgb
from locat_lightning.errors import InputError


@dataclass(frozen=True)
class Files:
    """Image files and their labels (a `Source`)."""

    paths: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> str:
        """The file of image `index`."""
        return self.paths[index]

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Reads image `index`."""
        return read_image(self.paths[index]), self.labels[index]

    @contextmanager
    def open(self, index: int) -> Iterator[tuple[Image.Image, int]]:
        """Opens image `index`."""
        with open_image(self.paths[index]) as image:
            yield image, self.labels[index]


@dataclass(frozen=True)
class TimmSource:
    """A data set that timm made, of torchvision's or with a reader of timm's own (a `Source`)."""

    dataset: Any
    name: str

    @property
    def class_names(self) -> list[str]:
        """The names that the data set knows."""
        return _known_classes(self.dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def path(self, index: int) -> str:
        """The data set's name and the position there."""
        return f"{self.name}/{index}"

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Reads image `index`; past timm's data set, which would put another for one that it cannot read."""
        with self.open(index) as (image, label):
            image.load()
            return image, label

    @contextmanager
    def open(self, index: int) -> Iterator[tuple[Image.Image, int]]:
        """Opens image `index`."""
        if hasattr(self.dataset, "reader"):
            file, label = self.dataset.reader[index]
            with file, open_image(file) as image:
                yield image, -1 if label is None else int(label)
        else:
            image, label = self.dataset[index]
            yield to_rgb(image), -1 if label is None else int(label)


class Stream(IterableDataset):
    """A data set that timm reads front to back, shuffling and sharing it out by itself, transformed.

    Args:
        dataset: timm's `IterableImageDataset`.
        transform: makes a tensor of an RGB image.
    """

    def __init__(self, dataset: Any, transform: Callable[[Image.Image], Any]) -> None:
        self.dataset = dataset
        self.transform = transform
        self.class_names = _known_classes(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[tuple[Any, int, int]]:
        for image, label in self.dataset:
            yield self.transform(to_rgb(image)), -1 if label is None else int(label), -1


def _known_classes(dataset: Any) -> list[str]:
    """Class names of torchvision's or timm's data set, in the order of their labels; [] if it has none."""
    if hasattr(dataset, "reader"):
        index = getattr(dataset.reader, "class_to_idx", None) or {}
        return sorted(map(str, index), key={str(name): label for name, label in index.items()}.__getitem__)
    return [str(name) for name in getattr(dataset, "classes", [])]


def labelled_files(folder: Path, class_names: list[str], named_by: str, complete: bool) -> Files:
    """Finds the images of a split, whose classes another names; a `complete` one has some of every class.

    Raises:
        InputError: the folder has no class folders, others than named, or too few images in them.
    """
    if unknown := sorted(set(_class_folders(folder)) - set(class_names)):
        raise InputError(
            f"{folder} has classes that {named_by} lacks: {listed(unknown)}; remove or rename them"
        )
    files = [images_beneath(folder / name) for name in class_names]
    if not any(files):
        raise InputError(f"no images in the class folders of {folder}: {EXTENSIONS}")
    if complete and (empty := [name for name, paths in zip(class_names, files, strict=True) if not paths]):
        raise InputError(f"class folders without an image in {folder}: {listed(empty)}; {EXTENSIONS}")
    return Files(
        [path for paths in files for path in paths],
        [label for label, paths in enumerate(files) for _ in paths],
    )


def unlabelled_files(folder: Path) -> Files:
    """Finds every image beneath a folder."""
    if not (paths := images_beneath(folder)):
        raise InputError(f"no images beneath {folder}: {EXTENSIONS}")
    return Files(paths, [-1] * len(paths))


def _class_folders(folder: Path) -> list[str]:
    if not (names := _folders(folder)):
        raise InputError(
            f"no class folders in {folder}: the images of each class belong in a folder of its name"
        )
    return names


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")


def images_beneath(folder: Path) -> list[str]:
    """Finds the path of every image in a folder and the folders in it, but for hidden ones, in order."""
    return files_beneath(folder, IMG_EXTENSIONS)


def files_beneath(folder: Path, endings: tuple[str, ...]) -> list[str]:
    """Finds the path of every file whose name, in lower case, has an ending, as `images_beneath` does."""
    return sorted(
        os.path.join(parent, name)  # noqa: PTH118 - a Path for each of a million files takes seconds
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.lower().endswith(endings) and name[0] != "."
    )


EXTENSIONS = f"files ending in {', '.join(IMG_EXTENSIONS)} count"


def listed(names: list[str], most: int = 10) -> str:
    """Lists names for an error, and the number of those beyond the first few."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
