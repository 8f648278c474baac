"""What a command says: mistakes in one line, and of Lightning's messages those that tell a user something."""

import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable
from functools import wraps

from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException

from locat.errors import refuse
from locat_lightning.errors import InputError, in_a_line

Command = Callable[[list[str]], None]

EXPECTED_WARNINGS = (
    # That of a resumed run.
    "Checkpoint directory .* exists and is not empty",
    # A checkpoint from elsewhere starts a run of its own.
    "The dirpath has changed from .* to ",
    # Models too large for one GPU are not for this trainer, and all others can be averaged.
    "You're using the WeightAveraging callback with a model that overrides the configure_model",
    # A frozen backbone stays in evaluation mode.
    "Found .* module.* in eval mode at the start of training",
    # The trainer then logs once an epoch, unless the user set it otherwise.
    "The number of training batches .* is smaller than the logging interval",
    # Lightning 2.6 calls torch's pytree in a way that torch 2.15 deprecates.
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)
# Beginnings of messages that --debug alone shows.
NO_NEWS = (
    "Seed set to",
    "GPU available",
    "TPU available",
    "HPU available",
    "Loading `train_dataloader` to estimate",
    "💡 Tip",
)
# Failures of the machine, as torch and the system say them, and what to do. The first that fits counts.
REMEDIES = {
    "shared memory|Bus error": (
        "processes that read images need a larger /dev/shm (docker run --shm-size 8g), or data.num_workers 0"
    ),
    "No space left on device|Disk quota exceeded": "free some, then run the command again",
    "OutOfMemory|out of memory|allocate memory|MemoryError": (
        "lower data.batch_size (and raise trainer.accumulate_grad_batches as much), or data.num_workers"
    ),
    r"\b(gloo|Gloo|NCCL)\b|ProcessGroup|process .*of the run has ended": (
        "see what the other processes said, then resume the run with --ckpt_path last"
    ),
    "DataLoader worker .*(killed|exited)": (
        "a process that reads images was ended from outside, perhaps because memory ran out: lower "
        "data.num_workers, then run the command again"
    ),
}

SERVICES = ("wandb", "mlflow", "comet_ml")  # packages of loggers, whose errors say what to do

# The last of these: a package that an option needs.
MISTAKES = (InputError, MisconfigurationException, ModuleNotFoundError)
# How Lightning's errors about options begin that are not a MisconfigurationException.
SAID_BY_LIGHTNING = ("`val_check_interval`", "Early stopping conditioned on metric")


def errors_in_a_line(run: Command) -> Command:
    """Make a command's `main` of a function that takes its arguments.

    A mistake of the user is answered with one line on standard error and exit code 2, a failure of the
    machine with one and exit code 1; `--debug` among the arguments shows the traceback, and all messages.
    """

    @wraps(run)
    def main(arguments: list[str]) -> None:
        debug = "--debug" in arguments
        _direct_messages(debug)
        try:
            run([argument for argument in arguments if argument != "--debug"])
        except BrokenPipeError:  # nobody reads what is printed
            raise
        except Exception as error:
            chain = _chain(error)
            failure = _failure(chain)
            said = failure or _mistake(chain)
            if debug or said is None:
                raise
            refuse(said, code=1 if failure else 2)

    return main


class Messages(logging.StreamHandler):
    """Writes to standard error as it is at the time: above the progress bar, while there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def _direct_messages(debug: bool) -> None:
    """Ignore expected warnings, and write Lightning's messages by `Messages`; all of them with `debug`."""
    for expected in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", expected)
    messages = Messages()
    if not debug:
        messages.addFilter(lambda record: not record.getMessage().startswith(NO_NEWS))
        threading.excepthook = _in_a_thread
        warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # not where in whose code
    for name in ("lightning.pytorch", "lightning.fabric"):
        if not (logger := logging.getLogger(name)).propagate:  # else whoever imports this decides
            logger.handlers = [messages]


def _in_a_thread(arguments: threading.ExceptHookArgs) -> None:
    """Leave a file that cannot be written to whoever waits for the thread: TensorBoard raises it again."""
    if not isinstance(arguments.exc_value, OSError):
        threading.__excepthook__(arguments)


def _chain(error: BaseException) -> list[BaseException]:
    """Return an error and those that it came from."""
    cause = error.__cause__ or error.__context__
    return [error, *(_chain(cause) if cause else ())]


def _failure(chain: list[BaseException]) -> str | None:
    """Return what failed that is no mistake of the user's, and what to do; None if there is nothing."""
    others = [each for each in chain if not isinstance(each, InputError)]  # which may quote any path
    for words, remedy in REMEDIES.items():
        for each in others:
            sentences = [*re.split(r"\n|\. ", str(each)), type(each).__name__]
            if said := [sentence for sentence in sentences if re.search(words, sentence)]:
                return f"{_of_system(each) or said[0]}: {remedy}"
    if len(others) < len(chain):
        return None
    for each in chain:
        if (package := type(each).__module__.partition(".")[0]) in SERVICES:
            return f"{package}: {in_a_line(each)}"
    said = [text for each in chain if (text := _of_system(each))]
    return f"{said[0]}: check that it is still there, and that this user may write there" if said else None


def _of_system(error: BaseException) -> str:
    """Return an error of the operating system as other commands put it; nothing of other errors."""
    if not isinstance(error, OSError) or not error.strerror:
        return ""
    return f"{os.fsdecode(error.filename)}: {error.strerror}" if error.filename else error.strerror


def _mistake(chain: list[BaseException]) -> str | None:
    """Return what the user can correct of an error or of one that it came from; None if there is nothing."""
    for each in chain:
        said = str(each).strip()
        if isinstance(each, MISTAKES) or said.startswith(SAID_BY_LIGHTNING):
            return said
    of_parser = [str(each) for each in chain if isinstance(each, ArgumentError)]
    if not of_parser:
        return None
    # Of an option of a class: the class's own option, below the group and the class.
    problems = [text for text in map(str, chain) if text.startswith("Problem with given class_path")]
    said = f"{of_parser[0].splitlines()[0]} {problems[-1]}" if problems else of_parser[-1]
    return re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", said)
