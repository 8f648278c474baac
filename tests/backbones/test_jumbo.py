"""Jumbo beside its definition; its tensors are compared with the authors' in test_parity.py."""

import math

import pytest
import timm
import torch
from torch.testing import assert_close

import locat_lightning.backbones.registry  # noqa: F401 (registers the models)

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 10}


def build(name="jumbo_tiny", **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, **(SMALL | kwargs)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model, torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize("J", [1, 3, 6])
def test_the_class_tokens_are_one_vector(J):
    model, images = build(jumbo_multiplier=J)
    tokens = model.forward_features(images)
    assert tokens.shape == (2, J + 16, 24)
    assert model.head_hidden_size == model.head.in_features == J * 24
    pooled = model.forward_head(tokens, pre_logits=True)
    assert torch.equal(pooled, tokens[:, :J].flatten(1))
    assert_close(model(images), model.head(pooled))


def test_a_block_by_hand():
    model, _ = build(jumbo_multiplier=2)
    block, x = model.blocks[0], torch.randn(2, 2 + 16, 24)
    after = x + block.ls1(block.attn(block.norm1(x)))
    patches = after[:, 2:] + block.ls2(block.mlp(block.norm2(after[:, 2:])))
    jumbo = torch.cat([after[:, 0], after[:, 1]], dim=-1)
    jumbo = jumbo + block.ls3(block.jumbo_mlp(block.norm3(jumbo)))
    expected = torch.cat([jumbo[:, None, :24], jumbo[:, None, 24:], patches], dim=1)
    assert_close(block(x), expected)


def test_all_blocks_share_one_mlp_of_the_class_tokens():
    model, _ = build()
    assert all(block.jumbo_mlp is model.jumbo_mlp for block in model.blocks)
    assert sum(p is model.jumbo_mlp.fc1.weight for p in model.parameters()) == 1


def test_the_head_begins_with_equal_chances():
    model = timm.create_model("locatjumbo_tiny", **SMALL | {"num_classes": 4})
    logits = model(torch.randn(2, 3, 32, 32))
    assert_close(logits, torch.full((2, 4), -math.log(4)))
    model.reset_classifier(7)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 7)
    model.reset_classifier(0)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 6 * 24)


def test_patches_are_normed_with_locat_alone():
    plain, images = build("jumbo_tiny")
    located, _ = build("locatjumbo_tiny")
    assert "norm_patches.weight" in located.state_dict()
    assert "norm_patches.weight" not in plain.state_dict()
    with torch.no_grad():
        located.norm_patches.weight.fill_(1.0)
        located.norm_patches.bias.zero_()
    assert_close(located.forward_features(images)[:, 6:].mean(-1), torch.zeros(2, 16), rtol=0, atol=1e-5)
    [patches] = located.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)
    assert_close(patches.flatten(2).mT, located.forward_features(images)[:, 6:])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"jumbo_multiplier": 0}, "jumbo_multiplier must be at least 1"),
        ({"global_pool": "avg"}, "global_pool must be 'token'"),
        ({"reg_tokens": 4}, "no registers"),
    ],
    ids=str,
)
def test_wrong_arguments_are_errors(wrong, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("jumbo_tiny", **SMALL | wrong)
