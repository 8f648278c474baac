"""The list of runs, and the lock of a run that trains."""

import fcntl
import json
import os
from multiprocessing import Pipe, get_context
from pathlib import Path

import pytest

from locat import runs


def test_runs_are_listed_with_state_seed_and_metrics(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = Path("runs")
    assert runs.list_runs(here) == f"no runs in {here}"

    def run(name, metrics=None, config="seed_everything: 3\nckpt_path: null\n"):
        (here / name / "checkpoints").mkdir(parents=True)
        (here / name / "config.yaml").write_text(f"a: 1\n{config}")
        if metrics is not None:
            (here / name / "metrics.json").write_text(metrics)

    run("a/version_0", json.dumps({"epochs": 3, "val/loss": 1.5, "val/top1": 0.51234, "best val/top1": 0.6}))
    run("broken", '{"epochs": ')
    run("cut")
    (here / "cut" / "checkpoints" / "last.ckpt").touch()
    rows = ["a,epoch,step,val/top1", "0.5,0,9,", *["0.5,,19,"] * 20000, ",2,29,0.75", ",3,29,"]
    (here / "cut" / "metrics.csv").write_text("\n".join(rows))
    run("failed")
    run("knn", json.dumps({"weights": "x", "seed": 7, "knn/top1_k20": 0.25}), config="")
    run("many", json.dumps(dict.fromkeys((*runs.HEADLINES, "knn/top1_k20"), 0.123456)))
    run("validated", config="b: 1\n")  # it has no checkpoint to resume from
    lines = runs.list_runs(here).splitlines()
    assert [line.split()[0] for line in lines] == [
        *("run", "a/version_0", "broken", "cut", "failed", "knn", "many", "resume"),
    ]
    columns = [line[lines[0].index("state") :].split("  ") for line in lines[1:-1]]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in columns]
    assert cells[0] == ["finished", "3", "3", "val/top1 0.5123 (best 0.6)"]
    assert cells[1] == ["finished, but metrics.json cannot be read", "3"]
    assert cells[2:4] == [["interrupted", "3", "3", "val/top1 0.75"], ["no checkpoint", "3"]]
    assert cells[4] == ["finished", "7", "knn/top1_k20 0.25"]
    assert all(len(line) <= 120 for line in lines)
    assert lines[6].endswith("…")
    assert lines[-1] == "resume an interrupted run: locat fit --ckpt_path runs/RUN/checkpoints/last.ckpt"


@pytest.mark.parametrize("name", ["val/rmse", "robustness/top1", "knn/top1_k20"])
def test_headlines(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a short name, so that the row is not cut
    Path("metrics.json").write_text(json.dumps({name: 0.41234, "val/loss": 2.0}))
    row = runs.list_runs(Path()).splitlines()[1]
    assert f"{name} 0.4123" in row
    assert "loss" not in row


def test_what_a_terminal_would_obey_is_not_printed(tmp_path):
    (tmp_path / "a\x1b[31m").mkdir()
    metrics = {"val/top1": "\x1b]0;title\x07", "epochs": "\x9b2J\r"}
    (tmp_path / "a\x1b[31m" / "metrics.json").write_text(json.dumps(metrics))
    printed = runs.list_runs(tmp_path)
    assert all(each.isprintable() or each == "\n" for each in printed)
    assert "a?[31m" in printed


def test_a_directory_that_no_process_has_locked(tmp_path):
    assert not runs.is_locked(tmp_path / "nowhere")
    assert not runs.is_locked(tmp_path)


def hold(run, told):
    kept = runs.lock(run)
    told.send("locked")
    told.recv()
    runs.unlock(run, kept, [run, *run.parents[:2]])
    told.send("unlocked")


def test_two_processes_cannot_lock_a_directory(tmp_path):
    run = runs.claim(tmp_path / "runs" / "name")
    here, there = Pipe()
    process = get_context("fork").Process(target=hold, args=(run, there))
    process.start()
    assert here.recv() == "locked"
    assert runs.is_locked(run)
    with pytest.raises(BlockingIOError):
        runs.lock(run)
    here.send("enough")
    assert here.recv() == "unlocked"
    process.join()
    assert not (tmp_path / "runs").exists()  # nothing was written there
    run.mkdir(parents=True)
    runs.unlock(run, runs.lock(run))


def test_only_what_was_made_and_is_empty_is_removed(tmp_path):
    run = runs.claim(tmp_path / "runs" / "name")
    (run / "log").touch()
    runs.unlock(run, runs.lock(run), [run, run.parent])
    assert [file.name for file in run.iterdir()] == ["log"]
    (run / "log").unlink()
    runs.unlock(run, runs.lock(run), [run, run.parent])
    assert list((tmp_path / "runs").iterdir()) == []


def test_each_claim_gets_a_directory_of_its_own(tmp_path):
    assert [runs.claim(tmp_path / "knn").name for _ in range(2)] == ["version_0", "version_1"]


def test_a_file_is_replaced_whole_or_stays(tmp_path):
    file = tmp_path / "last.ckpt"
    file.write_text("before")

    def fail():
        with runs.replaced(file) as part:
            part.write_text("half")
            raise OSError(28, "No space left on device")  # as the system says it, without the file

    with pytest.raises(OSError, match=r"last.ckpt'$"):
        fail()
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]
    with runs.replaced(file) as part:
        part.write_text("after")
    assert file.read_text() == "after"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("text", ["", "[[1, 2]]", "3", "null", '"x"', "[" * 100_000, "\udce9"])
def test_a_foreign_record_hides_no_other_run(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in (("a", text), ("b", '{"val/top1": 0.5}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_bytes(os.fsencode(content))
    (tmp_path / "a" / "config.yaml").write_bytes(b"seed_everything: 3\xe9\nckpt_path: \xff")
    _, first, second = runs.list_runs(Path()).splitlines()
    assert "finished, but metrics.json cannot be read" in first
    assert "val/top1 0.5" in second


def test_a_lock_that_is_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    """Between opening and locking the file, its owner ended and removed it."""
    held = runs.lock(tmp_path)
    lockf = fcntl.lockf

    def end_first(descriptor, flags):
        monkeypatch.setattr(fcntl, "lockf", lockf)
        runs.unlock(tmp_path, held)
        lockf(descriptor, flags)

    monkeypatch.setattr(fcntl, "lockf", end_first)
    descriptor = runs.lock(tmp_path)
    assert os.path.samestat(os.fstat(descriptor), (tmp_path / runs.LOCK).stat())
    runs.unlock(tmp_path, descriptor)
