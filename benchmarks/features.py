"""Features of images in files beside the forward pass alone: images a second, and the share of waiting.

    python benchmarks/features.py [--models vit_tiny_patch16_224 …] [--images 128] [--rounds 3]

JPEGs of 500 × 375, read by one process, are embedded at 224 px as `locat embed` does it; between the rounds,
the same number of images from memory goes through the backbone alone. One thread; medians.
"""

import argparse
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import timm
import torch
from alternating import DEVICE
from views import jpegs

import locat_lightning  # noqa: F401 - registers the models
from locat_lightning.data import ImageData
from locat_lightning.evaluation.embedding import embed_images
from locat_lightning.evaluation.features import image_features

BATCH = 16


def forward_seconds(backbone: torch.nn.Module, images: int) -> float:
    """Return how long the backbone takes for so many images in memory."""
    batch = torch.randn(BATCH, 3, 224, 224, device=DEVICE)
    start = perf_counter()
    with torch.inference_mode():
        for _ in range(images // BATCH):
            image_features(backbone, batch).cpu()
    return perf_counter() - start


def measure(name: str, data: ImageData, images: int, rounds: int) -> str:
    """Return a row of the table."""
    backbone = timm.create_model(name).to(DEVICE).eval()
    forward_seconds(backbone, BATCH)  # warms up
    alone, whole, waiting = [], [], []
    for _ in range(rounds):
        alone.append(forward_seconds(backbone, images))
        loader = data.loader_of("predict", range(images), pin_memory=DEVICE.type == "cuda")
        clock = embed_images(backbone, loader, DEVICE, lambda batch, rows: None, progress=False)
        whole.append(clock.seconds)
        waiting.append(clock.waited / clock.seconds)
    rates = f"{images / median(alone):.1f} | {images / median(whole):.1f}"
    return f"| {name} | {rates} | {median(waiting):.1%} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = ["vit_tiny_patch16_224", "locatvit_tiny", "locatvit_small"]
    parser.add_argument("--models", nargs="*", default=models)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | forward pass, images/s | embedded from files, images/s | waiting |\n|---|---|---|---|")
    with TemporaryDirectory() as folder:
        for number, content in enumerate(jpegs(args.images)):
            (Path(folder) / f"{number:04}.jpg").write_bytes(content)
        data = ImageData(root=folder, batch_size=BATCH, num_workers=1)
        data.setup("predict")
        for name in args.models:
            print(measure(name, data, args.images, args.rounds), flush=True)


if __name__ == "__main__":
    main()
