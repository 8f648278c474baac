"""What the tests of `locat fit` share: the run that they make, and what it logged."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

FIT = ["fit", "--config", "classify_tiny.yaml"]
QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
QUIET += ["--pictures.every_n_epochs", "0"]
RUN = Path("runs/classify_tiny/version_0")
BEST, LAST = RUN / "checkpoints/best.ckpt", RUN / "checkpoints/last.ckpt"


def scalars(run, tag):
    events = EventAccumulator(str(run)).Reload()
    return [(point.step, point.value) for point in events.Scalars(tag)]
