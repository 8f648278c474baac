"""Predictions are written by the task, into the run's directory."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from locat_lightning.callbacks.predictions import Predictions

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")


class Silent(LightningModule):
    def predict_step(self, batch, _):
        return 2 * batch


class Writer(Silent):
    def __init__(self):
        super().__init__()
        self.written = []

    def write_predictions(self, prediction, data, directory):
        self.written.append((prediction.tolist(), data, directory))

    def finish_predictions(self, data, directory):
        return f"{len(self.written)} batches: {directory}"


def predict(module, folder):
    options = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(default_root_dir=folder, logger=False, callbacks=[Predictions()], **options)
    trainer.predict(module, DataLoader(torch.arange(3), batch_size=2), return_predictions=False)


def test_each_batch_is_handed_to_the_task_and_the_end_is_told(tmp_path, caplog):
    module = Writer()
    predict(module, tmp_path)
    assert module.written == [([0, 2], None, Path(tmp_path)), ([4], None, Path(tmp_path))]
    assert f"2 batches: {tmp_path}" in caplog.text


def test_a_users_own_module_predicts_without(tmp_path, caplog):
    predict(Silent(), tmp_path)
    assert "nothing is written: Silent has no method write_predictions" in caplog.text
