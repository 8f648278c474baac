"""Feature distillation: its loss against plain expressions, and a teacher that stays what and where it is."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F

from locat_lightning.backbones.create import load_backbone
from locat_lightning.errors import InputError
from locat_lightning.evaluation.features import image_features
from locat_lightning.methods import Distillation
from tests.methods.runs import BACKBONE, METHODS, Batches, fit, random_batch, same, small, teacher, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


def distance(criterion, learnt, taught):
    """The mean distance of vectors [N, D]."""
    if criterion == "smooth_l1":
        return F.smooth_l1_loss(learnt, taught)
    return (1 - (F.normalize(learnt, dim=-1) * F.normalize(taught, dim=-1)).sum(-1)).mean()


@pytest.mark.parametrize("criterion", ["cosine", "smooth_l1"])
def test_the_loss_is_the_plain_one(criterion):
    task = small("Distillation", criterion=criterion, cls_weight=0.5, patch_weight=2.0)
    batch = random_batch(3)
    loss, scalars, features = task.compute_loss(batch)
    cls, patches, images = 0.0, 0.0, 0
    for views in batch.views:
        x = views.crops.flatten(0, 1)
        own_cls = image_features(task.backbone, x)
        assert images or torch.equal(features, own_cls)
        own = task.backbone.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)[0]
        taught = task.teacher.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)[0]
        taught = F.interpolate(taught, own.shape[-2:], mode="bilinear", antialias=True)
        vectors = [each.movedim(1, -1).flatten(0, 2) for each in (own, taught)]
        patches += len(x) * distance(criterion, task.project_patches(vectors[0]), vectors[1])
        cls += len(x) * distance(criterion, task.project_cls(own_cls), image_features(task.teacher, x))
        images += len(x)
    torch.testing.assert_close(scalars["cls_loss"], cls / images)
    torch.testing.assert_close(scalars["patch_loss"], patches / images)
    torch.testing.assert_close(loss, 0.5 * cls / images + 2 * patches / images)


def test_projections_only_where_widths_differ():
    assert [small("Distillation").project_cls.out_features] == [32]
    same = small("Distillation", backbone_args={"embed_dim": 32, "num_heads": 2})
    assert not list(same.project_cls.parameters()) + list(same.project_patches.parameters())


@pytest.mark.parametrize("student", ["resnet10t", "vit_tiny_patch16_224"])
def test_any_timm_model_is_a_student(student):
    arguments = {"img_size": 32, "embed_dim": 24, "depth": 1} if student.startswith("vit") else {}
    options = {"teacher_backbone": "vit_tiny_patch16_224", "warmup_epochs": 0, "lr": 1e-3}
    options["teacher_args"] = BACKBONE | {"embed_dim": 32, "num_heads": 2, "patch_size": 4}
    task = Distillation(student, backbone_args=arguments, teacher=teacher(), **options)
    assert fit(task, [random_batch(2)]).losses[0] > 0


def test_the_student_comes_to_give_the_teachers_features():
    record = fit(small("Distillation", lr=3e-3), [random_batch(8)] * 30)
    assert record.losses[-1] < 0.5 * record.losses[0]


def test_the_teacher_is_frozen_and_out_of_checkpoints(tmp_path):
    task = small("Distillation")
    before = {key: value.clone() for key, value in task.teacher.state_dict().items()}
    fit(task, [random_batch(2)] * 2, ModelCheckpoint(tmp_path, save_last=True))
    assert all(torch.equal(value, before[key]) for key, value in task.teacher.state_dict().items())
    assert not any(module.training for module in task.teacher.modules())
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert {key.partition(".")[0] for key in checkpoint["state_dict"]} == {
        "backbone",
        "project_cls",
        "project_patches",
    }
    assert checkpoint["distilled_from"]["weights"] == teacher()
    student = load_backbone(str(tmp_path / "last.ckpt"))
    assert all(
        torch.equal(value, task.backbone.state_dict()[key]) for key, value in student.state_dict().items()
    )


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"Distillation"}))
def test_a_run_of_another_method_is_a_teacher(tmp_path, name):
    """By its checkpoint alone, which records the model; of two networks the teacher is taken."""
    run = small(name)
    fit(run, [random_batch(2)], ModelCheckpoint(tmp_path, save_last=True))
    options = {"teacher_backbone": None, "teacher_args": None, "backbone_args": {"embed_dim": 12}}
    task = small("Distillation", teacher=str(tmp_path / "last.ckpt"), **options)
    assert same(task.teacher.state_dict(), run.backbone.state_dict())
    assert fit(task, [random_batch(2)]).losses[0] > 0


def test_another_teacher_does_not_go_on(tmp_path):
    fit(small("Distillation"), [random_batch(2)] * 2, ModelCheckpoint(tmp_path, save_last=True))
    other = torch.load(teacher(), weights_only=True)
    other["norm.bias"] += 1
    torch.save(other, tmp_path / "other.pt")
    task = small("Distillation", teacher=str(tmp_path / "other.pt"))
    with pytest.raises(
        InputError, match=r"other\.pt is not the one that the run began with .* as model\.teacher"
    ):
        trainer(max_epochs=2).fit(
            task, Batches([random_batch(2)] * 2), ckpt_path=tmp_path / "last.ckpt", weights_only=True
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": "random"}, "a teacher with random weights has nothing to teach"),
        ({"teacher": "nowhere.pt"}, r"model\.teacher: no such file"),
        ({"cls_weight": 0.0, "patch_weight": 0.0}, "are both 0"),
    ],
)
def test_what_cannot_be_taught_is_an_error(options, message):
    task = Distillation("locatvit_tiny", **({"teacher": teacher()} | options))
    with pytest.raises(InputError, match=message):
        task.check(trainer(max_epochs=20), training=True)
