"""The answers that need no torch."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from locat import command, configs
from locat.command import COMMANDS, HELP, main


def test_help_version_and_configs_import_no_torch():
    script = (
        "import sys; from locat import command\n"
        "for a in (['--help'], ['--version'], ['configs'], ['runs'], []): command.main(a)\n"
        "assert not {'torch', 'lightning', 'timm'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "locat fit --config classify_tiny.yaml" in done.stdout
    assert "locat-lightning 0." in done.stdout
    assert "quickstart.yaml" in done.stdout


def test_every_config_says_in_a_line_what_it_is():
    lines = configs.list_configs().splitlines()
    assert len(lines) == len(list(configs.config_directory().rglob("*.yaml"))) > 3
    assert all(len(line.split(maxsplit=1)[1]) > 20 for line in lines)


@pytest.mark.parametrize("command", ["configs", "runs"])
@pytest.mark.parametrize("help_", ["--help", "-h"])
def test_each_of_them_has_a_help(command, help_, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, help_])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: locat {command}")


@pytest.mark.parametrize("arguments", [["--debug", "configs"], ["configs", "--debug"]])
def test_debug_changes_nothing_of_an_answer(arguments, capsys):
    main(arguments)
    assert capsys.readouterr().out == f"{configs.list_configs()}\n"


def test_the_runs_of_a_directory_whose_name_is_given(tmp_path, capsys):
    main(["--debug", "runs", str(tmp_path)])
    assert capsys.readouterr().out == f"no runs in {tmp_path}\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["fitt", "--config", "x"], "there is no command 'fitt'; the first word is one of "),
        (["--debug", "fitt"], "there is no command 'fitt'; the first word is one of "),
        (["--config", "x", "fit"], "there is no command '--config'; the first word is one of "),
        (["configs", "tiny"], "locat configs: unrecognized arguments: tiny"),
        (["runs", "a", "b"], "locat runs: unrecognized arguments: b"),
        (["runs", "/nowhere"], "locat runs: no such folder: /nowhere"),
        (["runs", "--all"], "locat runs: unrecognized arguments: --all"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, expected, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"locat: error: {expected}")
    if "no command" in expected:
        assert line.endswith(f"one of {', '.join(COMMANDS)}")


def test_an_unknown_command_imports_no_torch():
    script = (
        "import sys; from locat import command\n"
        "try: command.main(['fitt'])\n"
        "finally: assert not {'torch', 'lightning', 'timm'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_every_command_is_in_the_help():
    assert all(f"\n  {command} " in HELP for command in COMMANDS)


def test_a_closed_pipe_ends_without_a_traceback():
    command = f"{sys.executable} -m locat configs | true"
    done = subprocess.run(
        ["bash", "-c", f"sleep 0.2; {command}"], capture_output=True, text=True, check=False
    )
    assert done.stderr == ""


def test_threads_do_not_spin_while_they_wait_unless_the_user_says_so(monkeypatch, capsys):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    main(["configs"])
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    main(["configs"])
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


@pytest.mark.parametrize(("options", "level"), [([], "ERROR"), (["--debug"], "")])
def test_what_torch_warns_of_is_for_debugging(options, level, monkeypatch):
    """It is a page of frames for each message that a lost process does not get."""
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "")  # restores what was
    monkeypatch.delenv("TORCH_CPP_LOG_LEVEL")
    main(["configs", *options])
    assert os.environ.get("TORCH_CPP_LOG_LEVEL", "") == level


def test_a_signal_whose_exception_was_lost_is_repeated(monkeypatch):
    """As in a fork or a finalizer, which pass over exceptions."""
    monkeypatch.setattr(command, "PATIENCE", 0.1)
    reached = []

    def run(arguments):
        for _ in range(2):  # the second one comes too soon
            with contextlib.suppress(SystemExit):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)
            reached.append(time.monotonic())
        time.sleep(10)

    monkeypatch.setattr(command, "import_module", lambda *_: SimpleNamespace(main=run))
    with pytest.raises(SystemExit, match=str(128 + signal.SIGINT)):
        main(["knn"])
    assert len(reached) == 2
    assert time.monotonic() - reached[-1] < 5


def test_a_signal_while_python_ends_shows_no_traceback():
    code = (
        "import atexit, os, signal\n"
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))\n"
        "from locat.command import main\n"
        "main()"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, "configs"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 128 + signal.SIGINT
    assert ended.stderr == ""
