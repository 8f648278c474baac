"""The exception for mistakes that a user can correct, and suggestions for their correction."""

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """A mistake in what the user gave. The message says in one line what, where and what to do.

    The command prints it without a traceback and exits with code 2 (`--debug` shows the traceback).
    """


def near(name: str, known: Iterable[str], n: int = 3) -> str:
    """Return the end of a message that suggests up to `n` similar names; empty if there are none."""
    found = get_close_matches(name, known, n)
    return f"; did you mean {', '.join(found)}?" if found else ""


def in_a_line(error: BaseException) -> str:
    """Return an exception's message without line breaks; its type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__
