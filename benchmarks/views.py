"""Views for DINO: images a second on one CPU core, beside lightly's `DINOTransform`.

Interleaved rounds, by CPU time, which others' load distorts less. Run: python benchmarks/views.py
"""

import io
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from lightly.transforms.dino_transform import DINOTransform
from PIL import Image
from sklearn.datasets import load_sample_images

from locat_lightning.data.views import MultiCrop

IMAGES, ROUNDS = 48, 9


def jpegs(count: int, width: int = 500, height: int = 375) -> list[bytes]:
    """Parts of scikit-learn's two photographs as JPEGs of one size."""
    rng = np.random.default_rng(0)
    photographs = [Image.fromarray(photograph) for photograph in load_sample_images().images]
    files = []
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        part_width = int(rng.integers(photograph.width // 2, photograph.height * width // height))
        part_height = part_width * height // width
        left = int(rng.integers(photograph.width - part_width + 1))
        top = int(rng.integers(photograph.height - part_height + 1))
        box = (left, top, left + part_width, top + part_height)
        file = io.BytesIO()
        photograph.resize((width, height), Image.Resampling.BICUBIC, box).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    files = jpegs(IMAGES)
    lightly = DINOTransform(n_local_views=8)
    on_worker, on_device = MultiCrop(colour_on="worker"), MultiCrop()
    crops = [
        on_device(Image.open(io.BytesIO(file)), np.random.default_rng([0, 0, i]))
        for i, file in enumerate(files)
    ]

    contestants: dict[str, Callable[[int], object]] = {
        "lightly DINOTransform, in full": lambda i: lightly(Image.open(io.BytesIO(files[i])).convert("RGB")),
        'colour_on="worker", in full': lambda i: on_worker(
            Image.open(io.BytesIO(files[i])), np.random.default_rng([0, 0, i])
        ),
        'colour_on="device", in full (here a CPU)': lambda i: [
            views.coloured()
            for views in on_device(Image.open(io.BytesIO(files[i])), np.random.default_rng([0, 0, i]))
        ],
        'colour_on="device", the worker': lambda i: on_device(
            Image.open(io.BytesIO(files[i])), np.random.default_rng([0, 0, i])
        ),
        'colour_on="device", the device (here a CPU)': lambda i: [views.coloured() for views in crops[i]],
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(ROUNDS):
        for name, contestant in contestants.items():
            start = time.process_time()
            for i in range(IMAGES):
                contestant(i)
            seconds[name].append(time.process_time() - start)

    print(f"2 x 224 + 8 x 96 px from {IMAGES} JPEGs of 500 x 375, one core, medians of {ROUNDS} rounds")
    print(f"{'':44}{'images/s':>10}{'ms/image':>10}{'x lightly':>11}")
    reference = seconds["lightly DINOTransform, in full"]
    for name, times in seconds.items():
        rate = IMAGES / statistics.median(times)
        ratio = statistics.median(r / t for r, t in zip(reference, times, strict=True))
        print(f"{name:44}{rate:10.1f}{1000 / rate:10.2f}{ratio:11.2f}")


if __name__ == "__main__":
    main()
