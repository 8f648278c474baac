"""What the study draws with until it draws by matplotlib."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn import functional as F

from locat_lightning.evaluation.features import frozen
from locat_lightning.labels import IGNORE

OPACITY = 0.6
INK, FAINT, PAPER = "#1f2328", "#6e7781", "#ffffff"


def patch_features(backbone: nn.Module, images: Tensor) -> Tensor | None:
    """What the last block makes of each patch, before the final norm: what dense probes read.

    Args:
        backbone: a timm model; of a CNN these are the features of the last stage.
        images: [B, 3, height, width], normalised.

    Returns:
        [B, D, H, W]; None if the model has no `forward_intermediates`.
    """
    forward = getattr(backbone, "forward_intermediates", None)
    if forward is None:
        return None
    with frozen(backbone), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        [features] = forward(images, indices=1, norm=False, output_fmt="NCHW", intermediates_only=True)
    return features  # type: ignore[no-any-return]


class Column(NamedTuple):
    """A title, a smaller line beneath, and a tile for each row of a `table`."""

    title: str
    note: str
    tiles: list[Image.Image]


def table(columns: Sequence[Column], side: int) -> Image.Image:
    """The columns side by side under their titles.

    Args:
        columns: at least one, with as many tiles each, all of one size.
        side: shorter side of a tile in pixels; gaps and letters follow it.
    """
    gap = max(4, side // 20)
    title, note = (ImageFont.load_default(size=side / parts) for parts in (13, 18))
    header = round(side / 13 + side / 18) + 2 * gap
    width, height = columns[0].tiles[0].size
    rows = len(columns[0].tiles)
    drawn = Image.new("RGB", (gap + len(columns) * (width + gap), header + rows * (height + gap)), PAPER)
    pen = ImageDraw.Draw(drawn)
    for number, column in enumerate(columns):
        left = gap + number * (width + gap)
        pen.text((left, gap), column.title, INK, title)
        pen.text((left, header - gap // 2), column.note, FAINT, note, anchor="ld")
        for row, tile in enumerate(column.tiles):
            drawn.paste(tile, (left, header + row * (height + gap)))
    return drawn


def resized(images: Tensor, side: int) -> Tensor:
    """Images as the tiles of a `table`: small ones enlarged without smoothing.

    Args:
        images: [B, 3, height, width], RGB from 0 to 1.
        side: the shorter side of the result in pixels.

    Returns:
        [B, 3, height, width] float32 on the CPU, from 0 to 1.
    """
    height, width = images.shape[-2:]
    shorter = min(height, width)
    size = (round(height * side / shorter), round(width * side / shorter))
    images = images.detach().float().cpu().clamp(0, 1)
    if side > shorter:
        return F.interpolate(images, size, mode="nearest-exact")
    return F.interpolate(images, size, mode="bilinear", antialias=True)


def fitted(text: str, room: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """A text, cut short where it is longer than that many pixels."""
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(f"{text}…") > room:
        text = text[:-1]
    return f"{text}…"


def overlay(image: Image.Image, classes: np.ndarray, colours: np.ndarray) -> Image.Image:
    """An image, in grey, under the colours of its pixels' classes; those without one stay as they are.

    Args:
        image: RGB.
        classes: [H, W] of the same size, integers; `IGNORE` for none.
        colours: [C, 3] uint8.
    """
    labelled = (classes != IGNORE)[..., None]
    painted = colours[np.where(classes == IGNORE, 0, classes)]
    grey = np.asarray(image.convert("L"))[..., None]
    mixed = np.where(labelled, OPACITY * painted + (1 - OPACITY) * grey, np.asarray(image))
    return Image.fromarray(mixed.round().astype(np.uint8))


def legend(
    labels: Sequence[int], class_names: Sequence[str], colours: np.ndarray, width: int, side: int
) -> Image.Image:
    """The colours of classes with their names.

    Args:
        labels: that are in it.
        class_names: by label.
        colours: [C, 3] uint8, by label.
        width: of the picture in pixels.
        side: height and width of the tiles above, which letters follow.
    """
    line, gap = max(16, side // 11), max(4, side // 20)
    font = ImageFont.load_default(size=0.7 * line)
    columns = max(1, width // (8 * line))
    rows = -(-len(labels) // columns)
    key = Image.new("RGB", (width, rows * line + 2 * gap), PAPER)
    pen = ImageDraw.Draw(key)
    for number, label in enumerate(labels):
        left, top = gap + number % columns * 8 * line, gap + number // columns * line
        pen.rectangle((left, top + 2, left + line - 4, top + line - 3), tuple(colours[label].tolist()), FAINT)
        pen.text((left + line, top), fitted(class_names[label], 6.8 * line, font), INK, font)
    return key
