"""What a file may say that the user did not type: data, never code.

A checkpoint and the config beside it may come from anybody. They choose among this package's own classes and
give them plain values; all else is taken from the command line and from `--config` alone.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from locat_lightning.errors import InputError


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


def refused(file: object, choice: str) -> InputError:
    """Return the error for what only the user may choose, because it is code or a place to write to."""
    return InputError(
        f"{file}: {choice}: a run's file may hold plain values and name classes of locat_lightning, no more; "
        "if you trust it, give it as --config"
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
