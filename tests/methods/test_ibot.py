"""iBOT: masks in the network, the targets of patches, heads, and what cannot be."""

import pytest
import torch
from lightning.pytorch import Callback
from torch.nn import functional as F

from locat_lightning.errors import InputError
from locat_lightning.methods import Ibot
from tests.methods.runs import HEAD, fit, random_batch, small, trainer


def images_and_masks(images=3):
    batch = random_batch(images)
    return batch.views[0].crops.flatten(0, 1), batch.masks.flatten(0, 1).flatten(1)


@pytest.mark.parametrize("name", ["locatvit_tiny", "vit_tiny_patch16_224", "locatvit_tiny_rope_mixed"])
def test_a_masked_patch_cannot_be_seen(name):
    task = Ibot(
        name, backbone_args={"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 3}, **HEAD
    )
    task.hp.backbone_args["depth"] = 1
    task.configure_model()
    images, masks = images_and_masks()
    network = task.student
    with torch.no_grad():
        network.mask_token.token.normal_()
        seen = network(images, masks)
        hidden = F.interpolate(masks.view(-1, 1, 4, 4).float(), scale_factor=8)
        other = network(images + hidden * torch.randn_like(images), masks)
        plain = network(images)
        unmasked = network(images, torch.zeros_like(masks))
    for one, two in zip(seen, other, strict=True):
        torch.testing.assert_close(one, two)
    assert not torch.allclose(seen.patches, plain.patches)
    assert all(torch.equal(one, two) for one, two in zip(plain, unmasked, strict=True))
    torch.testing.assert_close(plain.cls, network.backbone(images))


def test_refined_targets_are_prr_of_all_tokens():
    task = small("Ibot", patch_targets="refined")
    images, _ = images_and_masks()
    backbone = task.teacher.backbone
    with torch.no_grad():
        found = task.teacher(images, refined=True)
        tokens = backbone.forward_features(images)
    for image, refined in zip(tokens, found.patches, strict=True):
        heads = image.unflatten(-1, (3, 8)).transpose(0, 1)  # [h, N, d]
        attention = (heads @ heads.mT / 8**0.5).softmax(-1)
        expected = (attention @ heads).transpose(0, 1).flatten(1)
        torch.testing.assert_close(refined, expected[1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.cls, backbone(images))
    assert set(backbone.state_dict()) == set(small("Ibot").teacher.backbone.state_dict())
    assert fit(task, [random_batch(2)]).losses != fit(small("Ibot"), [random_batch(2)]).losses


def test_the_centre_of_patches_is_of_all_of_them_or_of_those_masked():
    batch = random_batch(4)
    logits = {}
    for choice in ("all", "masked"):
        task = small("Ibot", patch_center_of=choice, shared_head=False, center_momentum=0.0)
        with torch.no_grad():
            patches = task.teacher(batch.views[0].crops.flatten(0, 1)).patches
            logits[choice] = task.teacher.patch_logits(patches)
        fit(task, [batch])
        chosen = logits[choice] if choice == "all" else logits[choice][batch.masks.flatten(0, 1).flatten(1)]
        mean = chosen.flatten(0, -2).mean(0)
        torch.testing.assert_close(task.patch_targets.center, mean, atol=1e-6, rtol=1e-5)


def test_indices_that_come_with_the_batch_are_used():
    batch = random_batch(3)
    indices = batch.masks.flatten().nonzero().flatten()
    with_them = fit(small("Ibot"), [batch._replace(mask_indices=indices)]).losses
    assert with_them == fit(small("Ibot"), [batch]).losses


def test_the_weights_of_the_losses():
    batch = random_batch(3)
    [metrics] = fit(small("Ibot", cls_weight=0.5, patch_weight=2.0), [batch], log_every_n_steps=1).metrics
    total = 0.5 * metrics["train/cls_loss"] + 2 * metrics["train/patch_loss"]
    assert metrics["train/loss"] == pytest.approx(total)
    assert metrics["train/teacher_entropy"] + metrics["train/kl"] == pytest.approx(metrics["train/cls_loss"])
    assert metrics["train/masked"] == pytest.approx(batch.masks.float().mean().item())
    assert 1 <= metrics["train/prototypes"] <= 64
    assert 1 <= metrics["train/patch_prototypes"] <= 64


def test_signs_are_measured_where_they_are_written():
    record = fit(small("Ibot"), [random_batch(2)] * 4, log_every_n_steps=2)
    measured = {"train/prototypes", "train/patch_prototypes"}
    assert [measured <= metrics.keys() for metrics in record.metrics] == [False, True, True, True]
    values = [metrics.get("train/patch_prototypes") for metrics in record.metrics]
    assert values[1] == values[2] != values[3]


@pytest.mark.parametrize(
    ("name", "options"),
    [("Ibot", {"shared_head": False}), ("Dinov2", {"shared_head": False}), ("SelfPatch", {})],
)
def test_a_collapse_of_patches_is_said_in_words(name, options):
    class Collapse(Callback):
        def on_train_start(self, trainer, module):
            for network in (module.student, module.teacher):
                network.heads[-1].last_layer.weight_v.data[:] = 1.0

    with pytest.warns(UserWarning, match=r"collapsed at step 0, uniform: .*\(patch: .*teacher_.*temp"):
        fit(small(name, lr=0.0, min_lr=0.0, **options), [random_batch(4)], Collapse(), log_every_n_steps=1)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("swin_tiny_patch4_window7_224", {}, r"model\.backbone: swin_.* has no patches to mask"),
        ("vit_tiny_patch16_224", {"patch_targets": "refined"}, r"model\.patch_targets: .* no PRR"),
        ("locatjumbo_tiny", {}, r"model\.shared_head: \[CLS\] of locatjumbo_tiny is \d+ wide"),
    ],
)
def test_a_backbone_that_does_not_fit_is_an_error(name, options, message):
    arguments = {"img_size": 32} if name.startswith("swin") else {"img_size": 32, "depth": 1}
    task = Ibot(name, backbone_args=arguments, **(HEAD | options))
    with pytest.raises(InputError, match=message):
        task.configure_model()


def test_views_that_do_not_fit_are_an_error():
    batch = random_batch(2)
    with pytest.raises(InputError, match=r"Ibot needs views with masks: set data\.views\.class_path"):
        fit(small("Ibot"), [batch._replace(masks=None)])
    with pytest.raises(InputError, match=r"masks are of \[8, 8\] patches, but the model has \[4, 4\]"):
        fit(small("Ibot"), [batch._replace(masks=torch.zeros(2, 2, 8, 8, dtype=torch.bool))])
    with pytest.raises(InputError, match=r"set model\.shared_head false"):
        small("Ibot", patch_out_dim=8).check(trainer(max_epochs=20), training=True)


def test_separate_heads_of_jumbo_train():
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
    options = HEAD | {"shared_head": False, "warmup_teacher_temp_epochs": 0, "warmup_epochs": 0, "lr": 1e-3}
    record = fit(Ibot("locatjumbo_tiny", backbone_args=arguments, **options), [random_batch(2)])
    assert record.losses[0] > 0
