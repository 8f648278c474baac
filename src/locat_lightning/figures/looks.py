"""Looks at images by one or several models side by side: a row for each image, columns for each model."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor
from torch.nn import functional as F

from locat_lightning.figures.grid import Box, Column, grid, heat_column, image_column
from locat_lightning.figures.segmentation import class_column
from locat_lightning.figures.validation import MARK, kernel_column
from locat_lightning.structure import Foreground, Matches

DIMMED = 0.25  # brightness of a background
GAP = 8  # pixels between two images whose patches are matched

Matched = tuple[Matches, tuple[int, int], tuple[int, int]]  # of two images, and the grids of their patches


def looks_figure(
    images: Sequence[np.ndarray], columns: Mapping[str, Sequence[Column]], *, side: int
) -> Figure:
    """Draw a row for each image [H, W, 3]: itself, and each model's columns by its name.

    With several models, each column is titled with its model's name, cut to the width of a tile.
    """
    shown = [image_column("input", images)]
    for name, own in columns.items():
        for column in own:
            note = ", ".join(filter(None, (column.title, column.note)))
            shown.append(column._replace(title=_cut(name), note=note) if len(columns) > 1 else column)
    return grid(shown, images, side)


def kernels_of(
    images: Sequence[np.ndarray], blocks: Sequence[int], kernels: Sequence[Sequence[Tensor]]
) -> list[Column]:
    """Show the kernels of three patches in some blocks: for each image [H·W, H, W] of each of the blocks."""
    of_blocks = zip(*kernels, strict=True)
    return [kernel_column(block, images, each) for block, each in zip(blocks, of_blocks, strict=True)]


def attention_of(images: Sequence[np.ndarray], attention: Sequence[Tensor]) -> list[Column]:
    """Show the attention of [CLS], [h, H, W] for each image, in its own scale; no column if there is none."""
    heat = [each.float().mean(0) for each in attention]
    heat = [each / each.max() for each in heat]
    return [heat_column("attention of [CLS]", images, heat, "last block, mean of heads")] if heat else []


def components_of(colours: Sequence[Tensor]) -> list[Column]:
    """Show colours [3, H, W] of patches, as `shared_pca_colours` gives them."""
    tiles = [each.movedim(0, -1).numpy() for each in colours]
    return [image_column("PCA of patch features", tiles, "first three as RGB, one basis")]


def similarity_of(
    images: Sequence[np.ndarray], cosines: Sequence[Tensor], patch: tuple[int, int]
) -> list[Column]:
    """Show cosines [H, W] to one patch (row, column) of the first image, which is framed."""
    low, high = (
        float(pick(torch.cat([each.flatten() for each in cosines]))) for pick in (torch.min, torch.max)
    )
    heat = [(each - low) / max(high - low, 1e-12) for each in cosines]
    column = heat_column("similarity", images, heat, f"cosine, {low:.2f} to {high:.2f}")
    (rows, columns), (i, j) = cosines[0].shape, patch

    def draw(axes: Axes, row: int, box: Box) -> None:
        column.draw(axes, row, box)
        if row == 0:
            left, right, bottom, top = box
            width, height = (right - left) / columns, (bottom - top) / rows
            corner = left + j * width, top + i * height
            axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=MARK, linewidth=1.5))

    return [column._replace(draw=draw)]


def clusters_of(
    images: Sequence[np.ndarray], clusters: Sequence[Tensor], colours: np.ndarray
) -> list[Column]:
    """Show the clusters [H, W] of patches in colours [C, 3] over the images."""
    return [
        class_column("clusters of patches", images, clusters, colours)._replace(note="the same in all images")
    ]


def foreground_of(images: Sequence[np.ndarray], cuts: Sequence[Foreground]) -> list[Column]:
    """Show the eigenvector of each cut, and the image with its background dimmed."""
    heat, objects = [], []
    for image, (mask, y) in zip(images, cuts, strict=True):
        heat.append((y - y.min()) / (y.max() - y.min()).clamp_min(1e-12))
        fine = F.interpolate(mask[None, None].float(), image.shape[:2])[0, 0].numpy()[..., None]
        objects.append(image * (DIMMED + (1 - DIMMED) * fine))
    note = "second smallest of the normalised cut"
    return [
        heat_column("eigenvector", images, heat, note),
        image_column("foreground", objects, "above its mean"),
    ]


def matches_figure(
    images: Sequence[np.ndarray], matches: Mapping[str, Sequence[Matched]], *, most: int, side: int
) -> Figure:
    """Draw lines between patches of the first image and their partners in each other image.

    Args:
        images: two or more, [H, W, 3] from 0 to 1.
        matches: by the name of the model, for each image but the first: its matches with the first, and the
            grids (rows, columns) of the first and of the other.
        most: lines in a pair of images, the most similar ones.
        side: height of the images in pixels.
    """
    pairs = [_beside(images[0], other, side) for other in images[1:]]
    width = _width(images[0], side)
    columns = [_matches_column(name, pairs, width, found, most) for name, found in matches.items()]
    return grid(columns, pairs, side)


def _matches_column(
    name: str, pairs: Sequence[np.ndarray], width: int, matches: Sequence[Matched], most: int
) -> Column:
    tiles = image_column(_cut(name), pairs, f"patches that are each other's nearest, at most {most}")

    def draw(axes: Axes, row: int, box: Box) -> None:
        tiles.draw(axes, row, box)
        found, one, other = matches[row]
        left, right, bottom, top = box
        scale = (right - left) / pairs[row].shape[1]
        end, begin = left + width * scale, left + (width + GAP) * scale
        for mine, theirs in found.pairs[:most].tolist():
            x, y = _centre(mine, one, (left, end, bottom, top))
            u, v = _centre(theirs, other, (begin, right, bottom, top))
            colour = colormaps["hsv"]((x - left) / (end - left))
            axes.plot([x, u], [y, v], color=colour, linewidth=0.9, marker=".", markersize=3)

    return tiles._replace(draw=draw)


def _centre(patch: int, grid_: tuple[int, int], box: Box) -> tuple[float, float]:
    """Return the centre (x, y) of a patch of a grid in a box."""
    (rows, columns), (left, right, bottom, top) = grid_, box
    row, column = divmod(patch, columns)
    return left + (column + 0.5) / columns * (right - left), top + (row + 0.5) / rows * (bottom - top)


def _width(image: np.ndarray, height: int) -> int:
    return max(1, int(image.shape[1] * height / image.shape[0] + 0.5))


def _beside(one: np.ndarray, other: np.ndarray, side: int) -> np.ndarray:
    """Put two images beside each other, both `side` pixels high: [side, W, 3]."""
    parts = []
    for image in (one, other):
        size = side, _width(image, side)
        pixels = torch.from_numpy(image).movedim(-1, 0)[None].float()
        parts.append(F.interpolate(pixels, size, mode="bilinear", antialias=True)[0].movedim(0, -1).numpy())
    return np.concatenate([parts[0], np.ones((side, GAP, 3), np.float32), parts[1]], 1).clip(0, 1)


def _cut(name: str, most: int = 24) -> str:
    return name if len(name) <= most else f"…{name[1 - most :]}"
