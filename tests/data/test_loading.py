import io
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from multiprocessing import current_process, get_context
from multiprocessing.connection import Client
from multiprocessing.reduction import recv_handle
from multiprocessing.resource_sharer import DupFd

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, ImageCms, UnidentifiedImageError

from locat_lightning.data.dataset import Failure, Images, Source
from locat_lightning.data.decoding import read_image, to_rgb
from locat_lightning.data.loading import ImageLoader, UnreadableImages
from locat_lightning.data.sampling import EvaluationOrder, TrainOrder
from locat_lightning.data.workers import end_with_the_run
from locat_lightning.errors import InputError


def saved(image, suffix, **options):
    file = io.BytesIO()
    image.save(file, suffix, **options)
    file.seek(0)
    return file


def pixels(file):
    image = read_image(file)
    assert image.mode == "RGB"
    return np.asarray(image)


RAMP = np.array([[0, 257, 32768, 65535]])


@pytest.mark.parametrize(
    ("image", "suffix", "expected"),
    [
        (Image.new("L", (4, 4), 77), "PNG", (77, 77, 77)),
        (Image.new("1", (4, 4), 1), "PNG", (255, 255, 255)),
        (Image.new("RGB", (4, 4), (10, 20, 30)).quantize(4), "PNG", (10, 20, 30)),
        (Image.new("LA", (4, 4), (0, 0)), "PNG", (255, 255, 255)),
        (Image.new("LA", (4, 4), (40, 255)), "PNG", (40, 40, 40)),
        (Image.new("RGBA", (4, 4), (255, 0, 0, 0)), "PNG", (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (200, 0, 100, 51)), "PNG", (244, 204, 224)),
        (Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", (255, 0, 0)),
        (Image.new("CMYK", (16, 16), (0, 0, 0, 255)), "JPEG", (0, 0, 0)),
        (Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "TIFF", (255, 0, 0)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else None,
)
def test_every_mode_comes_out_as_a_viewer_shows_it(image, suffix, expected):
    found = pixels(saved(image, suffix)).astype(int)
    assert abs(found - expected).max() <= 2 * (suffix == "JPEG")


@pytest.mark.parametrize(
    ("mode", "colour", "transparency"),
    [("RGB", (9, 8, 7), (9, 8, 7)), ("L", 9, 9), ("P", 0, 0), ("P", 0, bytes([0, 255]))],
)
def test_a_colour_declared_transparent_is_white(mode, colour, transparency):
    file = saved(Image.new(mode, (2, 2), colour), "PNG", transparency=transparency)
    assert Image.open(file).mode == mode
    assert (pixels(file) == 255).all()


@pytest.mark.parametrize(
    ("values", "dtype", "suffix", "expected"),
    [
        (RAMP, "<u2", "PNG", [0, 1, 128, 255]),
        (RAMP, "<u2", "TIFF", [0, 1, 128, 255]),
        (RAMP, ">u2", "TIFF", [0, 1, 128, 255]),
        (RAMP, "<i4", "TIFF", [0, 1, 128, 255]),
        (RAMP * 2, "<i4", "TIFF", [0, 1, 128, 255]),
        (RAMP / 65535, "<f4", "TIFF", [0, 1, 128, 255]),
        (RAMP - 257, "<i4", "TIFF", [0, 0, 127, 254]),
    ],
)
def test_more_than_8_bits_are_scaled_not_clipped(values, dtype, suffix, expected):
    file = saved(Image.fromarray(values.astype(dtype)), suffix)
    assert Image.open(file).mode in {"I;16", "I;16B", "I", "F"}
    assert pixels(file)[0, :, 0].tolist() == expected


@pytest.mark.parametrize("odd", [np.inf, -np.inf, np.nan, 3.4e38, -9999.0, 1e6])
@pytest.mark.parametrize("scale", [1, 200.0])
@pytest.mark.parametrize("shape", [(40, 50), (16, 16)])
def test_a_pixel_that_is_not_finite_or_an_outlier_does_not_darken_the_others(odd, scale, shape):
    values = np.linspace(0, 1, math.prod(shape), dtype=np.float32).reshape(shape) * scale
    values[3, 7] = odd
    levels = pixels(saved(Image.fromarray(values), "TIFF"))[..., 0]
    expected = (np.linspace(0, 255, math.prod(shape)).reshape(shape)).round()
    expected[3, 7] = 255 if odd == 1e6 else 0
    assert abs(levels - expected).max() <= 1


def test_12_bits_in_16_are_visible():
    values = np.linspace(0, 4095, 600).round().astype(np.uint16).reshape(20, 30)
    levels = pixels(saved(Image.fromarray(values), "TIFF"))[..., 0]
    assert abs(levels - values / 4095 * 255).max() <= 0.51


@pytest.mark.parametrize(("suffix", "mode"), [("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("JPEG", "RGB")])
def test_a_colour_profile_is_applied(suffix, mode):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    # Another name, and red and blue exchanged: red in it is blue in sRGB.
    other = srgb.replace("sRGB".encode("utf-16-be"), "other".encode("utf-16-be")[:8])
    other = other.replace(b"rXYZ", b"????").replace(b"bXYZ", b"rXYZ").replace(b"????", b"bXYZ")
    image = Image.new("RGB", (16, 16), (204, 0, 0)).convert(mode)
    for profile, expected in ((srgb, (204, 0, 0)), (other, (0, 0, 204)), (b"rubbish", (204, 0, 0))):
        assert abs(pixels(saved(image, suffix, icc_profile=profile)).astype(int) - expected).max() <= 3


def test_a_small_file_of_many_pixels_is_not_decoded():
    file = saved(Image.new("1", (10_000, 10_000)), "PNG")
    assert len(file.getvalue()) < 20_000
    with pytest.raises(Image.DecompressionBombWarning, match="100000000 pixels"):
        read_image(file)


@pytest.mark.parametrize("suffix", ["PNG", "TIFF"])
@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda x: x),
        (2, lambda x: x[:, ::-1]),
        (3, lambda x: x[::-1, ::-1]),
        (4, lambda x: x[::-1]),
        (5, lambda x: x.transpose(1, 0, 2)),
        (6, lambda x: np.rot90(x, -1)),
        (7, lambda x: np.rot90(x, 2).transpose(1, 0, 2)),
        (8, lambda x: np.rot90(x)),
    ],
)
def test_exif_orientation_is_applied_once(suffix, orientation, upright):
    stored = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(pixels(saved(Image.fromarray(stored), suffix, exif=exif)), upright(stored))


def test_broken_exif_does_not_make_an_image_unreadable():
    file = saved(Image.new("RGB", (8, 8), (9, 9, 9)), "JPEG", exif=b"Exif\0\0rubbish that is no TIFF header")
    assert (pixels(file) == 9).all()


def test_a_plain_rgb_image_is_not_copied():
    image = Image.new("RGB", (8, 8))
    assert to_rgb(image) is image


@pytest.mark.parametrize("cut", [0, 10, 300])
def test_a_truncated_file_raises(cut):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    with pytest.raises(OSError):
        read_image(io.BytesIO(saved(noise, "JPEG").getvalue()[:cut]))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "I;16"])
def test_a_broken_file_raises(mode):
    levels = np.random.default_rng(0).integers(0, 256, (32, 32), np.uint8)
    image = (
        Image.fromarray(levels.astype(np.uint16)) if mode == "I;16" else Image.fromarray(levels).convert(mode)
    )
    data = bytearray(saved(image, "PNG").getvalue())
    data[data.index(b"IDAT") + 200] ^= 1
    with pytest.raises(OSError, match="broken data stream"):
        read_image(io.BytesIO(data))


@pytest.mark.parametrize("suffix", ["EPS", "PDF", "GIF"])
def test_other_formats_are_not_opened_whatever_the_file_is_called(suffix, tmp_path, monkeypatch):
    """Pillow would start Ghostscript for EPS."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("started"))
    file = tmp_path / "cat.jpg"
    Image.new("RGB", (8, 8)).save(file, suffix)
    with pytest.raises(UnidentifiedImageError):
        read_image(file)


class Numbers(Source):
    """Image i has the value i everywhere; those in `broken` cannot be read."""

    def __init__(self, size, broken=()):
        self.size, self.broken = size, set(broken)

    def __len__(self):
        return self.size

    def path(self, index):
        return f"image-{index}"

    def read(self, index):
        if index in self.broken:
            raise ValueError("broken\n as it is")
        return Image.new("RGB", (2, 2), (index,) * 3), index % 3


def noisy(image):
    """Draws from every generator that timm's transforms draw from, and passes the image's value on."""
    value = image.getpixel((0, 0))[0]
    return torch.tensor([value, random.random(), np.random.random(), torch.rand(()).item()])  # noqa: NPY002


def loader(
    size=10, broken=(), limit=0, training=True, workers=0, epoch=0, seed=0, world=1, rank=0, **options
):
    images = Images(Numbers(size, broken), noisy, seed)
    order = TrainOrder(images, world, rank, seed=seed) if training else EvaluationOrder(images, world, rank)
    order.set_epoch(epoch)
    options |= {"sampler": order, "batch_size": 4, "num_workers": workers, "training": training}
    return ImageLoader(images, unreadable=UnreadableImages(limit), **options)


def flat(batches):
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))


def test_batches_follow_from_seed_and_epoch_whatever_the_number_of_workers():
    here = list(loader(epoch=1))
    assert [len(batch.images) for batch in here] == [4, 4, 2]
    images, labels, indices = flat(here)
    assert images[:, 0].tolist() == indices.tolist()
    assert labels.tolist() == (indices % 3).tolist()
    assert sorted(indices.tolist()) == list(range(10))
    assert labels.dtype == indices.dtype == torch.int64
    assert same(here, loader(epoch=1, workers=2))
    for other in (loader(epoch=2), loader(epoch=1, seed=1)):
        other_images, _, other_indices = flat(other)
        assert other_indices.tolist() != indices.tolist()
        drawn = images[indices.argsort(), 1:]
        assert (other_images[other_indices.argsort(), 1:] != drawn).all()


@pytest.mark.parametrize("before", [(1, 3), (2, 2), (3, 1)])
@pytest.mark.parametrize("after", [(1, 2), (2, 3), (3, 2), (4, 3)])
@pytest.mark.parametrize("batches", [1, 2, 3])
def test_an_epoch_that_other_processes_began_goes_on_with_the_images_that_they_have_not_seen(
    before, after, batches
):
    def images_of(world, size, seen=0):
        orders = [
            TrainOrder(Images(Numbers(24), noisy), world, rank, batch_size=size) for rank in range(world)
        ]
        for order in orders:
            order.set_epoch(1)
            order.seen = seen
        shares = [[item - 24 for item in order] for order in orders]
        assert {len(share) for share in shares} == {orders[0].rest}  # else some would wait for others
        return [image for images in zip(*shares, strict=True) for image in images]

    whole, seen = images_of(*before), batches * before[0] * before[1]
    rest = images_of(*after, seen)
    assert set(whole[:seen]).isdisjoint(rest[: 24 - seen])
    assert sorted(whole[:seen] + rest[: 24 - seen]) == list(range(24))
    assert len(rest) - (24 - seen) < after[0]  # repeated, so that all processes have as many


def test_of_an_epoch_of_which_more_is_seen_than_there_is_nothing_is_left():
    order = TrainOrder(Images(Numbers(10), noisy), 1, 0, batch_size=4)
    order.seen = 10**6
    assert list(order) == []


def test_persistent_workers_see_the_epoch_change():
    images = Images(Numbers(6), noisy)
    order = TrainOrder(images, 1, 0)
    lasting = ImageLoader(
        images,
        sampler=order,
        batch_size=3,
        num_workers=1,
        persistent_workers=True,
        training=True,
        unreadable=UnreadableImages(0),
    )
    for epoch in range(3):
        order.set_epoch(epoch)
        fresh = TrainOrder(images, 1, 0)
        fresh.set_epoch(epoch)
        expected = ImageLoader(
            images, sampler=fresh, batch_size=3, training=True, unreadable=UnreadableImages(0)
        )
        assert same(lasting, expected)


def test_the_random_numbers_of_the_process_are_left_alone():
    random.seed(0), np.random.seed(0), torch.manual_seed(0)  # noqa: NPY002
    expected = noisy(Image.new("RGB", (2, 2)))
    random.seed(0), np.random.seed(0), torch.manual_seed(0)  # noqa: NPY002
    assert Images(Numbers(2), noisy)[1][2] == 1
    assert torch.equal(noisy(Image.new("RGB", (2, 2))), expected)


def test_two_ranks_share_out_evaluation_without_padding():
    first, second = (loader(7, training=False, world=2, rank=rank) for rank in (0, 1))
    assert flat(first)[2].tolist() == [0, 2, 4, 6]
    assert flat(second)[2].tolist() == [1, 3, 5]
    assert (len(first.sampler), len(second.sampler)) == (4, 3)


def test_two_ranks_share_out_training_evenly():
    parts = [flat(loader(7, world=2, rank=rank))[2].tolist() for rank in (0, 1)]
    assert [len(part) for part in parts] == [4, 4]
    assert set(parts[0] + parts[1]) == set(range(7))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("training", [True, False])
def test_the_first_unreadable_image_stops_the_run(training, workers):
    with pytest.raises(InputError) as error:
        list(loader(broken=[5], training=training, workers=workers))
    assert str(error.value) == (
        "cannot read image image-5 (broken as it is): repair or remove it,"
        " or allow more with --data.max_unreadable (now 0)"
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_training_fills_up_a_batch_with_its_readable_images(workers, caplog):
    batches = list(loader(8, broken=[2, 5], limit=2, workers=workers))
    assert [len(batch.images) for batch in batches] == [4, 4]
    assert set(flat(batches)[2].tolist()) == {0, 1, 3, 4, 6, 7}
    assert "2 images could not be read and were skipped (2 in all" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_leaves_unreadable_images_out(workers):
    batches = list(loader(10, broken=[1, 4, 5, 6, 7], limit=5, workers=workers, training=False))
    assert [batch.indices.tolist() for batch in batches] == [[0, 2, 3], [8, 9]]


def test_a_training_batch_of_unreadable_images_is_an_error():
    with pytest.raises(
        InputError, match=r"^no image of a training batch of 4 can be read, the first being image-"
    ):
        list(loader(4, broken=range(4), limit=4))


def test_unreadable_images_count_and_are_listed_once(caplog):
    unreadable = UnreadableImages(13)
    unreadable.add([Failure("a.jpg", "gone"), Failure("a.jpg", "gone")])
    unreadable.report()
    unreadable.add([Failure("a.jpg", "gone")])
    unreadable.report()
    [record] = caplog.records
    assert record.message == (
        "1 image could not be read and was skipped (1 in all, the run stops at more than 13):\n  a.jpg: gone"
    )
    unreadable.add(Failure(f"{number}.jpg", "gone") for number in range(12))
    unreadable.report()
    assert caplog.records[-1].message.endswith("  9.jpg: gone\n  and 2 more")
    with pytest.raises(InputError, match=r"^cannot read image 99.jpg \(gone\) and 13 more before: repair"):
        unreadable.add([Failure("99.jpg", "gone")])


@pytest.mark.parametrize("limit", [0, 2])
def test_the_image_that_stops_the_run_is_not_listed_as_skipped(limit, caplog):
    with pytest.raises(InputError, match=r"^cannot read image image-"):
        list(loader(8, broken=range(limit + 1), limit=limit, training=False))
    listed = [line for record in caplog.records for line in record.message.splitlines()[1:]]
    assert listed == [f"  image-{number}: broken as it is" for number in range(limit)]


def test_skipped_images_are_listed_with_the_last_batch(caplog):
    batches = iter(loader(10, broken=[0], limit=1, training=False))
    for expected in (0, 0, 1):
        next(batches)
        assert len(caplog.records) == expected


def test_an_iteration_that_is_given_up_lists_what_it_skipped(caplog):
    batches = iter(loader(10, broken=[0], limit=1, training=False))
    next(batches)
    batches.close()
    assert len(caplog.records) == 1


def test_reading_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels(saved(Image.new("P", (2, 2)), "PNG", transparency=bytes([0, 255])))


def test_workers_need_a_short_name_of_the_temporary_folder(monkeypatch):
    """They hand over images by a socket there; where its name is too long, the training would wait."""
    monkeypatch.setattr(tempfile, "tempdir", "/" + "t" * 74)
    loader(workers=1)
    monkeypatch.setattr(tempfile, "tempdir", "/" + "t" * 75)
    loader(workers=0)
    with pytest.raises(InputError, match="TMPDIR: the name of a temporary folder has 76 bytes"):
        loader(workers=1)


def work(ready):
    end_with_the_run(0)
    ready.set()
    time.sleep(60)


@pytest.fixture
def told_by_another(monkeypatch):
    """Starts a worker that a process other than its parent tells to end, and that obeys it after a time."""

    def start(grace):
        monkeypatch.setattr("locat_lightning.data.workers.GRACE", grace)
        context = get_context("fork")
        ready = context.Event()
        worker = context.Process(target=work, args=(ready,), daemon=True)
        worker.start()
        assert ready.wait(10)
        subprocess.run(
            [sys.executable, "-c", f"import os; os.kill({worker.pid}, {signal.SIGTERM:d})"], check=True
        )
        return worker

    return start


def test_a_worker_heeds_the_sigterm_of_its_run_before_any_other(told_by_another):
    worker = told_by_another(grace=50)
    worker.join(0.2)
    assert worker.is_alive()
    os.kill(worker.pid, signal.SIGTERM)
    worker.join(10)
    assert worker.exitcode == 0


def test_a_worker_heeds_the_sigterm_of_others_in_the_end(told_by_another):
    worker = told_by_another(grace=0.1)
    worker.join(10)
    assert worker.exitcode == 0


def hand_over(ready):
    end_with_the_run(0)
    ready.put([DupFd(1)._id, DupFd(1)._id])
    ready.get()
    sys.excepthook(ValueError, ValueError("another matter"), None)


def test_a_worker_is_silent_about_a_run_that_left_while_taking_a_batch(capfd):
    context = get_context("fork")
    ready = context.SimpleQueue()
    worker = context.Process(target=hand_over, args=(ready,))
    worker.start()
    before_asking, before_taking = ready.get()
    Client(before_asking[0], authkey=current_process().authkey).close()
    connection = Client(before_taking[0], authkey=current_process().authkey)
    connection.send((before_taking[1], os.getpid()))
    connection.close()
    with Client(
        before_asking[0], authkey=current_process().authkey
    ) as connection:  # an answer: both were dealt with
        connection.send((before_asking[1], os.getpid()))
        os.close(recv_handle(connection))
    ready.put(None)
    worker.join(10)
    assert worker.exitcode == 0
    assert capfd.readouterr().err == "ValueError: another matter\n"


def mistaken(items):
    raise InputError("these do not go together")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_that_collate_finds_is_told_in_a_line_and_ends_the_workers(workers):
    images = loader(8, workers=workers, collate=mistaken, persistent_workers=workers > 0)
    for _ in range(2):  # also a second time
        with pytest.raises(InputError, match=r"^these do not go together$"):
            list(images)
        assert images._iterator is None
