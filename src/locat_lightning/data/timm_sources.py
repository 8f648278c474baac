"""Data sets that timm makes: torchvision's, those of its own readers, and streams."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import create_dataset
from torch.utils.data import IterableDataset

from locat_lightning.data.dataset import Source
from locat_lightning.data.decoding import open_image, to_rgb
from locat_lightning.errors import InputError, in_a_line

KINDS = ("torch", "hfds", "hfids", "tfds", "wds")


@dataclass(frozen=True)
class TimmSource(Source[int]):
    """A data set of torchvision, or one that a reader of timm's reads.

    Timm's own data set is passed over: it would replace an unreadable image by another.
    """

    dataset: Any
    name: str

    @property
    def class_names(self) -> list[str]:
        """The class names that the data set knows, in the order of their labels; [] if none."""
        return _known_classes(self.dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def path(self, index: int) -> str:
        """Name image `index` by the data set and its position there."""
        return f"{self.name}/{index}"

    @contextmanager
    def open(self, index: int) -> Iterator[tuple[Image.Image, int]]:
        """Open image `index`."""
        if hasattr(self.dataset, "reader"):
            file, label = self.dataset.reader[index]
            with file, open_image(file) as image:
                yield image, -1 if label is None else int(label)
        else:
            image, label = self.dataset[index]
            yield to_rgb(image), -1 if label is None else int(label)


class Stream(IterableDataset):
    """A data set that timm reads front to back, shuffles and shares out among processes, transformed.

    Args:
        dataset: timm's `IterableImageDataset`.
        transform: turns an RGB image into a tensor.
    """

    def __init__(self, dataset: Any, transform: Callable[[Image.Image], Any]) -> None:
        self.dataset = dataset
        self.transform = transform
        self.class_names = _known_classes(dataset)

    def transformed(self, transform: Callable[[Image.Image], Any]) -> "Stream":
        """Return the same images with another transform."""
        return Stream(self.dataset, transform)

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[tuple[Any, int, int]]:
        for image, label in self.dataset:
            yield self.transform(to_rgb(image)), -1 if label is None else int(label), -1


def _known_classes(dataset: Any) -> list[str]:
    """Return the class names of torchvision's or timm's data set in the order of their labels."""
    if hasattr(dataset, "reader"):
        index = getattr(dataset.reader, "class_to_idx", None) or {}
        return sorted(map(str, index), key={str(name): label for name, label in index.items()}.__getitem__)
    return [str(name) for name in getattr(dataset, "classes", [])]


def timm_source(
    dataset: str, root: Path, split: str, names: Sequence[str], *, download: bool, batch_size: int, seed: int
) -> TimmSource | Stream:
    """Have timm make a data set.

    Args:
        dataset: timm's name of it: `torch/cifar10`, `hfds/timm/mini-imagenet`, `wds/…`.
        root: folder of its files.
        split: `train`, `val` or `test`.
        names: of the split, of which the first that timm knows is taken.
        download: whether it may be downloaded to root.
        batch_size: of a stream, which reads that many images at once.
        seed: of a stream's order.

    Raises:
        InputError: timm cannot make it.
    """
    kind = dataset.partition("/")[0].lower()
    if kind not in KINDS:
        known = ", ".join(f"{kind}/…" for kind in KINDS)
        raise InputError(f"unknown data set {dataset!r}: use folder, digits, or a name of timm's ({known})")
    failed: Exception | None = None
    for name in names:
        try:
            made = create_dataset(
                dataset,
                root=str(root),
                split=name,
                is_training=split == "train",
                download=download,
                batch_size=batch_size,
                seed=seed,
            )
        except ImportError as error:
            raise InputError(
                f"data set {dataset!r} needs a package that is missing: pip install {error.name}"
            ) from error
        except Exception as error:  # each kind of data set has errors of its own
            failed = failed or error
        else:
            return (
                Stream(made, to_rgb)
                if isinstance(made, IterableDataset)
                else TimmSource(made, f"{dataset}/{name}")
            )
    assert failed is not None
    hint = " (--data.download true downloads it)" if kind == "torch" and not download else ""
    raise InputError(f"data set {dataset!r}, {split}, in {root}: {in_a_line(failed)}{hint}") from failed
