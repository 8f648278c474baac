"""What LocAt costs: training steps, PRR, and large images, against timm's own models on the same machine.

Runs of the two sides alternate in one process, and medians and ratios of neighbouring runs are shown: the
machines are shared. Each row, and each model whose memory is measured, has a process of its own: with the
heap that other rows leave behind, the ratio of large images is some hundredths higher.
"""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import timm
import torch
from alternating import DEVICE, compare
from timm.layers import AttentionPoolPrr
from torch import Tensor, nn
from torch.nn import functional as F

import locat_lightning  # noqa: F401 - registers the models
from locat_lightning.nn import PatchRefinement

PAIRS = {size: (f"vit_{size}_patch16_224", f"locatvit_{size}") for size in ("tiny", "small")}
OTHERS = {
    "RoPE tiny": ("vit_tiny_patch16_rope_mixed_224", "locatvit_tiny_rope_mixed"),
    "Swin tiny": ("swin_tiny_patch4_window7_224", "locatswin_tiny"),
    "Jumbo tiny": ("jumbo_tiny", "locatjumbo_tiny"),
}


def training_step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def forward(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    @torch.inference_mode()
    def run() -> Tensor:
        out: Tensor = model(images)
        return out

    return run


def compare_steps(names: tuple[str, str], rounds: int) -> tuple[float, float, float]:
    images, labels = torch.randn(8, 3, 224, 224, device=DEVICE), torch.randint(1000, (8,), device=DEVICE)
    plain, ours = (training_step(timm.create_model(n).to(DEVICE), images, labels) for n in names)
    return compare(plain, ours, rounds)


def compare_forward(names: tuple[str, str], rounds: int) -> tuple[float, float, float]:
    images = torch.randn(2, 3, 512, 512, device=DEVICE)
    plain, ours = (forward(timm.create_model(n, img_size=512).eval().to(DEVICE), images) for n in names)
    return compare(plain, ours, rounds)


def compare_refinement(rounds: int) -> tuple[float, float, float]:
    tokens = torch.randn(8, 197, 384, device=DEVICE)
    every, only_cls = (pool(384, num_heads=6).to(DEVICE) for pool in (AttentionPoolPrr, PatchRefinement))
    return compare(lambda: every(tokens), lambda: only_cls(tokens), rounds)


def peak_memory(name: str, size: int, batch: int) -> float:
    """MiB that building the model and one forward pass add to this process (CPU, Linux)."""

    def mib(key: str) -> float:
        return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) / 1024

    before = mib("VmRSS")
    model = timm.create_model(name, img_size=size).eval()
    with torch.inference_mode():
        model(torch.zeros(batch, 3, size, size))
    return mib("VmHWM") - before


def row(what: str, plain: float, ours: float, ratio: float, unit: str = "ms", scale: float = 1e3) -> None:
    print(
        f"| {what:42} | {scale * plain:9.1f} {unit} | {scale * ours:9.1f} {unit} | {ratio:5.2f}x |",
        flush=True,
    )


def main() -> None:
    device = (
        torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    print(f"torch {torch.__version__}, timm {timm.__version__}, {device}\n")
    print(f"| {'':42} | {'plain ViT':>12} | {'LocAtViT':>12} | ratio  |")
    print("|".join(["", *("-" * width for width in (44, 14, 14, 8)), ""]))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as processes:
        for size, names in (PAIRS | OTHERS).items():
            rounds = 21 if size == "tiny" else 7 if size in OTHERS else 11
            times = processes.submit(compare_steps, names, rounds).result()
            row(f"training step, {size}, 224 px, batch 8", *times)
        for size, names in PAIRS.items():
            times = processes.submit(compare_forward, names, 15).result()
            row(f"forward, {size}, 512 px, batch 2", *times)
        for size, batch in (("tiny", 2), ("small", 2), ("small", 8)):
            mib, our_mib = (processes.submit(peak_memory, n, 512, batch).result() for n in PAIRS[size])
            row(f"peak memory, {size}, 512 px, batch {batch}", mib, our_mib, our_mib / mib, "MiB", 1)
        rows, one, ratio = processes.submit(compare_refinement, 101).result()
    print(
        f"\nPRR of [CLS] alone {1e3 * one:.2f} ms, of every row {1e3 * rows:.2f} ms: {1 / ratio:.1f}x cheaper"
    )


if __name__ == "__main__":
    main()
