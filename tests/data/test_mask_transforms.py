import colorsys
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor, resize

from locat_lightning.data.mask_transforms import (
    DISTORTION,
    distort_colours,
    fitted_size,
    is_varied,
    joint_augmentation,
    joint_evaluation,
    scale_saturation,
    square_augmentation,
    varied_crop,
)

PLAIN = {"normalisation": {"mean": (0, 0, 0), "std": (1, 1, 1)}}


def noise(height, width, seed=0):
    """Smooth noise, so that a pixel's neighbours are like it: an image, and a mask that goes with it."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(256, size=(6, 8, 3), dtype=np.uint8)).resize((width, height))
    mask = np.kron(rng.integers(5, size=(4, 4)), np.ones((height // 4, width // 4))).astype(np.uint8)
    return pil_to_tensor(image), torch.from_numpy(mask)


def resized(image, width, height):
    """What Pillow makes of an image, from 0 to 1."""
    pixels = Image.fromarray(image.permute(1, 2, 0).numpy())
    pixels = np.asarray(pixels.resize((width, height), Image.Resampling.BILINEAR))
    return torch.from_numpy(pixels / np.float32(255)).permute(2, 0, 1)


def resized_mask(mask, width, height):
    return F.interpolate(mask[None, None], (height, width), mode="nearest-exact")[0, 0]


def augmentation(**options):
    plain = {"crop_size": 32, "scale": (96, 64), "ratio": (1, 1), "cat_max_ratio": 1, "hflip": 0}
    transform = partial(joint_augmentation, **(plain | {"distortion": False} | PLAIN | options))

    def augment(image, mask, seed=0):
        torch.manual_seed(seed)
        return transform(image, mask)

    return augment


@pytest.mark.parametrize(
    ("size", "scale", "expected"),
    [
        ((683, 512), (2048, 512), [683, 512]),
        ((512, 683), (2048, 512), [512, 683]),
        ((500, 375), (520, 520), [520, 390]),
        ((375, 500), (520, 520), [390, 520]),
        ((4000, 500), (2048, 512), [2048, 256]),
        ((1000, 1), (100, 50), [100, 1]),
    ],
)
def test_an_image_fits_within_the_scale(size, scale, expected):
    assert fitted_size(size, scale) == expected


def test_evaluation_resizes_the_image_alone():
    image, mask = noise(48, 80)
    normalisation = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.5, 1.0)}
    pixels, same = joint_evaluation(image, mask, scale=(100, 36), normalisation=normalisation)
    assert (type(pixels), pixels.shape, pixels.dtype) == (torch.Tensor, (3, 36, 60), torch.float32)
    assert torch.equal(same, mask)
    expected = (resize(image, [36, 60]).permute(1, 2, 0).numpy() / 255 - 0.5) / np.array([0.25, 0.5, 1.0])
    np.testing.assert_allclose(pixels.permute(1, 2, 0), expected, atol=1e-5)


@pytest.mark.parametrize("ratio", [0.6, 1.0, 1.7])
def test_a_crop_is_cut_from_the_resized_image_and_mask(ratio):
    image, mask = noise(64, 96)
    pixels, classes = augmentation(ratio=(ratio, ratio))(image, mask, 4)

    height, width = fitted_size((64, 96), (int(96 * ratio), int(64 * ratio)))
    torch.manual_seed(4)
    torch.rand(())  # the ratio
    top, left = int(torch.randint(height - 32 + 1, ())), int(torch.randint(width - 32 + 1, ()))
    box = np.s_[..., top : top + 32, left : left + 32]
    torch.testing.assert_close(pixels, resized(image, width, height)[box], atol=1.01 / 255, rtol=0)
    assert torch.equal(classes, resized_mask(mask, width, height)[box])


def test_the_ratio_is_between_its_limits():
    image, mask = noise(64, 96)
    augment = augmentation(crop_size=130, ratio=(0.5, 2))
    heights = [int((augment(image, mask, seed)[1][:, 0] != 255).sum()) for seed in range(200)]
    assert 32 <= min(heights) < 40
    assert 120 < max(heights) <= 128
    assert 76 < np.mean(heights) < 84


@pytest.mark.parametrize("with_mask", [False, True])
def test_a_square_whatever_the_shape(with_mask):
    image, mask = noise(64, 96)
    options = {"scale": (40, 40), "keep_ratio": False, "with_mask": with_mask}
    pixels, classes = joint_evaluation(image, mask, **options, **PLAIN)
    torch.testing.assert_close(pixels, resize(image, [40, 40]) / 255)
    assert torch.equal(classes, resized_mask(mask, 40, 40) if with_mask else mask)


def test_pillow_resizes_alike():
    image, mask = noise(64, 96)
    pixels, _ = joint_evaluation(image, mask, scale=(60, 40), **PLAIN)
    torch.testing.assert_close(pixels, resized(image, 60, 40), atol=1.01 / 255, rtol=0)


def test_what_is_smaller_is_padded_after_it_is_normalised():
    image, mask = noise(64, 96)
    pixels, classes = augmentation(ratio=(0.25, 0.25), normalisation={"mean": (2, 2, 2), "std": (1, 1, 1)})(
        image, mask
    )
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
    straight, flipped = (augmentation(crop_size=96, hflip=hflip)(image, mask) for hflip in (0, 1))
    for one, other in zip(straight, flipped, strict=True):
        assert torch.equal(one[..., :64, :96], other[..., :64, :96].flip(-1))
        assert not torch.equal(one, other)


def test_everything_follows_from_torchs_random_numbers():
    image, mask = noise(64, 96)
    before = image.clone(), mask.clone()
    transform = augmentation(ratio=(0.5, 2), cat_max_ratio=0.5, hflip=0.5, distortion=True)
    first, again, other = (transform(image, mask, seed) for seed in (2, 2, 3))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert torch.equal(image, before[0])
    assert torch.equal(mask, before[1])


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
        verdicts.append(is_varied(torch.from_numpy(mask), cat_max_ratio))
        assert verdicts[-1] == varied(mask, cat_max_ratio)
    assert 5 < sum(verdicts) < 195


@pytest.mark.parametrize(
    ("counts", "expected"),
    [({1: 3, 2: 1}, False), ({1: 5, 2: 2, 255: 9}, True), ({1: 4, 255: 4}, False), ({255: 8}, False)],
)
def test_the_rule_at_its_limits(counts, expected):
    mask = np.concatenate([np.full(count, value, np.uint8) for value, count in counts.items()])[None]
    assert is_varied(torch.from_numpy(mask), 0.75) is expected


def test_a_crop_is_drawn_until_it_is_varied_and_no_more_than_eleven_times():
    mask = np.zeros((40, 50), np.uint8)
    mask[30:, 40:] = np.arange(10) % 3

    def reference(cat_max_ratio):
        crop, draw = np.zeros(1), 0
        while not varied(crop, cat_max_ratio) and draw < 11:
            draw += 1
            top, left = int(torch.randint(33, ())), int(torch.randint(43, ()))
            crop = mask[top : top + 8, left : left + 8]
        return crop, draw

    draws = []
    for seed in range(60):
        torch.manual_seed(seed)
        crop = mask[varied_crop(torch.from_numpy(mask), 8, 0.75)]
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        expected, count = reference(0.75)
        assert np.array_equal(crop, expected)
        assert torch.equal(state, torch.get_rng_state())  # as many random numbers were drawn
        draws.append(count)
    assert {1, 11} < set(draws)

    torch.manual_seed(0)
    varied_crop(torch.zeros(40, 50, dtype=torch.uint8), 8, 1)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    torch.randint(33, ()), torch.randint(43, ())  # one crop: a row and a column
    assert torch.equal(state, torch.get_rng_state())


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


def distorted(pixel, brightness, contrast, saturation, hue, contrast_first):
    """What mmsegmentation's `PhotoMetricDistortion` makes of one RGB pixel, but for its rounding."""
    if brightness is not None:
        pixel = [min(1, max(0, channel + brightness)) for channel in pixel]
    if contrast is not None and contrast_first:
        pixel = [min(1, channel * contrast) for channel in pixel]
    h, s, v = colorsys.rgb_to_hsv(*pixel)
    if saturation is not None:
        s = min(1, s * saturation)
    if hue is not None:
        h = (h + hue) % 1
    pixel = colorsys.hsv_to_rgb(h, s, v)
    if contrast is not None and not contrast_first:
        pixel = [min(1, channel * contrast) for channel in pixel]
    return pixel


def test_the_distortion_is_that_of_mmsegmentation():
    start = torch.rand(3, 2, 3, generator=torch.Generator().manual_seed(0))
    seen = set()
    for seed in range(60):
        torch.manual_seed(seed)
        distort_colours(pixels := start.clone())
        torch.manual_seed(seed)
        params = DISTORTION.make_params([start])
        draws = [params[f"{name}_factor"] for name in ("brightness", "contrast", "saturation", "hue")]
        seen.add((*(draw is None for draw in draws), params["contrast_before"]))
        for y in range(2):
            for x in range(3):
                expected = distorted(start[:, y, x].tolist(), *draws, params["contrast_before"])
                torch.testing.assert_close(pixels[:, y, x], torch.tensor(expected), atol=1e-5, rtol=0)
    assert len(seen) > 20


def test_the_ranges_of_the_distortion():
    torch.manual_seed(0)
    drawn = [DISTORTION.make_params([torch.zeros(3, 1, 1)]) for _ in range(800)]
    limits = {"brightness": (-32 / 255, 32 / 255), "contrast": (0.5, 1.5), "saturation": (0.5, 1.5)}
    for name, (low, high) in (limits | {"hue": (-18 / 180, 18 / 180)}).items():
        values = [each[f"{name}_factor"] for each in drawn if each[f"{name}_factor"] is not None]
        near = 0.03 * (high - low)
        assert low <= min(values) < low + near
        assert high - near < max(values) <= high
        assert 350 < len(values) < 450
    assert 350 < sum(each["contrast_before"] for each in drawn) < 450


def test_a_square_shows_the_same_part_of_image_and_mask(monkeypatch):
    """Red is the place from left to right, green from top to bottom; the mask is their coarse product."""
    monkeypatch.setattr("locat_lightning.data.mask_transforms.JITTER", [])
    y, x = torch.meshgrid(torch.arange(60) * 4, torch.arange(120) * 2, indexing="ij")
    image = torch.stack([x, y, y]).byte()
    shares, flipped = [], 0
    for seed in range(60):
        torch.manual_seed(seed)
        pixels, mask = square_augmentation(image, (x // 60 + 4 * (y // 60)).byte(), side=32, **PLAIN)
        assert (pixels.shape, mask.shape, mask.dtype) == ((3, 32, 32), (32, 32), torch.uint8)
        across, down = pixels[0] * 255, pixels[1] * 255
        # Where the place is not on the border of two classes, the mask is its class.
        inside = ((across % 60 - 30).abs() < 22) & ((down % 60 - 30).abs() < 22)
        classes = (across // 60 + 4 * (down // 60)).byte()
        assert inside.float().mean() > 0.3
        assert torch.equal(mask[inside], classes[inside])
        sides = [(each.max() - each.min() + each.diff(dim=k).mean()) for k, each in ((1, across), (0, down))]
        shares.append(float(sides[0] / 240 * sides[1] / 240))
        flipped += int(across[0, -1] < across[0, 0])
    assert flipped == 0
    assert min(shares) == pytest.approx(0.5, abs=0.05)
    assert max(shares) <= 1.05
    assert len({round(share, 3) for share in shares}) > 10


def test_the_colours_of_a_square_change_little_and_at_random():
    image, mask = noise(64, 64)
    squares = []
    for seed in range(40):
        torch.manual_seed(seed)
        flat = image.float().mean((1, 2), keepdim=True).byte().expand(-1, 64, 64).contiguous()
        squares.append(square_augmentation(flat, mask, side=8, **PLAIN)[0][:, 0, 0])
    squares = torch.stack(squares)
    unchanged = (squares - flat[:, 0, 0] / 255).abs().amax(1) < 1e-6
    assert 1 <= unchanged.sum() < 20  # brightness, saturation and hue: 1/8, as a flat image has no contrast
    assert len(squares.unique(dim=0)) > 10
    assert (squares.mean(1) - flat[:, 0, 0].float().mean() / 255).abs().max() < 0.12
