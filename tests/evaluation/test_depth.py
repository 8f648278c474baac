"""Errors of depths against their definitions written as loops."""

import math

import numpy as np
import pytest
import torch

from locat_lightning.evaluation.depth import NAMES, depth_errors, eigen_crop


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


def test_errors_are_those_of_each_image():
    given = drawn()
    found = depth_errors(*given)
    assert tuple(found) == NAMES
    for image in (0, 1, 3):
        expected = reference(*(each[image] for each in given))
        assert {name: values[image].item() for name, values in found.items()} == pytest.approx(
            expected, rel=1e-5
        )
    assert all(values[2].isnan() for values in found.values())


def test_eigens_crop():
    expected = np.zeros((480, 640), bool)
    expected[45:471, 41:601] = True
    assert np.array_equal(eigen_crop(torch.zeros(1, 480, 640)), expected)
    half = eigen_crop(torch.zeros(1, 960, 1280)).numpy()
    assert np.array_equal(half[::2, ::2], expected)
