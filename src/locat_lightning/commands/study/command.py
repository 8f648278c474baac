"""`locat study`: every arm and seed by the commands of `locat`, each once, and the report after each."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace

from locat_lightning.commands.messages import direct_messages
from locat_lightning.commands.parsing import ConfigByName, command_parser, errors_in_a_line, parse
from locat_lightning.commands.study.folders import some_of_each_class, unpacked
from locat_lightning.commands.study.plan import PROBES, Options, Study
from locat_lightning.commands.study.report import write_report
from locat_lightning.commands.study.results import measure_arm, read_results, said_in, write_atomically
from locat_lightning.errors import InputError

DESCRIPTION = (
    "Train every arm of a study with every seed, probe the frozen backbones, and write a report. What is "
    "finished is never done again: cut off, the same command goes on"
)
NOTE = "study.json"  # what a directory's results are of


def main(arguments: list[str]) -> None:
    """Run `locat study …`."""
    direct_messages(debug="--debug" in arguments)  # to the logs of the steps
    with errors_in_a_line("--debug" in arguments):
        _, *options = (argument for argument in arguments if argument != "--debug")
        parser = _parser()
        config = parse(parser, options)
        if config.config is None:
            raise InputError("locat study needs --config, as study_cifar.yaml")
        _study(config)


def _parser() -> ArgumentParser:
    parser = command_parser("study", DESCRIPTION)
    add = parser.add_argument
    add("-c", "--config", action=ConfigByName, help="a file with any of these options, or a shipped config")
    add(
        "--preset",
        type=str | None,
        default=None,
        help="one of the config's; by default gpu where there is a GPU, else cpu",
    )
    add("--to", type=str | None, default=None, help="directory of it all; by default runs/study_PRESET")
    add("--report", type=str | None, default=None, help="the page to write; by default results.md in --to")
    add("--images", type=str, default="data", help="folder of classes with train/ and test/, or a .tar of it")
    add("--masks", type=str, default="data", help="folder of the masked images, or a .tar of it")
    for name, help_ in (
        ("recipes", "of training: options of locat fit, by name of the recipe"),
        ("arms", "recipe, and options that differ, by name of the arm"),
        ("probes", f"options of the probes: {', '.join(PROBES)}"),
        ("presets", "by name: arms, seeds, images_per_class, and options of recipes and probes"),
    ):
        add(f"--{name}", type=dict[str, dict[str, Any]], default={}, help=help_)
    add("--seeds", type=list[int], default=[0, 1, 2], help="of each arm")
    return parser


def _study(config: Namespace) -> None:
    preset = config.preset or ("gpu" if torch.cuda.is_available() else "cpu")
    study = Study.of(vars(config), preset)
    directory = Path(config.to or f"runs/study_{preset}")
    images = unpacked(Path(config.images), directory / "data", "--images")
    masks = unpacked(Path(config.masks), directory / "data", "--masks") if "masks" in study.probes else images
    names = {"images": Path(config.images).name, "masks": Path(config.masks).name}
    _claim(directory, study, names)
    if study.images_per_class is not None:
        chosen = directory / "data" / f"{study.images_per_class}_per_class"
        images = some_of_each_class(images, study.images_per_class, chosen)
    folders = {"images": str(images.absolute()), "masks": str(masks.absolute())}
    report = Path(config.report) if config.report else directory / "results.md"
    command = f"locat study --config {Path(str(config.config[-1])).name} --preset {preset}"
    # Their names only: where they are is nobody else's concern.
    command += f" --images {names['images']}"
    command += f" --masks {names['masks']}" if "masks" in study.probes else ""
    # Seed by seed, so that a study that is cut off has compared all arms with as many seeds as it has.
    runs = [(arm, seed) for seed in study.seeds for arm in study.arms]
    for number, (arm, seed) in enumerate(runs, start=1):
        print(f"{arm}, seed {seed} ({number} of {len(runs)})", flush=True)
        try:
            news = measure_arm(study, arm, seed, directory / arm / f"seed_{seed}", folders)
        except (SystemExit, KeyboardInterrupt):
            print("cut off; the same command goes on", file=sys.stderr)
            raise
        if news or number == len(runs):
            with said_in(directory / "report.log"):
                write_report(report, study, read_results(study, directory), directory, folders, command)
    print(f"report: {report}")


def _claim(directory: Path, study: Study, names: dict[str, str]) -> None:
    """Note what the directory's results are of, or see that it is this study of data of these names.

    Seeds, arms and probes may have been added since: all else stays as it was measured.
    """
    own: Options = json.loads(json.dumps(vars(study) | names))
    if (note := directory / NOTE).is_file():
        there = json.loads(note.read_text())
        if differing := ", ".join(key for key in own if not _holds(there.get(key), own[key])):
            raise InputError(
                f"{directory} has the results of another study ({differing} differ): give another --to"
            )
    write_atomically(note, own)


def _holds(planned: Any, now: Any) -> bool:
    """Whether something is as it was planned, or more."""
    if isinstance(planned, dict) and isinstance(now, dict):
        return planned.items() <= now.items()
    if isinstance(planned, list) and isinstance(now, list):
        return all(each in now for each in planned)
    return bool(planned == now)
