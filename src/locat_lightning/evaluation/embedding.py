"""Features of many images, handed on batch by batch, so that any number of images takes the same memory."""

from collections.abc import Callable, Iterable, Iterator
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from locat_lightning.evaluation.batches import measuring
from locat_lightning.evaluation.dense import patch_features
from locat_lightning.evaluation.features import image_features

What = Literal["cls", "patch_mean", "patches"]
Write = Callable[[Any, Tensor], None]


class Waiting:
    """Seconds that an iteration has taken, and those of them in which it waited for its next item."""

    def __init__(self) -> None:
        self.seconds = self.waited = 0.0

    def __call__(self, items: Iterable[Any]) -> Iterator[Any]:
        """Pass items on."""
        begun = asked = perf_counter()
        for item in items:
            now = perf_counter()
            self.waited += now - asked
            yield item
            asked = perf_counter()
            self.seconds = asked - begun


def embed(
    backbone: nn.Module, images: Tensor, what: What, *, autocast_dtype: torch.dtype | None = None
) -> Tensor:
    """Return features of images [B, 3, height, width] as rows that files take.

    Returns:
        `cls`: [B, D], the input of the model's classifier (see `image_features`); `patches`: [B, H, W, D],
        the patch features of the last block (`patch_features`); `patch_mean`: [B, D], their mean. float32.
    """
    if what == "cls":
        return image_features(backbone, images, autocast_dtype=autocast_dtype)
    patches = patch_features(backbone, images, autocast_dtype=autocast_dtype)
    return patches.mean((-2, -1)) if what == "patch_mean" else patches.movedim(1, -1)


def embed_images(
    backbone: nn.Module,
    loader: DataLoader,
    device: torch.device | str,
    write: Write,
    *,
    what: What = "cls",
    dtype: torch.dtype = torch.float32,
    autocast_dtype: torch.dtype | None = None,
    progress: bool = True,
) -> Waiting:
    """Embed every batch of a loader, and pass each with its rows (see `embed`) to `write`, in order.

    Rows are of `dtype`, on the CPU. A GPU computes the next batch while the rows of the last one are written.

    Returns:
        How long it took, and how much of that was waiting for images.
    """
    device, clock = torch.device(device), Waiting()
    has_stream = device.type == "cuda"
    pending: tuple[Any, Tensor, torch.cuda.Event | None] | None = None
    with measuring(backbone, loader, "Extracting features", progress) as batches:
        for batch in clock(batches):
            images = batch.images.to(device, non_blocking=True)
            rows = embed(backbone, images, what, autocast_dtype=autocast_dtype).to(dtype)
            rows = rows.contiguous().to("cpu", non_blocking=has_stream)  # to pinned memory
            copied = torch.cuda.Event() if has_stream else None
            if copied is not None:
                copied.record()
            if pending is not None:
                _hand_on(write, *pending)
            pending = batch, rows, copied
        if pending is not None:
            _hand_on(write, *pending)
    return clock


def _hand_on(write: Write, batch: Any, rows: Tensor, copied: torch.cuda.Event | None) -> None:
    if copied is not None:
        copied.synchronize()
    write(batch, rows)
