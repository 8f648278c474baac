"""Shards against a folder: images a second that a loader reads, and how long a training waits for them.

The images are small JPEGs, for which the way to a file weighs most. The web server is on this machine and
answers each request after 20 ms. Interleaved rounds, of which the best counts: others' load only slows them.
Run: python benchmarks/streams.py
"""

import gc
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from views import jpegs

from locat_lightning.data import ImageData
from locat_lightning.data.packing import pack

IMAGES, ROUNDS, WORKERS, BATCH = 3000, 3, 1, 64
DELAY = 0.02  # seconds
STEP = 1.25  # seconds that a step computes for each second that reading its batch takes
SHARD = 250_000  # bytes, far fewer than the default: there are thirty shards, of which 16 are read at once


class Slow(SimpleHTTPRequestHandler):
    """Answers after a delay."""

    def do_GET(self) -> None:
        time.sleep(DELAY)
        super().do_GET()

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Slow, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def epoch(step: float, **options: Any) -> tuple[float, float]:
    """Read an epoch with a pause between batches; return images per second and the share of waiting."""
    data = ImageData(img_size=32, auto_augment=None, batch_size=BATCH, num_workers=WORKERS, **options)
    loader = data.train_dataloader()
    waited, images, began = 0.0, 0, 0.0
    last = time.perf_counter()
    for batch in loader:
        now = time.perf_counter()
        if began:
            waited, images = waited + now - last, images + len(batch.labels)
        else:
            began = now  # the first batch starts the workers
        time.sleep(step)
        last = time.perf_counter()
    seconds = last - began
    del loader, data
    gc.collect()  # the workers end before others are forked
    return images / seconds, waited / seconds


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        for number, content in enumerate(jpegs(IMAGES, 40, 30)):
            file = root / "images/train" / f"class_{number % 10}" / f"{number}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        files = ImageData(root=str(root / "images")).files()["train"]
        began = time.perf_counter(), time.process_time()
        to = root / "shards/train"
        index = pack(files, to, shard_size=SHARD, seed=0, workers=1, said=lambda done, of: None)
        wall, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
        million = 1e6 / IMAGES / 3600
        print(f"pack: {IMAGES:,} images in {len(index.shards)} shards, {wall:.1f} s ({cpu:.1f} s of a CPU)")
        print(f"      a million: {wall * million:.2f} hours of one process ({cpu * million:.2f} of a CPU)\n")
        with served(root / "shards") as url:
            kinds: dict[str, dict[str, Any]] = {
                "folder": {"root": str(root / "images")},
                "shards in a folder": {"stream": str(root / "shards")},
                "shards by HTTP": {"stream": url},
            }
            found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
            step = 0.0
            for number in range(ROUNDS):
                for kind, options in kinds.items():
                    cache = {"cache": str(root / f"cache_{number}")} if kind == "shards by HTTP" else {}
                    fast, _ = epoch(0, **options, **cache)
                    step = step or STEP * BATCH / fast  # after the folder's first epoch
                    cache = {"cache": str(root / f"cache_{number}_b")} if cache else {}
                    _, share = epoch(step, **options, **cache)
                    found[kind].append((fast, share))
        print("| | images/s | waiting |\n|---|---|---|")
        for kind, rounds in found.items():
            fast, share = max(fast for fast, _ in rounds), min(share for _, share in rounds)
            print(f"| {kind} | {fast:,.0f} | {share:.1%} |")


if __name__ == "__main__":
    main()
