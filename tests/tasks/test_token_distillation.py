"""A teacher's predictions for the distillation token, against plain expressions."""

import math

import pytest
import timm
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F

from locat_lightning.backbones.create import load_backbone
from locat_lightning.backbones.formats import write_model
from locat_lightning.errors import InputError
from locat_lightning.tasks import Classification
from locat_lightning.tasks.average import WeightAverage
from locat_lightning.tasks.token_distillation import soft_distillation
from tests.tasks.test_classification import BACKBONE, Batches, fit, task, trainer
from tests.tasks.test_long_tail import Tail, by_hand

UNMIXED = {"mixup": 0, "cutmix": 0}
CNN = {"teacher_backbone": "resnet10t", "warmup_epochs": 0, "lr": 1e-3}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start"),
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The weights of a CNN of six classes whose predictions differ."""
    torch.manual_seed(5)
    model = timm.create_model("resnet10t", num_classes=6)
    torch.nn.init.normal_(model.fc.weight, std=0.5)
    file = tmp_path_factory.mktemp("teacher") / "cnn.pth"
    torch.save(model.state_dict(), file)
    return str(file)


def student(teacher, name="locatvit_tiny_distilled", **options):
    torch.manual_seed(0)
    return Classification(name, backbone_args=BACKBONE, teacher=teacher, **(CNN | options))


class Steps(Classification):
    """Notes what each step saw and lost, with the logits of both classifiers."""

    def _compare(self, images, labels, mixed, taught=None):
        found = super()._compare(images, labels, mixed, taught)
        seen = images if mixed is None else mixed.images
        with torch.no_grad():
            pair = self.backbone(seen)
        shares = F.one_hot(labels, 6) if mixed is None else self.mixup.targets(mixed, pair[0])[0]
        targets = shares * 0.9 + 0.1 / 6
        self.steps_seen = [*getattr(self, "steps_seen", []), (seen, pair, targets, taught, found)]
        return found


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_the_loss_is_deits(tmp_path, teacher, kind, mixed):
    torch.manual_seed(0)
    options = {} if mixed else {"mixup": 0, "cutmix": 0}
    if kind == "soft":
        options |= {"distillation": "soft", "distillation_weight": 0.1, "distillation_temperature": 2.0}
    module = Steps("locatvit_tiny_distilled", backbone_args=BACKBONE, teacher=teacher, **CNN, **options)
    fit(tmp_path, module, Batches(batches=3), max_epochs=1, limit_val_batches=0)
    reference = load_backbone(teacher, "resnet10t", classifier=True).eval()
    assert len(module.steps_seen) == 3
    for seen, (of_class, of_token), targets, taught, (loss, logits, labels) in module.steps_seen:
        torch.testing.assert_close(taught, reference(seen).detach())  # of the images as they are mixed
        torch.testing.assert_close(logits, (of_class + of_token) / 2)
        assert labels.tolist() == targets.argmax(1).tolist()
        if kind == "hard":
            learnt, share = by_hand(of_token, F.one_hot(taught.argmax(1), 6)), 0.5
        else:
            share, learnt = 0.1, 0.0
            for own, given in zip(of_token.tolist(), taught.tolist(), strict=True):
                log_q, log_p = (
                    [z / 2 - math.log(sum(math.exp(y / 2) for y in row)) for z in row] for row in (own, given)
                )
                learnt += (
                    4 * sum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True)) / len(seen)
                )
        expected = (1 - share) * by_hand(of_class, targets) + share * learnt
        assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_a_student_that_agrees_has_no_soft_loss():
    logits = torch.randn(3, 5)
    assert soft_distillation(logits + 7, logits, 3.0).item() == pytest.approx(0, abs=1e-6)


def test_weights_of_classes_are_in_the_tokens_loss_alone_and_adjustment_in_both(tmp_path, teacher):
    data = Tail([40, 20, 10, 5, 2, 1], batches=1)
    prior = [n / 78 for n in (40, 20, 10, 5, 2, 1)]
    for options in ({"reweighting": 1.0, "reweight_from": 0.0}, {"logit_adjustment": 1.0}):
        torch.manual_seed(0)
        own = {"mixup": 0, "cutmix": 0, "teacher": teacher} | CNN | options
        module = Steps("locatvit_tiny_distilled", backbone_args=BACKBONE, **own)
        fit(tmp_path, module, data, max_epochs=1, limit_val_batches=0)
        [(_, (of_class, of_token), targets, taught, (loss, *_))] = module.steps_seen
        named = F.one_hot(taught.argmax(1), 6)
        if "reweighting" in options:
            weights = [
                1 / n / sum(p / n for p, n in zip(prior, data.class_counts, strict=True))
                for n in data.class_counts
            ]
            expected = by_hand(of_class, targets) + by_hand(of_token, named, weights=weights)
        else:
            own_labels = (targets > 0.5).double()
            expected = by_hand(of_class, own_labels, prior, smoothing=0.1) + by_hand(of_token, named, prior)
        assert loss.item() == pytest.approx(expected / 2, rel=1e-4)


def test_sharpness_aware_steps_ask_the_teacher_once(tmp_path, teacher):
    module = student(teacher, sam=0.05)
    asked = []
    taught = module.taught
    module.taught = lambda images: asked.append(len(images)) or taught(images)
    fit(tmp_path, module, Batches(batches=2), max_epochs=1, limit_val_batches=0)
    assert asked == [6, 6]


def test_the_teacher_is_frozen_out_of_checkpoints_and_of_evaluations(tmp_path, teacher):
    module = student(teacher, ema=0.5)
    before = torch.load(teacher, weights_only=True)
    run = fit(
        tmp_path,
        module,
        Batches(batches=2),
        enable_checkpointing=True,
        callbacks=[ModelCheckpoint(tmp_path, save_last=True)],
    )
    [average] = [each for each in run.callbacks if isinstance(each, WeightAverage)]
    assert average._average_model.module.teacher is module.teacher  # of which no average is kept
    kept = module.teacher.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in kept.items())
    assert not any(each.training for each in module.teacher.modules())
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert not [name for name in checkpoint["state_dict"] if name.startswith("teacher")]
    assert checkpoint["taught_by"]["weights"] == teacher
    measuring = student("/nowhere.pth", weights=str(tmp_path / "last.ckpt"))
    [found] = trainer(tmp_path).validate(measuring, datamodule=Batches(batches=2), verbose=False)
    assert found["val/loss"] == pytest.approx(float(run.callback_metrics["val/loss"]), rel=1e-4)
    on = trainer(tmp_path, max_epochs=3)
    on.fit(
        student(teacher, ema=0.5),
        datamodule=Batches(batches=2),
        ckpt_path=tmp_path / "last.ckpt",
        weights_only=True,
    )
    assert on.global_step == 6
    damaged = checkpoint | {"taught_by": [1]}
    torch.save(damaged, tmp_path / "damaged.ckpt")
    with pytest.raises(InputError, match="taught_by is a list, not a dictionary"):
        trainer(tmp_path, max_epochs=3).fit(
            student(teacher, ema=0.5),
            datamodule=Batches(batches=2),
            ckpt_path=tmp_path / "damaged.ckpt",
            weights_only=True,
        )
    other = before | {"fc.bias": before["fc.bias"] + 1}
    torch.save(other, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"other\.pth is not the one that the run began with"):
        trainer(tmp_path, max_epochs=3).fit(
            student(str(tmp_path / "other.pth"), ema=0.5),
            datamodule=Batches(batches=2),
            ckpt_path=tmp_path / "last.ckpt",
            weights_only=True,
        )


def test_an_exported_folder_is_a_teacher(tmp_path, teacher, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model(load_backbone(teacher, "resnet10t", classifier=True), tmp_path / "exported")
    module = student("exported", teacher_backbone=None)
    module.check(trainer(tmp_path), training=True)
    fit(tmp_path, module, max_steps=1, enable_checkpointing=True)
    before, kept = torch.load(teacher, weights_only=True), module.teacher.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in kept.items())
    [file] = tmp_path.rglob("*.ckpt")
    reference = torch.load(file, weights_only=True)["taught_by"]
    assert reference["weights"] == str(tmp_path / "exported")  # found from any directory


def test_the_token_learns_what_the_teacher_says_whatever_the_labels_are(tmp_path, teacher):
    """Its classifier comes to agree with the teacher, and that of [CLS] with the labels."""
    module = student(teacher, lr=1e-2, mixup=0, cutmix=0, label_smoothing=0, weight_decay=0)
    data = Batches(batches=1, size=12)
    fit(tmp_path, module, data, max_epochs=20, limit_val_batches=0)
    [batch] = data.items
    module.backbone.train()
    with torch.no_grad():
        of_class, of_token = module.backbone(batch.images)
        named = module.teacher(batch.images).argmax(1)
    assert not torch.equal(named, batch.labels)
    assert torch.equal(of_class.argmax(1), batch.labels)
    assert torch.equal(of_token.argmax(1), named)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "locatvit_tiny"}, "locatvit_tiny has no distillation token: set model.backbone to"),
        ({"teacher": "random"}, "a teacher with random weights has nothing to teach"),
        ({"teacher": "nowhere.pth"}, r"model\.teacher: no such file"),
        ({"distillation": "soft", "reweighting": 0.9}, "set model.distillation to hard"),
        (
            {"teacher": None, "teacher_backbone": None, "distillation": "soft"},
            r"model\.distillation says how .*: set model\.teacher",
        ),
        ({"teacher": None}, r"model\.teacher_backbone says how"),
        ({"teacher": None, "teacher_backbone": None, "teacher_args": {"a": 1}}, r"model\.teacher_args says"),
        ({"classes": 7}, "knows 6 classes, but the data have 7"),
    ],
)
def test_what_does_not_fit_is_said(tmp_path, teacher, options, message):
    options = dict(options)
    data = Tail(counts=[2] * 7, batches=1, classes=options.pop("classes", 6))
    module = student(**{"teacher": teacher} | options)
    run = trainer(tmp_path)

    def start():
        module.check(run, training=True)
        run.fit(module, datamodule=data)

    with pytest.raises(InputError, match=message):
        start()


class Normalised(Batches):
    """Noise for images that were normalised so."""

    model_channels = None
    normalisation = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.5)}  # noqa: RUF012


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_teacher_sees_images_normalised_as_its_own(tmp_path, teacher, precision):
    own = {"mean": (0.5, 0.5, 0.5), "std": [0.5, 0.5, 0.5]}
    contents = {"state_dict": torch.load(teacher, weights_only=True), "datamodule_hyper_parameters": own}
    torch.save(contents, tmp_path / "run.ckpt")
    images = Batches(batches=1).items[0].images
    pixels = images * torch.tensor([0.2, 0.25, 0.5]).view(3, 1, 1)
    pixels += torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
    reference = load_backbone(teacher, "resnet10t", classifier=True).eval()
    for file, seen in ((tmp_path / "run.ckpt", (pixels - 0.5) / 0.5), (teacher, images)):
        module = Steps("locatvit_tiny_distilled", backbone_args=BACKBONE, teacher=str(file), **CNN, **UNMIXED)
        options = {"max_epochs": 1, "limit_val_batches": 0, "precision": precision}
        fit(tmp_path, module, Normalised(batches=1), **options)
        [(_, _, _, taught, _)] = module.steps_seen
        expected, close = reference(seen).detach(), {"atol": 1e-4, "rtol": 1e-4}
        if precision == "bf16-true":
            assert taught.dtype == torch.bfloat16
            close = {"atol": 0.05 * float(expected.abs().max()), "rtol": 0}
        torch.testing.assert_close(taught.float(), expected, **close)


@pytest.mark.parametrize("std", [[0.5, 0.0, 0.5], ["a", 1, 1]])
def test_a_teachers_normalisation_is_numbers(tmp_path, teacher, std):
    contents = {"state_dict": torch.load(teacher, weights_only=True)}
    contents["datamodule_hyper_parameters"] = {"mean": [0.5] * 3, "std": std}
    torch.save(contents, tmp_path / "run.ckpt")
    with pytest.raises(InputError, match=r"model\.teacher: .*std in .*run\.ckpt"):
        fit(tmp_path, student(str(tmp_path / "run.ckpt")), Normalised(batches=1))


def test_a_teacher_of_other_classes_is_refused(tmp_path):
    data = Batches(batches=1)
    fit(tmp_path, first := task(), data, max_epochs=1).save_checkpoint(tmp_path / "t.ckpt")
    assert first.data_classes == [f"class {i}" for i in range(6)]
    same = student(str(tmp_path / "t.ckpt"), teacher_backbone=None)
    fit(tmp_path, same, data, max_epochs=1)
    data.class_names = [f"other {i}" for i in range(6)]
    with pytest.raises(InputError, match=r"model\.teacher: the weights were trained on other classes"):
        fit(tmp_path, student(str(tmp_path / "t.ckpt"), teacher_backbone=None), data, max_epochs=1)
