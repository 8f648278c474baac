"""SIGKILL at random moments: a run that is resumed as often as it takes ends as if nothing had happened."""

import csv
import os
import random
import signal

import pytest
import torch

from locat_lightning.commands.fit import main
from tests.commands.runs import BEST, FIT, LAST, RUN
from tests.commands.test_killed import differences

pytestmark = pytest.mark.usefixtures("workplace")

KILLS, SEED = 20, 0
SECONDS = (0.3, 4.0)  # from a process's start: while it starts, trains, measures, writes
RUN_OF_MANY = [
    "--trainer.max_epochs",
    "40",
    "--checkpoint.every_n_train_steps",
    "1",
    "--data.num_workers",
    "1",
]
RUN_OF_MANY += [
    "--knn.every_n_epochs",
    "4",
    "--knn.k",
    "3",
    "--checkpoint.monitor",
    "val/loss",
    "--checkpoint.mode",
    "min",
]
CLOCKS = ("train/images_per_s", "train/data_wait")  # columns that say how fast it was


def rows(table):
    with table.open() as file:
        for row in csv.DictReader(file):
            yield {name: value for name, value in row.items() if value and not name.startswith(CLOCKS)}


def test_a_run_killed_again_and_again(small, folder, start_locat, record_property, monkeypatch, tmp_path):
    place, kills = random.Random(SEED), 0
    options = [*FIT, *small, *RUN_OF_MANY]
    for _ in range(10 * KILLS):
        resume = ["--ckpt_path", str(LAST)] if LAST.is_file() else []
        process, output = start_locat(*options, *resume)
        process.join(place.uniform(*SECONDS) if kills < KILLS else 120)
        if process.exitcode is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        kills += 1
        process.join()
        for checkpoint in RUN.glob("checkpoints/*.ckpt"):
            torch.load(checkpoint, weights_only=True)
        assert not resume or LAST.is_file()
        if not LAST.is_file():  # nothing to resume from yet: the next one begins anew
            RUN.exists() and RUN.rename(f"before_{kills}")
    assert process.exitcode == 0, output.read_text()

    whole = tmp_path / "whole"
    whole.mkdir()
    monkeypatch.chdir(whole)
    main(options)
    for name in (BEST, LAST):
        expected, found = (torch.load(each, weights_only=True) for each in (name, tmp_path / name))
        assert differences(expected["state_dict"], found["state_dict"]) == [], name
    assert list(rows(tmp_path / RUN / "metrics.csv")) == list(rows(RUN / "metrics.csv"))
    record_property("SIGKILL at random moments", f"{kills} of a run that ends as if there had been none")
