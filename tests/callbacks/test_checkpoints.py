"""Which checkpoints a run leaves behind."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.demos.boring_classes import BoringModel
from timm.layers import DropPath

from locat_lightning.callbacks.checkpoints import Checkpoints
from locat_lightning.data.classification import ImageData
from locat_lightning.tasks import Classification

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
def test_a_run_cut_off_anywhere_ends_as_one_in_one_go(folder, tmp_path, hook, accumulate, batch):
    """Of 18 images, 4 batches an epoch: with three of them a step, the last step has one batch alone.

    Mixup, cutmix and drop path draw the same numbers, though another process begins with others.
    """

    def run(*callbacks, **options):
        seed_everything(0)
        size = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2}
        task = Classification(backbone_args=size | {"drop_path_rate": 0.5}, warmup_epochs=0, lr=1e-2)
        if options:
            seed_everything(5)
        data = ImageData(root=str(folder), img_size=32, batch_size=4, num_workers=0)
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

    steps, whole = run()
    run(Cut(hook, 1, batch))
    resumed_steps, resumed = run(ckpt_path=str(tmp_path / "run" / "last.ckpt"), weights_only=True)
    assert resumed_steps == steps
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0)
