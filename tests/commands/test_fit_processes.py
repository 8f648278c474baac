"""`locat fit` as processes: told to stop by a signal, and in two at once."""

import csv
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from locat_lightning.backbones.weights import read_checkpoint
from locat_lightning.commands.fit import main
from tests.commands.runs import BEST, FIT, LAST, QUIET, RUN, scalars

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("workplace")]

BOTH = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
# A module of a callback that sends a signal to the process of a rank, in the middle of a batch.
TELL = """
import os
from lightning.pytorch import Callback

class Tell(Callback):
    def on_after_backward(self, trainer, module):
        if trainer.global_step == 3 and str(trainer.global_rank) == os.environ.get("TOLD"):
            os.kill(os.getpid(), int(os.environ["SIGNAL"]))
"""
# No epoch of it writes a checkpoint.
ENDLESS = ["--data.num_workers", "1", "--trainer.max_epochs", "9999", "--checkpoint.every_n_epochs", "9999"]


def wait_until_it_trains(process):
    deadline = time.monotonic() + 120
    while not (RUN / "metrics.csv").is_file() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)


@pytest.mark.faults
@pytest.mark.parametrize("to", ["the process", "all processes"])
def test_sigterm_leaves_a_checkpoint_to_go_on_from(to, small, start_locat):
    """A shell sends it to the process, a scheduler to the workers that read images, too."""
    process, output = start_locat(*FIT, *small, *ENDLESS, "--trainer.check_val_every_n_epoch", "3")
    wait_until_it_trains(process)
    (os.kill if to == "the process" else os.killpg)(process.pid, signal.SIGTERM)
    process.join(60)
    said = output.read_text()
    assert process.exitcode == 128 + signal.SIGTERM, said
    assert "Traceback" not in said
    assert "resume with: locat fit --ckpt_path" in said
    step = torch.load(LAST, weights_only=True)["global_step"]
    assert step > 0
    longer = ["--trainer.max_epochs", str(step // 3 + 2), "--allow_changes", "true"]
    main(["fit", "--ckpt_path", str(LAST), *longer])
    assert torch.load(LAST, weights_only=True)["global_step"] == step // 3 * 3 + 6


@pytest.mark.faults
def test_an_interrupt_of_the_process_alone_ends_its_workers_too(small, start_locat):
    process, output = start_locat(*FIT, *small, *ENDLESS)
    wait_until_it_trains(process)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    said = output.read_text()
    assert process.exitcode == 128 + signal.SIGINT, said
    assert "Traceback" not in said
    assert f"resume with: locat fit --ckpt_path {LAST}" in said
    assert torch.load(LAST, weights_only=True)["global_step"] > 0


def predict(rank, *options):
    main(["predict", "--weights", str(BEST), *QUIET, *options])


def fit_predict_and_validate(rank, small):
    main([*FIT, *small, *BOTH, "--data.sampling", "balanced"])
    predict(rank, "--name", "two", *BOTH)
    main(["validate", "--weights", str(LAST), *QUIET, "--name", "two", *BOTH])


def test_two_processes_are_as_one(small, folder, two_processes):
    """They share out an odd number of images: none is counted twice, none is left out of any figure."""
    (folder / "val" / "ant" / "2.png").unlink()
    for number in range(1, 5):  # of six bees
        (folder / "train" / "bee" / f"{number}.png").unlink()
    two_processes(fit_predict_and_validate, small)  # `tell` below has Lightning start the other one
    assert [step for step, _ in scalars(RUN, "train/lr")] == [0, 1]  # of 14 images, 12 a step: one an epoch
    assert list(Path("runs/classify_tiny").iterdir()) == [RUN]

    main(["validate", "--weights", str(LAST), *QUIET])
    for tag in ("val/top1", "val/loss", "val/balanced", "val/few"):
        [(_, alone)] = scalars("runs/classify_tiny_validate/version_0", tag)
        assert scalars(RUN, tag)[-1][1] == pytest.approx(alone, rel=1e-5)
    of_images = [Path(f"runs/{name}_validate/version_0/images.csv") for name in ("classify_tiny", "two")]
    assert of_images[0].read_text() == of_images[1].read_text()
    assert len(of_images[0].read_text().splitlines()) == 1 + 7
    predict(0, "--name", "one")
    one, two = (Path(f"runs/{name}_predict/version_0/predictions.csv") for name in ("one", "two"))
    with one.open() as alone, two.open() as together:
        rows = list(csv.DictReader(together))
        assert [row["path"] for row in rows] == [row["path"] for row in csv.DictReader(alone)]
    assert len({row["path"] for row in rows}) == len(rows) == 7


def state_of(checkpoint):
    return read_checkpoint(checkpoint)["state_dict"]


@pytest.fixture
def tell(small, start_locat, monkeypatch):
    """Starts a run of two processes, one of which is sent a signal; returns its exit code and its output."""
    Path("tell.py").write_text(TELL)
    monkeypatch.syspath_prepend(Path.cwd())
    options = ["--model.backbone_args.drop_path_rate", "0.3", "--trainer.callbacks+=tell.Tell"]

    def start(rank, number, *more):
        environment = {"TOLD": str(rank), "SIGNAL": str(int(number)), "PYTHONPATH": os.pathsep.join(sys.path)}
        given = [*FIT, *small, *BOTH, *options, "--trainer.max_epochs", "8", *more]
        process, output = start_locat(*given, **environment)
        process.join(300)
        return process.exitcode, output.read_text()

    return start


@pytest.mark.faults
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_resume_as_if_they_had_not_been_told_to_stop(tell, strategy):
    """The second one is told, in the middle of a batch; the first saves, without the other if it has all."""
    options = ["--trainer.strategy", strategy]
    code, said = tell("none", 0, *options)
    assert code == 0, said
    whole = state_of(LAST)
    RUN.rename(RUN.with_name("whole"))
    code, said = tell(1, signal.SIGTERM, *options)
    assert code == 128 + signal.SIGTERM, said
    assert "Traceback" not in said
    assert said.splitlines()[-1] == f"interrupted; resume with: locat fit --ckpt_path {LAST}"
    assert 3 < torch.load(LAST, weights_only=True)["global_step"] < 8
    code, said = tell("none", 0, "--ckpt_path", str(LAST), *options)
    assert code == 0, said
    resumed = state_of(LAST)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
def test_the_last_line_says_what_to_do_if_a_process_is_lost(rank, tell):
    code, said = tell(rank, signal.SIGKILL)
    deadline = time.monotonic() + 30
    assert code == (1 if rank else -signal.SIGKILL), said
    output = next(Path().glob("output_*.txt"))
    while "--ckpt_path last" not in output.read_text() and time.monotonic() < deadline:
        time.sleep(0.1)  # of rank 0, the other process says it
    said = output.read_text()
    assert "Traceback" not in said
    assert said.splitlines()[-1].endswith("then resume the run with --ckpt_path last")
    if rank:
        assert torch.load(LAST, weights_only=True)["global_step"] in (3, 4)
