"""What a command says of errors: a line and a code for those of the user and of the machine."""

import threading

import pytest
import torch

from locat_lightning.commands.messages import errors_in_a_line
from locat_lightning.errors import InputError

FULL = OSError(28, "No space left on device", "runs/x/last.ckpt")
IN_A_WORKER = """Caught RuntimeError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "worker.py", line 1, in _worker_loop
RuntimeError: unable to allocate shared memory(shm) for file </torch_1_2_0>: No space left on device (28)
"""


class SafetensorError(Exception):
    pass


def caused(error, cause):
    error.__cause__ = cause
    return error


def answered(error, capsys, *arguments):
    """The line and the exit code of a command that raises an error."""

    @errors_in_a_line
    def main(arguments):
        raise error

    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    [line] = capsys.readouterr().err.splitlines()
    return line.removeprefix("locat: error: "), stopped.value.code


@pytest.mark.parametrize(
    ("error", "cause", "remedy"),
    [
        (FULL, "runs/x/last.ckpt: No space left on device: ", "free some"),
        (
            caused(InputError("a ViT cannot be written"), FULL),
            "runs/x/last.ckpt: No space left on device: ",
            "",
        ),
        (
            SafetensorError("I/O error: No space left on device (os error 28)"),
            "I/O error: No space",
            "free some",
        ),
        (RuntimeError(IN_A_WORKER), "RuntimeError: unable to allocate shared memory", "--shm-size"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."),
            "DataLoader",
            "--shm-size",
        ),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "DataLoader", "num_workers"),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), "DataLoader", "num_workers"),
        (MemoryError(), "MemoryError: ", "batch_size"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
            "CUDA out of memory",
            "batch_size",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"),
            "DefaultCPUAllocator",
            "batch_size",
        ),
        (PermissionError(13, "Permission denied", "runs/x"), "runs/x: Permission denied", ""),
        (FileNotFoundError(2, "No such file or directory", "runs/x"), "runs/x: No such file", ""),
    ],
)
def test_failures_of_the_machine_are_a_line_with_what_to_do(error, cause, remedy, capsys):
    line, code = answered(error, capsys)
    assert code == 1
    assert line.startswith(cause)
    assert remedy in line.removeprefix(cause)


def test_a_mistake_that_the_system_noticed_is_one(capsys):
    mistake = caused(
        InputError("--config: x.yaml: Permission denied"), PermissionError(13, "Permission denied")
    )
    assert answered(mistake, capsys) == ("--config: x.yaml: Permission denied", 2)


@pytest.mark.parametrize("error", [TypeError("a fault of ours"), BrokenPipeError(32, "Broken pipe")])
def test_other_errors_stay_as_they_are(error):
    with pytest.raises(type(error)):
        errors_in_a_line(lambda _: (_ for _ in ()).throw(error))([])


def test_debug_shows_where_the_machine_failed():
    with pytest.raises(OSError, match="No space left"):
        errors_in_a_line(lambda _: (_ for _ in ()).throw(FULL))(["--debug"])


def test_a_thread_leaves_a_full_disk_to_who_waits_for_it(capsys):
    def write(error):
        raise error

    errors_in_a_line(lambda _: None)([])
    for error in (FULL, TypeError("a fault of ours")):
        thread = threading.Thread(target=write, args=(error,))
        thread.start()
        thread.join()
    said = capsys.readouterr().err
    assert "a fault of ours" in said
    assert "No space left" not in said


def test_a_package_that_an_option_needs_is_named(capsys):
    missing = ModuleNotFoundError("Requirement 'wandb>=0.12.10' not met.")
    line, code = answered(caused(ValueError("trainer.logger"), missing), capsys)
    assert (line, code) == ("Requirement 'wandb>=0.12.10' not met.", 2)


@pytest.mark.parametrize("path", ["images/igloo", "gloo/out of memory", "Bus error"])
def test_words_in_a_path_that_a_mistake_names_are_no_failure(path, capsys):
    assert answered(InputError(f"no images in {path}"), capsys) == (f"no images in {path}", 2)
