"""DINO in two processes, of which one is told to stop: both do, and go on as if neither had been."""

import os
import signal

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.utilities.exceptions import SIGTERMException
from PIL import Image

from locat_lightning.callbacks.checkpoints import Checkpoints
from locat_lightning.data import MultiViewData
from locat_lightning.data.views import MultiCrop
from locat_lightning.methods import Dino

IMAGES, BATCH, STEPS = 20, 2, 5  # steps of an epoch of two processes
TOLD = 3  # the batch of the first epoch in which the signal comes


class Told(Callback):
    """Sends its own process SIGTERM, once, in the middle of a batch."""

    def on_after_backward(self, trainer, module):
        if trainer.global_step == TOLD:
            os.kill(os.getpid(), signal.SIGTERM)


def run(root, *callbacks, **options):
    seed_everything(0)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    task = Dino(
        "locatvit_tiny",
        backbone_args=size | {"drop_path_rate": 0.3},
        out_dim=64,
        hidden_dim=32,
        bottleneck_dim=16,
        warmup_epochs=1,
        lr=1e-2,
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=2,
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, Checkpoints) for callback in callbacks),
        callbacks=list(callbacks),
    )
    data = MultiViewData(root=str(root), views=MultiCrop(32, 16, 2), batch_size=BATCH, num_workers=0)
    stopped = False
    try:
        trainer.fit(task, data, **options)
    except SIGTERMException:
        stopped = True
    state = {key: value.clone() for key, value in task.state_dict().items()}
    return {"stopped": stopped, "step": trainer.global_step, "state": state}


def in_one_go_and_in_two(rank, folder):
    root = folder / "images"
    runs = {"whole": run(root)}
    for told in range(2):
        kept = folder / f"told {told}"
        saving = Checkpoints(kept, save_last=True, save_on_exception=True)
        runs[f"cut {told}"] = run(root, saving, *([Told()] if rank == told else []))
        last = kept / "last.ckpt"
        runs[f"resumed {told}"] = run(root, ckpt_path=str(last), weights_only=True)
    torch.save(runs, folder / f"{rank}.pt")


@pytest.mark.slow
def test_both_processes_stop_and_go_on_if_one_is_told_to(tmp_path, two_processes):
    generator = torch.Generator().manual_seed(0)
    (tmp_path / "images").mkdir()
    for index in range(IMAGES):
        pixels = torch.randint(256, (40, 40, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / "images" / f"{index:02}.png")

    two_processes(in_one_go_and_in_two, tmp_path)

    for rank in range(2):
        runs = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        whole = runs["whole"]["state"]
        assert runs["whole"]["step"] == 2 * STEPS
        for told in range(2):
            cut, resumed = runs[f"cut {told}"], runs[f"resumed {told}"]
            assert cut["stopped"]
            assert cut["step"] == TOLD + 1
            assert not all(torch.equal(cut["state"][key], value) for key, value in whole.items())
            checkpoint = torch.load(tmp_path / f"told {told}" / "last.ckpt", weights_only=True)
            assert checkpoint["global_step"] == TOLD + 1
            assert resumed["step"] == 2 * STEPS
            assert resumed["state"].keys() == whole.keys()
            assert all(torch.equal(resumed["state"][key], value) for key, value in whole.items())
