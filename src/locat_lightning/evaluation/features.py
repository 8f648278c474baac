"""Features of a frozen backbone: every image of a data set once, in its order, by any number of processes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from rich.progress import track
from torch import Tensor, nn

from locat_lightning.errors import InputError
from locat_lightning.evaluation.gather import first_process, gather_rows


class LabelledBatch(Protocol):
    """A batch of images with their labels and their places in the data set."""

    @property
    def images(self) -> Tensor:
        """[B, 3, H, W]."""

    @property
    def labels(self) -> Tensor:
        """[B] int64; -1 is "no label"."""

    @property
    def indices(self) -> Tensor:
        """[B] int64: positions in the data set."""


# By the names that Lightning has for precision. Autocast also brings images and weights of one kind of half
# precision ("bf16-true") together.
AUTOCAST = {
    **dict.fromkeys(("32", "32-true", "None")),
    **dict.fromkeys(("bf16", "bf16-mixed", "bf16-true"), torch.bfloat16),
    **dict.fromkeys(("16", "16-mixed", "16-true"), torch.float16),
}

Batch_co = TypeVar("Batch_co", bound=LabelledBatch, covariant=True)


class Batches(Protocol[Batch_co]):
    """What is needed of a `DataLoader`: its length in batches, and the batches."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch_co]: ...


class Features(NamedTuple):
    """A data set as a backbone sees it, in the order of the data set, in CPU memory."""

    features: Tensor  # [N, D] float32
    labels: Tensor  # [N] int64


def autocast_type(precision: str | int | None) -> torch.dtype | None:
    """The `autocast_dtype` below that serves one of Lightning's precisions.

    Args:
        precision: `bf16-mixed`, `16-mixed`, `bf16-true`, `16-true`, `32-true`, their short names, or None.

    Returns:
        The type of half precision; None for float32.

    Raises:
        InputError: features are not computed in that precision.
    """
    try:
        return AUTOCAST[str(precision)]
    except KeyError:
        known = ", ".join(name for name in AUTOCAST if "-" in name)
        raise InputError(f"precision {precision!r} is none that features are computed in: {known}") from None


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Autocast to `dtype`, or none at all, whatever there is around it."""
    # Without the cache: weights cast in here under inference mode must not meet a training step around us.
    return torch.autocast(device.type, dtype, enabled=dtype is not None, cache_enabled=False)


@contextmanager
def frozen(backbone: nn.Module) -> Iterator[None]:
    """Put `backbone` in evaluation mode; afterwards every submodule has its own training flag again."""
    training = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag


def image_features(
    backbone: nn.Module, images: Tensor, *, autocast_dtype: torch.dtype | None = None
) -> Tensor:
    """One vector per image: what a timm model hands to its classifier, or the output of any other module.

    For LocAt models that is PRR's [CLS]. An autocast context around this call has no effect inside it.

    Args:
        backbone: a timm model (its classifier is left out), or any module that maps images to vectors.
        images: [B, 3, H, W].
        autocast_dtype: mixed precision in this type; None computes in the type of the weights.

    Returns:
        [B, D] float32.

    Raises:
        InputError: `backbone` does not give one vector per image.
    """
    with autocast(images.device, autocast_dtype):
        timm: Any = backbone
        if hasattr(timm, "forward_head"):
            features = timm.forward_head(timm.forward_features(images), pre_logits=True)
        else:
            features = backbone(images)
    if not isinstance(features, Tensor) or features.ndim != 2:
        shape = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise InputError(
            f"{type(backbone).__name__} gives {shape} for {len(images)} images where [B, D] is needed: "
            "choose a backbone that pools (for timm models, global_pool other than '')"
        )
    return features.float()


def check_size(
    backbone: nn.Module, size: int, device: torch.device | str, *, advice: str, name: str = "the backbone"
) -> None:
    """See that a backbone takes square images of a size, by a black one.

    Args:
        backbone: see `image_features`; already on `device`.
        size: height and width in pixels.
        device: where the backbone computes.
        advice: what to do if it does not.
        name: of the backbone.

    Raises:
        InputError: it does not, or does not give one vector per image.
    """
    try:
        with frozen(backbone), torch.no_grad():
            image_features(backbone, torch.zeros(1, 3, size, size, device=device))
    except (AssertionError, RuntimeError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{name} does not take images of {size} pixels ({why}): {advice}") from error


def extract_features(
    backbone: nn.Module,
    loader: Batches[LabelledBatch],
    device: torch.device | str,
    *,
    autocast_dtype: torch.dtype | None = None,
    progress: bool = True,
) -> Features:
    """Run every image once through a frozen backbone.

    With `torch.distributed` initialised, each process brings its part of the data set and all get the whole;
    parts may differ in size or overlap (`DistributedSampler` repeats images). A training around this call is
    not touched: training flags and the states of the random number generators are put back.

    Args:
        backbone: see `image_features`; already on `device`.
        loader: batches with `images`, `labels` and `indices`.
        device: where the backbone computes.
        autocast_dtype: mixed precision in this type; None computes in the type of the weights.
        progress: show a progress bar (on the first process only).

    Returns:
        Features and labels of each distinct index, ascending; ordinary tensors, fit for autograd.

    Raises:
        InputError: there are no images, or the backbone does not give one vector per image.
    """
    device = torch.device(device)
    features, labels, indices = [], [], []
    show = progress and first_process()
    with isolate_rng(), frozen(backbone), torch.inference_mode():
        for batch in track(loader, "Extracting features", total=len(loader), disable=not show):
            images = batch.images.to(device, non_blocking=True)
            features.append(image_features(backbone, images, autocast_dtype=autocast_dtype).cpu())
            labels.append(batch.labels)
            indices.append(batch.indices)
    with torch.inference_mode(False):
        empty = torch.empty(0, dtype=torch.int64)
        found = gather_rows(
            torch.cat([empty, *indices]),
            torch.cat(features) if features else torch.empty(0, 0),
            torch.cat([empty, *labels]),
            device=device,
        )
    if not len(found[0]):
        raise InputError("no images to extract features from: the loader is empty (check root and split)")
    return Features(*found)
