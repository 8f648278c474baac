"""When a process that reads images ends: with its run, whoever else gets a signal."""

import os
import signal
import sys
from multiprocessing import parent_process
from threading import Thread, Timer
from typing import Any

# Seconds that a training process has to end its workers, before they obey others: Slurm's KillWait.
GRACE = 30


def end_with_the_run(worker: int) -> None:
    """Have a worker obey a SIGTERM of the process that trains at once, and one of others later.

    A scheduler sends SIGTERM to all processes of a job, and the training process still needs its workers to
    save a checkpoint. On macOS and Windows, where the sender of a signal is unknown, a worker obeys every
    SIGTERM at once.

    A worker whose run ends while a batch is on its way is silent about it: the run itself reports the reason.
    """
    sys.excepthook = _unless_the_receiver_left
    parent = parent_process()
    if parent is not None and hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        Thread(target=_end_when_told, args=(parent.pid,), daemon=True).start()


def _unless_the_receiver_left(kind: type[BaseException], *error: Any) -> None:
    if not issubclass(kind, EOFError | ConnectionError):
        sys.__excepthook__(kind, *error)


def _end_when_told(by: int | None) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != by:
        Timer(GRACE, os._exit, (0,)).start()
    os._exit(0)
