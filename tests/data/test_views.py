import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from sklearn.datasets import load_sample_image
from torchvision.transforms.v2 import RandomResizedCrop
from torchvision.transforms.v2 import functional as TF

from locat_lightning.data.colour import apply_colour
from locat_lightning.data.views import MultiCrop, Views, draw_boxes
from locat_lightning.errors import InputError


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    return Image.fromarray(load_sample_image("china.jpg")).resize((500, 375))


def jpeg(image: Image.Image) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    file.seek(0)
    return file


@pytest.mark.parametrize(
    ("size", "scale"), [((500, 375), (0.4, 1.0)), ((300, 100), (0.05, 0.4)), ((90, 400), (0.4, 1.0))]
)
def test_boxes_are_distributed_as_torchvisions(size, scale):
    count = 2000
    boxes = draw_boxes(np.random.default_rng(0), size, np.array([scale] * count))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        crop, image = RandomResizedCrop(224, scale=scale), torch.empty(3, size[1], size[0])
        drawn = [crop.make_params([image]) for _ in range(count)]
    theirs = np.array([[p["left"], p["top"], p["width"], p["height"]] for p in drawn])
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= size).all()
    for quantity in (*zip(boxes.T, theirs.T, strict=True), (boxes[:, 2:].prod(1), theirs[:, 2:].prod(1))):
        assert ks_2samp(*quantity).pvalue > 1e-3


def test_shapes_and_types(photograph):
    globals_, locals_ = MultiCrop()(photograph, np.random.default_rng(0))
    assert globals_.crops.shape == (2, 3, 224, 224)
    assert locals_.crops.shape == (8, 3, 96, 96)
    assert globals_.crops.dtype == locals_.crops.dtype == torch.uint8
    assert globals_.colour.shape == (2, 8)
    assert locals_.colour.shape == (8, 8)
    small = MultiCrop(global_size=32, local_views=0)(photograph.convert("L"), np.random.default_rng(0))
    assert [v.crops.shape for v in small] == [(2, 3, 32, 32)]


def test_crops_are_pils_to_a_level_and_half_are_flipped(photograph):
    multi_crop, flips = MultiCrop(global_size=64, local_size=32), []
    scales = np.array([multi_crop.global_scale] * 2 + [multi_crop.local_scale] * 8)
    for seed in range(20):
        boxes = draw_boxes(np.random.default_rng(seed), photograph.size, scales)
        views = multi_crop(photograph, np.random.default_rng(seed))
        crops = [crop for view in views for crop in view.crops]
        for crop, (x, y, w, h), size in zip(crops, boxes.tolist(), multi_crop.sizes, strict=True):
            expected = TF.pil_to_tensor(
                photograph.crop((x, y, x + w, y + h)).resize((size, size), Image.Resampling.BICUBIC)
            )
            errors = [(crop.int() - e.int()).abs().max().item() for e in (expected, expected.flip(-1))]
            assert min(errors) <= 1
            flips.append(errors[1] < errors[0])
    assert abs(np.mean(flips) - 0.5) < 4 * 0.5 / np.sqrt(len(flips))


@pytest.mark.parametrize("hflip", [0.0, 1.0])
def test_flips_can_be_left_out(photograph, hflip):
    half, given = MultiCrop(32, 16, 2), MultiCrop(32, 16, 2, hflip=hflip)
    for seed in range(8):
        expected, views = (cut(photograph, np.random.default_rng(seed)) for cut in (half, given))
        for a, b in zip(expected, views, strict=True):
            for like, crop in zip(a.crops, b.crops, strict=True):
                assert any((crop == each).all() for each in (like, like.flip(-1)))
    flips = MultiCrop(32, 16, 2, hflip=1.0)(photograph, np.random.default_rng(0))
    plain = MultiCrop(32, 16, 2, hflip=0.0)(photograph, np.random.default_rng(0))
    for a, b in zip(flips, plain, strict=True):
        assert (a.crops == b.crops.flip(-1)).all()


def test_the_generator_fixes_the_views(photograph):
    multi_crop = MultiCrop(global_size=32, local_size=16)
    first, again, other = (
        multi_crop(photograph, np.random.default_rng(seed)) for seed in ([3, 1, 7], [3, 1, 7], [3, 2, 7])
    )
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a.crops, b.crops)
        assert torch.equal(a.colour, b.colour)
        assert not torch.equal(a.crops, c.crops)
        assert not torch.equal(a.colour, c.colour)


def test_views_of_one_image_differ(photograph):
    _, local = MultiCrop()(photograph, np.random.default_rng(0))
    assert len({crop.numpy().tobytes() for crop in local.crops}) == 8


def test_worker_and_device_give_the_same_views(photograph):
    def views(colour_on: str) -> list[Views]:
        multi_crop = MultiCrop(global_size=48, local_size=32, colour_on=colour_on)
        images = [(multi_crop(photograph, np.random.default_rng(i)), -1, i) for i in range(3)]
        return [batch.to("cpu").coloured() for batch in multi_crop.collate(images).views]

    on_device, on_worker = views("device"), views("worker")
    for device, worker in zip(on_device, on_worker, strict=True):
        assert device.colour is worker.colour is None
        torch.testing.assert_close(device.crops, worker.crops, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("device", "given", "expected"),
    [
        ("cuda", {}, True),
        ("cuda:1", {}, True),
        ("cpu", {}, False),
        ("mps", {}, False),
        ("cuda", {"non_blocking": False}, False),
        ("cpu", {"non_blocking": True}, True),
    ],
)
def test_only_cuda_is_not_waited_for(device, given, expected):
    class Crops:
        def to(self, device, non_blocking):
            self.non_blocking = non_blocking
            return self

    assert Views(Crops(), None).to(torch.device(device), **given).crops.non_blocking is expected


def test_a_batch_puts_views_first(photograph):
    multi_crop = MultiCrop(global_size=32, local_size=16)
    images = [multi_crop(photograph, np.random.default_rng(i)) for i in range(3)]
    globals_, locals_ = multi_crop.collate([(views, -1, i) for i, views in enumerate(images)]).views
    assert globals_.crops.shape == (2, 3, 3, 32, 32)
    assert locals_.colour.shape == (8, 3, 8)
    assert torch.equal(locals_.crops[5, 2], images[2][1].crops[5])
    expected = apply_colour(images[2][1].crops[5:6], images[2][1].colour[5:6])[0]
    torch.testing.assert_close(locals_.coloured().crops[5, 2], expected, atol=1e-5, rtol=0)


def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same(photograph):
    large = jpeg(photograph.resize((2000, 1500), Image.Resampling.BICUBIC))
    multi_crop = MultiCrop(global_size=64, local_size=24)
    lazy, loaded = Image.open(large), Image.open(large)
    loaded.load()
    views = multi_crop(lazy, np.random.default_rng(0))
    assert lazy.size == (500, 375)
    for ours, full in zip(views, multi_crop(loaded, np.random.default_rng(0)), strict=True):
        assert torch.equal(ours.colour, full.colour)
        assert (ours.crops.float() - full.crops.float()).abs().mean() < 2


def test_a_jpeg_of_usual_size_is_decoded_in_full(photograph):
    file = jpeg(photograph)
    lazy, loaded = Image.open(file), Image.open(file)
    loaded.load()
    for seed in range(5):
        views = MultiCrop()(Image.open(file), np.random.default_rng(seed))
        for ours, full in zip(views, MultiCrop()(loaded, np.random.default_rng(seed)), strict=True):
            assert torch.equal(ours.crops, full.crops)
    assert lazy.size == (500, 375)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_scale": (0.9, 0.4)}, "data.views.global_scale"),
        ({"local_scale": (0.0, 0.4)}, "data.views.local_scale"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        MultiCrop(**arguments)
