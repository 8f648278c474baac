"""The fault campaign: what a run's processes, disk and files may meet, at random places, counted.

The places are drawn from fixed seeds; when a signal arrives is up to the machine. What is asserted holds for
all of them, so that a failure is a fault of the software, and is printed with its place.
"""

import ctypes
import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import torch

NEW_NAMESPACE = 0x00020000  # CLONE_NEWNS: what is mounted is seen by this process alone, and goes with it


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker("faults")


def pytest_terminal_summary(terminalreporter):
    passed = [each for each in terminalreporter.stats.get("passed", []) if each.when == "call"]
    counts = [f"{name}: {count}" for each in passed for name, count in each.user_properties]
    if counts:
        terminalreporter.section("faults")
        terminalreporter.write_line("\n".join(sorted(counts)))


def wait_for_the_end_of_all(process, seconds=60):
    """Wait for a process and for those that it started; all are killed, and it fails, if some do not end."""
    process.join(seconds)
    ended = process.exitcode is not None
    deadline = time.monotonic() + 10
    while ended and time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError("a process that it started does not end" if ended else "it does not end")


def is_sound(checkpoint):
    """Whether a checkpoint can be read, and is of a run that took a step."""
    return torch.load(checkpoint, weights_only=True)["global_step"] > 0


def mount_small_disk(folder, size):
    """Mount a disk of a size for this process alone; return whether its user may."""
    if ctypes.CDLL(None, use_errno=True).unshare(NEW_NAMESPACE) != 0:
        return False
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return subprocess.run(mount, capture_output=True).returncode == 0


def children(process):
    """The processes that a process has started, each with its rank in the run: 0 if it reads images."""
    found = {}
    with suppress(OSError):  # one has ended
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            found[int(child)] = int(b"LOCAL_RANK=1" in Path(f"/proc/{child}/environ").read_bytes())
    return found
