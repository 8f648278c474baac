"""The answers that need no torch."""

import subprocess
import sys

import locat


def test_help_version_and_configs_import_no_torch():
    script = (
        "import sys, locat\n"
        "for a in (['--help'], ['--version'], ['configs'], ['runs'], []): locat.main(a)\n"
        "assert not {'torch', 'lightning', 'timm'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "locat fit --config classify_tiny.yaml" in done.stdout
    assert "locat-lightning 0." in done.stdout
    assert "quickstart.yaml" in done.stdout


def test_every_config_says_in_a_line_what_it_is():
    lines = locat.list_configs().splitlines()
    assert len(lines) == len(list(locat.config_directory().rglob("*.yaml"))) > 3
    assert all(len(line.split(maxsplit=1)[1]) > 20 for line in lines)


def test_runs_are_listed_with_their_metrics(tmp_path):
    assert "no finished run" in locat.list_runs(tmp_path)
    (tmp_path / "a" / "version_0").mkdir(parents=True)
    (tmp_path / "a" / "version_0" / "metrics.json").write_text('{"epochs": 3, "val/top1": 0.51234}')
    assert locat.list_runs(tmp_path).split("a/version_0")[1].split() == ["epochs", "3", "val/top1", "0.5123"]
