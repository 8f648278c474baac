"""Mistakes in what the user typed: one line on standard error, and exit code 2."""

import sys
from argparse import ArgumentParser
from typing import NoReturn


def refuse(mistake: str) -> NoReturn:
    """Print in one line what is wrong with the command, and exit with code 2."""
    print(f"locat: error: {' '.join(mistake.split())}", file=sys.stderr)
    sys.exit(2)


class Parser(ArgumentParser):
    """Argparse's parser without the usage before an error."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command."""
        refuse(f"{self.prog}: {message}")
