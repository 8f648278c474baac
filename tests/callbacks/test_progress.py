"""What the bar is asked to show, when it stops, and the lines that stand for it in a file."""

import logging
import re

import pytest
import rich

from locat_lightning.callbacks.progress import ProgressBar
from locat_lightning.commands.fit import main


@pytest.fixture
def shown(small, tmp_path, monkeypatch):
    """Options of a run in seconds, with the bar."""
    monkeypatch.chdir(tmp_path)
    at = small.index("--trainer.enable_progress_bar")
    return ["fit", "--config", "classify_tiny.yaml", *small[:at], *small[at + 2 :]]


def test_in_a_file_an_epoch_is_a_line(shown, caplog, capsys):
    """The line has what the probe measured in its epoch, and no metric that was not measured in it."""
    main(
        [
            *shown,
            "--trainer.max_epochs",
            "3",
            "--trainer.check_val_every_n_epoch",
            "2",
            "--knn.every_n_epochs",
            "1",
        ]
    )
    lines = [line for line in caplog.messages if line.startswith("epoch ")]
    assert [line.split("   ")[0] for line in lines] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    for epoch, line in enumerate(lines, 1):
        assert re.search(r"   loss [\d.]+   lr \S+   images/s [\d.]+", line)
        assert ("   val/top1 " in line) == (epoch == 2)
        assert "   knn/top1 " in line
    assert "Epoch" not in capsys.readouterr().out


STYLES = re.compile(r"\x1b\[[\d;?]*[A-Za-z]")


class Terminal(logging.Handler):
    """Writes down in which order the bar stops and messages come."""

    def __init__(self, monkeypatch, width):
        super().__init__()
        self.events, self.metrics = [], []
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, as far as rich knows
        monkeypatch.setattr(rich, "_console", None)
        stop, get = ProgressBar._stop_progress, ProgressBar.get_metrics

        def stop_progress(bar):
            if not bar._progress_stopped:
                self.events.append("stopped")
            stop(bar)

        def get_metrics(bar, *arguments):
            self.metrics.append(get(bar, *arguments))
            return self.metrics[-1]

        monkeypatch.setattr(ProgressBar, "_stop_progress", stop_progress)
        monkeypatch.setattr(ProgressBar, "get_metrics", get_metrics)
        logging.getLogger("lightning.pytorch").addHandler(self)

    def emit(self, record):
        self.events.append(record.getMessage())

    def place(self, beginning):
        [place] = [place for place, event in enumerate(self.events) if event.startswith(beginning)]
        return place


@pytest.fixture
def terminal(monkeypatch, request):
    found = Terminal(monkeypatch, request.param)
    yield found
    logging.getLogger("lightning.pytorch").removeHandler(found)


@pytest.mark.parametrize("terminal", [80, 150], indirect=True)
def test_the_bar_shows_what_fits_and_stops_before_the_results(terminal, shown, capsys):
    main([*shown, "--knn.every_n_epochs", "1"])
    assert {"loss", "lr", "images/s"} <= terminal.metrics[-1].keys()
    width = rich.get_console().width
    assert width == 80 or "val/top1" in terminal.metrics[-1]
    [bar] = [line for line in STYLES.sub("", capsys.readouterr().out).splitlines() if "Epoch 2/2 " in line][
        -1:
    ]
    assert "3/3" in bar
    assert len(bar.rstrip()) <= width
    assert "v_num" not in terminal.metrics[-1]
    assert terminal.place("stopped") < terminal.place("k-NN top-1 (knn/top1) ") < terminal.place("epochs 2 ")

    terminal.events.clear()
    main(["predict", "--weights", "runs/classify_tiny/version_0/checkpoints/best.ckpt"])
    assert terminal.place("stopped") < terminal.place("8 predictions: runs/classify_tiny_predict/version_0/")
