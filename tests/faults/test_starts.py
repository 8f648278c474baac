"""Runs of one name that start together, and resumes of one run that start together."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.commands.runs import FIT, LAST
from tests.faults.conftest import is_sound

pytestmark = pytest.mark.usefixtures("workplace")

STARTS = 6


def test_runs_that_start_together_have_a_directory_each(small, start_locat, record_property):
    started = [start_locat(*FIT, *small, "--seed_everything", str(seed)) for seed in range(STARTS)]
    for process, output in started:
        process.join(200)
        assert process.exitcode == 0, output.read_text()
    runs = list(Path("runs/classify_tiny").iterdir())
    weights = {
        torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]["backbone.cls_token"]
        .sum()
        .item()
        for run in runs
    }
    assert len(runs) == len(weights) == STARTS  # no two of a seed: none wrote over another
    record_property("runs started together", f"{STARTS}, each with a directory of its own")


def test_of_resumes_that_start_together_one_trains(trained, start_locat, record_property):
    endless = ["--trainer.max_epochs", "99999", "--allow_changes", "true"]
    started = [start_locat("fit", "--ckpt_path", str(LAST), *endless) for _ in range(3)]
    deadline = time.monotonic() + 200
    while sum(process.is_alive() for process, _ in started) > 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    [training] = [process for process, _ in started if process.is_alive()]
    for process, output in started:
        if process is not training:
            assert process.exitcode == 2
            assert "another process is training in" in output.read_text()
    os.kill(training.pid, signal.SIGTERM)
    training.join(60)
    assert training.exitcode == 128 + signal.SIGTERM
    assert is_sound(LAST)
    record_property("resumes started together", "3, of which one trained")
