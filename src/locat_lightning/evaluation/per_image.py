"""What an evaluation found of each image, kept in a table: the figures follow from sums over the images."""

import csv
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from math import isfinite
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from locat.runs import write_csv
from locat_lightning.errors import InputError, in_a_line
from locat_lightning.evaluation.iou import IoU, shares
from locat_lightning.evaluation.shots import weights_by_group

TABLE = "images.csv"  # in the directory of an evaluation
OF_IMAGE = ("index", "path")  # the first columns of the table
SHOTS = "shots"  # the column after the label, where it is known how many training images its class had
OF_CLASS = (*OF_IMAGE, "class", "right", "annotated", "predicted")  # all columns, where pixels are counted
SEED = re.compile(r"_seed\d+")  # in the name of a condition's figure
OF_CONDITION = (*OF_IMAGE, "condition", *OF_CLASS[2:])  # the same, under several conditions


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of N images; a figure is their mean, as top-1 is that of hits.

    Args:
        indices: [N] int64, positions in the data set, ascending.
        names: of the images, as `names_of` gives them; "" where they have none.
        labels: [N] int64.
        scores: [N] by figure, of any type.
        shots: training images of each image's class, [N] int64: top-1 (`top1`, `top1_k20`, …) is then a
            figure by group of classes, too (`few`, `few_k20`, …; see `weights_by_group`).
    """

    indices: Tensor
    names: Sequence[str]
    labels: Tensor
    scores: Mapping[str, Tensor]
    shots: Tensor | None = None

    @cached_property
    def _weights(self) -> dict[str, Tensor]:
        return {} if self.shots is None else weights_by_group(self.labels, self.shots)

    def _by_group(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield the figures by group of classes: name, hits and weights of the images [N]."""
        for name, hits in self.scores.items():
            if name == "top1" or name.startswith("top1_"):
                for group, weights in self._weights.items():
                    yield group + name.removeprefix("top1"), hits, weights

    def statistics(self) -> Tensor:
        """Return [N, S] float64, whose sums over images decide the figures."""
        columns = [each.double() for each in self.scores.values()]
        for _, hits, weights in self._by_group():
            columns += [weights * hits, weights]
        return torch.stack(columns, 1)

    def figures(self, sums: Tensor, images: int) -> dict[str, Tensor]:
        """Return figures [...] by name of sums [..., S] over so many images; NaN of a group without any.

        In a resample of the images, those of groups of classes are means over images of weight 1 / n, n as in
        all images: a class counts there as often as it was drawn, and not the same as every other.
        """
        means, of_groups = sums[..., : len(self.scores)] / images, sums[..., len(self.scores) :].unbind(-1)
        found = dict(zip(self.scores, means.unbind(-1), strict=True))
        names = [name for name, _, _ in self._by_group()]
        groups = zip(names, of_groups[::2], of_groups[1::2], strict=True)
        return found | {name: hits / weights for name, hits, weights in groups}

    def annotations(self) -> Iterator[object]:
        """Yield what is annotated of each image."""
        yield from self.labels.tolist()

    def columns(self) -> tuple[str, ...]:
        """Return the columns of the table."""
        return (*OF_IMAGE, "label", *([] if self.shots is None else [SHOTS]), *self.scores)

    def rows(self) -> Iterator[tuple[object, ...]]:
        """Yield the rows of the table, one for each image."""
        known = [] if self.shots is None else [self.shots]
        scores = zip(*(each.float().tolist() for each in (*known, *self.scores.values())), strict=True)
        columns = zip(self.indices.tolist(), self.names, self.labels.tolist(), scores, strict=True)
        for index, name, label, of_image in columns:
            yield index, name, label, *(f"{score:.9g}" for score in of_image)


@dataclass(frozen=True, eq=False)
class Areas:
    """Areas of C classes in N images; figures are IoU and accuracies of the areas' sums.

    Args:
        indices: [N] int64, positions in the data set, ascending.
        names: of the images, as `names_of` gives them.
        classes: names of the classes.
        areas: [N, 3, C] int64, see `class_areas`.
    """

    indices: Tensor
    names: Sequence[str]
    classes: Sequence[str]
    areas: Tensor

    @classmethod
    def of(cls, found: IoU, classes: Sequence[str], data: Any, split: str) -> Self | None:
        """Return the areas of a result on a split of `data`; None if it does not have them."""
        if found.images is None:
            return None
        indices, areas = found.images
        return cls(torch.tensor(indices), names_of(data, split, indices), classes, areas)

    def statistics(self) -> Tensor:
        """Return [N, S] float64, whose sums over images decide the figures."""
        return self.areas.flatten(1).double()

    def figures(self, sums: Tensor, images: int) -> dict[str, Tensor]:
        """Return figures [...] by name of sums [..., S]; NaN where no pixel of the class is among them."""
        found = shares(sums.unflatten(-1, (3, len(self.classes))))
        of_classes = zip(self.classes, found["per_class"].unbind(-1), strict=True)
        return {name: found[name] for name in IoU.SCALARS} | {
            f"iou_{name}": each for name, each in of_classes
        }

    def annotations(self) -> Iterator[object]:
        """Yield what is annotated of each image: the pixels of each class."""
        for annotated in self.areas[:, 1].tolist():
            counts = zip(self.classes, annotated, strict=True)
            yield sorted((name, pixels) for name, pixels in counts if pixels)

    def columns(self) -> tuple[str, ...]:
        """Return the columns of the table."""
        return OF_CLASS

    def rows(self) -> Iterator[tuple[object, ...]]:
        """Yield the rows of the table: one for each class of an image, or an empty one if it has none."""
        for index, name, areas in zip(self.indices.tolist(), self.names, self.areas, strict=True):
            held = areas.any(0).nonzero()[:, 0].tolist()
            for label in held:
                yield index, name, self.classes[label], *areas[:, label].tolist()
            if not held:
                yield index, name, "", 0, 0, 0


@dataclass(frozen=True, eq=False)
class ConditionAreas:
    """Areas of C classes in N images under several conditions; a figure is the mIoU under one of them.

    Of conditions that differ in their seed alone (`miou_seed1`, …) the mean is a figure, too (`miou`).

    Args:
        indices: [N] int64, positions in the data set, ascending.
        names: of the images, as `names_of` gives them.
        classes: names of the classes.
        areas: [N, 3, C] of whole numbers by figure, see `class_areas`.
    """

    indices: Tensor
    names: Sequence[str]
    classes: Sequence[str]
    areas: Mapping[str, Tensor]

    def under_each(self) -> dict[str, Areas]:
        """Return the areas by figure."""
        return {
            name: Areas(self.indices, self.names, self.classes, areas) for name, areas in self.areas.items()
        }

    def statistics(self) -> Tensor:
        """Return [N, S] float64, whose sums over images decide the figures."""
        return torch.cat([each.statistics() for each in self.under_each().values()], 1)

    def figures(self, sums: Tensor, images: int) -> dict[str, Tensor]:
        """Return mIoU [...] by name of sums [..., S]; NaN where no pixel is annotated."""
        found = shares(sums.unflatten(-1, (len(self.areas), 3, len(self.classes))))["miou"]
        of_each = dict(zip(self.areas, found.unbind(-1), strict=True))
        return mean_over_seeds(of_each) | of_each

    def annotations(self) -> Iterator[object]:
        """Yield what is annotated of each image, under any condition: the pixels of each class."""
        yield from next(iter(self.under_each().values())).annotations()

    def columns(self) -> tuple[str, ...]:
        """Return the columns of the table."""
        return OF_CONDITION

    def rows(self) -> Iterator[tuple[object, ...]]:
        """Yield the rows of the table: of each condition those of its `Areas`."""
        for figure, areas in self.under_each().items():
            for index, name, *of_class in areas.rows():
                yield index, name, figure, *of_class


PerImage = Scores | Areas | ConditionAreas


def seeds_of(figures: Iterable[str]) -> dict[str, list[str]]:
    """Return the figures that differ in their seed alone, by what is left of their names without it."""
    found: dict[str, list[str]] = {}
    for figure in figures:
        if SEED.search(figure):
            found.setdefault(SEED.sub("", figure), []).append(figure)
    return found


def mean_over_seeds(figures: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the mean of figures [...] that differ in their seed alone, by `seeds_of`."""
    return {
        name: torch.stack([figures[each] for each in own]).mean(0) for name, own in seeds_of(figures).items()
    }


def names_of(data: Any, split: str, indices: Sequence[int]) -> list[str]:
    """Return names of images that are the same wherever the data set is: paths from its folder's parent on.

    Of data without sources it is the position, and "" of sources without paths.
    """
    source: Any = data.source(split) if hasattr(data, "source") else None
    if not indices or not hasattr(source, "path"):
        return ["" if source is not None else str(index) for index in indices]
    paths = [Path(source.path(index)) for index in indices]
    root = Path(os.path.commonpath({path.parent for path in paths})).parent
    return [path.relative_to(root).as_posix() for path in paths]


def fingerprint(results: PerImage) -> str:
    """Return a hash of the images' names and annotations; "" if they have no names."""
    if not all(results.names):
        return ""
    pairs = zip(results.names, results.annotations(), strict=True)
    return sha256("\n".join(f"{name!r} {each}" for name, each in pairs).encode()).hexdigest()[:16]


def write_table(file: Path, results: PerImage) -> None:
    """Write what was found of each image as CSV (`write_csv`)."""
    write_csv(file, results.columns(), results.rows())


def read_table(file: Path) -> PerImage:
    """Read what `write_table` wrote: `InputError` if it is something else."""
    try:
        with file.open(newline="", encoding="utf-8", errors="surrogateescape") as opened:
            head, *rows = csv.reader(opened)
        if tuple(head) == OF_CONDITION:
            return _condition_areas(rows)
        return _areas(rows) if tuple(head) == OF_CLASS else _scores(head, rows)
    except (ValueError, IndexError, csv.Error, OverflowError) as error:
        raise InputError(f"{file} is not the table of an evaluation: {in_a_line(error)}") from error


def _scores(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Scores:
    if (*head[:3],) != (*OF_IMAGE, "label") or not head[3:] or not rows:
        raise ValueError(f"its columns are {', '.join(head)[:100]}, of {len(rows)} rows")
    indices, names, labels, *scores = zip(*rows, strict=True)
    columns = [[float(value) for value in column] for column in scores]
    if len(columns) != len(head) - 3 or not all(
        map(isfinite, (each for column in columns for each in column))
    ):
        raise ValueError("a row has too few numbers")
    tables = {name: torch.tensor(column) for name, column in zip(head[3:], columns, strict=True)}
    shots = tables.pop(SHOTS).long() if SHOTS in tables else None
    if not tables:
        raise ValueError("it has no scores")
    return Scores(_whole(indices), names, _whole(labels), tables, shots)


def _areas(rows: Sequence[Sequence[str]]) -> Areas:
    indices, names, classes, right, annotated, predicted = zip(*rows, strict=True)
    known = sorted(set(classes) - {""})
    images = {
        index: (row, name) for row, (index, name) in enumerate(dict(zip(indices, names, strict=True)).items())
    }
    table = torch.zeros(len(images), 3, len(known), dtype=torch.int64)
    label = {name: number for number, name in enumerate(known)}
    held = [row for row, name in enumerate(classes) if name]
    of_image = torch.tensor([images[indices[row]][0] for row in held], dtype=torch.int64)
    of_class = torch.tensor([label[classes[row]] for row in held], dtype=torch.int64)
    counts = torch.stack([_whole(column) for column in (right, annotated, predicted)], 1)[held]
    if (counts < 0).any():
        raise ValueError("a count is negative")
    table[of_image, :, of_class] = counts
    return Areas(_whole(images), [name for _, name in images.values()], known, table)


def _condition_areas(rows: Sequence[Sequence[str]]) -> ConditionAreas:
    pairs = list(dict.fromkeys((row[2], row[0]) for row in rows))
    figures, images = (list(dict.fromkeys(part)) for part in zip(*pairs, strict=True))
    if pairs != [(figure, image) for figure in figures for image in images]:
        raise ValueError("the conditions are not of the same images")
    place = {pair: str(number) for number, pair in enumerate(pairs)}
    found = _areas([(place[row[2], row[0]], row[1], *row[3:]) for row in rows])
    tables = found.areas.unflatten(0, (len(figures), len(images)))
    areas = dict(zip(figures, tables, strict=True))
    return ConditionAreas(_whole(images), found.names[: len(images)], found.classes, areas)


def _whole(texts: Iterable[str]) -> Tensor:
    return torch.tensor([int(text) for text in texts], dtype=torch.int64)
