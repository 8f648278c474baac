"""Parsing that all commands share: configs by name, options of weights, suggestions for unknown options."""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import torch
import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace, set_parsing_settings
from yaml.representer import SafeRepresenter

from locat import configs
from locat_lightning.commands.sources import suggest_file
from locat_lightning.errors import InputError, in_a_line, near

# Options that decide the defaults of others, so that they are read before a parser has all its defaults.
DECISIVE = (
    *("--weights", "--ckpt_path", "--name", "--runs", "--model", "--model.class_path"),
    *("--data.root", "--data.dataset", "--data.stream"),
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
# What jsonargparse says of a value that is none of an option's choices, of a class within another, too.
KEY = re.compile('Parser key "([^"]+)"')
CHOICE = re.compile(
    r"""^(?P<keys>Parser key "[^"]+": (?:Does not validate .*? Errors: - )?"""
    r"""(?:Problem with given class_path '[^']+': Parser key "[^"]+": )?)"""
    r"Expected a typing\.Literal\[(?P<choices>[^\]]+)\]\. "
    r"Got value: (?P<value>.*?)(?: - Expected a <class .*)?$"
)
NOT_IN_YAML = re.compile("[\x7f-\x84\x86-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")
set_parsing_settings(instantiate_subclass_spec_in_any=False)  # where any value will do, it stays a value
# jsonargparse writes a config again when its class is replaced by another, but its restricted numbers are of
# subclasses, which YAML by itself does not write, and some defaults of Lightning's are enums.
yaml.SafeDumper.add_multi_representer(int, SafeRepresenter.represent_int)
yaml.SafeDumper.add_multi_representer(float, SafeRepresenter.represent_float)
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, each: dumper.represent_data(each.value))


class ConfigByName(ActionConfigFile):
    """`--config` takes a local file, or else the name of a shipped config."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        super().__call__(parser, cfg, find_config(str(values)), option_string)


def find_config(name: str) -> str:
    """Return the path of a config: a local file first, then a shipped one; `InputError` if it is not YAML."""
    path = configs.find(name)
    if path is None:
        if Path(name).is_dir():
            raise InputError(f"--config: {name} is a directory{suggest_file(Path(name) / 'config.yaml')}")
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


def command_parser(command: str, description: str) -> ArgumentParser:
    """Return the parser of a command that is not LightningCLI's."""
    options = {"exit_on_error": False, "allow_abbrev": False}
    return ArgumentParser(prog=f"locat {command}", description=description, **options)


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


def as_arguments(options: Mapping[str, Any]) -> list[str]:
    """Return options as a user would type them."""
    return [f"--{option}={_as_text(value)}" for option, value in options.items()]


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    text = json.dumps(value, ensure_ascii=False)  # YAML does not read escapes of halves of a character
    return NOT_IN_YAML.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def parse(
    parser: ArgumentParser,
    arguments: list[str],
    subparser: ArgumentParser | None = None,
    recorded: Sequence[str] = (),
) -> Namespace:
    """Parse arguments, of which the first is a command if there is a `subparser`.

    An option that does not exist is answered with those that are similar; a mistake in one of the `recorded`
    arguments, which nobody typed, says where it comes from. Without a `subparser`, an option that takes a
    list takes several words as well (`join_words`).
    """
    if subparser is None:
        arguments = join_words(parser, arguments)
    try:
        return parser.parse_args(arguments)
    except ArgumentError as error:
        unknown = _unknown_option(subparser or parser, arguments[subparser is not None :])
        mistake = unknown or _unknown_choice(error) or error
        options = [_option(each) for each in arguments]
        for option in (_option(each) for each in recorded):
            named = re.search(f'"{re.escape(option[2:])}"|^{re.escape(option)}:', str(mistake))
            typed = options.count(option) > 1 or any(each.startswith(f"{option}.") for each in options)
            if named and not typed:
                raise InputError(f"recorded with the weights, not typed: {in_a_line(mistake)}") from error
        if mistake is error:
            raise
        raise mistake from error


def join_words(parser: ArgumentParser, arguments: Sequence[str]) -> list[str]:
    """Write the words after an option that takes a list as one list: `--k 10 20` becomes `--k=[10, 20]`."""
    # Private: there is no other list of the options' types.
    types = {name: _alternatives(each) for each in parser._actions for name in each.option_strings}
    joined, rest = list[str](), list(arguments)
    while rest:
        option, equals, value = rest.pop(0).partition("=")
        lists = [each for each in types.get(option, ()) if get_origin(each) in (list, Sequence, tuple)]
        words = [value] if equals else []
        while lists and not equals and rest and not re.match(r"-(?![\d.])", rest[0]):
            words.append(rest.pop(0))
        if not lists or not words:
            joined.append(option + equals + value)
            continue
        others = {get_origin(each) for each in types[option] if each is not type(None)} - {list, Sequence}
        text = " ".join(words)
        if not (text.lstrip().startswith("[") or (len(words) == 1 and (others or text == "null"))):
            quote = str in get_args(lists[0])
            text = f"[{', '.join(_as_text([word])[1:-1] if quote else word for word in words)}]"
        joined.append(f"{option}={text}")
    return joined


def _alternatives(action: Any) -> tuple[Any, ...]:
    """Return the types of which an option takes one."""
    kind = getattr(action, "_typehint", None)
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _unknown_option(parser: ArgumentParser, arguments: list[str]) -> InputError | None:
    own, chosen = _known_options(parser, arguments)
    for option in (_option(each) for each in arguments if each.startswith("--")):
        below = any(f"{option}.".startswith(f"{each}.") for each in chosen)
        if option not in own and not below and not any(each.startswith(f"{option}.") for each in chosen):
            return InputError(f"{option}: there is no such option{_similar(option, own | chosen)}")
    return None


def _unknown_choice(error: ArgumentError) -> InputError | None:
    """Return what to say of a value that is none of an option's choices; None of another error."""
    if (found := CHOICE.search(in_a_line(error))) is None:
        return None
    option = ".".join(KEY.findall(found["keys"]))
    choices = [each.strip(" '") for each in found["choices"].split(",")]
    value = "null" if found["value"] == "None" else found["value"]
    return InputError(f"--{option}: {value} is none of {', '.join(choices)}{near(value, choices)}")


def _option(argument: str) -> str:
    return argument.partition("=")[0].removesuffix("+")


def _known_options(parser: ArgumentParser, arguments: list[str]) -> tuple[set[str], set[str]]:
    """Return a parser's own options, and those of the classes that are chosen."""
    # Private: there is no other list.
    own = {name for each in parser._actions for name in each.option_strings}
    kept, keep = [], True
    for argument in arguments:  # without options of classes, whose mistakes hide which classes are chosen
        if argument.startswith("--"):
            option = _option(argument)
            keep = option in own or option.endswith(".class_path")
        if keep:
            kept.append(argument)
    try:
        keys = parser.parse_args(kept).keys()
    except (ArgumentError, InputError):
        return own, own
    return own, {f"--{key.replace('.init_args.', '.')}" for key in keys}


def _similar(option: str, known: set[str]) -> str:
    """Suggest options with the same last segment or the same meaning; without one, of a similar name."""
    last = option.rpartition(".")[2].lstrip("-")
    names = sorted(name for name in known if not name.endswith((".help", ".class_path", "+")))
    same = [name for name in names if name == ALIASES.get(last)]
    same += [name for name in names if name.endswith((f".{last}", f"--{last}"))]
    return f"; did you mean {', '.join(same[:3])}?" if same else near(option, names)


def mixed_precision() -> str | None:
    """Return the mixed precision of the recipes where there is a GPU, else Lightning's default."""
    if not torch.cuda.is_available():
        return None
    return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"
