"""When a run that is told to ends, and which process it waits for: see tests/commands and tests/faults."""

import os
import signal
import time

import pytest

from locat_lightning.callbacks import interrupts
from locat_lightning.callbacks.interrupts import LAUNCHED_BY, Interrupts
from tests.methods.runs import trainer


@pytest.mark.parametrize("is_of_the_run", [True, False])
def test_only_a_process_of_the_run_is_missed(monkeypatch, is_of_the_run):
    """A run within a script leaves no trace for those that a launcher starts later."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv(LAUNCHED_BY, str(os.getppid() if is_of_the_run else os.getpid()))
    running = Interrupts(trainer(), lambda: None)
    assert os.environ[LAUNCHED_BY] == str(os.getpid())
    running._look()
    assert running._parent == (os.getppid() if is_of_the_run else 0)
    assert not running._lost
    with running:
        pass
    assert LAUNCHED_BY not in os.environ


def tell_this_process():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)


@pytest.fixture
def running():
    """The interrupts of a run, while it runs."""
    with Interrupts(trainer(), lambda: None) as interrupts:
        yield interrupts


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_validation_batch_start", "on_test_batch_start"])
def test_a_run_ends_at_the_next_batch_not_where_it_is(running, hook):
    """What is raised within a lock or a fork would be lost, or leave the lock as it is."""
    tell_this_process()
    with pytest.raises(SystemExit, match=str(128 + signal.SIGINT)):
        getattr(running, hook)(running.trainer, None, None, 0)


def test_a_second_signal_ends_it_where_it_is(running):
    tell_this_process()
    with pytest.raises(SystemExit, match=str(128 + signal.SIGINT)):
        tell_this_process()


def test_it_ends_by_itself_where_no_batch_follows(running, monkeypatch):
    monkeypatch.setattr(interrupts, "PATIENCE", 0.1)
    tell_this_process()
    with pytest.raises(SystemExit, match=str(128 + signal.SIGINT)):
        time.sleep(10)


def test_no_signal_ends_a_batch_under_way(running):
    running.trainer.fit_loop.epoch_loop.batch_progress.increment_started()
    tell_this_process()
    tell_this_process()
    with pytest.raises(SystemExit, match=str(128 + signal.SIGINT)):
        running.on_train_epoch_end(running.trainer, None)
