"""The attention of [CLS] that labels follow, against the whole softmax of each layer."""

import copy
import math

import pytest
import timm
import torch
from torch.nn import functional as F

from locat_lightning.backbones import registry  # noqa: F401 - names the models
from locat_lightning.nn import PatchRefinement
from locat_lightning.nn.class_attention import ClassAttention

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2, "num_classes": 5}


def model(name="locatvit_tiny", **options):
    torch.manual_seed(0)
    built = timm.create_model(name, **(SMALL | options)).train()
    for part, weight in built.named_parameters():
        if "gaug" in part or "qkv" in part or "token" in part:
            torch.nn.init.normal_(weight)
    return built


@pytest.fixture
def softmaxes(monkeypatch):
    """What each attention multiplies its values with, [B, h, N, N]."""
    seen = []

    def attend(q, k, v, attn_mask=None, **options):
        logits = q @ k.mT / math.sqrt(q.shape[-1])
        seen.append((logits if attn_mask is None else logits + attn_mask).softmax(-1))
        return seen[-1] @ v

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    monkeypatch.setattr("locat_lightning.nn.attention.FORCED", "plain")
    return seen


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", {"reg_tokens": 3, "qk_norm": True}),
        ("locatvit_tiny", {"reg_tokens": 2}),
        ("locatvit_tiny", {"gaug": {"rotated": True}}),
        ("vit_small_patch16_rope_mixed_224", {"global_pool": "token"}),
        ("locatvit_tiny_rope_mixed", {}),
        ("locatjumbo_tiny", {}),
    ],
)
def test_it_is_the_row_of_the_softmax(softmaxes, name, options):
    backbone = model(name, **options)
    attention = ClassAttention(backbone)
    backbone(torch.randn(3, 3, 32, 32))
    whole = softmaxes[1]  # of the last block; PRR's comes after it
    classes, P = backbone.cls_token.shape[1], backbone.num_prefix_tokens
    expected = whole[:, :, :classes, P:].mean(2)
    assert attention.heads.shape == (3, 2, 16)
    assert not attention.heads.requires_grad
    torch.testing.assert_close(attention.heads, expected, atol=1e-6, rtol=1e-4)
    assert attention.heads.std() > 1e-3  # or any row would do


@pytest.mark.parametrize(
    ("name", "options"),
    [("locatvit_tiny", {"reg_tokens": 2}), ("locatjumbo_tiny", {}), ("locatvit_tiny_distilled", {})],
)
def test_refined_is_the_row_of_prr(name, options):
    backbone = model(name, **options)
    attention = ClassAttention(backbone, "refined")
    images = torch.randn(3, 3, 32, 32)
    backbone(images)
    with torch.no_grad():
        tokens = backbone.attn_pool.pre_norm(backbone.forward_features(images))
    x = tokens.unflatten(-1, (2, 24)).transpose(1, 2)
    classes, P = backbone.cls_token.shape[1], backbone.num_prefix_tokens
    whole = (x @ x.mT / math.sqrt(24)).softmax(-1)
    torch.testing.assert_close(attention.heads, whole[:, :, :classes, P:].mean(2), atol=1e-6, rtol=1e-4)


def test_nothing_is_read_in_evaluation_and_a_copy_reads_its_own():
    backbone = model().eval()
    backbone.attention = ClassAttention(backbone)
    backbone(torch.randn(1, 3, 32, 32))
    assert backbone.attention.heads is None
    other = copy.deepcopy(backbone).train()
    other(torch.randn(1, 3, 32, 32))
    assert backbone.attention.heads is None
    assert other.attention.heads.shape == (1, 2, 16)


def test_training_is_as_without_it_compiled_and_with_checkpointed_blocks():
    images = torch.randn(2, 3, 32, 32)
    found = {}
    for way in ("plain", "reads", "checkpoints", "compiled"):
        backbone = model(depth=1, gaug=False)
        reader = ClassAttention(backbone) if way != "plain" else None
        if way == "checkpoints":
            backbone.set_grad_checkpointing()
        if way == "compiled":
            backbone.compile(backend="eager")
        backbone(images).square().sum().backward()
        grads = torch.cat([p.grad.flatten() for p in backbone.parameters()])
        found[way] = grads, None if reader is None else reader.heads
    for way in ("reads", "checkpoints", "compiled"):
        torch.testing.assert_close(found[way][0], found["plain"][0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found[way][1], found["reads"][1], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "of", "why"),
    [
        ("vit_tiny_patch16_224", {"global_pool": "avg"}, "class", r"pools no \[CLS\] token"),
        ("locatvit_tiny", {"class_token": False, "global_pool": "avg", "prr": False}, "class", "pools no"),
        ("vit_tiny_patch16_224", {"patch_drop_rate": 0.5}, "class", "drops patches"),
        ("vit_tiny_patch16_224", {}, "refined", "has no PRR"),
    ],
)
def test_models_without_such_an_attention(name, options, of, why):
    with pytest.raises(ValueError, match=why):
        ClassAttention(model(name, **options), of)


def test_models_of_other_kinds():
    for name in ("resnet10t", "swin_tiny_patch4_window7_224"):
        with torch.device("meta"), pytest.raises(ValueError, match=r"pools no \[CLS\] token"):
            ClassAttention(timm.create_model(name))


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("cait_xxs24_224", {"depth": 1}, "does not show queries and keys"),
        ("pit_ti_224", {}, "do not pass its blocks together"),
    ],
)
def test_models_that_keep_cls_another_way(name, options, why):
    with torch.device("meta"), pytest.raises(ValueError, match=why):
        ClassAttention(timm.create_model(name, **options))


def test_by_head():
    tokens = torch.arange(12.0).view(1, 2, 6)
    assert PatchRefinement(6, 2).by_head(tokens)[0, 1].tolist() == [[3, 4, 5], [9, 10, 11]]
