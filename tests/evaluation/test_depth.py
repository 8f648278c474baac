"""Errors of depths against their definitions written as loops."""

import math

import numpy as np
import pytest
import torch

from locat_lightning.evaluation.depth import DepthErrors, depth_errors, eigen_crop


def drawn(seed=0, size=(4, 11, 14)):
    rng = np.random.default_rng(seed)
    predicted, true = rng.uniform(0.5, 3, (2, *size))
    valid = rng.random(size) < 0.7
    valid[2] = False  # an image of which nothing is measured
    true[~valid] = 0
    return tuple(torch.from_numpy(each) for each in (predicted, true, valid))


def reference(predicted, true, valid):
    """The errors of one image."""
    pairs = [
        (p, t)
        for p, t, v in zip(*(each.flatten().tolist() for each in (predicted, true, valid)), strict=True)
        if v
    ]

    def mean(values):
        return sum(values) / len(pairs)

    ratios = [max(p / t, t / p) for p, t in pairs]
    return {
        "rmse": math.sqrt(mean((p - t) ** 2 for p, t in pairs)),
        "abs_rel": mean(abs(p - t) / t for p, t in pairs),
        "log10": mean(abs(math.log10(p) - math.log10(t)) for p, t in pairs),
        "delta1": mean(ratio < 1.25 for ratio in ratios),
        "delta2": mean(ratio < 1.25**2 for ratio in ratios),
        "delta3": mean(ratio < 1.25**3 for ratio in ratios),
    }


def test_errors_are_means_over_the_images_of_those_of_each():
    given = drawn()
    expected = [reference(*(each[image] for each in given)) for image in (0, 1, 3)]
    found = depth_errors(*given)
    metric = DepthErrors()
    metric.update(*(each[:1] for each in given))
    metric.update(*(each[1:] for each in given))
    for name, value in metric.compute().items():
        assert value.item() == pytest.approx(np.mean([each[name] for each in expected]), rel=1e-5)
        assert found[name][[0, 1, 3]].tolist() == pytest.approx([each[name] for each in expected], rel=1e-5)
        assert found[name][2].isnan()
    empty = DepthErrors()
    empty.update(*(each[2:3] for each in given))
    assert empty.compute()["rmse"].isnan()


def test_eigens_crop():
    expected = np.zeros((480, 640), bool)
    expected[45:471, 41:601] = True
    assert np.array_equal(eigen_crop(torch.zeros(1, 480, 640)), expected)
    half = eigen_crop(torch.zeros(1, 960, 1280)).numpy()
    assert np.array_equal(half[::2, ::2], expected)


def test_unequal_parts_of_several_processes_add_up():
    whole, *parts = DepthErrors(), DepthErrors(), DepthErrors()
    whole.update(*drawn())
    for part, images in zip(parts, (slice(1), slice(1, None)), strict=True):
        part.update(*(each[images] for each in drawn()))
    parts[0].merge_state(parts[1])  # as processes reduce their states
    torch.testing.assert_close(parts[0].compute(), whole.compute())
