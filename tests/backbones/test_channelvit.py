"""ChannelViT against a plain reference, its subsets of channels, their sampling, and GAug on each grid."""

from collections import Counter
from itertools import product

import pytest
import timm
import torch
from torch.testing import assert_close

import locat_lightning  # noqa: F401 - registers the models
from locat_lightning.backbones.channels import channels_of, take_channels
from locat_lightning.backbones.channelvit import ChannelPatchEmbed, sample_channels
from locat_lightning.backbones.create import create_backbone, load_backbone
from locat_lightning.backbones.weights import load_weights
from locat_lightning.data.bands import Channels
from locat_lightning.errors import InputError
from locat_lightning.inspection import cls_attention, gaussian_kernels
from locat_lightning.nn import gaussian_kernel
from locat_lightning.nn.layers import GaussianAttention

C = 5
SMALL = {"img_size": 24, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 4}


def build(name="channelvit_tiny", **options):
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL, in_chans=C, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def images(channels=C, height=24, width=24):
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(1))


def embedded(model, x, channels):
    """The tokens of images by loops over channels and places, for the grid that the model was built for."""
    prefix, embed = model.num_prefix_tokens, model.patch_embed
    tokens = [(model.cls_token[0, 0] + model.pos_embed[0, 0]).expand(len(x), -1)]
    for own, channel in enumerate(channels):
        for row, column in product(range(3), repeat=2):
            patch = x[:, own, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            token = patch.flatten(1) @ embed.proj.weight.flatten(1).T + embed.proj.bias
            place = model.pos_embed[0, prefix + 3 * row + column]
            tokens.append(token + embed.channel_embed[channel] + place)
    return torch.stack(tokens, 1)


@torch.no_grad()
def test_it_is_a_vision_transformer_over_the_patches_of_each_channel():
    model, x = build(), images()
    tokens = model.norm(model.blocks(embedded(model, x, range(C))))
    assert_close(model(x), model.head(tokens[:, 0]))
    final, [maps] = model.forward_intermediates(x, indices=1, norm=True)
    assert_close(final, tokens)
    expected = torch.stack([tokens[:, 1 + 9 * c : 10 + 9 * c] for c in range(C)]).mean(0)
    assert_close(maps, expected.mT.unflatten(-1, (3, 3)))


@torch.no_grad()
@pytest.mark.parametrize("name", ["channelvit_tiny", "locatchannelvit_tiny"])
def test_a_subset_in_any_order_is_the_model_that_is_given_only_these(name):
    model, x, taken = build(name), images(), (3, 0)
    take_channels(model, Channels(C, taken))
    assert channels_of(model) == 2
    found = model(x[:, taken])
    few = timm.create_model(name, **SMALL, in_chans=2).eval()
    state = model.state_dict()
    few.load_state_dict(state | {"patch_embed.channel_embed": state["patch_embed.channel_embed"][[*taken]]})
    assert_close(found, few(x[:, taken]))
    take_channels(model, Channels(C, (0, 3)))
    assert_close(found, model(x[:, [0, 3]]))  # channels have embeddings, no order
    with pytest.raises(ValueError, match="5 channels, not 2"):
        model(x)


def test_sampling_draws_a_number_evenly_and_then_channels_evenly():
    torch.manual_seed(0)
    drawn = [tuple(sample_channels(4).tolist()) for _ in range(4000)]
    sizes = Counter(map(len, drawn))
    assert all(900 < sizes[m] < 1100 for m in range(1, 5))
    pairs = Counter(each for each in drawn if len(each) == 2)
    assert set(pairs) == {(a, b) for a, b in product(range(4), repeat=2) if a < b}
    assert min(pairs.values()) > 110


def test_training_sees_subsets_and_evaluation_all():
    model, x = build(), images()
    seen = set()
    model.train()
    for _ in range(30):
        seen.add(model.forward_features(x).shape[1] - 1)
    assert seen == {9 * m for m in range(1, C + 1)}
    model(x).sum().backward()
    assert model.eval().forward_features(x).shape[1] == 1 + 9 * C
    whole = build(channel_sampling=False).train()
    assert {whole.forward_features(x).shape[1] for _ in range(5)} == {1 + 9 * C}
    assert "patch_embed.channel_embed" in model.no_weight_decay()


@torch.no_grad()
def test_the_gaussians_of_a_patch_are_about_its_place_on_every_channels_grid():
    model, seen = build("locatchannelvit_tiny", dynamic_img_size=True), []
    layer = model.blocks[0].attn
    assert isinstance(layer, GaussianAttention)
    layer.gaug.register_forward_hook(lambda module, inputs, found: seen.append(found))
    height, width = 3, 4
    model(images(C, 8 * height, 8 * width))
    s, gaussians = gaussian_kernel(seen[0]), seen[0].compute()
    places = list(product(range(height), range(width))) * C
    prefix = gaussians.alpha.shape[-1] - len(places)
    for query, key in ((0, 0), (5, 5 + 12), (17, 2), (40, 59), (59, 13)):
        (i, j), (k, m) = places[query], places[key]
        slope = gaussians.slope[..., prefix + query]  # -1/2 / (σ² + ε), vertical and horizontal
        expected = (
            gaussians.alpha[..., prefix + query]
            * (slope[0] * min((i - k) ** 2, gaussians.cap) + slope[1] * min((j - m) ** 2, gaussians.cap))
            .clamp_min(-23)
            .exp()
        )
        assert_close(s[..., query, key], expected)
    assert_close(s, s[..., :12].repeat(1, 1, 1, C))  # tiled over the channels of the keys


@torch.no_grad()
def test_pictures_have_one_grid():
    model, x = build("locatchannelvit_tiny", dynamic_img_size=True), images(C, 24, 32)
    assert [each.shape for each in gaussian_kernels(model, x)] == [(2, 12, 3, 4)] * 2
    attention = cls_attention(model, x)
    assert attention.shape == (2, 2, 3, 4)
    assert (attention.sum((-1, -2)) < 1).all()


@torch.no_grad()
def test_rgb_weights_are_adapted_as_timm_does(tmp_path):
    torch.manual_seed(0)
    rgb = timm.create_model("vit_tiny_patch16_224", **SMALL).eval()
    torch.save(rgb.state_dict(), file := tmp_path / "rgb.pth")
    weight = rgb.patch_embed.proj.weight
    plain = load_backbone(str(file), "vit_tiny_patch16_224", SMALL, channels=Channels(8, (0, 2, 3, 5, 6)))
    expected = weight.repeat(1, 2, 1, 1)[:, :5] * 3 / 5
    assert_close(plain.patch_embed.proj.weight, expected)
    by_channel = create_backbone("channelvit_tiny", SMALL | {"in_chans": 8}, 4)
    own = by_channel.patch_embed.channel_embed.clone()
    load_weights(by_channel, str(file), warm_start=True)
    assert_close(by_channel.patch_embed.proj.weight, weight.sum(1, keepdim=True))
    assert_close(by_channel.patch_embed.channel_embed, own)
    assert_close(by_channel.blocks[1].mlp.fc1.weight, rgb.blocks[1].mlp.fc1.weight)


def test_another_number_of_channels_is_said_in_a_line(tmp_path):
    model = create_backbone("vit_tiny_patch16_224", SMALL | {"in_chans": 4}, 4)
    with pytest.raises(InputError, match="takes 4 channels, but the images have 3"):
        take_channels(model, None)
    torch.save({"arch": "vit_tiny_patch16_224", "state_dict": model.state_dict()}, tmp_path / "a.pth")
    own = SMALL | {"in_chans": 4}
    with pytest.raises(InputError, match="vit_tiny_patch16_224 takes 4 channels, but the images have 2"):
        load_backbone(str(tmp_path / "a.pth"), None, own, channels=Channels(4, (0, 1)))
    with pytest.raises(InputError, match="takes 5 channels, but the images have 4"):
        take_channels(build(), Channels(4, (0,)))


@torch.no_grad()
def test_an_exported_program_takes_any_batch():
    model = build("locatchannelvit_tiny")
    model.blocks = model.blocks[:1]
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (images(),), dynamic_shapes=({0: batch},)).module()
    more = images().repeat(3, 1, 1, 1)
    assert_close(program(more), model(more))


def test_tokens_that_are_left_out_keep_their_places():
    model = build("locatchannelvit_tiny", patch_drop_rate=0.5, channel_sampling=False).train()
    kept = []
    model.blocks[0].attn.gaug.register_forward_hook(lambda module, inputs, found: kept.append(found.kept))
    model(images())
    assert isinstance(model.patch_embed, ChannelPatchEmbed)
    assert kept[0].shape == (2, 22)  # of 45
    assert int(kept[0].max()) < 9
