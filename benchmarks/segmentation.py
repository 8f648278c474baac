"""What the segmentation head costs: memory and time of its loss, against interpolate and cross_entropy.

150 classes, 32 images of 512 px, as ADE20K's batches. Each side runs in a process of its own, whose peak is
read; in the main process runs of the two sides alternate on a small batch for the time.
"""

import subprocess
import sys
from pathlib import Path

import torch
from alternating import DEVICE, compare
from torch import Tensor
from torch.nn import functional as F

from locat_lightning.labels import IGNORE
from locat_lightning.nn.decoder import MlpDecoder, upsampled_cross_entropy

IMAGES, CLASSES, SIDE, GRID, WIDTH = 32, 150, 512, 32, 384


def plain(logits: Tensor, masks: Tensor) -> Tensor:
    upsampled = F.interpolate(logits, masks.shape[-2:], mode="bilinear")
    return F.cross_entropy(upsampled, masks.long(), ignore_index=IGNORE)


LOSSES = {"plain": plain, "ours": upsampled_cross_entropy}


def step(side: str, images: int) -> None:
    torch.manual_seed(0)
    decoder = MlpDecoder(WIDTH, CLASSES).to(DEVICE)
    features = torch.randn(images, WIDTH, GRID, GRID, device=DEVICE)
    masks = torch.randint(CLASSES, (images, SIDE, SIDE), dtype=torch.uint8, device=DEVICE)
    LOSSES[side](decoder(features), masks).backward()  # type: ignore[no-untyped-call]


def resident(key: str) -> float:
    """MiB of this process (CPU, Linux)."""
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) / 1024


def own_peak(side: str) -> float:
    """MiB that a step on all images adds at its peak; to be asked in a fresh process."""
    step(side, 1)
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before: float = torch.cuda.memory_allocated() / 2**20
        step(side, IMAGES)
        return torch.cuda.max_memory_allocated() / 2**20 - before
    before = resident("VmRSS")
    step(side, IMAGES)
    return resident("VmHWM") - before


def peak(side: str) -> float:
    done = subprocess.run([sys.executable, __file__, side], check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout)


def main() -> None:
    name = (
        torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    print(f"torch {torch.__version__}, {name}\n")
    print(f"| {'':52} | {'plain':>11} | {'ours':>11} | ratio |")
    print("|".join(["", *("-" * width for width in (54, 13, 13, 7)), ""]))
    mib = {side: peak(side) for side in LOSSES}
    what, less = f"peak memory of the head's step, {IMAGES} images of {SIDE} px", mib["ours"] / mib["plain"]
    print(f"| {what:52} | {mib['plain']:7.0f} MiB | {mib['ours']:7.0f} MiB | {less:4.2f}x |")
    a, b, ratio = compare(lambda: step("plain", 2), lambda: step("ours", 2), 7)
    what = "time of the head’s step, 2 images"
    print(f"| {what:52} | {1e3 * a:8.1f} ms | {1e3 * b:8.1f} ms | {ratio:4.2f}x |")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(own_peak(sys.argv[1]))
    else:
        main()
