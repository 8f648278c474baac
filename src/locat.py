"""The `locat` command: what needs no torch answers at once, everything else is `locat_lightning.cli`.

This module stands beside the package because importing `locat_lightning` imports torch and registers models,
which takes seconds.
"""

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

if sys.platform != "win32":
    import fcntl

COMMANDS = (
    *("fit", "validate", "test", "predict", "knn", "linear", "retrieve"),
    *("study", "export", "info", "configs", "runs"),
)
HEADLINES = (
    *("val/top1", "val/miou", "knn/top1", *(f"knn/top1_k{k}" for k in (10, 20, 100, 200))),
    *("linear/top1", "retrieval/miou"),
)
SHOWN = ("epochs", *(name for metric in HEADLINES for name in (metric, f"best {metric}")))
LOCK = ".lock"  # in the directory of a run, while a process trains there
HELP = """usage: locat [--debug] COMMAND [options]

Vision Transformers whose patch features are good (LocAtViT), trained in PyTorch Lightning.

commands:
  fit        train                      locat fit --config classify_tiny.yaml --data.root DIR
  validate   measure on the val split   locat validate --weights runs/…/checkpoints/best.ckpt
  test       measure on the test split
  predict    classes of a folder of images as a CSV, or of their pixels as PNGs
  knn        k-NN accuracy of a frozen backbone          locat knn --weights W --data.root DIR
  linear     linear accuracy of a frozen backbone
  retrieve   mIoU of a frozen backbone's patch features, without training (Hummingbird)
  study      several models trained alike, probed and compared: locat study --config study_cifar.yaml
  export     a model in timm's hub layout, ONNX, …       locat export --weights W --to DIR
  info       what a model costs                          locat info locatvit_base
  configs    list the configs that --config takes by name
  runs       list the runs beneath a directory, with their results: locat runs [DIR]

options:
  --help     this text; `locat COMMAND --help` lists every option of a command
  --version  print the version
  --debug    show the traceback of an error

`--config` takes a path or the name of a shipped config, and every key of it is an option too:
`--data.batch_size 64`. `--weights` says where a model's weights come from: a checkpoint of a run, a file, a
timm name, or `random`. A run that was cut off goes on with `--ckpt_path last`.
"""


HELP_OF = {
    "configs": "usage: locat configs\n\nList the configs that --config takes by name, with a line each.\n",
    "runs": "usage: locat runs [DIR]\n\nList the runs beneath a directory (runs), with their results.\n",
}


def config_directory() -> Path:
    """Where the shipped configs are: inside an installed package, or at the top of a checkout."""
    here = Path(__file__).resolve().parent
    installed = here / "locat_lightning" / "configs"
    return installed if installed.is_dir() else here.parent / "configs"


def list_configs() -> str:
    """A line for each shipped config: its name, and its first comment."""
    lines = []
    for path in sorted(config_directory().rglob("*.yaml")):
        name = path.relative_to(config_directory()).as_posix()
        lines.append(f"{name:28}{path.read_text().splitlines()[0].lstrip('# ')}")
    return "\n".join(lines)


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


def main(arguments: list[str] | None = None) -> None:
    """Run the command with `arguments`, those of the process if None."""
    arguments = sys.argv[1:] if arguments is None else arguments
    match [argument for argument in arguments if argument != "--debug"]:
        case [] | ["--help" | "-h" | "help", *_]:
            print(HELP, end="")
        case ["--version", *_]:
            print(f"locat-lightning {version('locat-lightning')}")
        case ["configs" | "runs" as command, *rest] if {"--help", "-h"} & set(rest):
            print(HELP_OF[command], end="")
        case ["configs"]:
            print(list_configs())
        case ["runs", *rest] if len(rest) < 2 and not "".join(rest).startswith("-"):
            if rest and not Path(rest[0]).is_dir():
                _refuse(f"locat runs: no such folder: {Path(rest[0]).absolute()}")
            print(list_runs(Path(rest[0] if rest else "runs")))
        case ["configs" | "runs" as command, *rest]:
            _refuse(f"{' '.join(rest)!r} is too much for locat {command}: see locat {command} --help")
        case ["knn" | "linear" | "retrieve", *_]:
            from locat_lightning.measure import main as measure

            measure(arguments)
        case ["study", *_]:
            from locat_lightning.study.command import main as study

            study(arguments)
        case ["export", *_]:
            from locat_lightning.export import main as export

            export(arguments)
        case ["info", *_]:
            from locat_lightning.info import main as info

            info(arguments)
        case [command, *_] if command in COMMANDS:
            from locat_lightning.cli import main as run

            run(arguments)
        case [command, *_]:
            _refuse(f"{command!r} is no command: the first word is one of {', '.join(COMMANDS)}")


def _refuse(mistake: str) -> NoReturn:
    """Say in a line what is wrong with the command, and end with exit code 2."""
    print(f"locat: error: {' '.join(mistake.split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
