"""SIGKILL at random moments: a run that is resumed as often as it takes ends as if nothing had happened."""

import csv
import os
import random
import signal
import time

import pytest
import torch

from locat_lightning.commands.fit import main
from tests.commands.runs import BEST, FIT, LAST, RUN
from tests.commands.test_fit_processes import BOTH
from tests.commands.test_killed import differences
from tests.faults.conftest import children, is_sound, wait_for_the_end_of_all

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


def wait_for_a_checkpoint(process):
    deadline = time.monotonic() + 120
    while not LAST.is_file() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_processes_is_killed(rank, small, start_locat, record_property):
    process, output = start_locat(*FIT, *small, *RUN_OF_MANY, *BOTH)
    wait_for_a_checkpoint(process)
    process.join(random.Random(rank).uniform(0, 2))
    second = next(child for child, of_rank in children(process).items() if of_rank)
    os.kill(second if rank else process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while "--ckpt_path last" not in output.read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.join(60)
    said = output.read_text()
    assert process.exitcode == (1 if rank else -signal.SIGKILL), said
    assert "Traceback" not in said, said
    assert "frame #" not in said, said  # torch's
    assert said.splitlines()[-1].endswith("resume the run with --ckpt_path last"), said
    assert is_sound(LAST)
    record_property("SIGKILL of one of two processes", f"rank {rank}")


def test_a_process_that_reads_images_is_killed(small, start_locat, record_property):
    process, output = start_locat(*FIT, *small, *RUN_OF_MANY, "--trainer.max_epochs", "9999")
    wait_for_a_checkpoint(process)
    os.kill(max(children(process)), signal.SIGKILL)
    wait_for_the_end_of_all(process)
    said = output.read_text()
    assert process.exitcode == 1, said
    assert "Traceback" not in said, said
    assert "lower data.num_workers" in said.splitlines()[-1]
    assert is_sound(LAST)
    record_property("SIGKILL of a process that reads images", "1")
