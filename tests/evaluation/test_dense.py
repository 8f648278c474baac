"""Patch features: the last block's tokens as they are, of images of any size."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from locat_lightning.errors import InputError
from locat_lightning.evaluation.dense import feature_width, padded_size, patch_features

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


def build(name="locatvit_tiny", **arguments):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model(name, num_classes=0, **arguments).eval()


def images(*size, batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("prr", [True, False])
@pytest.mark.parametrize("reg_tokens", [0, 4])
def test_what_leaves_the_last_block(prr, reg_tokens):
    model = build(**SMALL, reg_tokens=reg_tokens, prr=prr)
    tokens = []
    model.blocks[-1].register_forward_hook(lambda *call: tokens.append(call[-1]))
    model(images(32, 32))
    expected = tokens[0][:, 1 + reg_tokens :].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    assert torch.equal(patch_features(model, images(32, 32)), expected)


@pytest.mark.parametrize(("layers", "blocks"), [(1, [2]), (2, [1, 2]), (3, [0, 1, 2]), ([0, 2], [0, 2])])
@pytest.mark.parametrize("norm", [False, True])
def test_the_features_of_several_blocks_and_behind_the_norm(layers, blocks, norm):
    model = build(**SMALL | {"depth": 3})
    tokens = {}
    for number, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *call, number=number: tokens.update({number: call[-1]}))
    torch.nn.init.normal_(model.norm.bias)
    model(images(32, 32))
    parts = [model.norm(tokens[number]) if norm else tokens[number] for number in blocks]
    expected = torch.cat(parts, 2)[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    assert torch.equal(patch_features(model, images(32, 32), layers=layers, norm=norm), expected)
    assert feature_width(model, layers) == expected.shape[1]


@pytest.mark.parametrize("size", [(32, 48), (48, 32), (29, 50), (1, 8)])
def test_images_of_any_size_are_padded_at_right_and_bottom(size):
    model = build(**SMALL, dynamic_img_size=True)
    features = patch_features(model, images(*size))
    height, width = (-(-side // 8) * 8 for side in size)
    assert padded_size(model, size) == (height, width)
    assert features.shape == (2, 24, height // 8, width // 8)
    whole = F.pad(images(*size), (0, width - size[1], 0, height - size[0]))
    assert torch.equal(features, patch_features(model, whole))


@pytest.mark.parametrize(
    ("name", "arguments", "stride"),
    [
        ("vit_tiny_patch16_224", {"dynamic_img_size": True}, 16),
        ("vit_small_patch16_dinov3", {"depth": 2}, 16),
        ("eva02_tiny_patch14_224", {"dynamic_img_size": True, "depth": 2}, 14),
        ("swin_tiny_patch4_window7_224", {"strict_img_size": False, "embed_dim": 12}, 32),
        ("resnet18", {}, 32),
    ],
)
def test_any_timm_model(name, arguments, stride):
    model = build(name, **arguments)
    height, width = padded_size(model, (75, 100))
    features = patch_features(model, images(75, 100))
    assert (height % stride, width % stride) == (0, 0)
    assert features.shape == (2, model.num_features, height // stride, width // stride)


def test_autocast_leaves_no_inference_tensor_to_the_training():
    model = build(**SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.inference_mode():
            mixed = patch_features(model, images(32, 32), autocast_dtype=torch.bfloat16)
            exact = patch_features(model, images(32, 32))
        model(images(32, 32)).sum().backward()
    assert mixed.dtype == exact.dtype == torch.float32
    assert not torch.equal(mixed, exact)
    torch.testing.assert_close(exact, patch_features(model, images(32, 32)))


def test_they_can_be_trained_on():
    model = build(**SMALL)
    patch_features(model, images(32, 32)).sum().backward()
    assert model.patch_embed.proj.weight.grad is not None
    assert model.norm.weight.grad is None


def test_mistakes():
    with pytest.raises(InputError, match=r"32 × 32 pixels and is given 40 × 32: .* dynamic_img_size=True"):
        patch_features(build(**SMALL), images(33, 32))
    patch_features(build(**SMALL), images(30, 27))
    with pytest.raises(InputError, match="Conv2d has no patch features"):
        patch_features(nn.Conv2d(3, 3, 1), images(32, 32))
    with pytest.raises(InputError, match="Conv2d has no feature_info"):
        feature_width(nn.Conv2d(3, 3, 1))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (3, "layers is 3, but .* has 1 to 2"),
        ([0, 2], r"layers is \[0, 2\], but .* has indices from 0 to 1"),
        ([-1], "has indices from 0 to 1, each once"),
        ([1, 1], r"layers is \[1, 1\], but"),
        ([], r"layers is \[\], but"),
    ],
)
def test_layers_that_there_are_not(layers, message):
    with pytest.raises(InputError, match=message):
        patch_features(build(**SMALL), images(32, 32), layers=layers)


def test_maps_of_several_sizes_are_not_concatenated():
    model = build("resnet10t")
    with pytest.raises(InputError, match="layers 2: maps of ResNet differ in size: take the last one alone"):
        patch_features(model, images(64, 64), layers=2)
    assert patch_features(model, images(64, 64), norm=True).shape == (2, 512, 2, 2)
