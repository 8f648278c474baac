"""Files of any number of channels: their values as written, and the units that a model sees."""

import builtins
import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
import tifffile
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from locat_lightning.data import ImageData
from locat_lightning.data.bands import BandReader, read_bands
from locat_lightning.data.decoding import read_image
from locat_lightning.errors import InputError

RNG = np.random.default_rng(0)


def values(dtype, shape=(5, 7, 4)):
    """Random values [H, W, C] over the whole range of a type, its ends among them."""
    if np.dtype(dtype).kind == "f":
        return RNG.normal(0, 1e4, shape).astype(dtype)
    ends = np.iinfo(dtype)
    drawn = RNG.integers(ends.min, ends.max, shape, dtype, endpoint=True)
    drawn.flat[:2] = ends.min, ends.max
    return drawn


@pytest.mark.parametrize("samples", [4, 5])
def test_a_file_of_more_channels_than_a_viewer_shows_is_not_taken_for_rgb(samples, tmp_path):
    """Pillow reads the first three of five without a word."""
    bands = np.random.default_rng(0).integers(255, size=(6, 7, samples), dtype=np.uint8)
    tifffile.imwrite(file := tmp_path / "a.tif", bands, photometric="rgb")
    if samples == 4:
        assert read_image(file).size == (7, 6)
        return
    with file.open("rb") as opened:
        for given in (file, opened):
            with pytest.raises(
                InputError, match=r"/a.tif has 5 channels: run locat stats, and give its file"
            ):
                read_image(given)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "uint32", "float32"])
def test_tiff_and_npy_keep_their_values(dtype, tmp_path):
    bands = values(dtype)
    np.save(tmp_path / "a.npy", bands)
    tifffile.imwrite(tmp_path / "samples.tif", bands, photometric="minisblack", planarconfig="contig")
    tifffile.imwrite(tmp_path / "planes.TIFF", bands.transpose(2, 0, 1), photometric="minisblack")
    for name in ("a.npy", "samples.tif", "planes.TIFF"):
        found = read_bands(tmp_path / name)
        assert found.dtype == bands.dtype
        assert_array_equal(found, bands)


def test_one_channel_and_an_opened_file_by_its_name(tmp_path):
    grey = values("uint16", (5, 7))
    Image.fromarray(grey).save(png := BytesIO(), "PNG")
    tifffile.imwrite(tiff := BytesIO(), grey)
    np.save(npy := BytesIO(), grey)
    for file, name in ((png, "shard/a.png"), (tiff, "a.tif"), (npy, "b.NPY")):
        file.seek(0)
        assert_array_equal(read_bands(file, name)[..., 0], grey)


def write_dicom(file, pixels, **tags):
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = FileDataset(str(file), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    data.Rows, data.Columns = pixels.shape[-2:]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 16
    data.HighBit, data.PixelRepresentation = 15, int(pixels.dtype.kind == "i")
    for tag, value in tags.items():
        setattr(data, tag, value)
    data.PixelData = pixels.tobytes()
    data.save_as(file, enforce_file_format=True)


def test_dicom_in_its_units_with_frames_as_channels(tmp_path):
    scan, frames = values("int16", (5, 7)), values("uint16", (3, 5, 7))
    write_dicom(tmp_path / "ct.dcm", scan, RescaleSlope="2", RescaleIntercept="-1024")
    write_dicom(tmp_path / "frames.dcm", frames, NumberOfFrames="3")
    assert_array_equal(read_bands(tmp_path / "ct.dcm")[..., 0], scan * 2.0 - 1024)
    assert_array_equal(read_bands(tmp_path / "frames.dcm"), frames.transpose(1, 2, 0))


def test_dicom_with_white_as_0_is_inverted(tmp_path):
    signed, unsigned = values("int16", (5, 7)), values("uint16", (5, 7)) % 4096
    tags = {"PhotometricInterpretation": "MONOCHROME1"}
    write_dicom(tmp_path / "signed.dcm", signed, **tags)
    tags |= {"BitsStored": 12, "HighBit": 11, "RescaleSlope": "2", "RescaleIntercept": "0"}
    write_dicom(tmp_path / "unsigned.dcm", unsigned, **tags)
    assert_array_equal(read_bands(tmp_path / "signed.dcm")[..., 0], -1 - signed)
    assert_array_equal(read_bands(tmp_path / "unsigned.dcm")[..., 0], 2.0 * (4095 - unsigned))


def png_of_zeros(size, kind, depth=16):
    """Return a PNG of zeros with a colour type: 2 RGB, 4 grey and alpha, 6 RGB and alpha."""
    samples = {2: 3, 4: 2, 6: 4}[kind]
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", size, size, depth, kind, 0, 0, 0))]
    chunks += [(b"IDAT", zlib.compress(bytes(size * (1 + size * samples * depth // 8)))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


@pytest.mark.parametrize("kind", [2, 4, 6])
def test_png_whose_values_pillow_does_not_keep(tmp_path, kind):
    (tmp_path / "a.png").write_bytes(png_of_zeros(3, kind))
    assert "a.png has 16-bit colours" in refusal(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(png_of_zeros(3, kind, depth=8))
    assert read_bands(tmp_path / "a.png").dtype == np.uint8
    Image.new("P", (3, 3)).save(tmp_path / "b.png")
    assert "b.png has a palette" in refusal(tmp_path / "b.png")


def test_pixels_are_in_standard_deviations_with_no_data_at_the_mean(tmp_path):
    bands = values("uint32").astype(np.float64)
    mean, std = bands.mean((0, 1)), bands.std((0, 1))
    np.save(tmp_path / "a.npy", bands.astype("uint32"))
    holes = bands.astype("float32")
    holes[1, 2] = np.nan
    np.save(tmp_path / "holes.npy", holes)
    expected = ((bands - mean) / std).transpose(2, 0, 1)
    with BandReader(tuple(mean), tuple(std), (2, 0))(tmp_path / "a.npy") as image:
        assert image.size == (image.width, image.height) == (7, 5)
        assert_allclose(image.pixels.numpy(), expected[[2, 0]], atol=1e-6)
    with BandReader(tuple(mean), tuple(std), (2, 0), fill=True)(tmp_path / "holes.npy") as image:
        assert (image.pixels[[1, 3]] == 0).all()
        assert (image.pixels[:, 1, 2] == 0).all()
        assert_allclose(image.pixels[[2, 0], 2:].numpy(), expected[[2, 0], 2:], atol=1e-4)


def refusal(*arguments, **options):
    with pytest.raises(InputError) as error:
        read_bands(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_no_image_of_channels_is_refused_in_a_line(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", np.zeros((2, 3, 4, 5), np.float32))
    np.save(tmp_path / "b.npy", np.zeros((2, 3), np.int64))
    np.save(tmp_path / "c.npy", np.zeros((2, 0, 3), np.uint8))
    np.save(tmp_path / "d.npy", np.array([{}], object), allow_pickle=True)
    tifffile.imwrite(tmp_path / "e.tif", np.zeros((2, 3, 4, 5), np.uint8), photometric="minisblack")
    assert "a.npy holds float32 of shape (2, 3, 4, 5)" in refusal(tmp_path / "a.npy")
    assert "8 to 32 bits" in refusal(tmp_path / "b.npy")
    assert "0 x 2 pixels" in refusal(tmp_path / "c.npy")
    assert "give height, width and channels" in refusal(tmp_path / "e.tif")
    assert "files of bands end in .tif" in refusal(tmp_path / "f.jpg")
    with pytest.raises(ValueError, match="allow_pickle"):
        read_bands(tmp_path / "d.npy")
    np.save(tmp_path / "b.npy", np.zeros((2, 3)))
    with (
        pytest.raises(InputError, match=r"b\.npy has 1 channel, but data\.mean and data\.std are of 2"),
        BandReader((0.0, 0.0), (1.0, 1.0), (0,))(tmp_path / "b.npy"),
    ):
        pass
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.split(".")[0] in ("tifffile", "pydicom"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    assert refusal(tmp_path / "e.tif").endswith("needs tifffile: pip install 'locat-lightning[channels]'")
    assert "needs pydicom" in refusal(tmp_path / "e.dcm")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 4}, r"data\.channels \(4\): data\.mean and data\.std are of 3"),
        ({"channels": [0, 3]}, "indices from 0 to 2"),
        ({"channels": [1, 1]}, "each once"),
        ({"mean": (0.0, 0.0)}, "are 2 and 3 numbers, not 3"),
        ({"channels": 2, "mean": (0.0, 0.0), "std": (1.0, 0.0)}, "channel 1 has one value everywhere"),
        ({"channels": 3, "dataset": "digits"}, "digits has RGB images"),
        ({"channels": [0, 1], "show": (0, 1, 2)}, r"data\.show"),
        ({"channels": 3, "eval_interpolation": "lanczos"}, "eval_interpolation 'lanczos'"),
    ],
)
def test_options_that_contradict_each_other(options, message):
    with pytest.raises(InputError, match=message):
        ImageData(**options).eval_transform()
