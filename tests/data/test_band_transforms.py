"""Transforms of images of any number of channels: what they keep, and the jitter against loops."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch.testing import assert_close

from locat_lightning.data import MaskedMultiCrop, SingleCrop
from locat_lightning.data.band_transforms import (
    BandAugmentation,
    BandEvaluation,
    apply_jitter,
    draw_jitter,
    jittered,
    no_jitter,
)
from locat_lightning.data.bands import Bands
from locat_lightning.data.views import MultiCrop

IMAGE = Bands(torch.randn(5, 40, 60, generator=torch.Generator().manual_seed(0)))


def test_evaluation_is_the_central_crop_in_the_shape_of_the_image():
    whole = BandEvaluation(40, crop_pct=1)(IMAGE)
    assert_close(whole, IMAGE.pixels[:, :, 10:50])
    assert BandEvaluation(32)(IMAGE).shape == (5, 32, 32)


def test_augmentation_without_chance_cuts_resizes_and_mirrors():
    plain = {"scale": (1.0, 1.0), "ratio": (1.5, 1.5), "jitter": 0.0, "erasing": 0.0}
    kept, mirrored = (BandAugmentation(24, hflip=flip, **plain)(IMAGE) for flip in (0.0, 1.0))
    assert kept.shape == (5, 24, 24)
    assert_close(kept.flip(-1), mirrored)
    torch.manual_seed(0)
    erased = BandAugmentation(24, hflip=0.0, **(plain | {"erasing": 1.0}))(IMAGE)
    changed = (erased != kept).all(0)
    assert 0 < changed.float().mean() < 0.5


def test_jitter_is_a_gain_about_the_mean_and_an_offset_of_each_channel():
    torch.manual_seed(3)
    found = jittered(IMAGE.pixels, 0.4)
    for before, after in zip(IMAGE.pixels.numpy(), found.numpy(), strict=True):
        gain = after.std() / before.std()
        assert 0.6 <= gain <= 1.4
        assert abs(after.mean() - before.mean()) <= 0.4
        np.testing.assert_allclose(after, (before - before.mean()) * gain + after.mean(), atol=1e-5)
    assert jittered(IMAGE.pixels, 0.0) is IMAGE.pixels


def test_jitter_and_blur_of_a_batch_are_those_of_each_crop():
    crops = torch.rand(6, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    parameters = draw_jitter(np.random.default_rng(0), [0.0, 1.0, 0.0, 1.0, 1.0, 0.0], 3, 0.3)
    assert (parameters[:, -1] > 0).tolist() == [False, True, False, True, True, False]
    found = apply_jitter(crops, parameters)
    for crop, own, after in zip(crops, parameters.tolist(), found, strict=True):
        for channel in range(3):
            plane = crop[channel].numpy()
            plane = (plane - plane.mean()) * own[channel] + plane.mean() + own[3 + channel]
            if own[-1]:
                low, high = plane.min() - 0.1, plane.max() + 0.1  # PIL's blur is of 8 bits
                levels = Image.fromarray(((plane - low) / (high - low) * 255).round().astype(np.uint8))
                blurred = np.asarray(levels.filter(ImageFilter.GaussianBlur(own[-1])))
                np.testing.assert_allclose(
                    after[channel], blurred / 255 * (high - low) + low, atol=0.012 * (high - low)
                )
            else:
                np.testing.assert_allclose(after[channel], plane, atol=1e-5)
    assert_close(apply_jitter(crops, no_jitter(6, 3)), crops)


def test_one_view_in_five_is_not_jittered_and_none_at_strength_0():
    drawn = torch.cat([draw_jitter(np.random.default_rng(i), [0.0] * 10, 2, 0.4) for i in range(100)])
    neutral = (drawn == no_jitter(1, 2)).all(1)
    assert 0.15 < neutral.float().mean() < 0.25
    assert drawn[:, :2].min() < 0.65
    assert drawn[:, 2:4].abs().max() <= 0.4
    assert_close(draw_jitter(np.random.default_rng(0), [0.0] * 4, 2, 0.0), no_jitter(4, 2))


@pytest.mark.parametrize("colour_on", ["worker", "device"])
def test_views_follow_from_the_image_and_its_numbers(colour_on):
    options = {"global_size": 24, "local_size": 16, "local_views": 3, "hflip": 1.0, "jitter": 0.0}
    views = MultiCrop(**options, colour_on=colour_on, global_scale=(1.0, 1.0))
    first, second = (views(IMAGE, np.random.default_rng(1)) for _ in range(2))
    assert [each.crops.shape for each in first] == [(2, 5, 24, 24), (3, 5, 16, 16)]
    assert (first[0].colour is None) == (colour_on == "worker")
    for one, other in zip(first, second, strict=True):
        assert one.crops.dtype == torch.float32
        assert_close(one.coloured().crops, other.coloured().crops)


def test_masked_views_and_one_crop():
    masked = MaskedMultiCrop(global_size=32, local_size=16, patch_size=16, undistorted_size=16, local_views=1)
    batch = masked.collate([(masked(IMAGE, np.random.default_rng(i)), 0, i) for i in range(2)])
    assert batch.undistorted.crops.shape == (2, 2, 5, 16, 16)
    assert_close(batch.undistorted.coloured().crops, batch.undistorted.crops)
    [view] = SingleCrop(global_size=16)(IMAGE, np.random.default_rng(0))
    assert_close(view.coloured().crops, view.crops)
    assert view.crops.shape == (1, 5, 16, 16)
