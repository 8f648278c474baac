"""What is installed from a wheel, in a directory that is no checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from locat import configs

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A directory with the files of the wheel."""
    directory = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(directory)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    [wheel] = directory.glob("*.whl")
    files = directory / "files"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(files)
    return files


def test_it_is_all_of_the_source_and_all_configs(installed):
    def below(directory, kind):
        return {path.relative_to(directory) for path in directory.rglob(kind)}

    for kind in ("*.py", "*.jinja", "py.typed"):
        assert below(installed, kind) == below(ROOT / "src", kind)
    assert below(installed / "locat_lightning" / "configs", "*") == below(ROOT / "configs", "*")


def test_configs_are_found_by_name_from_anywhere(installed, tmp_path):
    script = (
        "from locat import command, configs; command.main(['configs']); print(configs.find('dino_small'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = installed / "locat_lightning" / "configs" / "dino_small.yaml"
    assert done.stdout == f"{configs.list_configs()}\n{found}\n"
