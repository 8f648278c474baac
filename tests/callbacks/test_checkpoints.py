"""Which checkpoints a run leaves behind."""

from contextlib import suppress
from functools import partial
from itertools import islice

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from timm.layers import DropPath
from torch.utils.data import DataLoader

from locat_lightning.callbacks.checkpoints import Checkpoints
from locat_lightning.data.classification import ImageData
from locat_lightning.tasks import Classification
from locat_lightning.tasks.average import WeightAverage
from tests.conftest import write_images

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers:UserWarning",  # nothing is read from disk here
)


class Worsening(BoringModel):
    """Best in its first epoch, and stops at a step if told to."""

    def __init__(self, stop_at=None):
        super().__init__()
        self.stop_at = stop_at

    def training_step(self, batch, batch_idx):
        if self.global_step == self.stop_at:
            raise RuntimeError("stop")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.log("score", -float(self.current_epoch))


def fit(folder, module, epochs=3, **options):
    named = {"filename": "best", "monitor": "score", "mode": "max", "save_last": True}
    callback = Checkpoints(folder, save_on_exception=True, enable_version_counter=False, **(named | options))
    run = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        limit_train_batches=2,
        limit_val_batches=1,
        logger=False,
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    run.fit(module)


def step_of(path):
    return torch.load(path, weights_only=True)["global_step"]


def test_last_is_the_last_and_best_the_best(tmp_path):
    fit(tmp_path, Worsening())
    assert {path.name for path in tmp_path.iterdir()} == {"best.ckpt", "last.ckpt"}
    assert (step_of(tmp_path / "best.ckpt"), step_of(tmp_path / "last.ckpt")) == (2, 6)


@pytest.mark.parametrize("average", [None, WeightAverage(0.5)])
def test_weights_are_kept_after_some_epochs(average, tmp_path):
    module = Worsening()
    saving = Checkpoints(
        tmp_path, filename="best", monitor="score", mode="max", save_last=True, keep=[2, 3, 9]
    )
    run = Trainer(
        accelerator="cpu",
        max_epochs=3,
        limit_train_batches=2,
        limit_val_batches=1,
        logger=False,
        callbacks=[saving, *filter(None, [average])],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    run.fit(module)
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert {path.name for path in tmp_path.glob("epoch_*")} == {"epoch_2.ckpt", "epoch_3.ckpt"}
    assert step_of(tmp_path / "epoch_2.ckpt") == 4
    kept = torch.load(tmp_path / "epoch_3.ckpt", weights_only=True)
    torch.testing.assert_close(kept["state_dict"], last["state_dict"], rtol=0, atol=0)
    assert not {"optimizer_states", "callbacks", "loops", "current_model_state"} & kept.keys()
    assert average is None or "current_model_state" in last


@pytest.mark.parametrize("stop_at", [3, 4])
def test_a_run_cut_off_leaves_the_best_as_it_is(tmp_path, stop_at):
    with pytest.raises(RuntimeError, match="stop"):
        fit(tmp_path, Worsening(stop_at))
    assert {path.name for path in tmp_path.iterdir()} == {"best.ckpt", "last.ckpt"}
    assert (step_of(tmp_path / "best.ckpt"), step_of(tmp_path / "last.ckpt")) == (2, stop_at)
    progress = torch.load(tmp_path / "last.ckpt", weights_only=True)["loops"]["fit_loop"]
    assert progress["epoch_loop.batch_progress"]["total"]["processed"] == stop_at


def test_a_run_that_fails_at_once_leaves_none(tmp_path):
    with pytest.raises(RuntimeError, match="stop"):
        fit(tmp_path, Worsening(0))
    assert list(tmp_path.iterdir()) == []


def test_rarer_checkpoints(tmp_path):
    fit(tmp_path, Worsening(), epochs=3, every_n_epochs=2)
    assert step_of(tmp_path / "best.ckpt") == 4
    assert step_of(tmp_path / "last.ckpt") == 6  # at the end in any case


def state_of(directory, best):
    """The state that a checkpoint has of a run in `directory` with a best file."""
    saving = Checkpoints(directory, monitor="score", mode="max")
    own = {"best_model_path": str(best), "kth_best_model_path": str(best), "kth_value": torch.tensor(0.5)}
    return saving.state_dict() | own | {"best_k_models": {str(best): torch.tensor(0.5)}}


def test_a_state_from_elsewhere_deletes_no_file(tmp_path):
    """A new best checkpoint replaces the one before it: that is one of this run's own."""
    precious = tmp_path / "precious.ckpt"
    precious.touch()
    saving = Checkpoints(tmp_path / "run", monitor="score", mode="max")
    saving.load_state_dict(state_of(tmp_path / "run", precious))
    assert (saving.best_k_models, saving.best_model_path, saving.kth_best_model_path) == ({}, "", "")


def test_a_run_that_was_moved_knows_its_best(tmp_path):
    best = tmp_path / "moved" / "best.ckpt"
    best.parent.mkdir()
    best.touch()
    saving = Checkpoints(best.parent, monitor="score", mode="max")
    saving.load_state_dict(state_of(tmp_path / "run", tmp_path / "run" / "best.ckpt"))
    assert saving.best_k_models == {str(best): torch.tensor(0.5)}
    assert saving.best_model_path == saving.kth_best_model_path == str(best)
    assert saving.kth_value == 0.5


BATCHES = 4


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("checkpoints") / "images")


@pytest.fixture(scope="module")
def in_one_go():
    """What runs that nothing cut off ended with, which several tests compare with."""
    return {}


class Cut(Callback):
    """Stops a run at a hook of a batch."""

    def __init__(self, hook, epoch, batch):
        self.at = (epoch, batch)
        setattr(self, hook, self.stop)

    def stop(self, trainer, module, *batch):
        if (trainer.current_epoch, batch[-1]) == self.at:
            raise RuntimeError("stop")


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end"])
@pytest.mark.parametrize(("accumulate", "batch"), [(1, 2), (2, 1), (2, 2), (2, 3), (3, 3)])
def test_a_run_cut_off_anywhere_ends_as_one_in_one_go(images, in_one_go, tmp_path, hook, accumulate, batch):
    """Of 18 images, 4 batches an epoch: with three of them a step, the last step has one batch alone.

    Mixup, cutmix and drop path draw the same numbers, though another process begins with others.
    """

    def run(*callbacks, **options):
        seed_everything(0)
        size = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2}
        task = Classification(backbone_args=size | {"drop_path_rate": 0.5}, warmup_epochs=0, lr=1e-2)
        if options:
            seed_everything(5)
        data = ImageData(root=str(images), img_size=32, batch_size=4, num_workers=0)
        saving = Checkpoints(tmp_path / "run", filename="best", save_last=True, save_on_exception=True)
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=2,
            accumulate_grad_batches=accumulate,
            limit_val_batches=0,
            logger=False,
            callbacks=[*callbacks, saving] if callbacks or options else [],
            enable_checkpointing=bool(callbacks or options),
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        if callbacks:
            with pytest.raises(RuntimeError, match="stop"):
                trainer.fit(task, data)
        else:
            trainer.fit(task, data, **options)
        assert callbacks or trainer.num_training_batches == BATCHES
        assert task.mixup is not None
        assert any(isinstance(module, DropPath) for module in task.modules())
        return trainer.global_step, task.state_dict()

    if accumulate not in in_one_go:
        in_one_go[accumulate] = run()
    steps, whole = in_one_go[accumulate]
    run(Cut(hook, 1, batch))
    resumed_steps, resumed = run(ckpt_path=str(tmp_path / "run" / "last.ckpt"), weights_only=True)
    assert resumed_steps == steps
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0)


class Steps(Callback):
    """Notes images and learning rate of each optimizer step; stops after so many batches of an epoch."""

    def __init__(self, epoch=None, batches=None):
        self.cut = (epoch, batches)
        self.images, self.rates, self.batch, self.begun = {}, [], [], []

    def on_train_batch_start(self, trainer, module, batch, number):
        if (trainer.current_epoch, number) == self.cut:
            raise RuntimeError("stop")
        self.begun += batch.indices.tolist()

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.images.setdefault(trainer.current_epoch, []).extend(self.begun)
        self.begun.clear()
        self.rates.append(optimizer.param_groups[0]["lr"])


def steps_of(folder, run, batch_size, accumulate, steps, **resume):
    data = ImageData(root=str(folder), img_size=32, batch_size=batch_size, num_workers=0)
    size = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 1, "num_heads": 2}
    task = Classification(backbone_args=size, warmup_epochs=1, lr=1e-3)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=3,
        accumulate_grad_batches=accumulate,
        limit_val_batches=0,
        logger=False,
        callbacks=[steps, Checkpoints(run, save_last=True, save_on_exception=True)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with suppress(RuntimeError):
        trainer.fit(task, data, **resume)
    return trainer


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize(
    ("before", "cut", "after"),
    [
        ((3, 1), 1, (6, 1)),
        ((3, 1), 2, (6, 1)),
        ((3, 1), 5, (6, 1)),
        ((3, 1), 5, (9, 1)),
        ((6, 1), 1, (3, 1)),
        ((6, 1), 2, (9, 1)),
        ((3, 1), 2, (18, 1)),
        ((3, 1), 2, (64, 1)),
        ((3, 2), 3, (6, 1)),
        ((3, 2), 3, (3, 1)),
        ((3, 1), 3, (2, 4)),
        ((2, 4), 7, (3, 2)),
        ((4, 1), 3, (3, 1)),
        ((2, 1), 8, (5, 1)),
        ((4, 1), 1, (4, 1)),
    ],
    ids=str,
)
def test_a_run_with_other_batches_goes_on_with_the_images_it_has_not_seen(
    images, in_one_go, tmp_path, before, cut, after
):
    """Of 18 images; batches and accumulation before and after the second epoch is cut off."""
    steps_of(images, tmp_path, *before, begun := Steps(1, cut))
    last = tmp_path / "last.ckpt"
    trainer = steps_of(images, tmp_path, *after, rest := Steps(), ckpt_path=str(last), weights_only=True)
    assert trainer.current_epoch == 3
    assert len(rest.images[2]) == (18 // after[0] * after[0] or 18)
    both = begun.images[1] + rest.images[1]
    assert len(both) == len(set(both))
    assert len(begun.images.get(1, ())) == cut * before[0] - cut % before[1] * before[0]
    dropped = 18 % after[0] if after[0] < 18 else 0
    assert len(both) == 18 - dropped or len(begun.images[1]) >= 18 - dropped
    # The schedule goes on where it was, and ends with the run.
    if after not in in_one_go:
        steps_of(images, tmp_path / "whole", *after, whole := Steps())
        in_one_go[after] = whole.rates
    assert rest.rates == in_one_go[after][-len(rest.rates) :]
    assert trainer.global_step == len(begun.rates) + len(rest.rates)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
def test_a_run_with_other_batches_twice_repeats_no_image(images, tmp_path):
    """Of 18 images; batches of 4, 3 and 2, the first two cut off in the second epoch."""
    seen, resumed = [], {}
    for size, cut in ((4, 1), (3, 2), (2, None)):
        steps_of(images, tmp_path, size, 1, steps := Steps(1, cut), **resumed)
        seen += steps.images[1]
        resumed = {"ckpt_path": str(tmp_path / "last.ckpt"), "weights_only": True}
    assert sorted(seen) == list(range(18))


class Rows(CSVLogger):
    """Keeps what is logged, by step and names."""

    def __init__(self, folder):
        super().__init__(folder)
        self.rows = {}

    def log_metrics(self, metrics, step=None):
        self.rows[step, *sorted(metrics)] = sorted(metrics.values())


class Measured(BoringModel):
    """Has a validation and, as a probe, a measurement at the end of an epoch."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)["loss"]
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("score", self.layer.weight.sum())

    def on_train_epoch_end(self):
        self.log("probe", self.layer.weight.norm())

    def train_dataloader(self):
        images = torch.randn(BATCHES, 32, generator=torch.Generator().manual_seed(0))
        return Positions(images, self.trainer)


class Positions(DataLoader):
    """Goes on with the next batch, as the loader of our data does."""

    def __init__(self, images, trainer):
        super().__init__(images)
        self.trainer = trainer

    def __iter__(self):
        seen = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        yield from islice(super().__iter__(), seen, None)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class Killed(BaseException):
    pass


class CutAt(Callback):
    """Ends a run at the nth of the hooks that follow a batch."""

    def __init__(self, place=None):
        self.place, self.passed = place, []
        for hook in AFTER_A_BATCH:
            setattr(self, hook, partial(self.passes, hook))

    def passes(self, hook, *arguments):
        self.passed.append(hook)
        if len(self.passed) == self.place:
            raise Killed


AFTER_A_BATCH = ("on_validation_start", "on_validation_batch_end", "on_validation_end", "on_train_epoch_end")
AFTER_A_BATCH = (*AFTER_A_BATCH, "on_train_epoch_start", "on_train_batch_start", "on_train_end")


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty")
@pytest.mark.parametrize("saved", [True, False], ids=["interrupted", "killed"])
@pytest.mark.parametrize(
    "options",
    [
        {"max_epochs": 2},
        {"max_epochs": 2, "limit_val_batches": 0},
        {"max_epochs": 2, "check_val_every_n_epoch": 2},
        {"max_epochs": 2, "val_check_interval": 0.5},
        {"max_steps": 6},
    ],
    ids=str,
)
def test_what_follows_a_batch_is_made_up_for(options, saved, tmp_path):
    """Wherever a run is cut off, its weights, its best ones and its rows are those of a run in one go."""

    def run(name, cut, **resume):
        seed_everything(0)
        monitor = "probe" if "limit_val_batches" in options else "score"
        named = {"filename": "best", "monitor": monitor, "enable_version_counter": False}
        often = {} if monitor == "score" and len(options) > 1 else {"every_n_epochs": 1}
        saving = Checkpoints(
            tmp_path / name, save_last=True, save_on_exception=saved or cut.place is None, **named, **often
        )
        rows = Rows(tmp_path / name)
        trainer = Trainer(
            accelerator="cpu",
            logger=rows,
            log_every_n_steps=1,
            callbacks=[cut, saving],
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **({"limit_val_batches": 2} | options),
        )
        with suppress(Killed):
            trainer.fit(Measured(), weights_only=True, **resume)
        return rows.rows

    whole = run("whole", every := CutAt())
    for place in range(1, len(every.passed) + 1, 3):
        before = run(str(place), CutAt(place))
        last = tmp_path / str(place) / "last.ckpt"
        step = step_of(last) if last.is_file() else 0
        after = run(str(place), CutAt(), ckpt_path=str(last) if step else None)
        before = {key: row for key, row in before.items() if key[0] < step}
        assert before | after == whole, every.passed[place - 1]
        for name in ("best.ckpt", "last.ckpt"):
            expected, found = (
                torch.load(tmp_path / each / name, weights_only=True)["state_dict"]
                for each in ("whole", str(place))
            )
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
