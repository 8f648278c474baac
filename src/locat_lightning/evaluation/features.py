"""Features of a frozen backbone: every image of a data set once, in its order, by any number of processes."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from locat_lightning.backbones.channels import channels_of
from locat_lightning.errors import InputError
from locat_lightning.evaluation.batches import frozen, measuring
from locat_lightning.evaluation.gather import gather_rows

# By Lightning's names. Autocast also serves weights in half precision ("bf16-true") with images in float32.
AUTOCAST = {
    **dict.fromkeys(("32", "32-true", "None")),
    **dict.fromkeys(("bf16", "bf16-mixed", "bf16-true"), torch.bfloat16),
    **dict.fromkeys(("16", "16-mixed", "16-true"), torch.float16),
}


class Features(NamedTuple):
    """A data set as a backbone sees it, in the order of the data set."""

    features: Tensor  # [N, D] float32
    labels: Tensor  # [N] int64
    indices: Tensor  # [N] int64, positions in the data set, ascending; on the CPU

    def to(self, device: torch.device) -> "Features":
        """Return the same with features and labels on a device."""
        return self._replace(features=self.features.to(device), labels=self.labels.to(device))


def autocast_type(precision: str | int | None) -> torch.dtype | None:
    """Return the type of half precision of one of Lightning's precisions; None for float32."""
    try:
        return AUTOCAST[str(precision)]
    except KeyError:
        known = ", ".join(name for name in AUTOCAST if "-" in name)
        message = f"precision {precision!r} is not supported for features: use one of {known}"
        raise InputError(message) from None


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Autocast to `dtype`, or not at all for None, whatever is set around it."""
    # Without the cache: weights cast here, in inference mode, must not reach a training step around it.
    return torch.autocast(device.type, dtype, enabled=dtype is not None, cache_enabled=False)


def surrounding_autocast(device: torch.device) -> torch.dtype | None:
    """Return the type that is autocast to around this call; None for none."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def image_features(
    backbone: nn.Module, images: Tensor, *, autocast_dtype: torch.dtype | None = None
) -> Tensor:
    """Return a vector per image: the input of a timm model's classifier, or the output of any other module.

    For LocAt models that is PRR's [CLS]. An autocast context around this call has no effect inside it.

    Args:
        backbone: a timm model (its classifier is left out), or any module that maps images to vectors.
        images: [B, C, H, W].
        autocast_dtype: mixed precision in this type; None computes in the type of the weights.

    Returns:
        [B, D] float32.
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
    """Check that a backbone takes square images of `size` pixels, by a black one.

    Raises:
        InputError: it does not (the message ends with `advice`), or does not give one vector per image.
    """
    try:
        with frozen(backbone), torch.no_grad():
            image_features(backbone, torch.zeros(1, channels_of(backbone), size, size, device=device))
    except (AssertionError, RuntimeError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{name} does not take images of {size} pixels ({why}): {advice}") from error


def extract_features(
    backbone: nn.Module,
    loader: DataLoader,
    device: torch.device | str,
    *,
    autocast_dtype: torch.dtype | None = None,
    progress: bool = True,
) -> Features:
    """Run every image of `ImageBatch`es once through a frozen backbone (see `image_features`) on `device`.

    With `torch.distributed` initialised, each process brings its part of the data set and all get the whole;
    parts may differ in size or overlap (`DistributedSampler` repeats images). A training around this call is
    not touched. A progress bar is shown on the first process only.

    Returns:
        Features and labels of each distinct index, ascending: ordinary tensors on the CPU, fit for autograd.
    """
    device = torch.device(device)
    found = []
    with measuring(backbone, loader, "Extracting features", progress) as batches:
        for batch in batches:
            images = batch.images.to(device, non_blocking=True)
            features = image_features(backbone, images, autocast_dtype=autocast_dtype).cpu()
            found.append((batch.indices, features, batch.labels))
    with torch.inference_mode(False):
        none = torch.empty(0, dtype=torch.int64)
        columns = zip(*found or [(none, torch.empty(0, 0), none)], strict=True)
        indices, *tables = map(torch.cat, columns)
        features, labels, indices = gather_rows(indices, *tables, indices, device=device)
    if not len(features):
        raise InputError("no images to extract features from: the loader is empty (check root and split)")
    return Features(features, labels, indices)
