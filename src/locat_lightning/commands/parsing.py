"""What all commands share: parsing, configs by name, and mistakes that are answered in one line."""

import argparse
import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeFloat, PositiveFloat, PositiveInt
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.exceptions import SIGTERMException
from yaml.representer import SafeRepresenter

from locat import configs
from locat_lightning.backbones.weights import check_source
from locat_lightning.errors import InputError, near

# Options that decide the defaults of others, so that they are read before a parser has all its defaults.
DECISIVE = (
    *("--weights", "--ckpt_path", "--name", "--runs", "--model", "--model.class_path"),
    *("--data.root", "--data.dataset"),
)
# What options are called elsewhere.
ALIASES = {
    "epochs": "--trainer.max_epochs",
    "seed": "--seed_everything",
    "learning_rate": "--model.lr",
    "gpus": "--trainer.devices",
    "workers": "--data.num_workers",
    "resume": "--ckpt_path",
    "pretrained": "--weights",
}
NUMBERS = {
    "accumulate_grad_batches": PositiveInt,
    "check_val_every_n_epoch": PositiveInt,
    "gradient_clip_val": NonNegativeFloat,
    "limit_train_batches": PositiveFloat,
}
# How Lightning's errors about options begin that are not a MisconfigurationException.
SAID_BY_LIGHTNING = ("`val_check_interval`", "Early stopping conditioned on metric")
# jsonargparse writes a config again when its class is replaced by another, but its restricted numbers are of
# subclasses, which YAML by itself does not write.
yaml.SafeDumper.add_multi_representer(int, SafeRepresenter.represent_int)
yaml.SafeDumper.add_multi_representer(float, SafeRepresenter.represent_float)
LONGEST = 400  # characters of a message of jsonargparse's


class ConfigByName(ActionConfigFile):
    """`--config` takes a local file, or else the name of a shipped config."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Parse the config that `values` names."""
        super().__call__(parser, cfg, find_config(str(values)), option_string)


def find_config(name: str) -> str:
    """Return the path of a config: a local file first, then a shipped one.

    Raises:
        InputError: there is neither, or it is not YAML with options.
    """
    path = configs.find(name)
    if path is None:
        if Path(name).is_dir():
            raise InputError(f"--config: {name} is a directory{_suggest(Path(name) / 'config.yaml')}")
        similar = near(name, configs.names()) or f" ({', '.join(configs.names())})"
        raise InputError(f"--config: no file {Path(name).absolute()} and no shipped config {name!r}{similar}")
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f" in line {error.problem_mark.line + 1}"
        raise InputError(f"--config: {path} is not valid YAML{line}: {error.problem}") from error
    except yaml.reader.ReaderError as error:
        raise InputError(f"--config: {path} is not text (character {error.position})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--config: {path} is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise InputError(f"--config: {path}: {error.strerror}") from error
    if not isinstance(options, dict):
        raise InputError(f"--config: {path} has no options (such as `trainer:` with what belongs to it)")
    return str(path)


def check_weights(weights: str) -> None:
    """Check that there is such a source of weights (see `check_source`), and that it is not a directory.

    Raises:
        InputError: there is not, or it is.
    """
    if (path := Path(weights)).is_dir() and not exported_config(weights):
        best = path / "checkpoints" / "best.ckpt"
        raise InputError(f"--weights: {weights} is a directory{_suggest(best)}")
    check_source(local_dir(weights))


def _suggest(path: Path) -> str:
    return f": give a file, such as {path}" if path.is_file() else ", not a file"


def exported_config(weights: str) -> dict[str, Any]:
    """Return `config.json` of a folder that `locat export` wrote (`DIR` or `local-dir:DIR`), {} of others."""
    file = Path(weights.removeprefix("local-dir:")) / "config.json"
    return dict(json.loads(file.read_text())) if file.is_file() else {}


def local_dir(weights: str) -> str:
    """Return weights with timm's prefix if they are a folder."""
    return f"local-dir:{weights}" if Path(weights).is_dir() else weights


def command_parser(command: str, description: str) -> ArgumentParser:
    """Return the parser of a command that is not LightningCLI's."""
    return ArgumentParser(
        prog=f"locat {command}", description=description, exit_on_error=False, allow_abbrev=False
    )


def add_backbone_options(parser: ArgumentParser) -> None:
    """Add options that say which model the weights are of, and which of DINO's two networks to take."""
    add = parser.add_argument
    add("--backbone", type=str | None, default=None, help="timm's name, where the weights do not say it")
    add("--backbone_args", type=dict[str, Any], default={}, help="further arguments of the backbone")
    add("--student", action="store_true", help="take the student of a DINO checkpoint, not the teacher")


def add_weights_options(parser: ArgumentParser) -> None:
    """Add `--weights`, and the options that say which model they are of."""
    help_ = "a checkpoint, a file (DINO's, timm's, a state dict), an exported folder, a timm name, 'random'"
    parser.add_argument("--weights", type=str, required=True, help=help_)
    add_backbone_options(parser)


def decisive_options(arguments: list[str]) -> argparse.Namespace:
    """Return the options that decide defaults (`DECISIVE`, and `config`, a list), None where not given."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for option in DECISIVE:
        parser.add_argument(option, nargs="?")
    parser.add_argument("-c", "--config", action="append", nargs="?")
    return parser.parse_known_args(arguments)[0]


def parse(parser: ArgumentParser, arguments: list[str], subparser: ArgumentParser | None = None) -> Namespace:
    """Parse arguments; answer an option that does not exist with those that are similar.

    Args:
        parser: of the command.
        arguments: of the command.
        subparser: of the subcommand in `arguments`, if there is one.

    Raises:
        InputError: an option does not exist.
    """
    try:
        return parser.parse_args(arguments)
    except ArgumentError as error:
        typed = arguments if subparser is None else arguments[1:]
        own, chosen = _known_options(subparser or parser, typed)
        for option in filter(None, map(_option, typed)):
            if option not in own and not any(f"{option}.".startswith(f"{each}.") for each in chosen):
                suggestion = _similar(option, [*own, *chosen])
                raise InputError(f"{option}: there is no such option{suggestion}") from error
        raise


def _option(argument: str) -> str | None:
    return argument.partition("=")[0].removesuffix("+") if argument.startswith("--") else None


def _known_options(parser: ArgumentParser, arguments: list[str]) -> tuple[set[str], set[str]]:
    """Return a parser's own options, and those of the classes that are chosen."""
    own = {
        name for each in parser._actions for name in each.option_strings
    }  # private: there is no other list
    kept, keep = [], True
    for argument in arguments:  # without options of classes, whose mistakes hide which classes are chosen
        if option := _option(argument):
            keep = option in own or option.endswith(".class_path")
        if keep:
            kept.append(argument)
    try:
        keys = parser.parse_args(kept).keys()
    except (ArgumentError, InputError):
        return own, own
    return own, {f"--{key.replace('.init_args.', '.')}" for key in keys}


def _similar(option: str, known: list[str]) -> str:
    """Suggest options with the same last segment or the same meaning; without one, of a similar name."""

    def last(name: str) -> str:
        return name.rpartition(".")[2].lstrip("-")

    names = {each for each in known if not each.endswith((".help", ".class_path"))}
    same = {each for each in names if last(each) == last(option) or each == ALIASES.get(last(option))}
    if not same:
        return near(option, sorted(names))
    groups = ("--data", "--model", "--trainer")
    found = sorted(same, key=lambda each: (each not in ALIASES.values(), not each.startswith(groups), each))
    return f"; did you mean {', '.join(found[:3])}?"


def check_root(options: argparse.Namespace, dataset: str | None) -> None:
    """Check that `data.root` is used by the chosen data set.

    Args:
        options: see `decisive_options`.
        dataset: name of the data set, from the arguments, a config or the run of the weights.

    Raises:
        InputError: it is not: the digits, of a config or a run, come without a folder.
    """
    root, named = getattr(options, "data.root"), getattr(options, "data.dataset")
    if dataset == "digits" and root is not None and named is None:
        raise InputError(
            f"data.root: {root} would not be read, because data.dataset is digits: for the images there add "
            "--data.dataset folder, for the digits leave data.root out"
        )


def check_numbers(trainer: Namespace) -> None:
    """Check the options of a trainer that Lightning takes whatever they are, and fails on later (`NUMBERS`).

    Raises:
        InputError: one is out of its range.
    """
    for option, type_ in NUMBERS.items():
        try:
            if trainer[option] is not None:
                type_(trainer[option])
        except ValueError as error:
            raise InputError(f"trainer.{option}: {error}") from error


def check_writable(option: str, directory: Path) -> None:
    """Check that files can be created in a directory, or in the nearest existing one above it.

    Args:
        option: which says where the directory is.
        directory: may not exist yet.

    Raises:
        InputError: they cannot.
    """
    there = next(each for each in (directory, *directory.absolute().parents) if os.path.lexists(each))
    try:
        with TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise InputError(f"{option}: cannot write to {directory}: {there}: {error.strerror}") from error


def record_of_run(checkpoint: Path) -> Path | None:
    """Return where the run of a checkpoint recorded its config; None if the file is not of a run."""
    record = checkpoint.parent.parent / "config.yaml"
    return record if checkpoint.is_file() and record.is_file() else None


def check_processes(number: int) -> None:
    """Check that a CPU has a core for each process of a run.

    Raises:
        InputError: it has fewer.
    """
    cores = os.cpu_count() or 1
    if number > cores:
        raise InputError(
            f"devices: {number} processes need as many CPU cores, but there "
            f"{'is' if cores == 1 else 'are'} {cores}: use at most {cores}"
        )


def mixed_precision() -> str | None:
    """Return the mixed precision of the recipes where there is a GPU, else Lightning's default."""
    if not torch.cuda.is_available():
        return None
    return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"


def _mistake(error: BaseException | None) -> str | None:
    """Return what the user can correct of an error or of one that it came from; None if there is nothing."""
    chain: list[BaseException] = []
    while error is not None:
        chain.append(error)
        error = error.__cause__ or error.__context__
    for each in chain:
        by_lightning = isinstance(each, ValueError | RuntimeError) and str(each).lstrip().startswith(
            SAID_BY_LIGHTNING
        )
        if by_lightning or isinstance(each, InputError | MisconfigurationException):
            return " ".join(str(each).split())
    of_parser = [place for place, each in enumerate(chain) if isinstance(each, ArgumentError)]
    if not of_parser:
        return None
    # Of an option of a class: its group, of which class it is, and what is wrong with it.
    innermost = of_parser[-1]
    if innermost and type(chain[innermost - 1]) is ValueError:
        return _in_a_line(f"{str(chain[of_parser[0]]).partition(chr(10))[0]} {chain[innermost - 1]}")
    return _in_a_line(str(chain[innermost]))


def _in_a_line(message: str) -> str:
    """Join the lines of a message of jsonargparse's, name classes as in Python, and shorten the middle."""
    line = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", " ".join(message.split()))
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 100]} … {line[-97:]}"


@contextmanager
def errors_in_a_line(debug: bool) -> Iterator[None]:
    """Answer a mistake of the user with one line on standard error and exit code 2."""
    try:
        yield
    # As a shell reports it: whoever sent the signal sees that it was obeyed.
    except SIGTERMException:
        sys.exit(128 + signal.SIGTERM)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # Lightning, having ended the run, exits with 1
            sys.exit(128 + signal.SIGINT)
        raise
    except Exception as error:
        mistake = _mistake(error)
        if debug or mistake is None:
            raise
        print(f"locat: error: {mistake}", file=sys.stderr)
        sys.exit(2)
