"""The `locat` command: a table of commands, each imported when it is called."""

import os
import signal
import sys
import threading
from importlib import import_module

from locat.errors import refuse

# The module whose `main(arguments)` runs a command (`.` is locat_lightning.commands), and what it does.
COMMANDS = {
    "fit": (".fit", "train: locat fit --config classify_tiny.yaml --data.root DIR"),
    "validate": (".fit", "measure on the validation images: locat validate --weights runs/…/best.ckpt"),
    "test": (".fit", "measure on the test images"),
    "predict": (".fit", "write the classes of images as a CSV file, or of their pixels as PNG files"),
    "knn": (".evaluate", "k-NN accuracy of a frozen backbone: locat knn --weights W --data.root DIR"),
    "linear": (".evaluate", "linear accuracy of a frozen backbone"),
    "retrieve": (".evaluate", "mIoU of a frozen backbone's patch features, without training (Hummingbird)"),
    "track": (
        ".track",
        "J and F of objects that a frozen backbone's patch features follow through videos (DAVIS)",
    ),
    "robustness": (".evaluate", "top-1 or mIoU of a model against the number of patches that are corrupted"),
    "layers": (".evaluate", "how far each layer's attention reaches, how alike its patches are to [CLS]"),
    "compare": (".compare", "two models on the same images, paired: locat compare RUN_A RUN_B"),
    "embed": (
        ".embed",
        "write the features of a folder of images: locat embed --weights W --to features.npy",
    ),
    "show": (".show", "draw what a model makes of images: locat show --weights W IMAGE"),
    "stats": (
        ".stats",
        "mean and deviation of each channel of a folder: locat stats --data.root DIR",
    ),
    "average": (
        ".average",
        "one model of the mean weights of several (soup): locat average RUN RUN … --to DIR",
    ),
    "study": (".study.command", "train models alike and compare them: locat study --config study_cifar.yaml"),
    "pack": (
        ".pack",
        "write a folder of images to shards that --data.stream reads: locat pack --data.root DIR --to SHARDS",
    ),
    "export": (
        ".export",
        "write a model in timm's hub layout, as ONNX, …: locat export --weights W --to DIR",
    ),
    "info": (".info", "show what a model costs: locat info locatvit_base"),
    "configs": ("locat.configs", "list the configs that --config takes by name"),
    "runs": ("locat.runs", "list the runs in a directory, with their results: locat runs [DIR]"),
}

PATIENCE = 5  # seconds that a command has to end after a signal

HELP = f"""usage: locat [--debug] COMMAND [options]

Train and evaluate Vision Transformers with good patch features (LocAtViT), in PyTorch Lightning.

commands:
{"".join(f"  {name:10} {summary}" + chr(10) for name, (_, summary) in COMMANDS.items())}
options:
  --help     show this text; `locat COMMAND --help` lists the options of a command
  --version  print the version
  --debug    show the traceback of an error, and what torch warns of

`--config` takes a path or the name of a shipped config, and every key of it is an option too:
`--data.batch_size 64`. `--weights` takes a checkpoint of a run, a file, an exported folder, a timm name, or
`random`. Resume an interrupted run with `--ckpt_path last`.
"""


def main(arguments: list[str] | None = None) -> None:
    """Run `locat` with `arguments`; with those of the process, which then ends, if None."""
    is_last, arguments = arguments is None, sys.argv[1:] if arguments is None else arguments
    match [argument for argument in arguments if argument != "--debug"]:
        case [] | ["--help" | "-h" | "help", *_]:
            print(HELP, end="")
        case ["--version", *_]:
            from importlib.metadata import version

            print(f"locat-lightning {version('locat-lightning')}")
        case [name, *_] if name in COMMANDS:
            # Threads of OpenMP that spin while they wait make a run many times slower on a busy machine.
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
            if "--debug" not in arguments:  # torch writes a page of frames when a process of the run is lost
                os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
            _run(COMMANDS[name][0], arguments, is_last)
        case [name, *_]:
            refuse(f"there is no command {name!r}; the first word is one of {', '.join(COMMANDS)}")


def _run(module: str, arguments: list[str], is_last: bool) -> None:
    given = sys.argv
    is_main = threading.current_thread() is threading.main_thread()  # which alone may handle signals
    numbers = (signal.SIGINT, signal.SIGTERM) if is_main else ()
    ending = _Ending()
    before = {number: signal.signal(number, _leave) for number in numbers}
    if hasattr(signal, "pthread_sigmask"):  # they are blocked while a run starts its other processes
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    # Lightning starts the other processes of a run on several GPUs with the arguments in sys.argv.
    sys.argv = [given[0], *arguments]
    try:
        imported = import_module(module, "locat_lightning.commands")
        for number in numbers:
            signal.signal(number, ending)
        imported.main(arguments)
        sys.stdout.flush()  # where a closed pipe shows
    except BrokenPipeError:  # as by `locat runs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush at its end
        sys.exit(1)
    finally:
        sys.argv = given
        ending.cancel()
        for number, handler in before.items():
            signal.signal(number, _leave_at_the_end if is_last else handler)


def _leave_at_the_end(number: int, frame: object) -> None:
    """Leave while Python ends, where an exception would be shown and ignored."""
    os._exit(128 + number)


def _leave(number: int, frame: object) -> None:
    """Leave at once: nothing is written yet, and an import that an exception cut short would raise others."""
    os.write(2, b"interrupted\n")
    os._exit(128 + number)


class _Ending:
    """Leave by an exception, so that nothing is left behind, with the exit code that a shell reports.

    It may be lost, in a fork or a finalizer for example: the signal is then repeated. Others are ignored.
    """

    def __init__(self) -> None:
        self._again: threading.Timer | None = None
        self._is_due = True

    def __call__(self, number: int, frame: object) -> None:
        if self._is_due:
            self._is_due = False
            self._again = threading.Timer(PATIENCE, self._repeat, (os.getpid(), number))
            self._again.daemon = True
            self._again.start()
            os.write(2, b"interrupted\n")
            sys.exit(128 + number)

    def _repeat(self, process: int, number: int) -> None:
        self._is_due = True
        os.kill(process, number)

    def cancel(self) -> None:
        if self._again is not None:
            self._again.cancel()
