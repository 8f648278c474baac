"""The `locat` command: what needs no torch answers at once, everything else is `locat_lightning.commands`."""

import sys
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from locat.configs import list_configs
from locat.runs import list_runs

COMMANDS = (
    *("fit", "validate", "test", "predict", "knn", "linear", "retrieve"),
    *("study", "export", "info", "configs", "runs"),
)

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
            from locat_lightning.commands.evaluate import main as measure

            measure(arguments)
        case ["study", *_]:
            from locat_lightning.commands.study.command import main as study

            study(arguments)
        case ["export", *_]:
            from locat_lightning.commands.export import main as export

            export(arguments)
        case ["info", *_]:
            from locat_lightning.commands.info import main as info

            info(arguments)
        case [command, *_] if command in COMMANDS:
            from locat_lightning.commands.fit import main as run

            run(arguments)
        case [command, *_]:
            _refuse(f"{command!r} is no command: the first word is one of {', '.join(COMMANDS)}")


def _refuse(mistake: str) -> NoReturn:
    """Say in a line what is wrong with the command, and end with exit code 2."""
    print(f"locat: error: {' '.join(mistake.split())}", file=sys.stderr)
    sys.exit(2)
