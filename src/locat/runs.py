"""The runs in a directory: which there are, what came of each, and which are still training."""

import csv
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from locat.errors import Parser, refuse

if sys.platform != "win32":
    import fcntl

WIDTH = 120  # columns of the list
HEADLINES = (
    "val/top1",
    "val/miou",
    "val/rmse",
    "knn/top1",
    "linear/top1",
    "retrieval/miou",
    "tracking/J&F",
    "robustness/top1",
)  # also by `_kN`, `_memoryN`
LAST_ROWS = 2**16  # bytes of a table that hold its last row
LOCK = ".lock"  # in the directory of a run, while a process trains there


@contextmanager
def replaced(file: Path) -> Iterator[Path]:
    """Yield where to write so that `file` is there whole or as it was; of a failure nothing is left."""
    part = Path(f"{file}.part")
    try:
        yield part
        part.replace(file)
    except OSError as error:
        if error.filename in (None, str(part)):  # the system does not name a file that cannot be written on
            error.filename = str(file)
        raise
    finally:
        with suppress(OSError):  # it is whole, and has its name
            part.unlink()


def write_json(file: Path, value: Any) -> None:
    """Write JSON so that the file is there whole or as it was."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replaced(file) as part:
        part.write_text(json.dumps(value, indent=2) + "\n")


def write_csv(file: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table so that it is there whole or as it was, in UTF-8 (paths: as the system has them)."""
    with (
        replaced(file) as part,
        part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as opened,
    ):
        writer = csv.writer(opened)
        writer.writerow(header)
        writer.writerows(rows)


def claim(directory: Path) -> Path:
    """Create the first `version_N` that is free in a directory, even if other runs start at the same time."""
    for number in count():
        run = directory / f"version_{number}"
        with suppress(FileExistsError):
            run.mkdir(parents=True)
            break
    return run


def lock(run: Path) -> int | None:
    """Lock the directory of a run, so that no other process trains there.

    Returns:
        A file descriptor, to be given to `unlock`; None where files cannot be locked.

    Raises:
        BlockingIOError: another process has locked it.
    """
    if sys.platform == "win32":
        return None
    descriptor = os.open(run / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError | PermissionError):
            raise BlockingIOError(f"{run} is locked") from error
        return None
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(descriptor), (run / LOCK).stat()):
            return descriptor
    os.close(descriptor)  # the process that had locked it has just removed it
    return lock(run)


def unlock(run: Path, descriptor: int | None, made: Iterable[Path] = ()) -> None:
    """Unlock the directory of a run; of the directories made for it, remove those that are still empty."""
    if descriptor is not None:
        (run / LOCK).unlink(missing_ok=True)
        os.close(descriptor)
    for folder in made:
        with suppress(OSError):  # it is not empty, or gone
            folder.rmdir()


def is_locked(run: Path) -> bool:
    """Check whether another process trains in the directory of a run."""
    if sys.platform == "win32" or not (run / LOCK).is_file():
        return False
    with (run / LOCK).open() as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return True
    return False


def is_record(config: Path) -> bool:
    """Check that a file is what a training recorded: it alone has a checkpoint to resume from."""
    return re.search("^ckpt_path:", _read(config), re.MULTILINE) is not None


def list_runs(directory: Path) -> str:
    """Return a table of the runs in a directory: state, seed, epochs, and headline metrics with the best."""
    found = {path.parent for path in directory.rglob("metrics.json")}
    found |= {config.parent for config in directory.rglob("config.yaml") if is_record(config)}
    if not found:
        return f"no runs in {directory}"
    rows = [(f"run in {directory}", "state", "seed", "epochs", "metrics")]
    rows += [(run.relative_to(directory).as_posix(), *_describe(run)) for run in sorted(found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    lines = [printable(line) for line in lines]
    lines = [line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…" for line in lines]
    if any(state == "interrupted" for _, state, *_ in rows):
        lines.append(
            f"resume an interrupted run: locat fit --ckpt_path {directory}/RUN/checkpoints/last.ckpt"
        )
    return "\n".join(lines)


def printable(text: str) -> str:
    """Return text of a file without what a terminal would obey."""
    return "".join(each if each.isprintable() else "?" for each in text)


def _describe(run: Path) -> tuple[str, str, str, str]:
    if is_locked(run):
        state, metrics = "training", _logged(run / "metrics.csv")
    elif (file := run / "metrics.json").is_file():
        try:
            found = json.loads(file.read_text())
        except (OSError, ValueError, RecursionError):
            found = None
        is_record = isinstance(found, dict)
        state = "finished" if is_record else "finished, but metrics.json cannot be read"
        metrics = found if is_record else {}
    else:
        state = "interrupted" if (run / "checkpoints" / "last.ckpt").is_file() else "no checkpoint"
        metrics = _logged(run / "metrics.csv")
    # To parse the YAML of many runs takes seconds.
    recorded = re.search(r"^seed_everything: (\w+)", _read(run / "config.yaml"), re.MULTILINE)
    seed = metrics.get("seed", recorded[1] if recorded else "")
    return state, str(seed), str(metrics.get("epochs", "")), _headline(metrics)


def _logged(table: Path) -> dict[str, Any]:
    """Return what an unfinished run has logged last, by name; `epochs` is its epoch, counted from 0."""
    with suppress(OSError, ValueError, LookupError), table.open("rb") as file:
        header = file.readline()
        start = file.seek(max(len(header), table.stat().st_size - LAST_ROWS))
        lines = file.read().decode().splitlines()[start > len(header) :]  # the first may be a part of one
        columns, *rows = csv.reader([header.decode(), *lines])
        found = {name: float(text) for row in rows for name, text in zip(columns, row, strict=False) if text}
        return found | {"epochs": int(found["epoch"])}
    return {}


def _headline(metrics: dict[str, Any]) -> str:
    """Return the metrics that matter most, each with the best of the run."""
    texts = {k: f"{value:.4g}" if isinstance(value, float) else str(value) for k, value in metrics.items()}
    cells = []
    for name in metrics:
        if re.sub(r"_(k|memory)\w+$", "", name) in HEADLINES:
            best = f" (best {texts[f'best {name}']})" if f"best {name}" in texts else ""
            cells.append(f"{name} {texts[name]}{best}")
    return "  ".join(cells)


def _read(config: Path) -> str:
    return config.read_text(errors="replace") if config.is_file() else ""


def main(arguments: list[str]) -> None:
    """Run `locat runs`."""
    parser = Parser("locat runs", description="List the runs in a directory, with their results.")
    parser.add_argument("directory", nargs="?", help="runs by default")
    directory = parser.parse_args([each for each in arguments if each != "--debug"][1:]).directory
    if directory is not None and not Path(directory).is_dir():
        refuse(f"locat runs: no such folder: {Path(directory).absolute()}")
    print(list_runs(Path(directory or "runs")))
