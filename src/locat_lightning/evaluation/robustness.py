"""How a classifier's top-1, or the mIoU of a segmentation, falls with the number of corrupted patches."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jsonargparse.typing import PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.utils.data import DataLoader

from locat_lightning.errors import InputError
from locat_lightning.evaluation.batches import measuring
from locat_lightning.evaluation.features import autocast
from locat_lightning.evaluation.gather import gather_rows
from locat_lightning.evaluation.iou import check_classes, class_areas, count_pixels
from locat_lightning.evaluation.knn import label_ranks
from locat_lightning.evaluation.perturbation import BLUR, KINDS, patch_grid, perturbed
from locat_lightning.labels import IGNORE
from locat_lightning.nn.decoder import upsampled_argmax
from locat_lightning.nn.temperature import attention_temperature

# Mean and deviation of ImageNet's images, for values from 0 to 1: the mean of the three channels'.
OF_A_CHANNEL = {"mean": (0.449,), "std": (0.226,)}


@dataclass(frozen=True)
class Robustness:
    """Settings of a measurement with corrupted patches.

    Args:
        kinds: corruptions: `noise`, `blur`, `contrast` (of ImageNet-C), `occlusion`, `shuffle`.
        numbers: numbers of patches that are corrupted; null takes 1, 2, 4, … and all. 0 is always measured.
        patch_size: height and width of the patches in pixels; null takes those of the model.
        severity: of noise, blur and contrast, 1 to 5.
        temperatures: by which the attention logits of all blocks are divided.
        seed: seed of the choice of patches and of the noise.
    """

    kinds: Sequence[str] = KINDS
    numbers: Sequence[PositiveInt] | None = None
    patch_size: PositiveInt | None = None
    severity: PositiveInt = 5
    temperatures: Sequence[PositiveFloat] = (1.0,)
    seed: int = 0

    def __post_init__(self) -> None:
        if unknown := [kind for kind in self.kinds if kind not in KINDS]:
            raise InputError(f"there is no corruption {unknown[0]!r}: use {', '.join(KINDS)}")
        if not 1 <= self.severity <= len(BLUR):
            raise InputError(f"severity {self.severity} must be from 1 to {len(BLUR)}")
        if not self.temperatures:
            raise InputError("temperatures: give one or more, 1 for the model as it is")

    def counts(self, patches: int) -> list[int]:
        """Return the numbers of corrupted patches, ascending, of so many."""
        numbers = self.numbers or [2**power for power in range(patches.bit_length())] + [patches]
        if max(numbers) > patches:
            raise InputError(f"numbers: an image has {patches} patches, of which {max(numbers)} are too many")
        return sorted({*numbers})


class Condition(NamedTuple):
    """What a model was measured under."""

    kind: str  # "none" without a corruption
    number: int  # of corrupted patches
    temperature: float

    def named(self, figure: str) -> str:
        """Return the name that a figure, as `top1`, has under this condition."""
        at = "" if self.temperature == 1 else f"_t{self.temperature:g}"
        return f"{figure}{at}" if self.kind == "none" else f"{figure}_{self.kind}_n{self.number}{at}"


class Ranked(NamedTuple):
    """How a classifier ranks the right classes of N images."""

    indices: Tensor  # [N] int64, ascending
    labels: Tensor  # [N] int64
    ranks: dict[Condition, Tensor]  # [N] int64: classes before the right one


class Counted(NamedTuple):
    """Pixels of C classes in N segmented images."""

    indices: Tensor  # [N] int64, ascending
    areas: dict[Condition, Tensor]  # [N, 3, C] int32, see `class_areas`


def rank_perturbed(
    model: nn.Module,
    loader: DataLoader,
    device: torch.device | str,
    settings: Robustness,
    *,
    normalisation: Mapping[str, Sequence[float]] | None,
    autocast_dtype: torch.dtype | None = None,
    progress: bool = True,
) -> Ranked:
    """Rank the classes of `ImageBatch`es under each condition: some patches of the images are corrupted.

    Which patches are corrupted follows from the seed and the index of the image (see `perturbed`): the first
    of one order, so that with more of them the others stay corrupted, and for every model the same if
    `patch_size` is. With `torch.distributed` initialised, each process brings its part of the images.

    Args:
        model: maps images [B, channels, H, W] to logits [B, C]; on `device`.
        loader: labelled images, normalised.
        device: of the model.
        settings: which conditions.
        normalisation: `mean` and `std` of RGB images, which are corrupted before. None for images that are
            not RGB: each channel is corrupted as that of an RGB image with its mean and deviation would be,
            without bounds.
        autocast_dtype: mixed precision in this type; None computes in the type of the weights.
        progress: whether to show a bar.

    Source: "Are Vision Transformers Robust to Patch Perturbations?" (Gu, Tresp & Qin, ECCV 2022).
    """
    device, found = torch.device(device), _Found()
    with measuring(model, loader, "Corrupting patches", progress) as batches:
        for batch in batches:
            labels = batch.labels.to(device)
            outputs = perturbed_outputs(model, batch, device, settings, normalisation, autocast_dtype)
            ranks = {condition: label_ranks(logits, labels) for condition, logits in outputs}
            found.add(batch.indices, batch.labels, ranks)
    indices, labels, of_conditions = found.joined(device)
    return Ranked(indices, labels, of_conditions)


def count_perturbed(
    model: nn.Module,
    loader: DataLoader,
    device: torch.device | str,
    settings: Robustness,
    *,
    num_classes: int,
    normalisation: Mapping[str, Sequence[float]] | None,
    autocast_dtype: torch.dtype | None = None,
    progress: bool = True,
) -> Counted:
    """Count the pixels that a segmentation of `MaskBatch`es gets right under each condition.

    The model maps images [B, channels, H, W], of whole patches, to logits [B, C, h, w], which are upsampled
    to the size of the masks; those stay as they are, 255 is ignored. Other arguments are those of
    `rank_perturbed`.

    Raises:
        InputError: a mask has a class that is none of them, or no pixel of any mask is annotated.
    """
    check_classes(num_classes)
    device, found = torch.device(device), _Found()
    with measuring(model, loader, "Corrupting patches", progress) as batches:
        for batch in batches:
            masks = batch.masks.to(device)
            size, areas = (masks.shape[1], masks.shape[2]), dict[Condition, Tensor]()
            outputs = perturbed_outputs(model, batch, device, settings, normalisation, autocast_dtype)
            for condition, logits in outputs:
                pairs = zip(upsampled_argmax(logits, size), masks, strict=True)
                pixels = torch.stack([count_pixels(*pair, num_classes) for pair in pairs])
                areas[condition] = class_areas(pixels).int()
            found.add(batch.indices, pixels[:, -1].cpu(), areas)  # last those of no class
    indices, unknown, of_conditions = found.joined(device)
    if pixels_of_none := int(unknown.sum()):
        raise InputError(
            f"{pixels_of_none} pixels are of none of the classes 0..{num_classes - 1}: check the number of "
            f"classes, and that pixels without one are annotated as {IGNORE}"
        )
    if of_conditions and not next(iter(of_conditions.values()))[:, 1].any():
        raise InputError(
            "no pixel of the validation images is annotated: check the masks, and which label is ignored"
        )
    return Counted(indices, of_conditions)


def perturbed_outputs(
    model: nn.Module,
    batch: Any,
    device: torch.device,
    settings: Robustness,
    normalisation: Mapping[str, Sequence[float]] | None,
    autocast_dtype: torch.dtype | None,
) -> Iterator[tuple[Condition, Tensor]]:
    """Yield what a model makes of a batch's images, float32, under each condition; first of all without."""
    values = OF_A_CHANNEL if normalisation is None else normalisation
    mean, std = (torch.tensor(values[name], device=device).view(-1, 1, 1) for name in ("mean", "std"))
    images = batch.images.to(device, non_blocking=True) * std + mean
    images = images if normalisation is None else images.clamp(0, 1)
    patch = settings.patch_size or patch_of(model)
    options: dict[str, Any] = {
        "patch": patch,
        "severity": settings.severity,
        "mean": values["mean"],
        "bounded": normalisation is not None,
        "seed": settings.seed,
    }
    numbers = settings.counts(math.prod(patch_grid(images, patch)))
    variants = [("none", [0]), *((kind, numbers) for kind in settings.kinds)]
    for kind, of_kind in variants:
        corrupted = perturbed(images, batch.indices.tolist(), kind, of_kind, **options)
        for number, pixels in zip(of_kind, corrupted, strict=True):
            inputs = (pixels - mean) / std
            for temperature in settings.temperatures:
                with autocast(device, autocast_dtype), attention_temperature(model, temperature):
                    outputs = model(inputs).float()
                yield Condition(kind, number, temperature), outputs


class _Found:
    """What this process has found of its images so far, under all conditions."""

    def __init__(self) -> None:
        self.batches: list[tuple[Tensor, Tensor, Tensor]] = []
        self.conditions: Iterable[Condition] = ()  # a process without images knows none

    def add(self, indices: Tensor, of_images: Tensor, values: Mapping[Condition, Tensor]) -> None:
        """Add images [B], a number of each [B], and values [B, ...] by condition."""
        self.batches.append((indices, of_images, torch.stack([*values.values()], 1).cpu()))
        self.conditions = values.keys()

    def joined(self, device: torch.device) -> tuple[Tensor, Tensor, dict[Condition, Tensor]]:
        """Return the same of the images of all processes, each once; `device` is that of their group."""
        with torch.inference_mode(False):
            none = torch.empty(0, dtype=torch.int64)
            batches = self.batches or [(none, none, none.view(0, 0))]
            columns = [torch.cat(column) for column in zip(*batches, strict=True)]
            indices, of_images, values = gather_rows(columns[0], *columns, device=device)
        if not len(indices):
            raise InputError("no images to measure on: the loader is empty (check root and split)")
        return indices, of_images, dict(zip(self.conditions, values.unbind(1), strict=False))


def patch_of(model: nn.Module) -> int:
    """Return height and width in pixels of a model's patches, or of its `backbone`'s.

    `InputError` if it has none that are square.
    """
    of_images = getattr(getattr(model, "backbone", model), "patch_embed", None)
    patch = getattr(of_images, "patch_size", None)
    sides = {patch} if isinstance(patch, int) else set(patch or ())
    if len(sides) != 1:
        raise InputError(f"{type(model).__name__} has no square patches: set --patch_size")
    return int(sides.pop())
