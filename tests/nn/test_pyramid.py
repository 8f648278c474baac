"""The pyramid head, against UPerNet written as a list of convolutions."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from locat_lightning.nn.pyramid import PyramidDecoder, rescaling


def randomised(module):
    """The module in evaluation mode, with every norm doing something."""
    generator = torch.Generator().manual_seed(0)
    for each in module.modules():
        if isinstance(each, nn.BatchNorm2d):
            for values in (each.weight.data, each.bias.data, each.running_mean, each.running_var):
                values.copy_(torch.rand(values.shape, generator=generator) + 0.1)
    return module.eval()


def conv(block, features):
    """Convolution without bias, norm by the running statistics, ReLU."""
    convolution, norm, _ = block
    result = F.conv2d(features, convolution.weight, padding=convolution.kernel_size[0] // 2)
    shape = (1, -1, 1, 1)
    deviation = (norm.running_var + norm.eps).sqrt().view(shape)
    result = (result - norm.running_mean.view(shape)) / deviation
    return (result * norm.weight.view(shape) + norm.bias.view(shape)).relu()


def up(features, size):
    return F.interpolate(features, size, mode="bilinear", align_corners=False)


def upernet(head, levels):
    """Logits of four maps, the finest first: pyramid pooling, top-down path, fusion."""
    a, b, c, d = levels
    pooled = [d]
    for block, side in zip(head.pool, (1, 2, 3, 6), strict=True):
        pooled.append(up(conv(block, F.adaptive_avg_pool2d(d, side)), d.shape[2:]))
    d = conv(head.pooled, torch.cat(pooled, 1))
    c = conv(head.lateral[2], c) + up(d, c.shape[2:])
    b = conv(head.lateral[1], b) + up(c, b.shape[2:])
    a = conv(head.lateral[0], a) + up(b, a.shape[2:])
    out = [conv(head.smooth[0], a), conv(head.smooth[1], b), conv(head.smooth[2], c), d]
    fused = conv(head.fuse, torch.cat([up(each, a.shape[2:]) for each in out], 1))
    return F.conv2d(fused, head.classify.weight, head.classify.bias)


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize(("patch", "sides"), [(16, (20, 10, 5, 3)), (8, (10, 5, 3, 2)), (4, (5, 3, 2, 1))])
def test_it_is_upernet_on_levels_of_4_to_32_pixels(patch, sides, layers):
    torch.manual_seed(0)
    head = randomised(PyramidDecoder(8 * layers, 3, 6, layers=layers, patch=patch))
    features = torch.randn(2, 8 * layers, 5, 7)
    maps = features.chunk(layers, 1) * (4 // layers)
    with torch.no_grad():
        levels = [rescale(each) for rescale, each in zip(head.rescale, maps, strict=True)]
        found, expected = head(features), upernet(head, levels)
    assert tuple(level.shape[2] for level in levels) == sides
    assert found.shape == (2, 3, sides[0], levels[0].shape[3])
    torch.testing.assert_close(found, expected)
    assert found.std() > 1e-4


def test_upsampling_is_vitdets():
    quadrupled = rescaling(8, 2)
    kinds = [type(each) for each in quadrupled]
    assert kinds == [nn.ConvTranspose2d, nn.BatchNorm2d, nn.GELU, nn.ConvTranspose2d]
    assert quadrupled(torch.randn(2, 8, 3, 5)).shape == (2, 2, 12, 20)
    same = torch.randn(1, 8, 3, 5)
    assert torch.equal(rescaling(8, 0)(same), same)
    assert torch.equal(rescaling(8, -1)(same)[..., -1, -1], same[..., 2, 4])  # a part of a column counts


def test_every_weight_is_trained():
    head = PyramidDecoder(8, 3, 4)
    head(torch.randn(2, 8, 3, 3)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in head.parameters() if parameter.ndim > 1)


def test_other_numbers_of_layers():
    with pytest.raises(ValueError, match="1 or 4 layers, not of 2"):
        PyramidDecoder(16, 3, layers=2)
