"""Signals in the processes that read images."""

import os
import signal
import sys
from multiprocessing import parent_process
from threading import Thread
from types import TracebackType


def _leave_the_end_to_the_run(worker: int) -> None:
    """A scheduler sends SIGTERM to all processes of a job: a worker heeds only the one that trains.

    A worker that heeded nobody would keep alive a process that ends while it holds an unfinished iterator. On
    macOS and Windows, where the sender cannot be told, a worker heeds all.

    A run that is interrupted while it takes a batch says so itself: its worker, which hands batches over from
    a thread, does not complain as well.
    """
    sys.excepthook = _unless_the_receiver_left
    parent = parent_process()
    if parent is not None and hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        Thread(target=_end_when_told, args=(parent.pid,), daemon=True).start()


def _unless_the_receiver_left(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    if not issubclass(kind, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, traceback)


def _end_when_told(by: int | None) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != by:
        pass
    os._exit(0)
