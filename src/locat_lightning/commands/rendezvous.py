"""How the processes of a job of torchrun agree on how often it was started, and where they meet."""

import os
import socket
import time
from contextlib import suppress
from random import SystemRandom
from typing import Any
from uuid import uuid4

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from locat.jobs import COUNTS, identity


def meet() -> None:
    """Have all processes of this start agree how often the command was restarted, and meet where nobody was.

    torchrun counts restarts on each machine by itself; one whose processes were well does not count. After
    the first start they meet in a store of their own, the first one's: in torchrun's, where torch (2.15) lets
    them meet, those before them have left their addresses, and some would wait for processes that are gone.
    """
    own = os.environ
    if own.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    store = TCPStore(own["MASTER_ADDR"], int(own["MASTER_PORT"]), is_master=False)
    if own["RANK"] != "0":
        said = _ask(store, int(own["RANK"]))
    else:
        starts, restarts = store.add("locat/starts", 1), store.add(f"locat/starts/{identity()}", 1) - 1
        said = _tell(store, int(own["WORLD_SIZE"]), f"{restarts} {_place() if starts > 1 else ''}")
    own[COUNTS[1]], *place = said.split()
    if place:
        own |= {"MASTER_ADDR": place[0], "MASTER_PORT": place[1], "TORCHELASTIC_USE_AGENT_STORE": "False"}


def _place() -> str:
    """Return a host and a port where the first process can be reached."""
    # Those above are given to outgoing connections, which might take one before this process listens.
    ports = SystemRandom().sample(range(20_000, 32_768), 100)
    port = next(port for port in ports if _is_free(port))
    own = os.environ
    host = own["MASTER_ADDR"] if own["LOCAL_WORLD_SIZE"] == own["WORLD_SIZE"] else socket.getfqdn()
    return f"{host} {port}"


def _is_free(port: int) -> bool:
    with suppress(OSError), socket.socket() as free:
        free.bind(("", port))
        return True
    return False


def _tell(store: Any, processes: int, message: str) -> str:
    """Answer all other processes of this start, and return what they were told.

    The store may hold questions of processes that are gone: each is answered once, and the first process
    waits until as many as there are have heard it.
    """
    own, answered = uuid4().hex, set[bytes]()
    while store.add(f"locat/heard/{own}", 0) < processes - 1:
        for rank in range(1, processes):
            asked = f"locat/asked/{rank}"
            if store.check([asked]) and (question := store.get(asked)) not in answered:
                store.set(f"locat/answers/{question.decode()}", f"{own} {message}")
                answered.add(question)
        time.sleep(0.02)
    return message


def _ask(store: Any, rank: int) -> str:
    """Return what the first process of this start tells the others."""
    question = uuid4().hex
    store.set(f"locat/asked/{rank}", question)
    teller, _, message = store.get(f"locat/answers/{question}").decode().partition(" ")
    store.add(f"locat/heard/{teller}", 1)
    return str(message)
