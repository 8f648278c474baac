"""Which process a run waits for: the others are told and lost in tests/commands and tests/faults."""

import os

import pytest

from locat_lightning.callbacks.interrupts import LAUNCHED_BY, Interrupts
from tests.methods.runs import trainer


@pytest.mark.parametrize("is_of_the_run", [True, False])
def test_only_a_process_of_the_run_is_missed(monkeypatch, is_of_the_run):
    """A run within a script leaves no trace for those that a launcher starts later."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv(LAUNCHED_BY, str(os.getppid() if is_of_the_run else os.getpid()))
    interrupts = Interrupts(trainer(), lambda: None)
    assert os.environ[LAUNCHED_BY] == str(os.getpid())
    interrupts._look()
    assert interrupts._parent == (os.getppid() if is_of_the_run else 0)
    assert not interrupts._lost
    with interrupts:
        pass
    assert LAUNCHED_BY not in os.environ
