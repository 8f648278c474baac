"""What stays on the screen of a terminal."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from locat_lightning.commands.fit import main

CONTROL = re.compile(r"\x1b\[(\d*)([A-Za-z])|\x1b\[\?\d+[hl]|(\r)|(\n)")


def screen(output, width):
    """The lines that a terminal shows of what was written to it, without styles."""
    lines, row, column = [""], 0, 0

    def write(text):
        nonlocal row, column
        for letter in text:
            if column == width:
                row, column = row + 1, 0
                lines.extend([""] * (row + 1 - len(lines)))
            lines[row] = lines[row][:column].ljust(column) + letter + lines[row][column + 1 :]
            column += 1

    output, end = re.sub(r"\x1b\[[\d;]*m", "", output), 0
    for control in CONTROL.finditer(output):
        write(output[end : control.start()])
        end = control.end()
        count, letter, back, down = control.groups()
        if back:
            column = 0
        elif down:
            row += 1
            lines.extend([""] * (row + 1 - len(lines)))
        elif letter == "A":
            row -= int(count or 1)
        elif letter == "K":
            assert count == "2"
            lines[row] = ""
    write(output[end:])
    return [line.rstrip() for line in lines]


def on_a_terminal(arguments, width):
    """The screen that `locat` leaves on a terminal of so many columns."""
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, "-m", "locat", *arguments],
        stdin=end,
        stdout=end,
        stderr=end,
        env=environment | {"OMP_NUM_THREADS": "1", "TERM": "xterm"},
    )
    os.close(end)
    written = b""
    try:
        while part := os.read(terminal, 1 << 16):
            written += part
    except OSError:  # the other end is closed
        pass
    os.close(terminal)
    assert process.wait(60) == 0, written.decode()
    return screen(written.decode(), width)


def test_the_replay_of_a_screen():
    assert screen("one\r\ntwo\x1b[1A\r\x1b[2K\x1b[1;32mONE\x1b[0m\r\n", 80) == ["ONE", "two"]
    assert screen("abcdef", 4) == ["abcd", "ef"]


@pytest.fixture
def shown(small):
    """Options of a run in seconds, with the bar."""
    at = small.index("--trainer.enable_progress_bar")
    return small[:at] + small[at + 2 :]


def test_in_a_file_an_epoch_is_a_line(shown, tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", "classify_tiny.yaml", *shown])
    lines = [line for line in caplog.messages if line.startswith("epoch ")]
    assert [line.split("   ")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    for line in lines:
        assert re.search(r"   loss [\d.]+   lr \S+   images/s [\d.]+   val/top1 [\d.]+", line)
    assert "Epoch" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("width", [80, 150])
def test_the_bar_is_a_line_and_the_closing_lines_stay_below_it(width, shown, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit = on_a_terminal(["fit", "--config", "classify_tiny.yaml", *shown, "--knn.every_n_epochs", "1"], width)
    text = "".join(fit)
    [bar] = [place for place, line in enumerate(fit) if line.startswith("Epoch 2/2 ")]
    assert "3/3" in fit[bar]
    assert "loss: " in fit[bar]
    assert "lr: " in fit[bar]
    assert "images/s: " in fit[bar]
    assert width < 150 or "val/top1: " in fit[bar]
    assert not re.search("Seed set|[GT]PU available|estimate number", text)
    assert fit[bar + 1].startswith("k-NN top-1 (knn/top1) ")
    assert "epochs 2   val/loss" in text
    assert [line for line in fit if line][-2:] == [
        "run: runs/classify_tiny/version_0",
        "look: tensorboard --logdir runs",
    ]

    weights = ["--weights", "runs/classify_tiny/version_0/checkpoints/best.ckpt"]
    predict = [line for line in on_a_terminal(["predict", *weights], width) if line]
    assert sum("Predicting" in line for line in predict) == 1
    assert predict[-1] == "8 predictions: runs/classify_tiny_predict/version_0/predictions.csv"
