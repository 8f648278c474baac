"""Image files decoded to the RGB that a viewer shows, and why one cannot be."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import IO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from locat_lightning.errors import in_a_line

log = logging.getLogger(__name__)

# Those of torchvision's endings (IMG_EXTENSIONS), whatever a file is called. Pillow opens others by way of
# other programs: EPS starts Ghostscript.
FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Modes of more than 8 bits a channel, and the value that they show as white.
WHITE = {"I": 65535, "I;16": 65535, "I;16B": 65535, "I;16L": 65535, "I;16N": 65535, "F": 1}


def read_image(file: str | PathLike[str] | IO[bytes]) -> Image.Image:
    """Read an image as a viewer shows it: RGB, 8 bits, upright, transparent parts on white."""
    with open_image(file) as image:
        image.load()
        return image


@contextmanager
def open_image(file: str | PathLike[str] | IO[bytes]) -> Iterator[Image.Image]:
    """Open an image like `read_image`, but without decoding a plain JPEG yet, which allows a draft of it."""
    with Image.open(file, formats=FORMATS) as image:
        yield image if _is_plain(image) else to_rgb(image)


def _is_plain(image: Image.Image) -> bool:
    """Return whether the head of the file shows that `to_rgb` would only decode the image."""
    if image.format != "JPEG" or image.mode != "RGB":
        return False
    try:
        return bool(image.getexif().get(ExifTags.Base.Orientation, 1) == 1)
    except Exception:  # see to_rgb
        return True


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to the RGB that a viewer shows; may turn `image` itself upright.

    A plain RGB image is returned as it is, not copied. Colour profiles (ICC) are not applied.
    """
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception as error:  # the parser raises anything on broken EXIF data; the pixels are sound
        log.debug("broken EXIF data, orientation not applied: %s", error)
    if image.mode in WHITE:
        values = np.asarray(image, np.float64)
        white = max(WHITE[image.mode], values.max())
        image = Image.fromarray((values.clip(0) * (255 / white)).round().astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, "white")
        canvas.paste(image, mask=image.getchannel("A"))
        return canvas
    return image if image.mode == "RGB" else image.convert("RGB")


def reason(error: Exception) -> str:
    """Say in a line what is wrong with an image that cannot be read."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or of an unknown format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return in_a_line(error)
