"""Effective rank: known spectra, and what it must not see."""

import math

import pytest
import torch
from torch.nn import functional as F

from locat_lightning.evaluation.rank import effective_rank, outlying_share, patch_signs


def normal(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def by_hand(features):
    """In float64, one step at a time."""
    x = features.double()
    x = torch.stack([row / row.norm() for row in x])
    x = x - x.mean(0)
    values = torch.linalg.eigvalsh(x @ x.T).clamp_min(0).sqrt()
    shares = [value / values.sum() for value in values if value > 1e-6]
    return math.exp(-sum(p * p.log() for p in shares))


@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_k_directions_of_equal_strength(k):
    axes = torch.linalg.qr(normal(8, 8)).Q[:k]
    features = torch.cat([axes, -axes, axes, -axes])
    assert effective_rank(features).item() == pytest.approx(k, rel=1e-4)


@pytest.mark.parametrize("shape", [(40, 6), (6, 40), (16, 16), (2, 3)])
def test_formula(shape):
    features = normal(*shape) * torch.arange(1, shape[1] + 1) + 3
    rank = effective_rank(features)
    assert (rank.shape, rank.dtype) == ((), torch.float32)
    assert rank.item() == pytest.approx(by_hand(features), rel=1e-4)
    assert 1 <= rank.item() <= min(shape[0] - 1, shape[1]) + 1e-4


@pytest.mark.parametrize("shape", [(1, 5), (3, 200), (5000, 4), (5000, 65)])
def test_constant_features_have_rank_one(shape):
    features = normal(shape[1]).expand(shape) * 100
    assert effective_rank(features).item() == pytest.approx(1, abs=1e-6)
    assert effective_rank(torch.zeros(shape)).item() == 1


def test_the_length_of_a_feature_and_a_rotation_do_not_matter_but_a_weak_variation_does():
    features = normal(50, 12)
    rank = effective_rank(features)
    torch.testing.assert_close(effective_rank(features * torch.linspace(0.1, 9, 50)[:, None]), rank)
    torch.testing.assert_close(effective_rank(features @ torch.linalg.qr(normal(12, 12)).Q), rank)
    almost_constant = effective_rank(torch.ones(12) + 1e-3 * features)
    assert almost_constant > 8


def test_autocast_does_not_lower_the_precision():
    features = normal(64, 32)
    with torch.autocast("cpu", torch.bfloat16):
        rank = effective_rank(features)
        assert effective_rank(features.bfloat16()).dtype == torch.float32
    assert torch.equal(rank, effective_rank(features))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite(value):
    features = normal(4, 3)
    features[2, 1] = value
    assert effective_rank(features).isnan()


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (0, 3), (3, 0)])
def test_other_shapes(shape):
    with pytest.raises(ValueError, match=r"features must be \[N, D\]"):
        effective_rank(torch.zeros(shape))


def test_signs_of_patches_are_those_of_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    features, patches = (torch.randn(*shape, 6, generator=generator) for shape in ((3,), (3, 5)))
    signs = patch_signs(features, patches)
    alike, to_image = [], []
    for image, own in zip(features, patches, strict=True):
        pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
        alike += [F.cosine_similarity(own[i], own[j], dim=0) for i, j in pairs]
        to_image += [F.cosine_similarity(image, patch, dim=0) for patch in own]
    torch.testing.assert_close(signs["patch_cosine"], torch.stack(alike).mean())
    torch.testing.assert_close(signs["patch_cls_cosine"], torch.stack(to_image).mean())
    torch.testing.assert_close(signs["patch_rank"], effective_rank(patches.flatten(0, 1)))


def test_patches_that_have_collapsed_are_alike():
    patches = torch.randn(4, 1, 6, generator=torch.Generator().manual_seed(0)).expand(4, 9, 6)
    signs = patch_signs(patches[:, 0], patches)
    assert signs["patch_cosine"].item() == pytest.approx(1)
    assert signs["patch_cls_cosine"].item() == pytest.approx(1)
    assert signs["patch_rank"].item() <= 3.01


def test_many_patches_are_thinned_out_and_other_widths_have_no_cosine_with_the_image():
    patches = torch.randn(30, 200, 4, generator=torch.Generator().manual_seed(0))
    signs = patch_signs(torch.randn(30, 8), patches)
    assert "patch_cls_cosine" not in signs
    assert signs["patch_rank"].item() == pytest.approx(4, abs=0.1)


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_outlying_patches_are_those_of_more_than_three_times_the_median_norm(scale):
    norms = torch.tensor([[1.0, 1.1, 0.9, 2.9], [1.0, 3.2, 1.0, 40.0]]) * scale  # their median is 1
    directions = F.normalize(torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0)), dim=-1)
    assert outlying_share(norms.unsqueeze(-1) * directions).item() == 2 / 8
