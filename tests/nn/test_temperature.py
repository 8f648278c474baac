"""Temperature of attention against the equation, in timm's layers and in ours."""

import pytest
import timm
import torch
from timm.layers import Attention
from torch.nn import functional as F

from locat_lightning.backbones.locate import add_locat
from locat_lightning.errors import InputError
from locat_lightning.nn.gaussian import gaussian_kernel
from locat_lightning.nn.temperature import attention_temperature

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


def vit(name="vit_tiny_patch16_224", **options):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **SIZES | options).eval()


def plain_attention(layer, x, temperature):
    """softmax((q kᵀ / √d + S) / T) v by the layer's own weights."""
    q, k, v = layer.qkv(x).unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = layer.q_norm(q), layer.k_norm(k)
    logits = q @ k.mT / q.shape[-1] ** 0.5
    if hasattr(layer, "gaug"):
        s = gaussian_kernel(layer.gaug(q, (4, 4), (4, 4)))
        logits = logits + F.pad(s, (1, 0, 1, 0))
    return layer.proj(((logits / temperature).softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "locatvit_tiny"])
@pytest.mark.parametrize("temperature", [0.5, 3.0])
@torch.no_grad()
def test_logits_are_divided_by_it(name, options, temperature):
    model = vit(name, **options)
    layer, x = model.blocks[1].attn, torch.randn(3, 17, 24)
    layer.qkv.weight.mul_(10)  # or all attend to all
    expected = plain_attention(layer, x, temperature)
    before = layer(x)
    with attention_temperature(model, temperature):
        found = layer(x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(before, expected, atol=1e-4)
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("name", ["vit_small_patch16_rope_224", "eva02_tiny_patch14_224"])
@pytest.mark.parametrize("locat", [False, True])
@torch.no_grad()
def test_other_layers_of_timm(name, locat, monkeypatch):
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 2, "num_classes": 5}
    model = timm.create_model(name, **options).eval()
    if locat:
        add_locat(model)
    images, seen = torch.randn(1, 3, 32, 32), []

    def attention(q, k, v, attn_mask=None, dropout_p=0.0, **_):
        logits = q @ k.mT / q.shape[-1] ** 0.5
        seen.append(logits if attn_mask is None else logits + attn_mask)
        return seen[-1].softmax(-1) @ v

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    for temperature in (2.0, 4.0):
        with attention_temperature(model, temperature):
            model(images)
    assert len(seen) in (2, 4)  # the block's, and with LocAt that of PRR, which has no temperature
    torch.testing.assert_close(seen[0], 2 * seen[len(seen) // 2])


def test_one_is_the_model_as_it_is_and_an_error_leaves_nothing():
    model = vit("locatvit_tiny")

    def hooks():
        return sum(len(each._forward_hooks) for each in model.modules())

    before = hooks()
    with attention_temperature(model, 1):
        assert hooks() == before
    with pytest.raises(KeyError), attention_temperature(model, 2):
        raise KeyError(hooks() - before)
    assert hooks() == before


@pytest.mark.parametrize(
    ("name", "temperature", "message"),
    [
        ("resnet18", 2.0, "ResNet has no attention whose temperature can be set"),
        ("swin_tiny_patch4_window7_224", 2.0, "SwinTransformer has no attention"),
        ("vit_tiny_patch16_224", 0.0, "attention temperature 0 must be above 0"),
    ],
)
def test_what_has_none_is_an_error(name, temperature, message):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(InputError, match=message), attention_temperature(model, temperature):
        pass
    assert not any(isinstance(each, Attention) and each._forward_hooks for each in model.modules())
