"""Images of any number of channels: files by their ending, their values, and the units that a model sees.

A reader takes a file, by its path or opened, and returns its values as they are: [H, W, C], integers of
8 to 32 bits or floats.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from locat_lightning.data.decoding import MOST_PIXELS
from locat_lightning.errors import InputError

File = str | PathLike[str] | IO[bytes]
MOST_CHANNELS = 4096
MISSING = "reading {ending} files needs {package}: pip install 'locat-lightning[channels]'"


class Channels(NamedTuple):
    """Which channels of its files a data set takes: how many a file has, and the indices of those taken."""

    of_files: int
    taken: tuple[int, ...]


@dataclass(frozen=True)
class Bands:
    """An image of C channels, with as much of Pillow's interface as sources and transforms need.

    `pixels`, float32 [C, H, W], are in standard deviations from the mean of each channel in the data set;
    where a file has no finite value, they are 0.
    """

    pixels: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.width, self.height

    @property
    def width(self) -> int:
        return self.pixels.shape[2]

    @property
    def height(self) -> int:
        return self.pixels.shape[1]

    def load(self) -> None:
        """Do nothing: the pixels have been read."""


@dataclass(frozen=True)
class BandReader:
    """Opens files of bands in the units of the data set.

    Attributes:
        mean: of each channel of a file, in the values of the files.
        std: the standard deviations.
        channels: indices of the channels to take, in this order.
        fill: whether to keep all channels, those that are not taken being 0, their mean.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: tuple[int, ...]
    fill: bool = False

    @property
    def endings(self) -> tuple[str, ...]:
        """Endings of the files that count, in lower case."""
        return tuple(READERS)

    @contextmanager
    def __call__(self, file: File, name: str = "") -> Iterator[Bands]:
        """Open a file; the ending of its `name` says how it is read, by default its path's."""
        values = read_bands(file, name)
        found, number = values.shape[-1], len(self.mean)
        if found != number:
            raise InputError(
                f"{name or file} has {found} channel{'s' * (found != 1)}, but data.mean and data.std are of "
                f"{number}: remove it, or measure them again with locat stats"
            )
        taken = list(self.channels)
        # Differences of 32-bit values need float64.
        exact: Any = np.float64 if values.dtype.itemsize > 2 else np.float32
        mean, std = (np.array(each, exact)[taken] for each in (self.mean, self.std))
        pixels = ((values[..., taken].astype(exact) - mean) / std).transpose(2, 0, 1)
        standard = np.where(np.isfinite(pixels), pixels, 0).astype(np.float32, order="C")
        if self.fill:
            whole = np.zeros((number, *standard.shape[1:]), np.float32)
            whole[taken] = standard
            standard = whole
        yield Bands(torch.from_numpy(standard))


def read_bands(file: File, name: str = "") -> np.ndarray:
    """Read the values of a file, [H, W, C], by the ending of its name.

    Raises:
        InputError: a package is missing, or the file has no image of channels, or of too many pixels.
    """
    name = name or str(file)
    ending = next((each for each in READERS if name.lower().endswith(each)), None)
    if ending is None:
        raise InputError(f"{name}: files of bands end in {', '.join(READERS)}")
    values = READERS[ending](file, name)
    if values.ndim == 2:
        values = values[..., None]
    kind, bits = values.dtype.kind, 8 * values.dtype.itemsize
    if values.ndim != 3 or kind not in "uif" or (bits > 32 and kind != "f"):
        raise InputError(
            f"{name} holds {values.dtype} of shape {values.shape}: "
            "give [H, W, C], integers of 8 to 32 bits or floats"
        )
    _check_size(values.shape, name)
    return values


def _check_size(shape: tuple[int, ...], name: str) -> None:
    """Check the size of an image [H, W, C], before it is decoded where a format tells it."""
    height, width, channels = shape
    if height * width > MOST_PIXELS or not 0 < channels <= MOST_CHANNELS or not height * width:
        raise InputError(f"{name}: {width} x {height} pixels of {channels} channels cannot be read")


def _read_tiff(file: File, name: str) -> np.ndarray:
    """Read the first image of a TIFF: pages, samples or planes of it are channels."""
    try:
        from tifffile import TiffFile
    except ImportError as error:
        raise InputError(MISSING.format(ending=".tif", package="tifffile")) from error
    with TiffFile(file) as tiff:
        image = tiff.series[0]
        places = [image.axes.find(axis) for axis in "YX"]
        others = [place for place in range(len(image.shape)) if place not in places]
        several = [place for place in others if image.shape[place] > 1]
        if min(places) < 0 or len(several) > 1:
            raise InputError(
                f"{name} has the axes {image.axes} of {image.shape}: give height, width and channels"
            )
        channels = image.shape[several[0]] if several else 1
        _check_size((image.shape[places[0]], image.shape[places[1]], channels), name)
        values: np.ndarray = image.asarray()
        return values.transpose(*places, *others).reshape(
            *(values.shape[place] for place in places), channels
        )


def _read_npy(file: File, name: str) -> np.ndarray:
    values: np.ndarray = np.load(file, allow_pickle=False)
    return values


def _read_dicom(file: File, name: str) -> np.ndarray:
    """Read a DICOM image in the units of its rescale slope and intercept; its frames are channels.

    Where it is stored with white as 0 (MONOCHROME1), it is inverted first, within the bits that are stored.
    """
    try:
        from pydicom import dcmread
        from pydicom.pixels.processing import apply_rescale
    except ImportError as error:
        raise InputError(MISSING.format(ending=".dcm", package="pydicom")) from error
    data: Any = dcmread(file)
    frames, samples = int(data.get("NumberOfFrames") or 1), int(data.get("SamplesPerPixel") or 1)
    if frames > 1 and samples > 1:
        raise InputError(f"{name} has {frames} frames in colour: give one frame, or grey ones")
    _check_size((data.Rows, data.Columns, frames * samples), name)
    stored: np.ndarray = data.pixel_array
    if data.PhotometricInterpretation == "MONOCHROME1":
        stored = ~stored if stored.dtype.kind == "i" else stored ^ (2 ** int(data.BitsStored) - 1)
    values: np.ndarray = apply_rescale(stored, data)
    return np.moveaxis(values, 0, -1) if frames > 1 else values


def _read_png(file: File, name: str) -> np.ndarray:
    with Image.open(file, formats=("PNG",)) as image:
        if image.mode == "P":
            raise InputError(f"{name} has a palette: save it in grey or RGB")
        # Pillow reads 16 bits of grey alone; of others it leaves out half.
        if not image.mode.startswith("I") and "16" in str(image.tile[0].args):
            raise InputError(f"{name} has 16-bit colours: save it as TIFF")
        return np.asarray(image)


# One line a format; the first ending that a name has counts.
READERS: dict[str, Callable[[File, str], np.ndarray]] = {
    ".tif": _read_tiff,
    ".tiff": _read_tiff,
    ".npy": _read_npy,
    ".dcm": _read_dicom,
    ".dicom": _read_dicom,
    ".png": _read_png,
}
