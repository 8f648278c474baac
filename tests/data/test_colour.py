from itertools import permutations

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy.stats import chisquare, kstest
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from locat_lightning.data import colour as C

DRAWS = 4000


def values(number: float, count: int = 1) -> Tensor:
    return torch.full((count, 1, 1, 1), number)


@pytest.fixture(scope="module")
def drawn() -> np.ndarray:
    """Parameters of views blurred and solarized as a first global, a second global and a local one are: [D,
    3, 8]."""
    rng = np.random.default_rng(0)
    return np.stack([C.draw_colour(rng, [1.0, 0.1, 0.5], [0.0, 0.2, 0.0]).numpy() for _ in range(DRAWS)])


@pytest.fixture
def pixels() -> Tensor:
    """Random colours; also grays, and colours with equal channels."""
    x = torch.rand(8, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    x[0] = x[0, :1]
    x[1] = (x[1] * 2).round() / 2
    x[2] = (x[2] * 5).round() / 5
    return x


def frequency_matches(flags: np.ndarray, probability: float) -> bool:
    sigma = np.sqrt(probability * (1 - probability) / flags.size)
    return bool(abs(flags.mean() - probability) <= 4 * sigma)


def test_probabilities_are_dinos(drawn):
    jittered = drawn[..., C.BRIGHTNESS] != 1
    for view in range(3):
        assert frequency_matches(jittered[:, view], 0.8)
        assert frequency_matches(drawn[:, view, C.GRAYSCALE], 0.2)
    for view, blur, solarize in ((0, 1.0, 0.0), (1, 0.1, 0.2), (2, 0.5, 0.0)):
        assert frequency_matches(drawn[:, view, C.SIGMA] > 0, blur)
        assert frequency_matches(drawn[:, view, C.SOLARIZE], solarize)


@pytest.mark.parametrize(
    ("column", "low", "high"),
    [
        (C.BRIGHTNESS, 0.6, 1.4),
        (C.CONTRAST, 0.6, 1.4),
        (C.SATURATION, 0.8, 1.2),
        (C.HUE, -0.1, 0.1),
        (C.SIGMA, 0.1, 2.0),
    ],
)
def test_values_are_uniform_over_dinos_range(drawn, column, low, high):
    applied = drawn[..., column][drawn[..., column] != C.NEUTRAL[column]]
    assert low <= applied.min()
    assert applied.max() <= np.float32(high)
    assert kstest(applied, "uniform", (low, high - low)).pvalue > 1e-3


def test_all_orders_of_the_jitter_are_as_likely(drawn):
    assert sorted(C.JITTER_ORDERS) == sorted(permutations(range(4)))
    orders = drawn[..., C.ORDER][drawn[..., C.BRIGHTNESS] != 1].astype(int)
    assert chisquare(np.bincount(orders, minlength=24)).pvalue > 1e-3


def test_neutral_values_stand_where_nothing_is_jittered(drawn):
    calm = drawn[drawn[..., C.BRIGHTNESS] == 1]
    assert (calm[:, : C.ORDER + 1] == C.NEUTRAL[: C.ORDER + 1]).all()


def test_views_and_operations_are_independent(drawn):
    """No parameter says anything of another, in the same view or in another one of the same image."""
    jittered = drawn[(drawn[..., C.BRIGHTNESS] != 1).all(axis=1)]
    columns = jittered.reshape(len(jittered), -1)
    columns = columns[:, columns.std(axis=0) > 0]
    correlation = np.corrcoef(columns.T) - np.eye(columns.shape[1])
    assert columns.shape[1] == 22  # all but: second's and local's constant solarize
    assert np.abs(correlation).max() < 4.5 / np.sqrt(len(jittered))


@pytest.mark.parametrize("factor", [0.6, 0.93, 1.0, 1.4])
@pytest.mark.parametrize(
    ("ours", "torchvisions"),
    [
        (C._brightness, TF.adjust_brightness),
        (C._contrast, TF.adjust_contrast),
        (C._saturation, TF.adjust_saturation),
    ],
)
def test_factors_change_pixels_as_torchvision(pixels, ours, torchvisions, factor):
    expected = torchvisions(pixels, factor)
    ours(pixels, values(factor, len(pixels)))
    torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("turns", [-1 / 6, -0.1, -0.003, 0.0, 0.05, 0.1, 1 / 6])
def test_hue_turns_as_torchvision(pixels, turns):
    expected = TF.adjust_hue(pixels, turns)
    C.turn_hue(pixels, values(turns, len(pixels)))
    torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=0)


def test_grayscale_and_solarize_are_torchvisions(pixels):
    gray, solarized = TF.rgb_to_grayscale(pixels, 3), TF.solarize(pixels, 128 / 255)
    for operation, expected in ((C._grayscale, gray), (C._solarize, solarized)):
        x = pixels.clone()
        operation(x, values(1.0, len(x)))
        torch.testing.assert_close(x, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [32, 96, 150])
@pytest.mark.parametrize("sigma", [0.1, 0.5, 0.9, 1.3, 1.7, 2.0])
def test_blur_is_pils_up_to_its_rounding(size, sigma):
    """PIL rounds after each of six passes: at worst 3 levels on white noise, without a bias."""
    noise = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(noise).filter(ImageFilter.GaussianBlur(sigma)), dtype=np.float64)
    x = torch.from_numpy(noise).permute(2, 0, 1)[None].float()
    C._blur(x, C._blur_bands(size, values(sigma)))
    error = x[0].permute(1, 2, 0).numpy() - expected
    assert np.abs(error).max() < 3
    assert abs(error.mean()) < 0.05


@pytest.mark.parametrize("size", [5, 13, 14, 24, 100])
@pytest.mark.parametrize("sigma", [0.1, 0.9, 1.42, 2.0])
def test_a_blur_is_three_boxes_and_extends_the_border_before_each(size, sigma):
    variance = sigma**2 / 3
    whole = int((np.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    box = np.array([part, *[1.0] * (2 * whole + 1), part])
    expected = np.eye(size)
    for _ in range(3):
        padded = np.pad(expected, ((0, 0), (whole + 1, whole + 1)), mode="edge")
        expected = np.stack([np.convolve(line, box / box.sum(), mode="valid") for line in padded])
    actual = C._blur_bands(size, values(sigma, 2)).double()
    torch.testing.assert_close(actual, torch.tensor(expected.T).expand(2, 1, -1, -1), atol=1e-6, rtol=0)


def test_a_crop_goes_through_its_operations_in_its_own_order():
    generator = torch.Generator().manual_seed(0)
    order = (C.HUE, C.SATURATION, C.BRIGHTNESS, C.CONTRAST)
    crop = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=generator)
    parameters = torch.tensor([[1.3, 0.7, 1.2, 0.08, float(C.JITTER_ORDERS.index(order)), 0.0, 0.0, 1.0]])
    x = TF.to_dtype(crop, torch.float32, scale=True)
    x = TF.adjust_contrast(TF.adjust_brightness(TF.adjust_saturation(TF.adjust_hue(x, 0.08), 1.2), 1.3), 0.7)
    expected = TF.normalize(TF.solarize(x, 128 / 255), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    actual = C.apply_colour(crop, parameters)
    # A value within rounding of the threshold may fall on either side of it.
    assert ((actual - expected).abs() < 1e-4).float().mean() > 0.999


@pytest.mark.parametrize("size", [32, 96])
def test_all_together_as_on_a_gpu_equals_one_by_one(size):
    generator = torch.Generator().manual_seed(0)
    crops = torch.randint(0, 256, (40, 3, size, size), dtype=torch.uint8, generator=generator)
    parameters = C.draw_colour(np.random.default_rng(0), [0.5] * 40, [0.2] * 40)
    kept = crops.clone()
    mean, std = torch.tensor([IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD])[..., None, None]
    together = C._augment_together(crops, parameters, mean, std)
    one_by_one = C._augment_one_by_one(crops, parameters, mean, std)
    torch.testing.assert_close(together, one_by_one, atol=2e-5, rtol=0)
    assert torch.equal(crops, kept)


def test_all_together_is_one_graph():
    """Without a break, so that a compiler fuses what works on single pixels."""
    crops = torch.randint(
        0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    values = torch.rand(4, 2 * len(C.SLOTS) + len(C.NEUTRAL), generator=torch.Generator().manual_seed(1)) / 6
    mean, std = torch.tensor([IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD])[..., None, None]
    compiled = torch.compile(C._augment, backend="eager", fullgraph=True, dynamic=False)
    expected = C._augment(crops, values, mean, std)
    torch.testing.assert_close(compiled(crops, values, mean, std), expected, atol=1e-5, rtol=0)


def test_neutral_parameters_only_normalise():
    crops = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    x = C.apply_colour(crops, torch.tensor([C.NEUTRAL] * 2))
    mean, std = torch.tensor([IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD])[..., None, None]
    expected = (crops / 255 - mean) / std
    torch.testing.assert_close(x, expected, atol=1e-6, rtol=0)
