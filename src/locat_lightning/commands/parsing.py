"""What all commands share: configs by name, and mistakes that are answered by one line."""

import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from inspect import signature
from itertools import zip_longest
from pathlib import Path
from pkgutil import resolve_name
from tempfile import TemporaryFile
from typing import Any

import torch
import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.exceptions import SIGTERMException

from locat import configs
from locat_lightning.backbones.weights import check_source
from locat_lightning.errors import InputError, near

# How Lightning's errors about options begin that are no MisconfigurationException.
SAID_BY_LIGHTNING = ("`val_check_interval`", "Early stopping conditioned on metric")


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
    """See that there is such a source of weights (`check_source`), and that it is no directory.

    Raises:
        InputError: there is not, or it is.
    """
    if (path := Path(weights)).is_dir():
        raise InputError(f"--weights: {weights} is a directory{_suggest(path / 'checkpoints' / 'best.ckpt')}")
    check_source(weights)


def _suggest(path: Path) -> str:
    return f": give a file, such as {path}" if path.is_file() else ", not a file"


def command_parser(command: str, description: str) -> ArgumentParser:
    """The parser of a command that is none of LightningCLI's."""
    return ArgumentParser(
        prog=f"locat {command}", description=description, exit_on_error=False, allow_abbrev=False
    )


def add_backbone_options(parser: ArgumentParser) -> None:
    """What says of which model weights are, where they do not, and which of DINO's two to take."""
    add = parser.add_argument
    add("--backbone", type=str | None, default=None, help="timm's name, where the weights do not say it")
    add("--backbone_args", type=dict[str, Any], default={}, help="further arguments of the backbone")
    add("--student", action="store_true", help="of a DINO checkpoint the student, not the teacher")


@contextmanager
def near_options(parser: ArgumentParser) -> Iterator[None]:
    """Have an option that a parser does not know answered by those that it knows.

    Raises:
        InputError: there is such an option.
    """
    try:
        yield
    except ArgumentError as error:
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", str(error))
        if unknown is None:
            raise
        option, known = unknown[1], [name for action in parser._actions for name in action.option_strings]
        group, _, rest = option.partition(".")
        # Options of a class, as data's, are none of the parser's: what can be mistyped is the group.
        classes = [each.removesuffix(".help") for each in known if re.fullmatch(r"--\w+\.help", each)]
        likely = [f"{each}.{rest}" for each in get_close_matches(group, classes) if rest]
        raise InputError(f"{option}: there is no such option{near(option, likely or known)}") from error


def shipped_configs() -> str:
    """The names that `--config` knows, in a line."""
    return ", ".join(configs.names())


def given_options(arguments: list[str]) -> dict[str, str]:
    """The values of `--option value` and `--option=value`, by option."""
    values = {}
    for option, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        key, equals, value = option.partition("=")
        values[key] = value if equals else following
    return values


def check_root(arguments: list[str], dataset: str | None) -> None:
    """See that a folder of images that is given is one that is read.

    Args:
        arguments: of the command.
        dataset: which the images are of, by the arguments, a config or the run of the weights.

    Raises:
        InputError: it is not, as a config or a run has the digits, which come without a folder.
    """
    options = given_options(arguments)
    if dataset == "digits" and "--data.root" in options and "--data.dataset" not in options:
        raise InputError(
            f"data.root: {options['--data.root']} would not be read, as data.dataset is digits: for the "
            "images there add --data.dataset folder, for the digits leave data.root out"
        )


def check_writable(option: str, directory: Path) -> None:
    """See that files can be made in a directory, or in the nearest one above it that there is.

    Args:
        option: which says where the directory is.
        directory: does not have to be there.

    Raises:
        InputError: they cannot.
    """
    there = next(each for each in (directory, *directory.absolute().parents) if os.path.lexists(each))
    try:
        with TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise InputError(
            f"{option}: nothing can be written to {directory}: {there}: {error.strerror}"
        ) from error


def record_of_run(checkpoint: Path) -> Path | None:
    """Where the run of a checkpoint wrote down its config; None if the file is no checkpoint in a run."""
    record = checkpoint.parent.parent / "config.yaml"
    return record if checkpoint.is_file() and record.is_file() else None


def check_processes(number: int) -> None:
    """See that a CPU has a core for each process of a run.

    Raises:
        InputError: it has fewer.
    """
    cores = os.cpu_count() or 1
    if number > cores:
        raise InputError(
            f"devices: {number} on a CPU are as many processes, but it has {cores} cores: take no more"
        )


def mixed_precision() -> str | None:
    """The recipe's mixed precision where there is a GPU, else Lightning's default."""
    if not torch.cuda.is_available():
        return None
    return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"


def _in_a_line(message: str) -> str:
    """Key and problem, from jsonargparse's account of every type that it tried."""
    keys = list(dict.fromkeys(re.findall(r'Parser key "([^"]+)"', message)))
    key, problem = ".".join(keys), message.rpartition('Parser key "')[2]
    if option := re.search(r"Option '([^']+)' is not accepted", problem):
        owner = re.search(r"class_path '([^']+)'", problem)
        known = signature(resolve_name(owner[1])).parameters if owner else ()
        name = f"{key}.{option[1]}"
        return f"{name}: there is no such option{near(name, [f'{key}.{each}' for each in known])}"
    if unknown := re.search(r"Expected a dot import path string: (.*)", problem):
        return f"{key}: there is no class {unknown[1]!r}"
    if fault := re.search(r"Problem with given class_path '[^']+':\s*(.*)", problem):
        return f"{key}: {fault[1]}"
    if tuple_ := re.search(r"Expected a tuple with (\d+) elements\. Got value: (.*)", problem):
        return f"{key}: it takes {tuple_[1]} values, not {tuple_[2]}"
    if limit := re.search(r"Not of type \w+: (.*) does not conform to restriction (.*)", problem):
        return f"{key}: {limit[1]} is out of range ({limit[2].replace('v', '')})"
    if other := re.search(r"Not of type (\w+): .*: ('.*')", problem):
        return f"{key}: {other[2]} is not of the type {other[1]}"
    if keys and (value := re.search(r"(?:Given|Got) value: (.*)", problem)):
        tried = re.findall(r"Expected an? (?:<class '(.+?)'>|typing\.(.+))", problem[: value.start()])
        names = ["null" if name == "NoneType" else name or other for name, other in tried]
        if allowed := [
            word for name in names for word in re.findall(r"[\w-]+", name.partition("Literal")[2])
        ]:
            return (
                f"{key}: {value[1]!r} must be one of {', '.join([*allowed, *('null',) * ('null' in names)])}"
            )
        types = " or ".join(names)
        return f"{key}: {value[1]!r} is not of the type {types}" if types else f"{key}: {value[1]!r} is wrong"
    return " ".join(message.split())


def _mistake(error: BaseException | None) -> str | None:
    """What a user can put right of an error, or of one that it came from; None if there is nothing."""
    while error is not None:
        if isinstance(error, InputError | MisconfigurationException):
            return " ".join(str(error).split())
        if isinstance(error, ValueError | RuntimeError) and str(error).lstrip().startswith(SAID_BY_LIGHTNING):
            return f"trainer: {' '.join(str(error).split())}"
        if isinstance(error, ArgumentError) and not isinstance(error.__cause__, InputError):
            return _in_a_line(str(error))
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def errors_in_a_line(debug: bool) -> Iterator[None]:
    """What a user can put right is one line on standard error and exit code 2."""
    try:
        yield
    # As the shell has it: whoever sent the signal sees that it was heeded.
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
