"""What all tests share."""

import pytest
import torch
from PIL import Image

SMALL = "{img_size: 32, patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2}"


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny operations on two threads of a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path):
    """A folder of three classes, 6 images each to train on and 3 (of the last: 2) to validate on."""
    generator = torch.Generator().manual_seed(0)
    root = tmp_path / "images"
    for split, count in (("train", 6), ("val", 3)):
        for label, name in enumerate(("ant", "bee", "cat")):
            (root / split / name).mkdir(parents=True)
            for i in range(count - (split == "val" and name == "cat")):
                noise = torch.randint(0, 80, (32, 32, 3), generator=generator, dtype=torch.uint8)
                noise[..., label] += 120
                Image.fromarray(noise.numpy()).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture
def small(folder):
    """Options that make any config of classification run in seconds on `folder`."""
    return [
        *("--data.root", str(folder), "--data.img_size", "32", "--data.batch_size", "6"),
        *("--data.num_workers", "0", "--model.backbone_args", SMALL, "--model.warmup_epochs", "0"),
        *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--pictures.images", "2"),
        *("--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1", "--pictures.side", "64"),
    ]
