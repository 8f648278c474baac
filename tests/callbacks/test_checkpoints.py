"""Which checkpoints a run leaves behind."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from locat_lightning.callbacks.checkpoints import Checkpoints

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
    assert set(progress["epoch_loop.batch_progress"]["total"].values()) == {stop_at}


def test_a_run_that_fails_at_once_leaves_none(tmp_path):
    with pytest.raises(RuntimeError, match="stop"):
        fit(tmp_path, Worsening(0))
    assert list(tmp_path.iterdir()) == []


def test_rarer_checkpoints(tmp_path):
    fit(tmp_path, Worsening(), epochs=3, every_n_epochs=2)
    assert step_of(tmp_path / "best.ckpt") == 4
    assert step_of(tmp_path / "last.ckpt") == 6  # at the end in any case
