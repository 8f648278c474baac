"""Predictions as files: a table of classes and probabilities, or the classes of pixels as PNGs."""

import csv
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from locat.runs import replaced
from locat_lightning.figures.segmentation import painted


def write_table(file: Path, paths: Iterable[str], probabilities: Tensor, class_names: Sequence[str]) -> None:
    """Write a CSV with a row for each image: path, class, and the probability of every class.

    Paths are written in the bytes of the file system, all else in UTF-8. `probabilities` is [images,
    classes]; without `class_names`, classes are labels' numbers. The directory of the file may not exist yet.
    """
    names = list(class_names) or [str(label) for label in range(probabilities.shape[1])]
    file.parent.mkdir(parents=True, exist_ok=True)
    with (
        replaced(file) as part,
        part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as opened,
    ):
        writer = csv.writer(opened)
        writer.writerow(["path", "class", *names])
        for path, row in zip(paths, probabilities, strict=True):
            writer.writerow([path, names[int(row.argmax())], *(f"{value:.6f}" for value in row.tolist())])


def write_classes(
    directory: Path, name: str, image: Image.Image, classes: np.ndarray, colours: np.ndarray
) -> None:
    """Write the classes of an image's pixels as two PNGs.

    `predictions/NAME.png` has the index of each pixel's class, with the classes' colours as its palette;
    `overlays/NAME.png` has the colours [C, 3] over the image in grey. The name may have folders; classes are
    [H, W], as large as the image; both are uint8.
    """
    indexed = Image.fromarray(classes)
    indexed.putpalette(colours.tobytes())
    grey = image.convert("LA").convert("RGBA")
    overlaid = Image.alpha_composite(grey, Image.fromarray(painted(classes, colours))).convert("RGB")
    for folder, drawn in (("predictions", indexed), ("overlays", overlaid)):
        file = directory / folder / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        drawn.save(file)


def file_names(paths: Sequence[str]) -> list[str]:
    """Name a file for each image: its path below the folder that holds all, without its ending if unique."""
    root = os.path.commonpath([Path(path).parent for path in paths])
    within = [Path(path).relative_to(root) for path in paths]
    bare = [str(path.with_suffix("")) for path in within]
    return bare if len(set(bare)) == len(bare) else [str(path) for path in within]
