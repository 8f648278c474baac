"""Data sets that timm makes: torchvision's, and those of the Hugging Face hub."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import create_dataset

from locat_lightning.data.base import SPLITS
from locat_lightning.data.dataset import Source
from locat_lightning.data.decoding import open_image, to_rgb
from locat_lightning.errors import InputError, in_a_line

KINDS = ("torch", "hfds")
# Of timm's, too, but read front to back: without positions there is no exact resume.
WITHOUT_POSITIONS = {
    "wds": "pass the folder or URL of its shards as --data.stream, after locat pack --tars has indexed them",
    "hfids": "take hfds/…, the same data set with positions",
    "tfds": "write its images to a folder, or take hfds/…",
}


@dataclass(frozen=True)
class TimmSource(Source[int]):
    """A data set of torchvision, or one that a reader of timm's reads.

    Timm's own data set is passed over: it would replace an unreadable image by another.
    """

    dataset: Any
    name: str

    def __len__(self) -> int:
        return len(self.dataset)

    @cached_property
    def labels(self) -> np.ndarray | None:
        """The label of each image, int64 [N]; None if they are no numbers, or not known without reading."""
        reader: Any = getattr(self.dataset, "reader", None)
        if hasattr(reader, "label_key"):  # of Hugging Face
            found: Any = list(reader.dataset[reader.label_key])
        else:
            named = (getattr(self.dataset, name, None) for name in ("targets", "labels", "_labels"))
            found = next((each for each in named if each is not None), ())
        with suppress(TypeError, ValueError):  # of another kind
            labels = np.asarray(found)
            if labels.shape == (len(self),) and labels.dtype.kind in "iu":
                return labels.astype(np.int64)
        return None

    def path(self, index: int) -> str:
        return f"{self.name}/{index}"

    @contextmanager
    def open(self, index: int) -> Iterator[tuple[Image.Image, int]]:
        if hasattr(self.dataset, "reader"):
            file, label = self.dataset.reader[index]
            with file, open_image(file) as image:
                yield image, -1 if label is None else int(label)
        else:
            image, label = self.dataset[index]
            yield to_rgb(image), -1 if label is None else int(label)


def is_fetched(dataset: str) -> bool:
    """Whether a package would fetch this data set, and run what some of them hold."""
    return dataset.lower().startswith("hfds/")


def known_class_names(source: TimmSource) -> list[str]:
    """Return the class names that a data set knows, in the order of their labels; [] if none."""
    if hasattr(source.dataset, "reader"):
        labels = getattr(source.dataset.reader, "class_to_idx", None) or {}
        return [str(name) for name in sorted(labels, key=labels.__getitem__)]
    return [str(name) for name in getattr(source.dataset, "classes", [])]


def timm_source(dataset: str, root: Path, split: str, *, download: bool) -> TimmSource:
    """Have timm's `create_dataset` make a split, by the first of its names that timm knows."""
    kind = dataset.partition("/")[0].lower()
    if kind in WITHOUT_POSITIONS:
        raise InputError(f"data set {dataset!r} is read front to back: {WITHOUT_POSITIONS[kind]}")
    if kind not in KINDS:
        known = ", ".join(f"{kind}/…" for kind in KINDS)
        raise InputError(f"unknown data set {dataset!r}: use folder, digits, or a name of timm's ({known})")
    options = {"root": str(root), "is_training": split == "train", "download": download}
    failed: Exception | None = None
    for name in SPLITS[split]:
        try:
            made = create_dataset(dataset, split=name, **options)
        except ImportError as error:
            raise InputError(
                f"data set {dataset!r} needs a package that is missing: pip install {error.name}"
            ) from error
        except Exception as error:  # each kind of data set has errors of its own
            failed = failed or error
        else:
            return TimmSource(made, f"{dataset}/{name}")
    assert failed is not None
    hint = " (--data.download true downloads it)" if kind == "torch" and not download else ""
    raise InputError(f"data set {dataset!r}, {split}, in {root}: {in_a_line(failed)}{hint}") from failed
