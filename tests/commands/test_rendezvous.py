"""Processes of a start agree with each other, and with none of those before them."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.distributed import HashStore

from locat_lightning.commands.rendezvous import _ask, _tell

# The second process fails in its first start, when the first one is well.
PROCESS = """
import os, sys, time
import torch.distributed as dist
from locat_lightning.commands.rendezvous import meet

counted = os.environ["TORCHELASTIC_RESTART_COUNT"]
meet()
agreed = os.environ["TORCHELASTIC_RESTART_COUNT"]
dist.init_process_group("gloo")
dist.barrier()
open(os.environ["RANK"], "a").write(f"{counted} {agreed}, ")
if agreed == "0":
    time.sleep(0 if os.environ["RANK"] == "1" else 60)
    sys.exit(1)
"""


def test_processes_hear_the_first_of_their_own_start():
    store = HashStore()
    store.set("locat/asked/1", "asked by one that is gone")
    for start in "0", "1":
        with ThreadPoolExecutor(3) as processes:
            heard = [processes.submit(_ask, store, rank) for rank in (1, 2)]
            heard.append(processes.submit(_tell, store, 3, f"{start} host 29500"))
            assert [each.result(10) for each in heard] == [f"{start} host 29500"] * 3
        store.set("locat/asked/2", f"asked after start {start}")


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.usefixtures("workplace")
def test_two_machines_agree_though_one_alone_has_counted_a_restart():
    Path("process.py").write_text(PROCESS)
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--max-restarts", "1"]
    command += [
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:29578",
        "--rdzv-id",
        "1",
        "process.py",
    ]
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    machines = [subprocess.Popen(command, env=os.environ | path) for _ in range(2)]
    assert [machine.wait(100) for machine in machines] == [0, 0]
    assert sorted(Path(rank).read_text() for rank in "01") == ["0 0, 0 1, ", "0 0, 1 1, "]
