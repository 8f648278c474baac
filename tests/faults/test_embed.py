"""`locat embed` ended by a signal, and given again: no row is lost, none comes twice."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from locat.command import main
from tests.commands.test_embed import QUIET, SIZES, model, pile, rows_of

__all__ = ["model"]
IMAGES = 400


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_all_processes(number, model, tmp_path, start_locat):
    """As a terminal sends it, also to those that read images."""
    root = pile(tmp_path / "pile", IMAGES)
    named = ["--weights", "net.pth", "--backbone", "locatvit_tiny", "--backbone_args", json.dumps(SIZES)]
    arguments = ["embed", *named, *QUIET, "--data.root", str(root), "--what", "patches"]
    arguments += ["--data.batch_size", "1", "--data.num_workers", "1"]
    process, output = start_locat(*arguments, "--to", "a.npy")
    part = Path("a.npy.part/features")
    sizes = set[int]()  # the first row is counted before the second is written
    while process.is_alive() and len(sizes) < 4:
        sizes.add(part.stat().st_size if part.exists() else 0)
        time.sleep(0.01)
    os.killpg(process.pid, number)
    process.join(30)
    if number == signal.SIGKILL:
        assert process.exitcode == -number
    else:
        assert process.exitcode == 128 + number
        assert f"of {IMAGES} images are done: the same command continues" in output.read_text()
    assert "Traceback" not in output.read_text()
    assert not Path("a.npy").exists()
    main([*arguments, "--to", "a.npy"])
    main([*arguments, "--to", "b.npy"])
    np.testing.assert_array_equal(np.load("a.npy"), np.load("b.npy"))
    assert rows_of("a.csv") == rows_of("b.csv")
    assert len(rows_of("a.csv")) == IMAGES
