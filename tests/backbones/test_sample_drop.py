"""Stochastic depth by images: a plain loop gives the same, and what it leaves out stays."""

import pytest
import timm
import torch

import locat_lightning  # noqa: F401 - registers the models
from locat_lightning.backbones.sample_drop import drop_samples

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "locatvit_tiny"])
@pytest.mark.parametrize(("images", "rate", "kept"), [(5, 0.4, 3), (1, 0.9, 1), (4, 0.0, 4)])
def test_a_block_adds_the_branch_of_some_images(name, images, rate, kept):
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL)
    x = torch.randn(images, 3, 32, 32)
    plain = model(x)
    state = model.state_dict()
    drop_samples(model, rate)
    assert list(model.state_dict()) == list(state)
    block, tokens = model.blocks[0], torch.randn(images, 17, 24)
    model(x)  # notes the grid

    torch.manual_seed(1)
    found = block(tokens)
    torch.manual_seed(1)
    expected = tokens.clone()
    for branch in (lambda t: block.attn(block.norm1(t)), lambda t: block.mlp(block.norm2(t))):
        chosen, before = torch.randperm(images)[:kept].tolist(), expected.clone()
        for place in chosen:
            expected[place] += images / kept * branch(before[place : place + 1])[0]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(model.eval()(x), plain)


def test_other_blocks_are_an_error():
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=32, embed_dim=24, num_classes=0)
    with pytest.raises(ValueError, match="has none of timm's blocks"):
        drop_samples(model, 0.3)
