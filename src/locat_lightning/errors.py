"""The exception for mistakes that a user can correct, and suggestions for their correction."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from math import isfinite
from typing import Any


class InputError(ValueError):
    """A mistake in what the user gave. The message says in one line what, where and what to do.

    The command prints it without a traceback and exits with code 2 (`--debug` shows the traceback).
    """


def check_finite(group: str, options: Mapping[str, Any]) -> None:
    """Check that options of a group that are numbers, or tuples of them, are finite: `InputError` if not."""
    for name, value in options.items():
        parts = tuple(value) if isinstance(value, list | tuple) else (value,)
        if any(isinstance(part, float) and not isfinite(part) for part in parts):
            shown, what = (parts, "finite numbers") if len(parts) > 1 else (f"({value})", "a finite number")
            raise InputError(f"{group}.{name} {shown} must be {what}")


def near(name: str, known: Iterable[str], n: int = 3) -> str:
    """Return the end of a message that suggests up to `n` similar names; empty if there are none."""
    found = get_close_matches(name, known, n)
    return f"; did you mean {', '.join(found)}?" if found else ""


def in_a_line(error: BaseException) -> str:
    """Return an exception's message without line breaks; its type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__
