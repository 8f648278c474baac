"""Where the processes meet that torchrun has started again."""

import os
import socket

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from locat.jobs import COUNTS


def meet_anew() -> None:
    """Have processes that torchrun has restarted meet in a store of their own: the first one's.

    torch (2.15) lets them meet in torchrun's store, where those before them have left their addresses: some
    would wait for processes that are gone.
    """
    own, count = os.environ, os.environ.get(COUNTS[1], "0")
    if count == "0" or own.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    agent = TCPStore(own["MASTER_ADDR"], int(own["MASTER_PORT"]), is_master=False)
    if own["RANK"] == "0":
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        host = own["MASTER_ADDR"] if own["LOCAL_WORLD_SIZE"] == own["WORLD_SIZE"] else socket.getfqdn()
        agent.set(f"locat/meet/{count}", f"{host} {port}")
    host, port = agent.get(f"locat/meet/{count}").decode().split()
    os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "False"}
