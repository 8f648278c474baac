"""Measure LocAt on a GPU, most important first, within given minutes: `make gpu`.

    python benchmarks/gpu.py [--minutes 8] [--images CIFAR --masks CAMVID] [--device cpu --tiny]

Each group of rows runs in a process of its own with a share of the time, so that one that fails or hangs
leaves the others. After each row the results so far are written to `benchmarks/results/gpu-CARD.json`, and as
Markdown beside it; `benchmarks/refresh.py` puts them into README and docs. With `--tiny` sizes are too small
to say anything: it shows that the command works, also on a CPU, and writes below `build/`.
"""

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Timer
from time import monotonic
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARK = "ROW "  # what a process prints before each row


class Group(NamedTuple):
    """A table, the module of `benchmarks/` whose `rows(group, …)` yields it, and its share of the minutes."""

    title: str
    module: str
    share: float


GROUPS = {
    "exact": Group("Attention against float64", "gpu_attention", 0.15),
    "layer": Group("Attention, forward and backward, bf16: ms", "gpu_attention", 0.22),
    "step": Group("Training step: images/s, and peak GiB", "gpu_training", 0.4),
    "dino": Group("DINO Small, 2 × 224 + 8 × 96 px, 64 images a step", "gpu_training", 0.25),
    "classify": Group("Classification from JPEG files", "gpu_training", 0.15),
    "evaluate": Group("Segmentation head, k-NN", "gpu_training", 0.15),
    "study": Group("The study's preset `gpu`", "gpu_training", 1.0),
}


def show(value: Any) -> str:
    """Return a cell of a table."""
    if value is None:
        return ""
    if not isinstance(value, int | float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(rows: list[dict[str, Any]]) -> str:
    """Return rows as a Markdown table: the first column is `row`, the others are those of any row."""
    columns = list(dict.fromkeys(name for row in rows for name in row if name != "row"))
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[row["row"], *(show(row.get(name)) for name in columns)] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def markdown(result: dict[str, Any]) -> str:
    """Return the tables of a result, under a line that says on what it was measured."""
    machine = result["machine"]
    text = f"{machine['card']}, torch {machine['torch']}, Triton {machine['triton']}:\n"
    for name, group in result["groups"].items():
        state = "" if group["state"] == "done" else f" ({group['state']})"
        body = table(group["rows"]) if group["rows"] else "(no rows)\n"
        text += f"\n{GROUPS[name].title}{state}:\n\n{body}"
    return text


def machine(device: str) -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    import torch

    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    card = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return {"card": card, "torch": torch.__version__, "triton": triton, "python": platform.python_version()}


def measure(name: str, args: argparse.Namespace) -> None:
    """Print the rows of a group, in the process that is for it."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from importlib import import_module

    print(MARK + json.dumps({"machine": machine(args.device)}), flush=True)
    for row in import_module(GROUPS[name].module).rows(name, args):
        print(MARK + json.dumps(row), flush=True)


def rows_of(name: str, arguments: list[str], seconds: float) -> Iterator[dict[str, Any]]:
    """Run a process for a group and yield what it prints; end it after some seconds."""
    command = [sys.executable, str(Path(__file__)), "--group", name, *arguments]
    own = {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    options: dict[str, Any] = {"env": os.environ | own, "start_new_session": True}
    cut = False

    def end() -> None:
        nonlocal cut
        cut = True
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with the workers that read images

    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options) as process:
        timer = Timer(seconds, end)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(MARK):
                    yield json.loads(line.removeprefix(MARK))
        except BaseException:
            end()
            raise
        finally:
            timer.cancel()
    code = process.returncode
    yield {"state": "cut off" if cut else "done" if code == 0 else f"failed with exit code {code}"}


def write(result: dict[str, Any], folder: Path) -> None:
    """Write a result as JSON and Markdown, by the name of its card."""
    if result["machine"]:
        card = re.sub(r"\W+", "-", result["machine"]["card"].lower()).removeprefix("nvidia-")
        (folder / f"gpu-{card}.json").write_text(json.dumps(result, indent=1) + "\n")
        (folder / f"gpu-{card}.md").write_text(markdown(result))


def main(given: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--images", help="CIFAR-10, for the study: a folder, or a .tar archive of one")
    parser.add_argument("--masks", help="CamVid, for the study")
    parser.add_argument("--output", type=Path, default=None, help="folder of the results")
    parser.add_argument("--group", choices=GROUPS, help=argparse.SUPPRESS)
    args = parser.parse_args(given)
    if args.group:
        measure(args.group, args)
        return
    folder = args.output or (ROOT / "build" / "gpu" if args.tiny else RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    end = monotonic() + 60 * args.minutes
    result: dict[str, Any] = {"machine": None, "tiny": args.tiny, "groups": {}}
    for name in args.groups:
        group: dict[str, Any] = {"state": "not measured", "rows": []}
        result["groups"][name] = group
        seconds = min(end - monotonic(), 60 * args.minutes * GROUPS[name].share)
        if seconds < 5 or (name == "study" and not (args.images and args.masks)):
            write(result, folder)
            continue
        for row in rows_of(name, given, seconds):
            if "machine" in row:
                result["machine"] = row["machine"]
                group["state"] = "cut off"  # unless it says otherwise
            elif "state" in row:
                group["state"] = row["state"]
            else:
                group["rows"].append(row)
                print(name, *(f"{key}: {show(value)}" for key, value in row.items()), sep="  ", flush=True)
            write(result, folder)
    if not result["machine"]:
        sys.exit("nothing was measured: see the messages above")
    print("\n" + markdown(result))


if __name__ == "__main__":
    main(sys.argv[1:])
