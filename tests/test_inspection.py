"""What a model does on images: the numbers, and the model left as it was."""

import math
import random

import numpy as np
import pytest
import timm
import torch
from torch.nn import functional as F

from locat_lightning.backbones import registry  # noqa: F401 - names the models
from locat_lightning.inspection import (
    cls_attention,
    gaussian_kernels,
    kernel_widths,
    observe,
    pca_colours,
    shared_pca_colours,
)
from locat_lightning.nn import gaussian_kernel

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 10}


def vit(name="locatvit_tiny", **options):
    torch.manual_seed(0)
    model = timm.create_model(name, **(SMALL | options))
    for part, weight in model.named_parameters():
        if "gaug" in part or "qkv" in part:
            torch.nn.init.normal_(weight)
    return model


def rows_of_the_last_softmax(backbone, images):
    """softmax(q kᵀ / √d + S) [B, h, N, N] of the last block, and S of every block."""
    tokens = backbone.norm_pre(backbone._pos_embed(backbone.patch_embed(images)))
    kernels = []
    for block in backbone.blocks:
        attn, x = block.attn, block.norm1(tokens)
        q, k, _ = attn.qkv(x).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
        q, k = attn.q_norm(q), attn.k_norm(k)
        logits = q @ k.transpose(-1, -2) / math.sqrt(8)
        if hasattr(attn, "gaug"):
            P = backbone.num_prefix_tokens
            S = gaussian_kernel(attn.gaug(q, attn.grid.of(x.shape[1] - P), attn.grid.built_for))
            logits = logits + F.pad(S, (P, 0, P, 0))
            kernels.append(S)
        tokens = block(tokens)
    return logits.softmax(-1), kernels


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("locatvit_tiny", {}, (16, 16)),
        ("locatvit_tiny", {"reg_tokens": 2, "qk_norm": True}, (16, 16)),
        ("locatvit_tiny", {"dynamic_img_size": True}, (12, 20)),
        ("vit_tiny_patch16_224", {"qk_norm": True}, (16, 16)),
        ("vit_tiny_patch16_224", {"dynamic_img_size": True}, (12, 20)),
    ],
)
@torch.no_grad()
def test_values(name, options, size):
    backbone, images = vit(name, **options).eval(), torch.randn(2, 3, *size)
    grid = size[0] // 4, size[1] // 4
    attention, kernels = rows_of_the_last_softmax(backbone, images)

    found = cls_attention(backbone, images)
    assert found.shape == (2, 3, *grid)
    P = backbone.num_prefix_tokens
    torch.testing.assert_close(found.flatten(-2), attention[:, :, 0, P:])
    torch.testing.assert_close(found.sum((-2, -1)), 1 - attention[:, :, 0, :P].sum(-1))

    drawn = gaussian_kernels(backbone, images)
    assert len(drawn) == (3 if name == "locatvit_tiny" else 0)
    for ours, S in zip(drawn, kernels, strict=True):
        assert ours.shape == (2, math.prod(grid), *grid)
        torch.testing.assert_close(ours.flatten(-2), S.mean(1))


def test_a_model_without_cls_or_attention():
    images = torch.randn(1, 3, 16, 16)
    registers = vit(class_token=False, reg_tokens=2, global_pool="avg", prr=False)
    assert cls_attention(registers, images) is None
    assert gaussian_kernels(registers, images)[0].shape == (1, 16, 4, 4)
    for cnn in ("resnet10t", "efficientnet_lite0"):
        backbone = timm.create_model(cnn, num_classes=2)
        assert gaussian_kernels(backbone, images) == []
        assert cls_attention(backbone, images) is None


def test_means_over_images_heads_patches_and_directions():
    backbone, images = vit(depth=2), torch.randn(3, 3, 16, 16)
    found = kernel_widths(backbone, images)
    tokens = backbone._pos_embed(backbone.patch_embed(images))
    for block, (variance, alpha) in zip(backbone.blocks, found, strict=True):
        attn = block.attn
        q = attn.qkv(block.norm1(tokens))[:, 1:, :24].unflatten(-1, (3, 8))
        z, a = attn.gaug.log_var(q), attn.gaug.log_alpha(q)
        assert variance == pytest.approx((16 * torch.sigmoid(z - torch.tensor(15.0).log())).mean().item())
        assert alpha == pytest.approx(F.softplus(a).mean().item())
        tokens = block(tokens)


def test_images_are_padded_to_whole_patches():
    backbone = vit(depth=2, dynamic_img_size=True)
    images = torch.randn(2, 3, 13, 18)
    assert kernel_widths(backbone, images) == kernel_widths(backbone, F.pad(images, (0, 2, 0, 3)))
    assert gaussian_kernels(backbone, images)[0].shape == (2, 4 * 5, 4, 5)


def test_a_model_without_gaug_has_none():
    assert kernel_widths(vit(depth=2, gaug=False), torch.zeros(1, 3, 16, 16)) == []
    assert kernel_widths(timm.create_model("resnet10t"), torch.zeros(1, 3, 16, 16)) == []


def test_observing_leaves_nothing_behind():
    backbone = vit(depth=2, drop_path_rate=0.5).train()
    backbone.blocks[0].eval()
    flags = [module.training for module in backbone.modules()]
    hooks = [list(module._forward_hooks) for module in backbone.modules()]
    [block, whole] = observe(backbone, torch.randn(2, 3, 16, 16), [backbone.blocks[1], backbone])[:2]
    assert [module.training for module in backbone.modules()] == flags
    assert [list(module._forward_hooks) for module in backbone.modules()] == hooks
    assert block.inputs[0].shape == block.output.shape == (2, 17, 24)
    assert not whole.output.requires_grad
    with pytest.raises(AssertionError):
        observe(backbone, torch.randn(2, 3, 7, 7), [backbone])
    assert [list(module._forward_hooks) for module in backbone.modules()] == hooks


def test_a_compiled_model_is_observed_too():
    backbone, images = vit(depth=1), torch.randn(2, 3, 16, 16)
    expected = kernel_widths(backbone, images)
    compiled = torch.compile(backbone, backend="eager")
    with torch.no_grad():
        compiled.eval()(images)
    assert kernel_widths(compiled, images) == expected


def test_the_principal_components_are_red_green_and_blue():
    # Three orthogonal directions, of falling strength, of patterns that are uncorrelated and lopsided.
    generator = torch.Generator().manual_seed(0)
    patterns = torch.linalg.qr(torch.rand(2 * 6 * 5, 4, generator=generator).log()).Q[:, 1:]
    patterns = torch.linalg.qr(patterns - patterns.mean(0)).Q
    patterns = torch.where(patterns.pow(3).sum(0) < 0, -patterns, patterns)
    axes = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q[:3]
    points = (patterns * torch.tensor([9.0, 3.0, 1.0])) @ axes + torch.randn(8, generator=generator)
    features = points.view(2, 6, 5, 8).movedim(-1, 1)
    colours = pca_colours(features)
    assert colours.shape == (2, 3, 6, 5)
    low, high = patterns.quantile(0.01, dim=0), patterns.quantile(0.99, dim=0)
    expected = ((patterns - low) / (high - low)).clamp(0, 1).view(2, 6, 5, 3).movedim(-1, 1)
    torch.testing.assert_close(colours, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(pca_colours(100 * features), colours, atol=1e-4, rtol=0)
    torch.testing.assert_close(pca_colours(features.flip(1)), colours, atol=1e-4, rtol=0)
    torch.testing.assert_close(pca_colours(-features), colours, atol=1e-4, rtol=0)


def test_one_wild_patch_does_not_take_the_colours_of_the_others():
    features = torch.rand(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    features[:, 0] *= 5
    features[0, 0, 3, 3] = 50
    colours = pca_colours(features)
    assert colours[0, 0, 3, 3] == 1
    assert colours[:, 0].std() > 0.2


@pytest.mark.parametrize("value", [0.0, 0.3, 1e6, math.nan, math.inf])
def test_features_without_variation_are_grey(value):
    features = torch.full((2, 64, 7, 7), value) * torch.linspace(0.1, 1, 64).view(64, 1, 1)
    assert (pca_colours(features) == 0.5).all()


def test_fewer_than_three_components():
    assert (pca_colours(torch.rand(1, 2, 4, 4))[:, 2] == 0.5).all()
    assert (pca_colours(torch.rand(1, 8, 1, 1)) == 0.5).all()
    assert pca_colours(torch.rand(1, 8, 1, 2)).unique().numel() == 3  # one component: low, high, and grey


def test_training_goes_on_as_before():
    backbone = vit(drop_path_rate=0.5)
    backbone.blocks[1].eval()
    flags = [module.training for module in backbone.modules()]
    hooks = [list(module._forward_hooks) for module in backbone.modules()]
    numbers = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    kernels, attention = gaussian_kernels(backbone, images), cls_attention(backbone, images)
    assert not any(found.requires_grad for found in (*kernels, attention))
    assert [module.training for module in backbone.modules()] == flags
    assert [list(module._forward_hooks) for module in backbone.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), numbers[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == numbers[1:]  # noqa: NPY002


def test_components_share_a_basis_across_images_of_any_size():
    """Against an eigen-decomposition of the covariance of all patches."""
    torch.manual_seed(0)
    scale = torch.tensor([5.0, 3, 2, 0.1])[:, None, None]
    maps = [scale * torch.randn(4, 6, 5), 1 + scale * torch.randn(4, 3, 8)]
    patches = np.concatenate([each.flatten(1).T.numpy() for each in maps]).astype(np.float64)
    centred = patches - patches.mean(0)
    _, vectors = np.linalg.eigh(centred.T @ centred)
    components = centred @ vectors[:, ::-1][:, :3]
    components *= np.where((components**3).sum(0) < 0, -1, 1)
    low, high = np.quantile(components, [0.01, 0.99], axis=0)
    expected = ((components - low) / (high - low)).clip(0, 1)
    found = shared_pca_colours(maps)
    assert [each.shape for each in found] == [(3, 6, 5), (3, 3, 8)]
    colours = torch.cat([each.flatten(1).T for each in found])
    np.testing.assert_allclose(colours, expected, atol=1e-4)


def test_components_of_the_foreground_alone():
    torch.manual_seed(0)
    mask = torch.zeros(6, 8, dtype=torch.bool)
    mask[1:5, 2:6] = True
    features = torch.randn(5, 6, 8)
    features[0] = 40.0 * mask
    for each in (features, -features):  # whatever the sign of the first component
        (colours,) = shared_pca_colours([each], foreground=True)
        assert torch.equal(colours.any(0) | ~mask, torch.ones_like(mask))
        assert not colours[:, ~mask].any()
        alone = shared_pca_colours([each[:, mask][..., None]])[0][..., 0]
        torch.testing.assert_close(colours[:, mask], alone)


def test_kernels_of_some_blocks():
    backbone, images = vit().eval(), torch.randn(1, 3, 16, 16)
    every, some = gaussian_kernels(backbone, images), gaussian_kernels(backbone, images, [0, 2])
    assert all(torch.equal(a, b) for a, b in zip(some, (every[0], every[2]), strict=True))
    assert gaussian_kernels(backbone, images, []) == []
