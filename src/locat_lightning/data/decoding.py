"""Image files decoded to the RGB that a viewer shows, and why one cannot be."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import inf
from os import PathLike
from typing import IO, Any, Protocol

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import SAMPLESPERPIXEL, TiffImageFile
from torchvision.datasets.folder import IMG_EXTENSIONS

from locat_lightning.errors import InputError, in_a_line

log = logging.getLogger(__name__)

# Those of torchvision's endings (IMG_EXTENSIONS), whatever a file is called. Pillow opens others by way of
# other programs: EPS starts Ghostscript.
FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Modes of more than 8 bits a channel, and the values that may show as white: those of 12 and of 16 bits.
WHITE = dict.fromkeys(("I", "I;16", "I;16B", "I;16L", "I;16N"), (4095, 65535)) | {"F": (1,)}
OUTLIERS = 0.1  # per cent of the pixels of these modes that may be brighter than white
NO_DATA = 1e37  # values from here on stand for no data, as the largest of float32 does
MOST_PIXELS = Image.MAX_IMAGE_PIXELS or inf  # Pillow's limit

# A small file may stand for gigabytes of pixels: what Pillow only warns of is refused.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


def read_image(file: str | PathLike[str] | IO[bytes]) -> Image.Image:
    """Read an image as a viewer shows it: RGB, 8 bits, upright, transparent parts on white."""
    with open_image(file) as image:
        image.load()
        return image


@contextmanager
def open_image(file: str | PathLike[str] | IO[bytes], name: str = "") -> Iterator[Image.Image]:
    """Open an image like `read_image`, but without decoding a plain JPEG yet, which allows a draft of it.

    `InputError`, with the file or its `name`, if a viewer would leave out channels.
    """
    with Image.open(file, formats=FORMATS) as image:
        channels = image.tag_v2.get(SAMPLESPERPIXEL, 1) if isinstance(image, TiffImageFile) else 1
        if channels > len("CMYKA" if image.mode == "CMYK" else "RGBA"):
            named = name or (file if isinstance(file, str | PathLike) else getattr(file, "name", "an image"))
            raise InputError(
                f"{named} has {channels} channels: run locat stats, and give its file as data.stats"
            )
        plain = image.format == "JPEG" and image.mode == "RGB" and orientation(image) == 1
        yield image if plain and to_srgb(image) is None else to_rgb(image)


class Reader(Protocol):
    """How the images of a data set are opened."""

    @property
    def endings(self) -> tuple[str, ...]:
        """Endings of the files that count, in lower case."""

    def __call__(self, file: str | PathLike[str] | IO[bytes], name: str = "") -> AbstractContextManager[Any]:
        """Open an image, perhaps without decoding it; an opened file comes with its `name`."""


@dataclass(frozen=True)
class RgbReader:
    """Opens images as `open_image` does, whatever their name says."""

    endings: tuple[str, ...] = IMG_EXTENSIONS

    def __call__(
        self, file: str | PathLike[str] | IO[bytes], name: str = ""
    ) -> AbstractContextManager[Image.Image]:
        return open_image(file, name)


RGB = RgbReader()


def orientation(image: Image.Image) -> int:
    """Return how an image is stored, as its EXIF tag says: 1 (upright, also without a tag) to 8."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception as error:  # the parser raises anything on broken EXIF data; the pixels are sound
        log.debug("broken EXIF data, orientation not applied: %s", error)
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to the RGB that a viewer shows; may turn `image` itself upright.

    A plain RGB image is returned as it is, not copied. A colour profile (ICC) is converted to sRGB. Of 12 or
    16 bits, and of floating-point numbers from 0 to 1, the largest is white; where more than `OUTLIERS` of
    the pixels are brighter, and of 100 or more than one, the level that all but these reach. What is negative
    or not finite is black.
    """
    image.load()  # broken pixels are an error, unlike the EXIF data that a PNG may have behind them
    if orientation(image) != 1:
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode in WHITE:
        values = np.asarray(image, np.float64)
        values = np.where(np.abs(values) < NO_DATA, values, 0).clip(0)
        brightest = max(values.size >= 100, int(values.size * OUTLIERS / 100))
        bright = float(np.partition(values, -1 - brightest, axis=None)[-1 - brightest])
        white = next((level for level in WHITE[image.mode] if bright <= level), bright)
        image = Image.fromarray((values * (255 / white)).round().clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "icc_profile" in image.info:
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    if transform := to_srgb(image):
        image = ImageCms.applyTransform(image, transform) or image
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, "white")
        canvas.paste(image, mask=image.getchannel("A"))
        return canvas
    return image if image.mode == "RGB" else image.convert("RGB")


def to_srgb(image: Image.Image) -> ImageCms.ImageCmsTransform | None:
    """Return what converts the colours of an image to sRGB; None if they are sRGB already."""
    profile = image.info.get("icc_profile")
    return _to_srgb(profile, image.mode) if profile else None


@lru_cache(32)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(own):
            return None
        to = "RGBA" if mode == "RGBA" else "RGB"
        return ImageCms.buildTransform(own, ImageCms.createProfile("sRGB"), mode, to)
    except (ImageCms.PyCMSError, OSError, ValueError, KeyError) as error:  # broken, or of another mode
        log.debug("colour profile not applied: %s", error)
        return None


def reason(error: Exception) -> str:
    """Say in a line what is wrong with an image that cannot be read."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or of an unknown format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return in_a_line(error)
