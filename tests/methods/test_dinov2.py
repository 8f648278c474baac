"""DINOv2: the schedules and groups of the original code, Gram anchoring, and what cannot be."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn import functional as F

from locat_lightning.backbones.create import load_backbone
from locat_lightning.backbones.sample_drop import SampledBlock
from locat_lightning.data.views import Views
from locat_lightning.errors import InputError
from locat_lightning.methods import Dinov2
from locat_lightning.methods.dinov2 import gram_loss, resampled
from locat_lightning.schedules import square_root_rule
from tests.methods.runs import Batches, Record, Stop, copied, fit, random_batch, same, small, trainer

FOLDER = Path(__file__).parents[1] / "golden"
GRAM = load_file(FOLDER / "dinov3_extra.safetensors")
with safe_open(FOLDER / "dinov2_sched_masks.safetensors", "pt") as file:
    META = json.loads(file.metadata()["meta"])
    SCHEDULES = {key: file.get_tensor(key) for key in file.keys() if key.startswith("sched.")}  # noqa: SIM118


def test_schedules_are_those_of_the_original_code(monkeypatch):
    options = META["sched"]
    length, (start, end) = options["epoch_len"], options["teacher_temp"]
    task = small(
        "Dinov2",
        freeze_last_layer_epochs=options["freeze_last_layer_epochs"],
        momentum=options["momentum"][0],
        weight_decay=options["wd"][0],
        weight_decay_end=options["wd"][1],
        warmup_teacher_temp=start,
        warmup_teacher_patch_temp=start,
        teacher_temp=end,
        teacher_patch_temp=end,
    )
    task.peak_lr = square_root_rule(options["base_lr"], options["global_batch"], 1024)
    assert task.peak_lr == pytest.approx(options["lr"])
    task.steps, task.warmup = options["epochs"] * length, options["warmup_epochs"] * length
    task._temperature_warmup = options["teacher_temp_warmup_epochs"] * length
    task._groups = task.parameter_groups()
    for step in range(task.steps):
        monkeypatch.setattr(Dinov2, "step", step)
        monkeypatch.setattr(Dinov2, "current_epoch", step // length)
        groups = [{} for _ in task._groups]
        task.set_rates(groups)
        expected = {key.removeprefix("sched."): value[step].item() for key, value in SCHEDULES.items()}
        assert groups[0]["lr"] == pytest.approx(expected["lr"], abs=1e-9)
        assert groups[0]["weight_decay"] == pytest.approx(expected["wd"])
        assert groups[-1]["lr"] == pytest.approx(expected["last_layer_lr"], abs=1e-9)
        assert task.momentum(step) == pytest.approx(expected["momentum"])
        assert task.temperatures() == pytest.approx((expected["teacher_temp"],) * 2)


def test_learning_rates_and_decays_of_parameters_are_those_of_the_original_code():
    groups = META["param_groups"]
    task = small("Dinov2", backbone_args={"depth": 4, "init_values": 1e-5, "reg_tokens": 1})
    found = {}
    for group in task.parameter_groups():
        for name, parameter in task.student.named_parameters():
            if any(parameter is each for each in group.parameters):
                found[name] = group
    checked = 0
    for part, prefix in (("backbone_depth4_decay0.9_patchmult0.2", "backbone."), ("dino_head", "head.")):
        for theirs, (scale, decay, last) in groups[part].items():
            ours = (prefix + theirs).replace("mlp.", "layers.") if prefix == "head." else prefix + theirs
            ours = ours.replace("register_tokens", "reg_token")
            ours = ours.replace("backbone.mask_token", "mask_token.token")
            assert found[ours].lr_scale == pytest.approx(scale), ours
            assert found[ours].decays == bool(decay), ours
            assert last == ("last_layer" in ours)
            checked += 1
    assert checked == len(groups["backbone_depth4_decay0.9_patchmult0.2"]) + len(groups["dino_head"])


def test_the_loss_of_gram_anchoring_is_dinov3s():
    patches = GRAM["gram.student"].clone().requires_grad_()
    loss = gram_loss(patches, GRAM["gram.teacher"])
    torch.testing.assert_close(loss, GRAM["gram.img.loss"], atol=1e-6, rtol=1e-6)
    (gradient,) = torch.autograd.grad(loss, patches)
    torch.testing.assert_close(gradient, GRAM["gram.img.grad_student"], atol=1e-8, rtol=1e-5)


def test_features_are_resampled_to_the_students_grid():
    features = torch.randn(2, 36, 5, generator=torch.Generator().manual_seed(0))
    grid = features.view(2, 6, 6, 5).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, (3, 3), mode="bicubic").permute(0, 2, 3, 1).reshape(2, 9, 5)
    torch.testing.assert_close(resampled(features, 3), expected)
    assert resampled(features, 6) is features


def test_the_gram_teacher_is_the_average_of_given_steps():
    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            grams.append(copied(module.gram))
            teachers.append(copied(module.backbone))

    grams, teachers = [], []
    options = {"gram_weight": 2.0, "gram_start": 2, "gram_warmup": 4, "gram_updates": [5], "momentum": 0.5}
    task = small("Dinov2", **options, backbone_args={"drop_path_rate": 0.5})
    start = copied(task.gram)
    record = fit(task, [random_batch(3, seed) for seed in range(7)], Watch())
    expected = [start, teachers[1], teachers[1], teachers[1], teachers[4], teachers[4], teachers[4]]
    assert all(same(own, each) for own, each in zip(grams, expected, strict=True))
    assert [task.weight_of_gram(step) for step in (1, 2, 4, 6, 9)] == pytest.approx([0, 0, 1, 2, 2])
    assert ["train/gram_loss" in metrics for metrics in record.metrics] == [False] * 3 + [True] * 4
    assert not any(p.requires_grad or p.grad is not None for p in task.gram.parameters())


def test_the_gram_teacher_sees_larger_views(tmp_path):
    torch.save(small("Dinov2", seed=3).backbone.state_dict(), tmp_path / "earlier.pt")
    batch = random_batch(3)
    crops = F.interpolate(batch.views[0].crops.flatten(0, 1), (64, 64), mode="bicubic").unflatten(0, (2, 3))
    task = small("Dinov2", gram_weight=1.0, gram_teacher=str(tmp_path / "earlier.pt"))
    seen = task.student(batch.views[0].crops.flatten(0, 1), batch.masks.flatten(0, 1).flatten(1))
    [(weight, loss)] = task.further_terms(batch._replace(undistorted=Views(crops, None)), seen).values()
    anchors = task.gram.forward_intermediates(
        crops.flatten(0, 1), indices=1, norm=True, intermediates_only=True
    )
    small_grid = F.interpolate(anchors[0], (4, 4), mode="bicubic").flatten(2).mT
    assert weight == 1
    torch.testing.assert_close(loss, gram_loss(seen.patches, small_grid))
    assert same(task.gram.state_dict(), small("Dinov2", seed=3).backbone.state_dict())


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_run_with_gram_anchoring_resumes_without_the_file_of_its_teacher(tmp_path):
    options = {"gram_weight": 2.0, "gram_teacher": str(tmp_path / "earlier.pt"), "gram_updates": [3]}
    torch.save(small("Dinov2", seed=3).backbone.state_dict(), tmp_path / "earlier.pt")
    batches = [random_batch(2, seed) for seed in range(4)]
    whole = small("Dinov2", **options)
    losses = fit(whole, batches, max_epochs=2).losses
    saving = ModelCheckpoint(tmp_path / "run", save_last=True)
    with pytest.raises(KeyError):
        fit(small("Dinov2", **options), batches, saving, Stop(1, 0), max_epochs=2)
    (tmp_path / "earlier.pt").unlink()
    resumed, record = Dinov2(**dict(whole.hparams)), Record()
    resumed.resume(torch.load(tmp_path / "run" / "last.ckpt", weights_only=True))
    trainer(record, max_epochs=2).fit(
        resumed, Batches(batches), ckpt_path=tmp_path / "run" / "last.ckpt", weights_only=True
    )
    assert record.losses == losses[4:]
    assert same(resumed.gram.state_dict(), whole.gram.state_dict())
    backbone = load_backbone(str(tmp_path / "run" / "last.ckpt"))  # the teacher's, not Gram's
    state = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(v, state[f"teacher.backbone.{k}"]) for k, v in backbone.state_dict().items())


def test_the_students_blocks_leave_images_out():
    task = small("Dinov2", sample_drop=0.3)
    assert all(isinstance(block, SampledBlock) for block in task.student.backbone.blocks)
    assert not any(isinstance(block, SampledBlock) for block in task.backbone.blocks)
    assert fit(task, [random_batch(4)] * 2).losses[1] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_drop": 0.1, "backbone_args": {"drop_path_rate": 0.1}}, "set one of them to 0"),
        ({"gram_teacher": "nowhere.pt"}, r"model\.gram_teacher: no such file"),
    ],
)
def test_what_cannot_be_is_an_error(options, message):
    with pytest.raises(InputError, match=message):
        small("Dinov2", **options).check(trainer(max_epochs=20), training=True)


def test_a_backbone_without_timms_blocks_is_an_error():
    task = Dinov2("locatvit_tiny_rope_mixed", backbone_args={"img_size": 32, "depth": 1}, out_dim=16)
    with pytest.raises(InputError, match=r"model\.sample_drop: .* use 0"):
        task.configure_model()
