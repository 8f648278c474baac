"""Runs of one name that start together, and resumes of one run that start together."""

from pathlib import Path

import pytest
import torch

from tests.commands.runs import FIT, LAST

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
    longer = ["--trainer.max_epochs", "30", "--allow_changes", "true"]
    started = [start_locat("fit", "--ckpt_path", str(LAST), *longer) for _ in range(3)]
    codes = []
    for process, output in started:
        process.join(200)
        codes.append(process.exitcode)
        if process.exitcode:
            assert "another process is training in" in output.read_text()
    assert sorted(codes) == [0, 2, 2]
    assert torch.load(LAST, weights_only=True)["global_step"] == 90
    record_property("resumes started together", "3, of which one trained")
