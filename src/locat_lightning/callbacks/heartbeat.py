"""Signs of life of all processes of a run, so that one that vanishes with its machine is missed.

A process that waits for another in NCCL or Gloo waits for up to the timeout of the process group, which is
half an hour by default. Here each process counts up in the store of torch.distributed, which the first
process keeps, and that one looks whether all of them do.
"""

import threading
import time
from contextlib import suppress
from typing import Any

EVERY = 5  # seconds between two signs
LOST_AFTER = 60  # seconds without one
AT_THE_END = 2  # seconds to tell the others
ENDED = b"ended"  # the last sign of a process that ends in order
OUT_OF_REACH = "the first process of the run is out of reach"


class Heartbeat:
    """Give signs of life, and look after those of the others, until it is stopped.

    The first process looks after all others, each of these after the first.

    Args:
        store: a store of torch.distributed that nobody else uses.
        rank: of this process.
        processes: how many there are.
        every: seconds between two signs.
        lost_after: seconds without one, after which a process counts as lost.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        processes: int,
        *,
        every: float = EVERY,
        lost_after: float = LOST_AFTER,
    ) -> None:
        self._store, self._rank = store, rank
        self._watched = range(1, processes) if rank == 0 else range(1)
        self._every, self._lost_after = every, lost_after
        self._stopped = threading.Event()
        self._answered = time.monotonic()  # when the store last did
        self._lost = ""
        store.set(_key(rank), "0")
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def lost(self) -> str:
        """Which process was lost, as a sentence; "" while none is."""
        late = time.monotonic() - self._answered > self._lost_after + self._every
        if late and not (self._lost or self._stopped.is_set()):
            self._lost = OUT_OF_REACH
        return self._lost

    def stop(self) -> None:
        """Tell the others that this process ends in order.

        A thread that is still in torch's store when Python ends would abort the process.
        """
        self._stopped.set()
        self._thread.join(AT_THE_END)

    def _run(self) -> None:
        signs, seen = 0, dict[int, tuple[bytes, float]]()
        while not (self._stopped.wait(self._every) or self._lost):
            signs += 1
            try:
                self._store.set(_key(self._rank), str(signs))
                # Who has not begun is not waited for: a process may list its images for long.
                there = [rank for rank in self._watched if rank in seen or self._store.check([_key(rank)])]
                found = self._store.multi_get([_key(rank) for rank in there])
            except Exception:
                # Of many kinds. It may pass; if it lasts, the first process, which has the store, is lost.
                continue
            self._answered = now = time.monotonic()
            for rank, sign in zip(there, found, strict=True):
                before, since = seen.get(rank, (b"", now))
                if sign not in (before, ENDED):
                    seen[rank] = sign, now
                elif sign != ENDED and now - since > self._lost_after:
                    self._lost = f"process {rank} of the run has given no sign for {self._lost_after:g} s"
        with suppress(Exception):  # the first process has ended already
            self._store.set(_key(self._rank), ENDED.decode())


def _key(rank: int) -> str:
    return f"locat/alive/{rank}"
