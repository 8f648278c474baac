"""Mistakes in what the user typed, and failures of the machine: one line on standard error."""

import sys
from argparse import ArgumentParser
from typing import NoReturn


def refuse(mistake: str, code: int = 2) -> NoReturn:
    """Print in one line what is wrong with the command, and exit; code 1 says that it was not the command."""
    print(f"locat: error: {' '.join(mistake.split())}", file=sys.stderr)
    sys.exit(code)


class Parser(ArgumentParser):
    """Argparse's parser without the usage before an error."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command."""
        refuse(f"{self.prog}: {message}")
