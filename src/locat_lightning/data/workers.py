"""When a process that reads images ends: with its run, whoever else gets a signal."""

import os
import signal
import sys
import tempfile
import traceback
from multiprocessing import parent_process
from multiprocessing.queues import Queue
from threading import Thread, Timer
from typing import Any

from locat_lightning.errors import InputError

# Seconds that a training process has to end its workers, before they obey others: Slurm's KillWait.
GRACE = 30
# Bytes that a socket's path may have, and those that multiprocessing adds to the temporary folder's.
LONGEST, ADDED = 107, 32


def check_temporary_folder() -> None:
    """Check that workers can hand over images in the system's temporary folder, where they would wait."""
    if (length := len(os.fsencode(tempfile.gettempdir()))) > LONGEST - ADDED:
        raise InputError(
            f"TMPDIR: the name of a temporary folder has {length} bytes, but processes that read images can "
            f"only use one of at most {LONGEST - ADDED}: set TMPDIR=/tmp, or --data.num_workers 0"
        )


def end_with_the_run(worker: int) -> None:
    """Have a worker obey a SIGTERM of the process that trains at once, one of others later, and no Ctrl-C.

    A scheduler sends SIGTERM to all processes of a job, a terminal SIGINT, and the training process still
    needs its workers to end its batch. On macOS and Windows, where the sender of a signal is unknown, a
    worker obeys every SIGTERM at once.

    A worker whose run ends while a batch is on its way is silent about it: the run itself reports the reason.
    One that cannot send a batch ends, as the run would wait for the batch.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):  # a scheduler sends it to all processes before it ends a job
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    sys.excepthook = _unless_the_receiver_left
    # Private: what a subclass would override, but DataLoader makes the queue.
    Queue._on_queue_feeder_error = staticmethod(_end_unsent)  # type: ignore[attr-defined]
    parent = parent_process()
    if parent is not None and hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        Thread(target=_end_when_told, args=(parent.pid,), daemon=True).start()


def _unless_the_receiver_left(kind: type[BaseException], *error: Any) -> None:
    if not issubclass(kind, EOFError | ConnectionError):
        sys.__excepthook__(kind, *error)


def _end_unsent(error: Exception, batch: Any) -> None:
    if "shared memory" in str(error) and hasattr(signal, "SIGBUS"):
        # As the system ends a worker where a page is missing, which torch explains.
        os.kill(os.getpid(), signal.SIGBUS)
    traceback.print_exception(error)
    os._exit(1)


def _end_when_told(by: int | None) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != by:
        Timer(GRACE, os._exit, (0,)).start()
    os._exit(0)
