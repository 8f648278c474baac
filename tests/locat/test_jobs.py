"""The job of a run: which run is its own when it is restarted, and asking SLURM to queue it again."""

import pytest

from locat import jobs

SLURM = {"SLURM_JOB_ID": "7"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4"}
TORCHRUN |= {"MASTER_ADDR": "first", "MASTER_PORT": "29500"}


@pytest.fixture
def runs(tmp_path):
    found = [tmp_path / f"version_{number}" for number in range(3)]
    for run in found:
        run.mkdir()
    return found


@pytest.fixture
def job(monkeypatch):
    """Sets the environment of a job, and of no other."""

    def begin(environment):
        for name in (*SLURM, *TORCHRUN, *jobs.COUNTS, "SLURM_ARRAY_JOB_ID"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return begin


@pytest.mark.parametrize(
    ("environment", "count"),
    [
        (SLURM, "SLURM_RESTART_COUNT"),
        ({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "8", "SLURM_ARRAY_TASK_ID": "2"}, "SLURM_RESTART_COUNT"),
        (TORCHRUN, "TORCHELASTIC_RESTART_COUNT"),
        (TORCHRUN | {"TORCHELASTIC_RUN_ID": "mine"}, "TORCHELASTIC_RESTART_COUNT"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "4"}, "TORCHELASTIC_RESTART_COUNT"),
    ],
)
def test_a_restarted_job_has_its_run_and_no_other(job, runs, monkeypatch, environment, count):
    job(environment)
    jobs.mark(runs[0])  # of an earlier job with the same name
    assert jobs.run_of_this_job(runs) is None  # its first start
    jobs.mark(runs[1])
    job(environment | {count: "0"})
    assert jobs.is_restarted() is False
    job(environment | {count: "1"})
    assert jobs.run_of_this_job(runs) == runs[1]
    monkeypatch.setattr("sys.argv", ["locat", "fit", "--seed_everything", "1"])  # another command of the job
    assert jobs.run_of_this_job(runs) is None


def test_another_job_has_no_run_here(job, runs):
    job(SLURM)
    jobs.mark(runs[0])
    job({"SLURM_JOB_ID": "70", "SLURM_RESTART_COUNT": "1"})
    assert jobs.run_of_this_job(runs) is None
    job({"SLURM_RESTART_COUNT": "1"})
    jobs.mark(runs[1])
    assert jobs.run_of_this_job(runs) is None
    assert not (runs[1] / jobs.MARK).exists()


def test_scontrol_is_asked_for_the_job(job, tmp_path, monkeypatch):
    job(SLURM)
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho $* >> {tmp_path}/asked\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert jobs.requeue() == "SLURM has queued job 7 again: it resumes the run by itself"
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    scontrol.write_text("#!/bin/sh\necho 'Requeue of this job is\n not permitted' >&2; exit 1\n")
    assert "(Requeue of this job is not permitted): submit it anew" in jobs.requeue()
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert "SLURM has not queued job 7 again" in jobs.requeue()
