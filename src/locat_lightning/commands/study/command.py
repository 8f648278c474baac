"""`locat study`: run the steps of every arm and seed, each once, and write the report after each seed."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import torch
from jsonargparse import Namespace

from locat_lightning.commands.messages import errors_in_a_line
from locat_lightning.commands.parsing import ConfigByName, command_parser, decisive_options, parse
from locat_lightning.commands.study.folders import some_of_each_class, unpacked
from locat_lightning.commands.study.plan import Step, Study
from locat_lightning.commands.study.report import write_report
from locat_lightning.commands.study.steps import (
    output_to,
    read_results,
    record_of,
    run_step,
    steps_to_run,
)
from locat_lightning.errors import InputError, near

DESCRIPTION = (
    "Train every arm of a study with every seed, probe the models, and write a report. An interrupted study "
    "resumes with the same command; finished steps are not repeated"
)


@errors_in_a_line
def main(arguments: list[str]) -> None:
    """Run `locat study …`."""
    study, config = read_study(arguments[1:])
    file = Path(str(config.config[-1]))
    directory = Path(config.to or "_".join(filter(None, (f"runs/{file.stem}", config.preset))))
    records = Path(config.records or directory)
    folders = _folders(study, config.folders, directory / "data")
    command = f"locat study --config {file.name}" + (f" --preset {config.preset}" if config.preset else "")
    for name, folder in config.folders.items():
        command += f" --folders.{name} {Path(folder).name}"  # where they are stays private
    page, runs = Path(config.report or directory / "results.md"), study.runs()
    directory.mkdir(parents=True, exist_ok=True)
    for number, (arm, seed) in enumerate(runs, start=1):
        steps, record = study.steps(arm, seed), record_of(records, arm, seed)
        news = False
        if config.run:
            print(f"{arm}, seed {seed} ({number} of {len(runs)})", flush=True)
            news = _run(steps, directory / arm / f"seed_{seed}", folders, record)
        if news or number == len(runs):
            with output_to(directory / "report.log"):
                write_report(page, study, read_results(study, records), directory, folders, command)
    print(f"report: {page}")


def _run(steps: Sequence[Step], directory: Path, folders: Mapping[str, str], record: Path) -> bool:
    """Run the steps of an arm and a seed that are not finished; return whether there were any."""
    steps, news = steps_to_run(steps, directory, record), False
    try:
        for place, step in enumerate(steps, start=1):
            print(f"  {step.name} ({place} of {len(steps)})", flush=True)
            news |= run_step(step, directory, folders, record)
    except (SystemExit, KeyboardInterrupt):
        print("interrupted; the same command resumes the study", file=sys.stderr)
        raise
    return news


def read_study(options: list[str]) -> tuple[Study, Namespace]:
    """Return the study that a command line describes, and its options."""
    parser = command_parser("study", DESCRIPTION)
    add = parser.add_argument
    add("-c", "--config", action=ConfigByName, help="a file with any of these options, or a shipped config")
    preset = "one of the config's presets; by default gpu with a GPU, if it has that one, else cpu"
    add("--preset", type=str | None, default=None, help=preset)
    add("--to", type=str | None, default=None, help="directory of the runs; by default runs/CONFIG_PRESET")
    help_ = "directory of the results, a JSON for each arm and seed, which suffice to go on; by default --to"
    add("--records", type=str | None, default=None, help=help_)
    add("--report", type=str | None, default=None, help="the page to write; by default results.md in --to")
    add(
        "--run", type=bool, default=True, help="false runs nothing, and writes the report of what is finished"
    )
    folders = "--folders.NAME DIR gives the folder, or a .tar of it, for {NAME} in the options of the config"
    add("--folders", type=dict[str, str], default={}, help=folders)
    parser.add_class_arguments(Study)
    if decisive_options(options).config is None and not {"-h", "--help"} & set(options):
        raise InputError("locat study needs --config, for example study_digits.yaml")
    config = parser.instantiate_classes(parse(parser, options))
    study = Study(**{each.name: config[each.name] for each in fields(Study)})
    if config.preset is None and study.presets:
        config.preset = "gpu" if torch.cuda.is_available() and "gpu" in study.presets else "cpu"
    return (study.with_preset(config.preset) if config.preset else study), config


def _folders(study: Study, given: dict[str, str], beneath: Path) -> dict[str, str]:
    """Return the absolute path of each folder that the study reads, unpacked, with fewer images if asked."""
    needed, folders = study.folders(), {}
    if missing := [name for name in needed if name not in given]:
        options = " ".join(f"--folders.{name} DIR" for name in missing)
        raise InputError(f"the config reads {{{missing[0]}}}: add {options} (a folder, or a .tar of one)")
    for name, source in given.items():
        option = f"--folders.{name}"
        if name not in needed:
            raise InputError(f"{option}: the config does not read {{{name}}}{near(name, needed)}")
        folder = unpacked(Path(source), beneath / name, option)
        if name in study.per_class:
            folder = some_of_each_class(folder, study.per_class[name], beneath / name, option)
        folders[name] = str(folder.absolute())
    return folders
