"""Training on a GPU: steps beside timm's, runs fed from files, heads and searches (rows of `gpu.py`)."""

import argparse
import gc
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any
from unittest.mock import patch

import numpy as np
import segmentation
import timm
import torch
from gpu_attention import milliseconds
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F
from views import jpegs

from locat_lightning.data import ImageData, MultiViewData
from locat_lightning.data.colour import draw_colour
from locat_lightning.data.dataset import ImageBatch
from locat_lightning.data.views import MultiCrop, ViewBatch, Views
from locat_lightning.evaluation.knn import knn_classify
from locat_lightning.methods import Dino, Dinov2
from locat_lightning.nn import layers
from locat_lightning.nn.gaussian import Gaussians, LazyGaussians
from locat_lightning.tasks import Classification

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}  # of --tiny
# Size of the model, pixels, images a step, whether compiled.
STEPS = [
    ("small", 224, 256, False),
    ("base", 224, 128, False),
    ("small", 224, 256, True),
    ("small", 512, 32, False),
    ("base", 224, 128, True),
    ("tiny", 224, 256, False),
    ("small", 512, 32, True),
    ("tiny", 224, 256, True),
]


def authors_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gaussians: Gaussians | LazyGaussians,
    *,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention with all of S, from exponents [B, h, N, N, 2] that are summed over the two directions.

    On grids from 32 × 32 on, the authors average the queries in squares of four while training.
    """
    if isinstance(gaussians, LazyGaussians):
        gaussians = gaussians.compute()
    slope, alpha, (height, width), cap, *_ = gaussians
    token = torch.arange(height * width, device=q.device)
    place = torch.stack([token // width, token % width]).float()  # [2, N]
    slope, alpha = slope[..., -len(token) :], alpha[..., -len(token) :]
    pooled = min(height, width) >= 32

    def of_queries(each: Tensor) -> Tensor:
        return F.avg_pool2d(each.reshape(*each.shape[:-1], height, width), 2).flatten(-2) if pooled else each

    squares = (of_queries(place)[:, :, None] - place[:, None]).square().clamp(max=cap).movedim(0, -1)
    exponents = torch.stack([of_queries(each) for each in slope], -1)[..., None, :] * squares
    s = of_queries(alpha)[..., None] * exponents.sum(-1).exp()
    if pooled:
        s = s.view(*s.shape[:-2], height // 2, width // 2, -1)
        s = s.repeat_interleave(2, -3).repeat_interleave(2, -2).flatten(-3, -2)
    prefix = q.shape[-2] - len(token)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=F.pad(s, (prefix, 0, prefix, 0)).to(q.dtype))


def freed(device: str) -> None:
    gc.collect()
    torch._dynamo.reset()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def step_cost(
    name: str, pixels: int, images: int, compiled: bool, args: argparse.Namespace
) -> tuple[Any, Any]:
    """Return images/s and peak GiB of a training step in bfloat16 with AdamW; None where memory is short."""
    freed(args.device)
    options = SMALL if args.tiny else {"img_size": pixels}
    try:
        model = timm.create_model(name, **options).to(args.device)
        if compiled:
            model.compile(dynamic=False, backend="eager" if args.tiny else "inductor")
        optimizer = torch.optim.AdamW(model.parameters(), fused=args.device == "cuda")
        batch = torch.randn(images, 3, *[options["img_size"]] * 2, device=args.device)
        labels = torch.randint(1000, (images,), device=args.device)

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast(args.device, dtype=torch.bfloat16):
                loss = F.cross_entropy(model(batch), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

        rate = 1e3 * images / milliseconds(step, args.device, seconds=0.05 if args.tiny else 0.5)
    except torch.OutOfMemoryError:
        return None, None
    return rate, torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else None


def steps(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for size, pixels, images, compiled in STEPS[3:4] if args.tiny else STEPS:
        images = 2 if args.tiny else images
        cost = partial(step_cost, pixels=pixels, images=images, compiled=compiled, args=args)
        plain, ours = cost(f"vit_{size}_patch16_224"), cost(f"locatvit_{size}")
        authors: tuple[Any, Any] = None, None
        if not compiled:
            with patch.object(layers, "gaussian_attention", authors_attention):
                authors = cost(f"locatvit_{size}")
        yield {
            "row": f"{size}, {pixels} px, {images} images, {'compiled' if compiled else 'eager'}",
            "plain ViT": plain[0],
            "LocAtViT": ours[0],
            "S in full": authors[0],
            "time, LocAtViT / plain": plain[0] / ours[0] if plain[0] and ours[0] else None,
            "plain, GiB": plain[1],
            "LocAtViT, GiB": ours[1],
            "S in full, GiB": authors[1],
        }


class Clock(Callback):
    """Times a run from one step to another, and the host's wait for data between them."""

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop = start, stop
        self.waited, self.ended = 0.0, 0.0
        self.images = 0

    def _now(self, module: LightningModule) -> float:
        if module.device.type == "cuda":
            torch.cuda.synchronize()
        return perf_counter()

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, index: int) -> None:
        if self.start < trainer.global_step < self.stop:
            self.waited += perf_counter() - self.ended

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.start:
            self.began = self._now(module)
        elif self.start < trainer.global_step <= self.stop:
            self.images += len(batch[1])
        if trainer.global_step == self.stop:
            self.seconds = self._now(module) - self.began
        self.ended = perf_counter()


class Repeated(LightningDataModule):
    """The same batch in memory, over and over; the colours of its crops are augmented each time."""

    def __init__(self, batch: Any) -> None:
        super().__init__()
        self.batch, self.batch_size, self.class_names = batch, len(batch[1]), [str(i) for i in range(1000)]

    def train_dataloader(self) -> "Repeated":
        """Itself."""
        return self

    def __len__(self) -> int:
        return 10_000

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield self.batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return MultiViewData.on_after_batch_transfer(self, batch, dataloader_idx)  # type: ignore[arg-type]


def train(task: LightningModule, data: LightningDataModule, args: argparse.Namespace) -> tuple[float, float]:
    """Return images/s of a run in bfloat16, and the share of the time in which the host waited for data."""
    freed(args.device)
    clock = Clock(1, 3) if args.tiny else Clock(12, 52)
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator=args.device,
        devices=1,
        precision="bf16-mixed",
        max_steps=clock.stop,
        limit_val_batches=0,
        enable_checkpointing=False,
        callbacks=[clock],
        **quiet,
    )
    trainer.fit(task, data)
    return clock.images / clock.seconds, clock.waited / clock.seconds


def fed(
    make: Callable[[bool], LightningModule],
    memory: Callable[[], LightningDataModule],
    files: Callable[[], LightningDataModule],
    args: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """Yield rows of runs fed from memory and from files, eager and compiled."""
    for compiled in (False,) if args.tiny else (False, True):
        mode = "compiled" if compiled else "eager"
        of_memory, _ = train(make(compiled), memory(), args)
        yield {"row": f"{mode}, from memory", "images/s": of_memory}
        rate, waiting = train(make(compiled), files(), args)
        share = rate / of_memory
        yield {"row": f"{mode}, from files", "images/s": rate, "of memory's": share, "waiting": waiting}


def folder_of_jpegs(root: Path, images: int) -> None:
    """Write a folder of a class with photographs of 500 × 375 pixels, of which some are alike."""
    different = jpegs(min(images // 2, 256))
    for split, count in (("train", images), ("val", 4)):
        for label in ("a", "b"):
            folder = root / split / label
            folder.mkdir(parents=True)
            for number in range(count // 2):
                file, first = folder / f"{number}.jpg", folder / f"{number % len(different)}.jpg"
                if file == first:
                    file.write_bytes(different[number])
                else:
                    os.link(first, file)


def dino(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    images, views = (2, MultiCrop(32, 16, 2)) if args.tiny else (64, MultiCrop())
    colours = [draw_colour(np.random.default_rng(i), [0.5] * 10, [0.1] * 10) for i in range(images)]
    parts = []
    for first, count in ((0, 2), (2, len(views.sizes) - 2)):
        size = views.sizes[first]
        crops = torch.randint(0, 256, (count, images, 3, size, size), dtype=torch.uint8)
        parts.append(Views(crops, torch.stack([each[first : first + count] for each in colours], 1)))
    if args.device == "cuda":
        parts = [each.pin_memory() for each in parts]
    grid = views.sizes[0] // (8 if args.tiny else 16)
    masks = torch.rand(2, images, grid, grid) < 0.3
    masks[:, ::2] = False  # half of the images
    places = masks.flatten().nonzero().flatten()
    batch = ViewBatch(parts, torch.full((images,), -1), torch.arange(images), masks, places)
    options: dict[str, Any] = {"warmup_epochs": 0}
    options |= {"backbone_args": SMALL, "out_dim": 64} if args.tiny else {}

    def task(compiled: bool) -> Dino:
        return Dino("locatvit_small", compile=compiled, **options)

    with TemporaryDirectory() as root:
        folder_of_jpegs(Path(root), 8 if args.tiny else 4096)
        own: dict[str, Any] = {"views": views, "batch_size": images}
        own |= {"num_workers": 0} if args.tiny else {}
        yield from fed(task, lambda: Repeated(batch), lambda: MultiViewData(root=root, **own), args)
    dinov2 = Dinov2("locatvit_small", warmup_teacher_temp_epochs=0, **options)
    yield {"row": "DINOv2, eager, from memory", "images/s": train(dinov2, Repeated(batch), args)[0]}


def classify(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    images, size = (2, 32) if args.tiny else (256, 224)
    batch = ImageBatch(torch.randn(images, 3, size, size), torch.randint(2, (images,)), torch.arange(images))
    if args.device == "cuda":
        batch = ImageBatch(*(each.pin_memory() for each in batch))

    def task(compiled: bool) -> Classification:
        options: dict[str, Any] = {"backbone_args": SMALL} if args.tiny else {}
        return Classification("locatvit_small", compile=compiled, warmup_epochs=0, **options)

    with TemporaryDirectory() as root:
        folder_of_jpegs(Path(root), 8 if args.tiny else 16384)
        own: dict[str, Any] = {"batch_size": images, "img_size": size} | (
            {"num_workers": 0} if args.tiny else {}
        )
        yield from fed(task, lambda: Repeated(batch), lambda: ImageData(root=root, **own), args)


def evaluate(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    device = args.device
    if args.tiny:
        segmentation.IMAGES, segmentation.SIDE, segmentation.CLASSES = 2, 64, 5
    for side, name in (("plain", "interpolate and cross_entropy"), ("ours", "the head's loss")):
        freed(device)
        images = segmentation.IMAGES
        yield {
            "row": f"{name}, {images} images of {segmentation.SIDE} px, {segmentation.CLASSES} classes",
            "ms": milliseconds(partial(segmentation.step, side, images), device),
            "GiB": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
        }
    freed(device)
    bank, queries, width = (2000, 64, 16) if args.tiny else (1_281_167, 50_000, 384)
    features, labels = torch.randn(bank + queries, width, device=device), torch.arange(bank + queries) % 1000
    start = perf_counter()
    knn_classify(features[:bank], labels[:bank], features[bank:], labels[bank:])
    yield {
        "row": f"k-NN of {queries:,} among {bank:,} × {width}",
        "ms": 1e3 * (perf_counter() - start),
        "GiB": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
    }


def study(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Run the study and yield how long it took; its report is beside the results."""
    start = perf_counter()
    report = Path(args.output or "build/gpu") / "study.md"
    report.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "locat", "study", "--config", "study_cifar.yaml", "--preset", "gpu"]
    command += ["--report", str(report), "--folders.images", args.images, "--folders.masks", args.masks]
    subprocess.run(command, check=True)
    yield {"row": f"report: {report.name}", "minutes": (perf_counter() - start) / 60}


def rows(group: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure the rows of a group."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    groups = {"step": steps, "dino": dino, "classify": classify, "evaluate": evaluate, "study": study}
    yield from groups[group](args)
