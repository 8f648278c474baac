"""The one exception for what a user can put right."""


class InputError(ValueError):
    """A mistake in what the user gave: the message says what, where and what to do, in one line.

    The command prints it without a traceback and exits with code 2 (`--debug` shows the traceback).
    """
