"""The runs beneath a directory: which there are, what came of each, and which still train."""

import json
import os
import sys
from pathlib import Path
from typing import Any

if sys.platform != "win32":
    import fcntl

HEADLINES = (
    *("val/top1", "val/miou", "knn/top1", *(f"knn/top1_k{k}" for k in (10, 20, 100, 200))),
    *("linear/top1", "retrieval/miou"),
)

SHOWN = ("epochs", *(name for metric in HEADLINES for name in (metric, f"best {metric}")))

LOCK = ".lock"  # in the directory of a run, while a process trains there


def hold(run: Path) -> int | None:
    """Have other processes know that this one trains in the directory of a run, until it ends.

    Returns:
        A file descriptor that has to be kept open until then; None where files cannot be locked, or there is
        no such directory.
    """
    if sys.platform == "win32" or not run.is_dir():
        return None
    lock = os.open(run / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock


def is_held(run: Path) -> bool:
    """Whether another process trains in the directory of a run."""
    if sys.platform == "win32" or not (run / LOCK).is_file():
        return False
    with (run / LOCK).open() as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return True
    return False


def list_runs(directory: Path) -> str:
    """A line for each run beneath a directory: its path, and its headline metrics or how to go on with it."""
    runs = {path.parent: _headline(json.loads(path.read_text())) for path in directory.rglob("metrics.json")}
    for config in directory.rglob("config.yaml"):
        if config.parent not in runs and "\nckpt_path:" in config.read_text():  # which training alone has
            last = config.parent / "checkpoints" / "last.ckpt"
            if is_held(config.parent):
                state = "still training"
            elif last.is_file():
                state = f"not finished; to go on: locat fit --ckpt_path {last}"
            else:
                state = "not finished, without a checkpoint"
            runs[config.parent] = {"": state}
    names = [name for name in SHOWN if any(name in cells for cells in runs.values())]
    widths = {name: max(len(cells.get(name, "")) for cells in runs.values()) for name in names}
    width = max((len(run.as_posix()) for run in runs), default=0)
    lines = []
    for run, cells in sorted(runs.items()):
        row = [cells[""]] if "" in cells else [cells.get(name, "").ljust(widths[name]) for name in names]
        lines.append("   ".join([run.as_posix().ljust(width), *row]).rstrip())
    return "\n".join(lines) or f"no run beneath {directory}"


def _headline(metrics: dict[str, Any]) -> dict[str, str]:
    """What of a run's metrics is worth a look, as `name value` by name."""
    return {
        name: f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in metrics.items()
        if name in SHOWN
    }
