"""The head of depth and its losses against plain expressions."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from locat_lightning.nn.depth import DepthDecoder, gradient_loss, scale_invariant_loss


def test_the_head_is_that_of_the_protocol():
    """Features are upsampled by 4, then mapped to 256 bins from 0.001 to 10 m."""
    torch.manual_seed(0)
    head, features = DepthDecoder(6), torch.randn(2, 6, 3, 4)
    with torch.no_grad():
        head.conv.weight.mul_(5)
    upsampled = F.interpolate(features, scale_factor=4, mode="bilinear")
    weights = head.conv(upsampled).relu() + 0.1
    weights = weights / weights.sum(1, keepdim=True)
    bins = torch.from_numpy(np.linspace(1e-3, 10, 256)).float()
    expected = (weights * bins[None, :, None, None]).sum(1)
    torch.testing.assert_close(head(features), expected, atol=1e-5, rtol=1e-5)
    assert expected.shape == (2, 12, 16)
    assert list(head.state_dict()) == ["conv.weight", "conv.bias"]


@pytest.mark.parametrize("mixed", [True, False])
def test_depths_are_not_rounded_to_bfloat16(mixed):
    """Weights of bins are: then each of 256 bins alone is predicted as exactly as in float32."""
    head = DepthDecoder(256)
    with torch.no_grad():
        head.conv.bias.zero_()
        head.conv.weight.copy_(4096 * torch.eye(256)[..., None, None])
    features = torch.eye(256)[..., None, None]  # the image i wants the bin i
    expected = head(features)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        found = head(features) if mixed else head.bfloat16()(features.bfloat16())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert expected[:, 0, 0].diff().min() > 0.03  # bins are 39 mm apart, 31 or 63 mm in bfloat16


def test_depths_are_float32_whatever_the_default(monkeypatch):
    """Lightning's bf16-true makes it bfloat16."""
    head, features = DepthDecoder(6).bfloat16(), torch.randn(1, 6, 2, 2).bfloat16()
    expected = head(features)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = head(features)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


def depths(seed=0, size=(2, 13, 17)):
    rng = np.random.default_rng(seed)
    predicted, true = rng.uniform(0.1, 10, (2, *size))
    true[rng.random(size) < 0.2] = 0
    true[0, 3, 4] = 12  # beyond what counts
    return torch.from_numpy(predicted).requires_grad_(), torch.from_numpy(true)


@pytest.mark.parametrize("with_variance", [True, False])
def test_the_scale_invariant_loss(with_variance):
    predicted, true = depths()
    g = [
        np.log((p + 1e-3) / (t + 1e-3))
        for p, t in zip(predicted.detach().flatten().tolist(), true.flatten().tolist(), strict=True)
        if 0 < t <= 10
    ]
    expected = np.sqrt((np.var(g, ddof=1) if with_variance else 0) + 0.15 * np.mean(g) ** 2)
    loss = scale_invariant_loss(predicted, true, with_variance=with_variance)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert predicted.grad.isfinite().all()
    assert (predicted.grad[true == 0] == 0).all()
    assert (predicted.grad[true > 0] != 0).sum() > 100


def test_the_loss_of_gradients():
    predicted, true = depths()
    expected = 0.0
    for stride in (1, 2, 4, 6):
        p, t = (each.detach().numpy()[:, ::stride, ::stride] for each in (predicted, true))
        valid = (t > 0) & (t <= 10)
        g = np.log(p + 1e-3) - np.log(t + 1e-3)
        for b, y, x in np.ndindex(g.shape):
            for v, u in ((y + 2, x), (y, x + 2)):
                if v < g.shape[1] and u < g.shape[2] and valid[b, y, x] and valid[b, v, u]:
                    expected += abs(g[b, y, x] - g[b, v, u]) / valid.sum()
    assert gradient_loss(predicted, true).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("true", [torch.zeros(1, 9, 9), torch.full((1, 9, 9), 20.0)])
@pytest.mark.parametrize("loss", [scale_invariant_loss, gradient_loss])
def test_images_without_depths_teach_nothing(loss, true):
    predicted = torch.ones(1, 9, 9, requires_grad=True)
    loss(predicted, true).backward()
    assert loss(predicted, true) < 1e-5
    assert (predicted.grad == 0).all()


def test_a_perfect_prediction_has_finite_gradients():
    predicted = torch.full((1, 9, 9), 2.0, requires_grad=True)
    for options in ({}, {"with_variance": False}):
        scale_invariant_loss(predicted, torch.full((1, 9, 9), 2.0), **options).backward()
    assert predicted.grad.isfinite().all()
