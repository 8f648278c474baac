"""The job that a run is part of, under SLURM or torchrun: whether it was restarted, and which run it had."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from socket import gethostname

MARK = ".job"  # in the directory of a run: which job and command it belongs to
COUNTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")  # environment variables


def slurm_job(environment: Mapping[str, str] = os.environ) -> str:
    """Return the id of the SLURM job, as `scontrol` takes it; "" outside one."""
    if array := environment.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{environment.get('SLURM_ARRAY_TASK_ID', '')}"
    return environment.get("SLURM_JOB_ID", "")


def is_restarted(environment: Mapping[str, str] = os.environ) -> bool:
    """Check whether SLURM has requeued this job, or torchrun has started its processes again."""
    return any(environment.get(count, "0") not in ("", "0") for count in COUNTS)


def identity(environment: Mapping[str, str] = os.environ) -> str:
    """Return what this job's command has in common with itself restarted, in all processes; "" without a job.

    A job of torchrun is named by `--rdzv-id`; without it by the process of torchrun, and on several machines
    by the address of the first, which stays the same unless the rendezvous is c10d.
    """
    name = slurm_job(environment)
    if not name and "TORCHELASTIC_RUN_ID" in environment:
        name = environment["TORCHELASTIC_RUN_ID"]
        if name in ("", "none") and environment.get("LOCAL_WORLD_SIZE") == environment.get("WORLD_SIZE"):
            name = f"{gethostname()} {os.getppid()}"
        elif name in ("", "none"):
            name = f"{environment.get('MASTER_ADDR')}:{environment.get('MASTER_PORT')}"
    return name and f"{name} {hashlib.sha256(repr(sys.argv[1:]).encode()).hexdigest()[:16]}"


def mark(run: Path) -> None:
    """Note in the directory of a run which job it belongs to, if it belongs to one."""
    if own := identity():
        (run / MARK).write_text(own)


def run_of_this_job(runs: Iterable[Path]) -> Path | None:
    """Return the newest of some directories of runs that this job, which was restarted, has begun.

    A job that starts for the first time removes the marks of earlier ones of the same name.
    """
    own, found = identity(), []
    for run in runs if own else ():
        with suppress(OSError):
            if (run / MARK).read_text() == own:
                found.append(run)
    if not is_restarted():
        for run in found:
            (run / MARK).unlink(missing_ok=True)
        return None
    return max(found, key=lambda run: (run / MARK).stat().st_mtime, default=None)


def requeue() -> str:
    """Ask SLURM to queue this job again, and return a line that says what came of it."""
    job = slurm_job()
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
        said = "" if done.returncode == 0 else done.stderr.strip() or f"code {done.returncode}"
    except (OSError, subprocess.SubprocessError) as error:
        said = str(error)
    if said:
        return f"SLURM has not queued job {job} again ({' '.join(said.split())}): submit it anew"
    return f"SLURM has queued job {job} again: it resumes the run by itself"
