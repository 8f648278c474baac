"""A small /dev/shm, as containers have it: one line with the cause, exit code 1."""

import os

import pytest

from locat.command import main
from tests.commands.runs import FIT, RUN
from tests.conftest import begin_child
from tests.faults.conftest import mount_small_disk

pytestmark = pytest.mark.usefixtures("workplace")

NOT_PERMITTED = 77


def with_little_shared_memory(arguments, output):
    if not mount_small_disk("/dev/shm", "128k"):
        os._exit(NOT_PERMITTED)
    begin_child()
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    main(arguments)


def test_a_small_shared_memory_is_named(small, fork_server, tmp_path, record_property):
    output = tmp_path / "output.txt"
    options = [*FIT, *small, "--data.num_workers", "2"]
    process = fork_server.Process(target=with_little_shared_memory, args=(options, output))
    process.start()
    process.join(120)
    if process.exitcode == NOT_PERMITTED:
        pytest.skip("this user may not mount a disk")
    said = output.read_text()
    assert process.exitcode == 1, said
    assert "Traceback" not in said
    assert "processes that read images need a larger /dev/shm" in said.splitlines()[-1]
    assert not RUN.exists()
    record_property("a small /dev/shm", "1")
