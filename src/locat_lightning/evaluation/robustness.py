"""How a classifier's accuracy falls with the number of patches that are corrupted."""

import math
from collections.abc import Mapping, Sequence
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
from locat_lightning.evaluation.knn import label_ranks
from locat_lightning.evaluation.perturbation import BLUR, KINDS, patch_grid, perturbed
from locat_lightning.nn.temperature import attention_temperature


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

    @property
    def name(self) -> str:
        """Name of its top-1 among the figures."""
        at = "" if self.temperature == 1 else f"_t{self.temperature:g}"
        return f"top1{at}" if self.kind == "none" else f"top1_{self.kind}_n{self.number}{at}"


class Ranked(NamedTuple):
    """How a classifier ranks the right classes of N images."""

    indices: Tensor  # [N] int64, ascending
    labels: Tensor  # [N] int64
    ranks: dict[Condition, Tensor]  # [N] int64: classes before the right one


def rank_perturbed(
    model: nn.Module,
    loader: DataLoader,
    device: torch.device | str,
    settings: Robustness,
    *,
    normalisation: Mapping[str, Sequence[float]],
    autocast_dtype: torch.dtype | None = None,
    progress: bool = True,
) -> Ranked:
    """Rank the classes of `ImageBatch`es under each condition: some patches of the images are corrupted.

    Which patches are corrupted follows from the seed and the index of the image (see `perturbed`): the first
    of one order, so that with more of them the others stay corrupted, and for every model the same if
    `patch_size` is. With `torch.distributed` initialised, each process brings its part of the images.

    Args:
        model: maps images [B, 3, H, W] to logits [B, C]; on `device`.
        loader: labelled images, normalised.
        device: of the model.
        settings: which conditions.
        normalisation: `mean` and `std` of the images' channels, which are corrupted before.
        autocast_dtype: mixed precision in this type; None computes in the type of the weights.
        progress: whether to show a bar.

    Source: "Are Vision Transformers Robust to Patch Perturbations?" (Gu, Tresp & Qin, ECCV 2022).
    """
    device = torch.device(device)
    mean, std = (torch.tensor(normalisation[name], device=device).view(3, 1, 1) for name in ("mean", "std"))
    patch = settings.patch_size or patch_of(model)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    conditions: dict[Condition, None] = {}
    with measuring(model, loader, "Corrupting patches", progress) as batches:
        for batch in batches:
            images = (batch.images.to(device, non_blocking=True) * std + mean).clamp(0, 1)
            labels, rows = batch.labels.to(device), []
            options: dict[str, Any] = {
                "patch": patch,
                "severity": settings.severity,
                "mean": normalisation["mean"],
                "seed": settings.seed,
            }
            numbers = settings.counts(math.prod(patch_grid(images, patch)))
            variants = [("none", [0]), *((kind, numbers) for kind in settings.kinds)]
            for kind, of_kind in variants:
                corrupted = perturbed(images, batch.indices.tolist(), kind, of_kind, **options)
                for number, pixels in zip(of_kind, corrupted, strict=True):
                    inputs = (pixels - mean) / std
                    for temperature in settings.temperatures:
                        conditions[Condition(kind, number, temperature)] = None
                        with autocast(device, autocast_dtype), attention_temperature(model, temperature):
                            rows.append(label_ranks(model(inputs).float(), labels))
            found.append((batch.indices, batch.labels, torch.stack(rows, 1).cpu()))
    with torch.inference_mode(False):
        none = torch.empty(0, dtype=torch.int64)
        columns = [
            torch.cat(column) for column in zip(*found or [(none, none, none.view(0, 0))], strict=True)
        ]
        indices, labels, ranks = gather_rows(columns[0], *columns, device=device)
    if not len(indices):
        raise InputError("no images to measure on: the loader is empty (check root and split)")
    # A process without images knows no conditions.
    return Ranked(indices, labels, dict(zip(conditions, ranks.T, strict=False)))


def patch_of(model: nn.Module) -> int:
    """Return height and width in pixels of a model's patches; `InputError` if it has none that are square."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    sides = {patch} if isinstance(patch, int) else set(patch or ())
    if len(sides) != 1:
        raise InputError(f"{type(model).__name__} has no square patches: set --patch_size")
    return int(sides.pop())
