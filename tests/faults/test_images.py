"""Malformed images of every format: read, or refused in a line, and neither slow nor large."""

import io
import random
import time

import numpy as np
import pytest
from PIL import Image

from locat_lightning.data.decoding import FORMATS, read_image, reason
from tests.faults.test_damage import cut, flipped, zeroed

MODES = {"JPEG": ("RGB", "L", "CMYK"), "PNG": ("RGB", "RGBA", "P", "L", "I;16", "1"), "WEBP": ("RGB", "RGBA")}
MODES |= {"TIFF": ("RGB", "L", "F", "I;16", "CMYK"), "BMP": ("RGB", "P", "L"), "PPM": ("RGB", "L")}
EACH = 60
SECONDS = 5


def encoded(form, mode):
    rng = np.random.default_rng(0)
    if mode in ("F", "I;16"):
        image = Image.fromarray(
            rng.integers(65535, size=(32, 32)).astype(np.float32 if mode == "F" else np.uint16)
        )
    else:
        image = Image.fromarray(rng.integers(256, size=(32, 32, 3), dtype=np.uint8)).convert(mode)
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(file, form, **({"exif": exif} if form in ("JPEG", "WEBP", "PNG") else {}))
    return file.getvalue()


@pytest.mark.filterwarnings("ignore")  # Pillow's, of what it finds in the files
@pytest.mark.parametrize("form", FORMATS)
def test_a_malformed_image_is_read_or_refused_in_a_line(form, tmp_path, record_property):
    place, read, lines, file = random.Random(0), 0, [], tmp_path / "image"
    for mode in MODES[form]:
        sound = encoded(form, mode)
        for number in range(EACH):
            file.write_bytes((flipped, cut, zeroed)[number % 3](sound, place))
            begun = time.monotonic()
            try:
                image = read_image(file)
            except Exception as error:  # of any kind: the reason is what is said
                lines.append(reason(error))
            else:
                assert image.mode == "RGB"
                read += 1
            assert time.monotonic() - begun < SECONDS
    assert all(lines)
    assert not any("\n" in line for line in lines)
    record_property(f"malformed {form}", f"{read + len(lines)}: {read} read, {len(lines)} refused")
