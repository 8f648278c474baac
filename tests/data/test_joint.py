import colorsys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from locat_lightning.data.joint import (
    CONTRAST,
    JointAugmentation,
    JointEvaluation,
    JointSquare,
    as_tensor,
    distort,
    draw_crop,
    fitted_size,
    is_varied,
    scale_saturation,
)


def noise(height, width, seed=0):
    """Smooth noise, so that a pixel's neighbours are like it: an image, and a mask that goes with it."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(256, size=(6, 8, 3), dtype=np.uint8)).resize((width, height))
    mask = np.kron(rng.integers(5, size=(4, 4)), np.ones((height // 4, width // 4))).astype(np.uint8)
    return image, mask


def augmentation(**options):
    plain = {"crop_size": 32, "scale": (96, 64), "ratio": (1, 1), "cat_max_ratio": 1, "hflip": 0}
    colours = {"distortion": False, "mean": (0, 0, 0), "std": (1, 1, 1)}
    return JointAugmentation(**(plain | colours | options))


@pytest.mark.parametrize(
    ("size", "scale", "expected"),
    [
        ((683, 512), (2048, 512), (683, 512)),
        ((512, 683), (2048, 512), (512, 683)),
        ((500, 375), (520, 520), (520, 390)),
        ((375, 500), (520, 520), (390, 520)),
        ((4000, 500), (2048, 512), (2048, 256)),
        ((1000, 1), (100, 50), (100, 1)),
    ],
)
def test_an_image_fits_within_the_scale(size, scale, expected):
    assert fitted_size(size, scale) == expected


def test_evaluation_resizes_the_image_alone():
    image, mask = noise(48, 80)
    pixels, same = JointEvaluation((100, 36), (0.5, 0.5, 0.5), (0.25, 0.5, 1.0))(image, mask)
    assert (pixels.shape, pixels.dtype) == ((3, 36, 60), torch.float32)
    assert np.array_equal(same, mask)
    expected = np.asarray(image.resize((60, 36), Image.Resampling.BILINEAR)) / 255
    expected = (expected - 0.5) / np.array([0.25, 0.5, 1.0])
    np.testing.assert_allclose(pixels.permute(1, 2, 0), expected, atol=1e-5)


@pytest.mark.parametrize("ratio", [0.6, 1.0, 1.7])
def test_a_crop_is_cut_from_the_resized_image_and_mask(ratio):
    image, mask = noise(64, 96)
    pixels, classes = augmentation(ratio=(ratio, ratio))(image, mask, np.random.default_rng(4))

    width, height = fitted_size((96, 64), (int(96 * ratio), int(64 * ratio)))
    rng = np.random.default_rng(4)
    rng.uniform()  # the ratio
    top, left = rng.integers(height - 32 + 1), rng.integers(width - 32 + 1)
    whole = as_tensor(image.resize((width, height), Image.Resampling.BILINEAR))
    whole_mask = F.interpolate(torch.from_numpy(mask)[None, None], (height, width), mode="nearest-exact")
    torch.testing.assert_close(pixels, whole[:, top : top + 32, left : left + 32], atol=1.01 / 255, rtol=0)
    assert torch.equal(classes, whole_mask[0, 0, top : top + 32, left : left + 32])


@pytest.mark.parametrize("with_mask", [False, True])
def test_a_square_whatever_the_shape(with_mask):
    image, mask = noise(64, 96)
    pixels, classes = JointSquare(40, with_mask, (0, 0, 0), (1, 1, 1))(image, mask)
    torch.testing.assert_close(pixels, as_tensor(image.resize((40, 40), Image.Resampling.BILINEAR)))
    resized = F.interpolate(torch.from_numpy(mask)[None, None], (40, 40), mode="nearest-exact")[0, 0]
    assert torch.equal(classes, resized if with_mask else torch.from_numpy(mask))


def test_torchvision_resizes_alike():
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    image, mask = noise(64, 96)
    pixels, _ = JointEvaluation((60, 40), (0, 0, 0), (1, 1, 1))(image, mask)
    expected = functional.resize(functional.pil_to_tensor(image), [40, 60], antialias=True) / 255
    torch.testing.assert_close(pixels, expected, atol=1.01 / 255, rtol=0)


def test_what_is_smaller_is_padded_after_it_is_normalised():
    image, mask = noise(64, 96)
    pixels, classes = augmentation(ratio=(0.25, 0.25), mean=(2, 2, 2))(image, mask, np.random.default_rng(0))
    assert pixels.shape == (3, 32, 32)
    assert classes.shape == (32, 32)
    padding = torch.ones(32, 32, dtype=torch.bool)
    padding[:16, :24] = False
    assert (pixels[:, padding] == 0).all()
    assert (pixels[:, ~padding] < 0).all()
    assert (classes[padding] == 255).all()
    assert (classes[~padding] < 5).all()


def test_image_and_mask_are_flipped_together():
    image, mask = noise(64, 96)
    straight, flipped = (
        augmentation(crop_size=96, hflip=hflip)(image, mask, np.random.default_rng(0)) for hflip in (0, 1)
    )
    for one, other in zip(straight, flipped, strict=True):
        assert torch.equal(one[..., :64, :96], other[..., :64, :96].flip(-1))
        assert not torch.equal(one, other)


def test_everything_follows_from_the_generator():
    image, mask = noise(64, 96)
    transform = augmentation(ratio=(0.5, 2), cat_max_ratio=0.5, hflip=0.5, distortion=True)
    first, again, other = (transform(image, mask, np.random.default_rng([0, 1, i])) for i in (2, 2, 3))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def varied(mask, cat_max_ratio):
    """mmsegmentation's rule, as its `RandomCrop` computes it."""
    classes, counts = np.unique(mask, return_counts=True)
    counts = counts[classes != 255]
    return len(counts) > 1 and counts.max() / counts.sum() < cat_max_ratio


@pytest.mark.parametrize("cat_max_ratio", [0.5, 0.75, 0.9])
def test_the_rule_of_the_crop(cat_max_ratio):
    rng = np.random.default_rng(0)
    verdicts = []
    for case in range(200):
        shares = rng.dirichlet([0.3, 0.3, 0.3])
        mask = rng.choice([3, 7, 255], size=(8, 8), p=shares).astype(np.uint8)
        if case % 2:
            mask[mask == 255] = 0
        verdicts.append(is_varied(mask, cat_max_ratio))
        assert verdicts[-1] == varied(mask, cat_max_ratio)
    assert 5 < sum(verdicts) < 195


@pytest.mark.parametrize(
    ("counts", "expected"),
    [({1: 3, 2: 1}, False), ({1: 5, 2: 2, 255: 9}, True), ({1: 4, 255: 4}, False), ({255: 8}, False)],
)
def test_the_rule_at_its_limits(counts, expected):
    mask = np.concatenate([np.full(count, value, np.uint8) for value, count in counts.items()])[None]
    assert is_varied(mask, 0.75) is expected


def test_a_crop_is_drawn_until_it_is_varied_and_no_more_than_eleven_times():
    mask = np.zeros((40, 40), np.uint8)
    mask[30:, 30:] = np.arange(10) % 3
    identity = np.arange(40)

    def reference(rng, cat_max_ratio):
        crop, draw = np.zeros(1), 0
        while not varied(crop, cat_max_ratio) and draw < 11:
            draw += 1
            top, left = rng.integers(33), rng.integers(33)
            crop = mask[top : top + 8, left : left + 8]
        return left, top, crop, draw

    draws = []
    for seed in range(60):
        left, top, crop = draw_crop(np.random.default_rng(seed), mask, identity, identity, 8, 0.75)
        *expected, count = reference(np.random.default_rng(seed), 0.75)
        assert (left, top) == tuple(expected[:2])
        assert np.array_equal(crop, expected[2])
        draws.append(count)
    assert {1, 11} < set(draws)

    counted = SimpleNamespace(draws=0)

    def integers(high):
        counted.draws += 1
        return 0

    draw_crop(SimpleNamespace(integers=integers), mask, identity, identity, 8, 1)
    assert counted.draws == 2  # one crop: a row and a column


@pytest.mark.parametrize("factor", [0.5, 1.3, 20.0])
def test_the_saturation_is_that_of_hsv(factor):
    pixels = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(0))
    pixels[:, 0] = torch.tensor([[0.0], [0.5], [1.0]])  # saturated
    pixels[:, 1] = 0.3  # grey
    pixels[:, 2] = 0  # black
    expected = pixels.clone()
    for y in range(6):
        for x in range(6):
            hue, saturation, value = colorsys.rgb_to_hsv(*pixels[:, y, x].tolist())
            expected[:, y, x] = torch.tensor(colorsys.hsv_to_rgb(hue, min(1, saturation * factor), value))
    scale_saturation(pixels, factor)
    torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=0)


def distorted(pixel, draws, chosen):
    """What mmsegmentation's `PhotoMetricDistortion` makes of one RGB pixel, but for its rounding."""
    brightness, contrast, saturation, hue = draws
    brighten, change_contrast, saturate, turn, contrast_first = chosen
    if brighten:
        pixel = [min(1, max(0, channel + brightness)) for channel in pixel]
    if change_contrast and contrast_first:
        pixel = [min(1, channel * contrast) for channel in pixel]
    h, s, v = colorsys.rgb_to_hsv(*pixel)
    if saturate:
        s = min(1, s * saturation)
    if turn:
        h = (h + hue) % 1
    pixel = colorsys.hsv_to_rgb(h, s, v)
    if change_contrast and not contrast_first:
        pixel = [min(1, channel * contrast) for channel in pixel]
    return pixel


def test_the_distortion_is_that_of_mmsegmentation():
    start = torch.rand(3, 2, 3, generator=torch.Generator().manual_seed(0))
    seen = set()
    for seed in range(60):
        pixels = start.clone()
        distort(pixels, np.random.default_rng(seed))
        rng = np.random.default_rng(seed)
        draws = [rng.uniform(*span) for span in ((-32 / 255, 32 / 255), CONTRAST, CONTRAST, (-0.1, 0.1))]
        chosen = tuple(rng.random(5) < 0.5)
        seen.add(chosen)
        for y in range(2):
            for x in range(3):
                expected = distorted(start[:, y, x].tolist(), draws, chosen)
                torch.testing.assert_close(pixels[:, y, x], torch.tensor(expected), atol=1e-5, rtol=0)
    assert len(seen) > 20
