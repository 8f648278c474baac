"""SIGINT and SIGTERM at random moments: one line, the exit code of the signal, nothing lost, nothing left."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.commands.runs import FIT, LAST, RUN
from tests.commands.test_fit_processes import BOTH, wait_until_it_trains
from tests.faults.conftest import children, is_sound, wait_for_the_end_of_all

pytestmark = pytest.mark.usefixtures("workplace")

# Small epochs, so that many moments fall into validation, a fork of workers, and the writing of checkpoints.
ENDLESS = ["--trainer.max_epochs", "99999", "--data.num_workers", "2"]
TRIES = 8


def check(said, code, number):
    assert code in (128 + number, -number), said  # which is the same to a shell
    assert "Traceback" not in said, said
    assert "Exception ignored" not in said, said
    assert RUN.exists() == LAST.is_file(), said
    if LAST.is_file():
        assert is_sound(LAST)
        assert f"resume with: locat fit --ckpt_path {LAST}" in said
        LAST.parents[2].rename(f"done_{time.monotonic_ns()}")  # the next one begins anew
    assert not RUN.parent.exists(), said


@pytest.mark.parametrize("to", ["the process", "all processes"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda each: each.name)
def test_a_signal_at_a_random_moment(number, to, small, start_locat, record_property):
    moment, trained = random.Random(f"{number} {to}"), 0
    for _ in range(TRIES):
        process, output = start_locat(*FIT, *small, *ENDLESS)
        process.join(moment.uniform(0.1, 5))
        (os.kill if to == "the process" else os.killpg)(process.pid, number)
        wait_for_the_end_of_all(process)
        trained += LAST.is_file()
        check(output.read_text(), process.exitcode, number)
    record_property(
        f"{number.name} to {to}", f"{TRIES} at random moments, {trained} of them of a run that trained"
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda each: each.name)
def test_a_signal_while_python_starts(number, small, record_property):
    moment = random.Random(int(number))
    for _ in range(TRIES // 2):
        process = subprocess.Popen(
            [sys.executable, "-m", "locat", *FIT, *small, *ENDLESS],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        time.sleep(moment.uniform(0.3, 8))
        os.killpg(process.pid, number)
        said, _ = process.communicate(timeout=60)
        check(said, process.returncode, number)
    record_property(f"{number.name} from the start of Python on", f"{TRIES // 2}")


@pytest.mark.parametrize("to", ["the first", "the second", "both"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda each: each.name)
def test_a_signal_to_two_processes(number, to, small, start_locat, record_property):
    moment, trained = random.Random(f"{number} {to}"), 0
    for starts in (True, False):
        process, output = start_locat(*FIT, *small, *ENDLESS, *BOTH)
        if not starts:
            wait_until_it_trains(process)
        process.join(moment.uniform(0.1, 4))
        second = [child for child, rank in children(process).items() if rank]
        if to == "both":
            os.killpg(process.pid, number)
        else:
            os.kill(second[0] if to == "the second" and second else process.pid, number)
        wait_for_the_end_of_all(process)
        trained += LAST.is_file()
        check(output.read_text(), process.exitcode, number)
    record_property(f"{number.name} to {to} of two processes", f"2, {trained} of them of a run that trained")
