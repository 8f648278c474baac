"""The answers that need no torch."""

import subprocess
import sys

import pytest

from locat import configs, runs
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


def test_runs_are_listed_with_their_metrics(tmp_path):
    assert "no run beneath" in runs.list_runs(tmp_path)
    (tmp_path / "a" / "version_0").mkdir(parents=True)
    (tmp_path / "a" / "version_0" / "metrics.json").write_text('{"epochs": 3, "val/top1": 0.51234}')
    assert runs.list_runs(tmp_path).split("a/version_0")[1].split() == ["epochs", "3", "val/top1", "0.5123"]
    (tmp_path / "longer" / "version_0").mkdir(parents=True)
    other = '{"epochs": 30, "val/loss": 1.5, "val/top1": 0.25, "best val/top1": 0.5}'
    (tmp_path / "longer" / "version_0" / "metrics.json").write_text(other)
    for name, recorded in (("cut", "ckpt_path: null"), ("failed", "ckpt_path: null"), ("validated", "b: 1")):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text(f"a: 1\n{recorded}\n")
    last = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    last.touch()
    pad = " " * len("longer/version_0")
    assert runs.list_runs(tmp_path).replace(f"{tmp_path}/", "").splitlines() == [
        "a/version_0" + pad[11:] + "   epochs 3    val/top1 0.5123",
        "cut"
        + pad[3:]
        + f"   not finished; to go on: locat fit --ckpt_path {last}".replace(f"{tmp_path}/", ""),
        "failed" + pad[6:] + "   not finished, without a checkpoint",
        "longer/version_0   epochs 30   val/top1 0.25     best val/top1 0.5",
    ]


def test_a_run_elsewhere_is_not_held(tmp_path):
    """Its logger has another directory than the one that the run was to have."""
    assert runs.hold(tmp_path / "nowhere") is None
    assert not runs.is_held(tmp_path / "nowhere")
    assert not runs.is_held(tmp_path)


@pytest.mark.parametrize("command", ["configs", "runs"])
@pytest.mark.parametrize("help_", ["--help", "-h"])
def test_each_of_them_has_a_help(command, help_, capsys):
    main([command, help_])
    assert capsys.readouterr().out.startswith(f"usage: locat {command}")


@pytest.mark.parametrize("arguments", [["--debug", "configs"], ["configs", "--debug"]])
def test_debug_changes_nothing_of_an_answer(arguments, capsys):
    main(arguments)
    assert capsys.readouterr().out == f"{configs.list_configs()}\n"


def test_the_runs_of_a_directory_whose_name_is_given(tmp_path, capsys):
    main(["--debug", "runs", str(tmp_path)])
    assert capsys.readouterr().out == f"no run beneath {tmp_path}\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["fitt", "--config", "x"], "'fitt' is no command: the first word is one of "),
        (["--debug", "fitt"], "'fitt' is no command: the first word is one of "),
        (["--config", "x", "fit"], "'--config' is no command: the first word is one of "),
        (["configs", "tiny"], "'tiny' is too much for locat configs: see locat configs --help"),
        (["runs", "a", "b"], "'a b' is too much for locat runs: see locat runs --help"),
        (["runs", "/nowhere"], "locat runs: no such folder: /nowhere"),
        (["runs", "--all"], "'--all' is too much for locat runs: see locat runs --help"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, expected, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"locat: error: {expected}")
    if "no command" in expected:
        assert line.endswith("knn, linear, retrieve, study, export, info, configs, runs")


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
