from pathlib import Path

import pytest
import torch
from jsonargparse.typing import NonNegativeInt
from lightning.pytorch import Trainer

from locat_lightning.commands import resume
from locat_lightning.commands.resume import Change, changes
from locat_lightning.errors import InputError

MODEL = {
    "_class_path": "locat_lightning.methods.Dino",
    "_instantiator": "lightning.pytorch.cli.instantiate_module",
    "backbone": "locatvit_tiny",
    "backbone_args": {"drop_path_rate": 0.1, "img_size": 32},
    "lr": None,
}
DATA = {"_class_path": "locat_lightning.data.MultiViewData", "batch_size": 64}
VIEWS = {"class_path": "locat_lightning.data.views.MultiCrop", "init_args": {"global_scale": [0.4, 1.0]}}
RUN = {"seed_everything": 0, "trainer.max_epochs": 100, "trainer.devices": 8, "trainer.precision": "32-true"}
BEFORE = {"model": MODEL, "data": DATA | {"root": "a", "num_workers": 4, "views": VIEWS}} | RUN


def with_(group=None, **options):
    return BEFORE | {group: BEFORE[group] | options}


def test_a_checkpoint_keeps_a_plain_seed():
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", devices=1)
    assert type(resume.of_trainer(trainer, NonNegativeInt(7))["seed_everything"]) is int
    assert resume.of_trainer(trainer, True)["seed_everything"] is True


def test_what_is_the_same_is_no_change():
    assert changes(BEFORE, BEFORE) == []
    other = {"root": "b", "num_workers": 0, "download": True, "max_unreadable": 3}
    views = VIEWS | {"init_args": {"global_scale": (0.4, 1)}}
    assert changes(BEFORE, with_("data", **other, views=views)) == []
    assert changes(BEFORE, with_("model", _instantiator=None)) == []


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (with_("model", lr=0.1), Change("model.lr", None, 0.1)),
        (with_("model", backbone="vit"), Change("model.backbone", "locatvit_tiny", "vit")),
        (with_("model", warmup_epochs=3), Change("model.warmup_epochs", "not set", 3)),
        (with_("model", _class_path="a.Other"), Change("model", "Dino", "Other")),
        (
            with_("model", backbone_args={"drop_path_rate": 0.2, "img_size": 32}),
            Change("model.backbone_args.drop_path_rate", 0.1, 0.2),
        ),
        (with_("data", batch_size=32), Change("data.batch_size", 64, 32)),
        (
            with_("data", views=VIEWS | {"init_args": {"global_scale": [0.3, 1.0]}}),
            Change("data.views.global_scale", [0.4, 1.0], [0.3, 1.0]),
        ),
        (with_("data", views=VIEWS | {"class_path": "a.Other"}), Change("data.views", "MultiCrop", "Other")),
        (BEFORE | {"seed_everything": 1}, Change("seed_everything", 0, 1)),
        (BEFORE | {"trainer.max_epochs": 200}, Change("trainer.max_epochs", 100, 200)),
        (BEFORE | {"trainer.devices": 4}, Change("trainer.devices", 8, 4)),
    ],
)
def test_a_change_is_found_in_both_directions(now, expected):
    assert changes(BEFORE, now) == [expected]
    assert changes(now, BEFORE) == [Change(expected.option, expected.now, expected.before)]


def test_arguments_that_are_left_out_are_no_arguments():
    none, some = with_("model", backbone_args=None), with_("model", backbone_args={"depth": 2})
    assert changes(none, with_("model", backbone_args={})) == []
    assert changes(none, some) == [Change("model.backbone_args.depth", "not set", 2)]


def test_classes_that_the_data_tell_are_no_change():
    three = with_("model", num_classes=3, class_names=["ant", "bee", "cat"])
    untold = with_("model", num_classes=None)
    assert changes(three, untold) == []
    assert changes(three, with_("model", num_classes=4)) == [Change("model.num_classes", 3, 4)]


def test_what_a_checkpoint_does_not_record_is_not_compared():
    checkpoint = {"hyper_parameters": MODEL, "state_dict": {}}
    assert changes(resume.of_checkpoint(checkpoint), BEFORE) == []
    assert changes(resume.of_checkpoint(checkpoint), with_("model", lr=1)) == [Change("model.lr", None, 1)]


def test_a_checkpoint_keeps_what_the_trainer_says(tmp_path):
    def trainer(**options):
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        return Trainer(accelerator="cpu", **(quiet | options))

    record = resume.of_trainer(trainer(max_epochs=2), 0)
    checkpoint = {"hyper_parameters": MODEL, "datamodule_hyper_parameters": DATA, resume.RECORD: record}
    torch.save(checkpoint, tmp_path / "last.ckpt")
    before = resume.of_checkpoint(torch.load(tmp_path / "last.ckpt", weights_only=True))
    now = {"model": MODEL, "data": DATA}
    assert changes(before, now | resume.of_trainer(trainer(max_epochs=2, precision=32), 0)) == []
    other = trainer(max_epochs=3, accumulate_grad_batches=2, devices=2, precision="bf16-mixed")
    assert [str(change) for change in changes(before, now | resume.of_trainer(other, 7))] == [
        "seed_everything was 0 and is 7 now",
        "trainer.accumulate_grad_batches was 1 and is 2 now",
        "trainer.devices was 1 and is 2 now",
        "trainer.max_epochs was 2 and is 3 now",
        "trainer.precision was 32-true and is bf16-mixed now",
    ]


def test_a_change_is_refused_or_said(caplog):
    now, path = with_("model", lr=0.1) | {"trainer.max_epochs": 200}, Path("runs/last.ckpt")
    with pytest.raises(InputError) as refused:
        resume.check(BEFORE, now, allowed=False, checkpoint=path)
    assert str(refused.value) == (
        "resuming from runs/last.ckpt, model.lr was null and is 0.1 now; "
        "trainer.max_epochs was 100 and is 200 now: "
        "leave the options out (locat fit --ckpt_path runs/last.ckpt takes those of the run), "
        "or allow the change with --allow_changes true"
    )
    more = now | {"trainer.devices": 1, "trainer.precision": "16-mixed"}
    with pytest.raises(InputError, match=r"model.lr was.*trainer.max_epochs was.*; and 1 more: leave"):
        resume.check(BEFORE, more, allowed=False, checkpoint=path)
    with caplog.at_level("INFO"):
        resume.check(BEFORE, now, allowed=True, checkpoint=path)
    assert [record.message for record in caplog.records] == [
        "resuming with a change: model.lr was null and is 0.1 now",
        "resuming with a change: trainer.max_epochs was 100 and is 200 now",
    ]
    resume.check(BEFORE, BEFORE, allowed=False, checkpoint=path)
