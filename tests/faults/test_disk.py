"""A full disk: one line with the cause, exit code 1, the checkpoint before is whole, no half of a file."""

import json
import os
import shutil
import sys
import traceback
from pathlib import Path

import pytest
import torch

from locat.command import main
from tests.commands.runs import LAST
from tests.conftest import begin_child
from tests.faults.conftest import mount_small_disk

pytestmark = pytest.mark.usefixtures("workplace")

COMMANDS = {
    "fit": ["fit", "--ckpt_path", str(LAST), "--trainer.max_epochs", "6", "--allow_changes", "true"],
    "predict": ["predict", "--weights", str(LAST)],
    "export": ["export", "--weights", str(LAST), "--to", "exported"],
}


def on_a_small_disk(size, free, arguments, result, output):
    """Run a command on a copy of a run, on a disk with so many free bytes; write down what is left of it."""
    Path("disk").mkdir()
    if not mount_small_disk("disk", size):
        return
    shutil.copytree("runs", "disk/runs")
    os.chdir("disk")
    filler = os.statvfs(".").f_bavail * os.statvfs(".").f_frsize - free
    Path("filler").write_bytes(bytes(max(0, filler)))
    os.environ["TMPDIR"] = str(Path.cwd())
    begin_child()
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code = 0
    try:
        main(arguments)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    step = torch.load(LAST, weights_only=True)["global_step"]
    names = [path.name for path in Path().rglob("*") if path.is_file()]
    result.write_text(json.dumps({"code": code, "step": step, "files": names}))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("free", [0, 4096, 32_768, 131_072])
def test_a_full_disk(command, free, trained, fork_server, record_property):
    result, output = Path("result.json").absolute(), Path("output.txt").absolute()
    given = ("16m", free, COMMANDS[command], result, output)
    process = fork_server.Process(target=on_a_small_disk, args=given)
    process.start()
    process.join(120)
    if process.exitcode == 0 and not result.is_file():
        pytest.skip("this user may not mount a disk")
    said = output.read_text()
    found = json.loads(result.read_text())
    assert "Traceback" not in said, said
    if found["code"] == 0:  # there was room enough
        return
    assert found["code"] == 1, said
    assert [line for line in said.splitlines() if "No space left on device" in line], said
    assert found["step"] >= 6
    assert not [name for name in found["files"] if name.endswith((".part", ".tmp"))]
    record_property(f"full disk, {free} bytes free", command)
