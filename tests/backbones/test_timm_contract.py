"""What timm's own tests of models check (tests/test_models.py of its release), of every registered name.

`test_structure` builds each model as it is, without memory. The other tests shrink the model, which makes all
sizes of a family the same: they take the smallest.
"""

import copy
import fnmatch

import pytest
import timm
import torch
from timm.models import FeatureInfo, create_feature_extractor, get_graph_node_names, group_parameters
from torch.testing import assert_close

from locat_lightning.backbones.registry import MODELS

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 12, "depths": (1, 2, 1), "num_heads": (1, 2, 3)}
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
TINY = [name for name in MODELS if "tiny" in name]


def small(name, **options):
    torch.manual_seed(0)
    return timm.create_model(name, **(SWIN if "swin" in name else VIT), **options)


def images(model):
    return IMAGES[..., : model.patch_embed.img_size[0], : model.patch_embed.img_size[1]]


def assert_every_parameter_has_a_gradient(model):
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("name", TINY)
def test_forward_with_and_without_checkpointing(name):
    model = small(name).eval()
    logits = model(images(model))
    assert logits.shape == (2, 1000)
    assert logits.isfinite().all()
    model.set_grad_checkpointing()
    assert_close(model(images(model)), logits)


@pytest.mark.parametrize("name", TINY)
def test_backward(name):
    model = small(name, num_classes=42).train()
    logits = model(images(model))
    assert logits.shape == (2, 42)
    logits.square().mean().backward()
    assert_every_parameter_has_a_gradient(model)


@pytest.mark.parametrize("name", MODELS)
def test_structure(name):
    meta = {"device": "meta", "dtype": torch.float32}
    with torch.device("meta"):
        model = timm.create_model(name, **meta).eval()
        with pytest.raises(TypeError):
            timm.create_model(name, not_an_argument=1, **meta)
    config, names = model.default_cfg, dict(model.named_parameters())
    heads = config["classifier"] if isinstance(config["classifier"], tuple) else (config["classifier"],)
    assert {f"{layer}.weight" for layer in (*heads, config["first_conv"])} <= names.keys()
    assert model.in_chans == config["input_size"][0]
    assert model.num_classes == config["num_classes"]
    assert len(set(group_parameters(model, model.group_matcher(coarse=False), reverse=True).values())) > 1
    for pattern in model.no_weight_decay():
        absent = getattr(model, pattern, None) is None
        assert absent or any(fnmatch.fnmatch(each, pattern) for each in names), pattern

    model.to(torch.float64).reset_classifier(2)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.float64)}
    assert {module.training for module in model.modules()} == {False}


@pytest.mark.parametrize("name", TINY)
def test_widths_of_features_and_heads(name):
    model = small(name).eval()
    features = model.forward_features(images(model))
    assert features.shape[-1] == model.num_features
    pooled = model.forward_head(features, pre_logits=True).shape
    assert pooled == (2, model.head_hidden_size)
    assert model.to(torch.bfloat16)(images(model).bfloat16()).dtype == torch.bfloat16
    model.float().reset_classifier(0)
    assert model.num_classes == 0
    assert model(images(model)).shape == small(name, num_classes=0)(images(model)).shape == pooled


# What timm's interpolation of Swin's positions does is not as torch wants it.
@pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:Using a non-tuple sequence")
@pytest.mark.parametrize("name", TINY)
def test_a_frozen_model_stays_frozen(name):
    model = small(name).requires_grad_(False)
    model.reset_classifier(0)
    model.set_input_size(img_size=(128, 128))
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", TINY)
def test_features_only(name):
    model = small(name, features_only=True, out_indices=(0, -1)).eval()
    side = (SWIN if "swin" in name else VIT)["img_size"]
    maps = model(IMAGES[..., :side, :side])
    channels = [each.shape[3 if getattr(model, "output_fmt", "") == "NHWC" else 1] for each in maps]
    assert channels == model.feature_info.channels()
    assert len(maps) == 2


@pytest.mark.parametrize("name", TINY)
def test_forward_intermediates(name):
    model = small(name).eval()
    info, x = FeatureInfo(model.feature_info, len(model.feature_info)), images(model)
    tokens, maps = model.forward_intermediates(x)
    assert_close(tokens, model.forward_features(x))
    assert [each.shape[1] for each in maps] == info.channels()
    assert [x.shape[-1] // each.shape[-1] for each in maps] == info.reduction()
    model.set_grad_checkpointing()
    assert_close(model.forward_intermediates(x)[0], tokens)


@pytest.mark.parametrize("name", TINY)
def test_pruned_layers(name):
    model = small(name).eval()
    x, last = images(model), len(model.feature_info) - 1
    whole = copy.deepcopy(model)
    whole.prune_intermediate_layers([last], prune_head=False)
    assert_close(whole(x), model(x))
    maps = model.forward_intermediates(x, intermediates_only=True)
    for index in (0, last):
        pruned = copy.deepcopy(model)
        taken = pruned.prune_intermediate_layers([index], prune_norm=True)
        (found,) = pruned.forward_intermediates(x, indices=taken, intermediates_only=True)
        assert_close(found, maps[index])
        pruned.train()
        found = pruned.forward_intermediates(x, indices=taken, intermediates_only=True)
        sum(each.sum() for each in (pruned.forward_features(x), *found)).backward()
        assert_every_parameter_has_a_gradient(pruned)


@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing")  # Swin's drop path, in train mode
@pytest.mark.parametrize("name", TINY)
def test_torch_fx_takes_attention_as_a_leaf(name):
    model = small(name, num_classes=42).eval()
    *_, output = get_graph_node_names(model)[1]
    traced = create_feature_extractor(model, [output]).eval()
    (logits,) = traced(images(model)).values()
    assert_close(logits, model(images(model)))
    logits.square().mean().backward()
    assert_every_parameter_has_a_gradient(traced)
