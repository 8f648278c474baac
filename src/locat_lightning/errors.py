"""The one exception for what a user can put right, and what helps to put it right."""

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """A mistake in what the user gave: the message says what, where and what to do, in one line.

    The command prints it without a traceback and exits with code 2 (`--debug` shows the traceback).
    """


def near(name: str, known: Iterable[str], n: int = 3) -> str:
    """At most `n` known names that are like a name, to end a message with; empty if there is none."""
    found = get_close_matches(name, known, n)
    return f"; near it: {', '.join(found)}" if found else ""
