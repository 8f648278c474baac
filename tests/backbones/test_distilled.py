"""The distillation token beside [CLS]: what its classifier reads, with PRR and without."""

import pytest
import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from torch.testing import assert_close

from locat_lightning.backbones.weights import load_weights
from locat_lightning.inspection import cls_attention
from tests.backbones.test_registry import build, images


def refined_by_hand(tokens, heads):
    """All rows of softmax(x xᵀ / √d) x by head, of final tokens [B, N, D]."""
    found = []
    for image in tokens:
        parts = image.chunk(heads, dim=-1)
        found.append(torch.cat([(x @ x.mT / x.shape[1] ** 0.5).softmax(-1) @ x for x in parts], -1))
    return torch.stack(found)


@pytest.mark.parametrize("prr", [True, False])
def test_each_classifier_reads_its_own_token(prr):
    model = build("locatvit_tiny_distilled", prr=prr).eval()
    tokens = model.forward_features(images())
    assert tokens.shape == (2, 2 + 16, 24)
    read = refined_by_hand(tokens, 3) if prr else tokens
    of_class, of_teacher = model.head(read[:, 0]), model.head_dist(read[:, 1])
    assert (of_class - of_teacher).abs().max() > 0.01
    assert_close(model(images()), (of_class + of_teacher) / 2)
    assert_close(model.forward_head(tokens, pre_logits=True), (read[:, 0] + read[:, 1]) / 2)
    model.train().set_distilled_training()
    for found, expected in zip(model(images()), (of_class, of_teacher), strict=True):
        assert_close(found, expected)


def test_without_locat_it_is_timms_model_and_takes_its_weights():
    ours, theirs = build("locatvit_tiny_distilled", gaug=False, prr=False), None
    torch.manual_seed(1)
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 10}
    theirs = timm.create_model("deit_tiny_distilled_patch16_224", **small)
    assert type(theirs) is VisionTransformerDistilled
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_close(ours.eval()(images()), theirs.eval()(images()))


def test_weights_of_other_classes_start_with_both_classifiers_anew(tmp_path):
    torch.save(build("locatvit_tiny_distilled").state_dict(), tmp_path / "w.pth")
    model = build("locatvit_tiny_distilled", num_classes=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    load_weights(model, str(tmp_path / "w.pth"), warm_start=True)
    kept = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    assert kept == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}


def test_attention_is_of_the_patches_alone():
    maps = cls_attention(build("locatvit_tiny_distilled"), images())
    assert maps.shape == (2, 3, 4, 4)
