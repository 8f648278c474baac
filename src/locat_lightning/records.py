"""What a file may say that the user did not type: data, never code.

A checkpoint and the config beside it may come from anybody. They choose among this package's own classes and
give them plain values; all else is taken from the command line and from `--config` alone.
"""

from collections.abc import Iterator, Mapping
from math import isfinite
from typing import Any

from torch import Tensor

from locat_lightning.errors import InputError

LARGEST = 2**32 - 1  # whole number of an option or a count; numpy takes no larger seed


def plain(value: Any, file: object, option: str = "", classes: Mapping[str, type] | None = None) -> Any:
    """Return what a file says, if it is data: null, boolean, number, text, and lists and mappings of these.

    Args:
        value: read from the file.
        file: for the message.
        option: dotted name of the value; "" for all of them.
        classes: options whose value is a class, by their last word, and the base of those that are allowed.

    Raises:
        InputError: it is something else, or names a class where none belongs, or one of another package.
    """
    if classes and value is not None and (base := classes.get(option.rpartition(".")[2])) is not None:
        spec = value if isinstance(value, Mapping) else {"class_path": value}
        if not _is_own(path := str(spec.get("class_path")), base):
            raise refused(file, f"{option} is {path}")
        arguments = plain(spec.get("init_args") or {}, file, f"{option}.init_args", classes)
        return {"class_path": path, "init_args": arguments}
    if isinstance(value, Mapping):
        if "class_path" in value or not all(isinstance(key, str) for key in value):
            raise refused(file, f"{option} names {value.get('class_path', 'what is no option')}")
        return {k: plain(each, file, f"{option}.{k}".lstrip("."), classes) for k, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each, file, option, classes) for each in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise refused(file, f"{option} is a {type(value).__name__}")


def check_like(found: Any, own: Any, file: object, place: str) -> None:
    """Check that a state in a checkpoint has the structure of the one that would be written now.

    Args:
        found: of mappings, lists and single values; entries besides those of `own` may be anything single.
        own: the state to compare with; null stands for any single value.
        file: for the message.
        place: dotted name of the state, for the message.

    Raises:
        InputError: it lacks an entry, or has a value of another kind, or a number that counts nothing.
    """
    if isinstance(own, Mapping) and isinstance(found, Mapping) and own.keys() <= found.keys():
        for key, value in found.items():
            check_like(value, own.get(key), file, f"{place}.{key}")
        return
    if isinstance(own, list | tuple) and isinstance(found, list | tuple) and len(own) == len(found):
        for number, (value, like) in enumerate(zip(found, own, strict=True)):
            check_like(value, like, file, f"{place}.{number}")
        return
    if isinstance(own, bool | str):
        fits = isinstance(found, type(own))
    elif isinstance(own, int):
        fits = type(found) is int and 0 <= found <= LARGEST
    elif isinstance(own, float):
        fits = type(found) in (int, float) and isfinite(found)
    else:
        single = not isinstance(found, Tensor) or found.numel() == 1
        fits = single and not isinstance(own, Mapping | list | tuple)
    if not fits:
        kind = type(found).__name__
        shown = f"{found!r:.60}" if isinstance(found, str | int | float | None) else f"a {kind}"
        raise InputError(f"{file}: {place} ({shown}) is not what a run has there: take another checkpoint")


def refused(file: object, choice: str) -> InputError:
    """Return the error for what only the user may choose, because it is code or a place to write to."""
    trusted = f"; if you trust it, add --config {file}" if str(file).endswith(".yaml") else ""
    return InputError(
        f"{file}: {choice}: a run's file may hold plain values and name classes of locat_lightning, no more"
        f"{trusted}"
    )


def _is_own(class_path: str, base: type) -> bool:
    """Check that an import path is of a class of this package that derives from a base."""
    module, _, name = class_path.rpartition(".")
    homes = [each.__module__ for each in _derived(base) if each.__name__ == name]
    return any(home.startswith("locat_lightning.") and f"{home}.".startswith(f"{module}.") for home in homes)


def _derived(base: type) -> Iterator[type]:
    own: list[type] = base.__subclasses__()
    for each in own:
        yield each
        yield from _derived(each)
