"""Jobs that are cut off and start again by themselves: SLURM's requeue, and torchrun's restart."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from locat_lightning.backbones.weights import read_checkpoint
from tests.commands.runs import FIT, LAST, RUN
from tests.commands.test_fit_processes import BOTH, TELL

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.usefixtures("workplace")]

# As TELL, but once: what is started again trains on.
ONCE = (
    TELL.replace("def on", "told = os.path.exists('told')\n\n    def on", 1)
    .replace("if ", "if not self.told and ", 1)
    .replace("            os.kill", "            open('told', 'w').close()\n            os.kill")
)
LONGER = ["--trainer.max_epochs", "3", "--trainer.callbacks+=tell.Tell"]


@pytest.fixture
def options(small, monkeypatch):
    """Options of a run of 9 steps, whose process RANK gets the signal SIGNAL once, in the 4th."""
    Path("tell.py").write_text(ONCE)
    monkeypatch.syspath_prepend(Path.cwd())
    return [*FIT, *small, *LONGER]


def environment(rank, number):
    return {"TOLD": str(rank), "SIGNAL": str(int(number)), "PYTHONPATH": os.pathsep.join(sys.path)}


def weights_of(run):
    return read_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"]


def test_slurm_queues_the_job_again_and_it_resumes_by_itself(options, start_locat, tmp_path):
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f"#!/bin/sh\necho $* >> {tmp_path}/asked\n")
    scontrol.chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
    job |= {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS_PER_NODE": "1"}
    job |= {"PATH": f"{scontrol.parent}:{os.environ['PATH']}"} | environment(0, signal.SIGUSR1)
    process, output = start_locat(*options, **job)
    process.join(100)
    said = output.read_text()
    assert process.exitcode == 128 + signal.SIGUSR1, said
    assert "Traceback" not in said
    assert said.splitlines()[-1] == "SLURM has queued job 7 again: it resumes the run by itself"
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    assert torch.load(LAST, weights_only=True)["global_step"] == 4  # no step is lost

    process, output = start_locat(*options, SLURM_RESTART_COUNT="1", **job)
    process.join(100)
    said = output.read_text()
    assert process.exitcode == 0, said
    assert f"this job was restarted: its run resumes from {LAST}" in said
    assert list(RUN.parent.iterdir()) == [RUN]
    assert torch.load(LAST, weights_only=True)["global_step"] == 9
    process, output = start_locat(*options, "--name", "whole", **environment("none", 0))
    process.join(100)
    whole = weights_of(Path("runs/whole/version_0"))
    assert all(torch.equal(value, whole[name]) for name, value in weights_of(RUN).items())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_torchrun_starts_a_lost_process_again_and_the_run_resumes_by_itself(options, strategy):
    """The checkpoint is that of the epoch before, or, without parts, of the step before."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--max-restarts", "1"]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "locat"]
    both = [*BOTH[:-1], strategy, "--trainer.max_epochs", "6"]  # of a step each
    done = subprocess.run(
        [*launcher, *options, *both],
        env=os.environ | environment(1, signal.SIGKILL),
        capture_output=True,
        text=True,
        timeout=300,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert f"this job was restarted: its run resumes from {LAST}" in said
    assert list(RUN.parent.iterdir()) == [RUN]
    assert (RUN / "metrics.json").is_file()
    assert read_checkpoint(LAST)["global_step"] == 6
