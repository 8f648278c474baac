"""A run that SIGKILL ends, taken up again: what comes of it is what would have come of it in one go."""

import os
import signal
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from PIL import Image

from locat_lightning.callbacks.checkpoints import CheckpointFiles, Checkpoints
from locat_lightning.commands.fit import main

IMAGES, BATCH, EPOCHS = 22, 2, 3
BATCHES = IMAGES // BATCH
EVERY = 4  # optimizer steps from checkpoint to checkpoint: 11 batches an epoch are no multiple of it
KILLED = (1, 8)  # epoch and batch; the last checkpoint is of batch 5 of that epoch, after 16 steps
BEFORE = 16


class Watch(Callback):
    """Writes down what each batch holds, and kills the process where it is told to."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        """Epoch, batch, the images, and numbers that stand for the coloured views."""
        views = [each.crops.double().sum().item().hex() for each in batch.views]
        with Path("batches.txt").open("a") as file:
            print(trainer.current_epoch, batch_idx, batch.indices.tolist(), *views, file=file)

    def on_after_backward(self, trainer, module):
        """Between the gradients and the optimizer step."""
        here = f"{trainer.current_epoch},{trainer.fit_loop.batch_idx}"
        if os.environ.get("TEST_KILL_AT") == here:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """A run of seconds on generated images, with every kind of randomness that DINO has."""
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for index in range(IMAGES):
        pixels = torch.randint(256, (40, 40, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(root / f"{index:02}.png")
    backbone = "{img_size: 32, patch_size: 8, embed_dim: 24, depth: 2, num_heads: 3, drop_path_rate: 0.3}"
    return [
        *("--config", "dino_digits.yaml", "--data.dataset", "folder", "--data.root", str(root)),
        *("--data.batch_size", str(BATCH), "--data.num_workers", "1", "--data.views.local_views", "2"),
        *("--model.backbone_args", backbone, "--model.out_dim", "64", "--model.hidden_dim", "32"),
        *("--model.bottleneck_dim", "16", "--model.warmup_epochs", "1", "--pictures.images", "1"),
        *("--trainer.max_epochs", str(EPOCHS), "--trainer.accelerator", "cpu", "--pictures.side", "32"),
        *("--trainer.enable_progress_bar", "false", "--trainer.callbacks+=test_killed.Watch"),
        *("--checkpoint.every_n_train_steps", str(EVERY)),
    ]


def last(folder):
    return next(folder.glob("runs/*/version_0")) / "checkpoints" / "last.ckpt"


def batches(folder):
    return (folder / "batches.txt").read_text().splitlines()


def differences(a, b, at=""):
    """The places where two checkpoints are not the same to the last bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [at]
    if isinstance(a, dict) and isinstance(b, dict):
        lacking = [f"{at}.{key}: in one of them" for key in a.keys() ^ b.keys()]
        both = a.keys() & b.keys()
        return lacking + [d for key in both for d in differences(a[key], b[key], f"{at}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{at}[{i}]")]
    return [] if a == b else [f"{at}: {a!r}, {b!r}"]


@pytest.mark.faults
def test_a_killed_run_ends_as_if_it_had_not_been_killed(options, tmp_path, monkeypatch, start_locat):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    monkeypatch.chdir(whole)
    main(["fit", *options])

    place = f"{KILLED[0]},{KILLED[1]}"
    dead, output = start_locat("fit", *options, folder=killed, TEST_KILL_AT=place)
    dead.join(120)
    assert dead.exitcode == -signal.SIGKILL, output.read_text()
    assert torch.load(last(killed), weights_only=True)["global_step"] == BEFORE
    begun = KILLED[0] * BATCHES + KILLED[1] + 1
    assert batches(killed) == batches(whole)[:begun]

    monkeypatch.chdir(killed)
    main(["fit", *options, "--ckpt_path", "last"])
    assert [path.name for path in last(killed).parents[2].iterdir()] == ["version_0"]
    assert batches(killed)[begun:] == batches(whole)[BEFORE:]
    assert len(set(batches(killed))) == len(batches(whole)) == EPOCHS * BATCHES

    expected, found = (torch.load(last(folder), weights_only=True) for folder in (whole, killed))
    assert found["global_step"] == EPOCHS * BATCHES
    assert differences(expected, found) == []


@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")  # nothing is read from disk
def test_a_run_killed_while_it_writes_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    """Where the system's temporary folder is on another disk, Lightning overwrites the file bit by bit."""

    class Killed(BaseException):
        pass

    def half(file, contents):
        files.append(file)
        write(file, contents if len(files) < 2 else contents[:1000])
        if len(files) == 2:
            raise Killed

    files, write = [], Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", half)
    saving = Checkpoints(tmp_path, save_top_k=0, save_last=True, every_n_train_steps=2)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"accelerator": "cpu", "limit_val_batches": 0}
    trainer = Trainer(max_steps=6, callbacks=[saving], plugins=[CheckpointFiles()], **quiet)
    with pytest.raises(Killed):
        trainer.fit(BoringModel())
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2
