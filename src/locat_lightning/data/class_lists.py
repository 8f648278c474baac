"""Names and colours of the classes of a segmentation: of the well-known data sets, or the user's own.

The lists of ADE20K, PASCAL Context (59 classes), COCO-Stuff 164k, PASCAL VOC 2012 and Cityscapes are in the
order of the labels that mmsegmentation reads, with the colours that it draws (`METAINFO` in
`mmseg/datasets/{ade,pascal_context,coco_stuff,voc,cityscapes}.py` of github.com/open-mmlab/mmsegmentation).
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from locat_lightning.data.decoding import reason
from locat_lightning.errors import InputError
from locat_lightning.labels import IGNORE

KNOWN = Path(__file__).parent / "classes"  # a file for each of the well-known data sets
HEADER = ["name", "red", "green", "blue"]


class Classes(NamedTuple):
    """The classes of a segmentation in the order of their labels."""

    names: list[str]  # C of them, each once
    colours: np.ndarray  # uint8 [C, 3], RGB; in some data sets two classes share one


def read_classes(file: Path) -> Classes:
    """Read the classes from a text or CSV file; an `InputError` names the line that has another form.

    A line is a class, `name` or `name,red,green,blue` with colours from 0 to 255, in the order of the labels.
    A header of these words and blank lines are skipped.
    """
    try:
        lines = list(csv.reader(file.read_text(encoding="utf-8-sig").splitlines()))
    except (OSError, UnicodeError, csv.Error) as error:
        raise InputError(f"cannot read classes from {file}: {reason(error)}") from error
    rows = {number: [field.strip() for field in line] for number, line in enumerate(lines, 1) if any(line)}
    rows = {number: row for number, row in rows.items() if row not in (HEADER, HEADER[:1])}
    coloured = any(len(row) > 1 for row in rows.values())
    for number, row in rows.items():
        levels = all(field.isascii() and field.isdigit() and int(field) < 256 for field in row[1:])
        if len(row) != (4 if coloured else 1) or not levels:
            raise InputError(
                f"{file}, line {number}: expected `name` on every line, or `name,red,green,blue` with colours"
                f" from 0 to 255 on every line, not {','.join(row)!r}"
            )
    names = [row[0] for row in rows.values()]
    colours = np.array([row[1:] for row in rows.values()], int) if coloured else None
    return named_classes(names, colours, where=str(file))


def named_classes(names: Sequence[str], colours: np.ndarray | None = None, where: str = "classes") -> Classes:
    """Check C names; give them colours, [C, 3] from 0 to 255, or distinct ones. Errors begin with `where`."""
    if not 0 < len(names) <= IGNORE:
        raise InputError(f"{where}: there must be from 1 to {IGNORE} classes, not {len(names)}")
    if repeated := sorted({name for name in names if not name or names.count(name) > 1}):
        raise InputError(f"{where}: every class needs a name of its own; got {repeated[0]!r} twice or empty")
    colours = distinct_colours(len(names)) if colours is None else colours.astype(np.uint8)
    return Classes(list(names), colours)


def distinct_colours(count: int) -> np.ndarray:
    """Return up to 255 colours, the first ones as different as possible, none black: uint8 [count, 3].

    Source: the colour map of PASCAL VOC from its second colour on. The bits of the label become, three at a
    time, the high bits of red, green and blue.
    """
    labels = np.arange(1, count + 1)[:, None]
    colours = np.zeros((count, 3), np.uint8)
    for place in range(3):
        colours |= (((labels >> (3 * place + np.arange(3))) & 1) << (7 - place)).astype(np.uint8)
    return colours
