"""Segmentation without training: every patch takes the classes of the training patches most like it.

Source: "Towards In-context Scene Understanding" (Balažević et al., NeurIPS 2023), Hummingbird's retrieval.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from jsonargparse.typing import PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from locat_lightning.errors import InputError
from locat_lightning.evaluation.batches import measuring
from locat_lightning.evaluation.dense import padded_size, patch_features
from locat_lightning.evaluation.gather import distributed, gather_rows, parts
from locat_lightning.evaluation.iou import IoU, check_classes, count_pixels, image_areas, iou
from locat_lightning.evaluation.knn import VOTES, faiss_neighbours, inverse_norms, nearest_neighbours
from locat_lightning.labels import IGNORE
from locat_lightning.nn.decoder import upsampled_argmax

Search = Literal["auto", "torch", "faiss"]
PATCHES = 2**32  # more than an image has: the key of a patch is (pass · images + image) · PATCHES + patch
SEEDS = (42, 400, 783, 1293, 4019)  # of Hummingbird's few-shot splits
# Images in its splits, by number of training images (VOC's augmented set, ADE20K) and fraction.
SPLIT_SIZES = {10_582: {8: 1320, 64: 160, 128: 80}, 20_210: {8: 2550, 64: 300, 128: 150}}


@dataclass(frozen=True)
class Retrieval:
    """Settings of dense retrieval.

    Args:
        memory_size: patches in the memory; null takes all.
        neighbours: patches of the memory that vote; all where there are fewer.
        temperature: of the votes, softmax(cosine / temperature).
        search: `torch` compares chunk by chunk on the memory's device, some 300 MB besides the memory;
            `faiss` has an exact search on the CPU of the same result; `auto` takes it for a memory on the
            CPU where it is installed.
        seed: seed of the choice of images and patches.
        fraction: 8 takes 1/8 of the training images, at random, and so on; 1 takes all.
    """

    memory_size: PositiveInt | None = None
    neighbours: PositiveInt = 30
    temperature: PositiveFloat = 0.02
    search: Search = "auto"
    seed: int = 0
    fraction: PositiveInt = 1

    def __post_init__(self) -> None:
        if self.memory_size is not None and self.memory_size < 1:
            raise InputError(
                f"memory_size is {self.memory_size}: give the number of patches to keep, or none for all"
            )
        if self.neighbours < 1 or self.temperature <= 0:
            raise InputError(
                f"retrieval from {self.neighbours} neighbours at temperature {self.temperature}: "
                "both must be positive, like Hummingbird's 30 and 0.02"
            )
        if self.fraction < 1:
            raise InputError(f"fraction is {self.fraction}: give 8 for 1/8 of the training images, and so on")
        if self.search == "faiss" and find_spec("faiss") is None:
            raise InputError(
                "search='faiss' needs faiss: pip install 'locat-lightning[retrieval]', or take search='torch'"
            )

    def split(self, places: Sequence[int]) -> Sequence[int]:
        """Choose the training images of a few-shot split among `places`, ascending positions.

        Of VOC's augmented set and of ADE20K the splits are as large as Hummingbird's; which images are in
        them is drawn here. Of one seed, the smaller splits are parts of the larger.
        """
        if self.fraction == 1:
            return places
        number = SPLIT_SIZES.get(len(places), {}).get(self.fraction, round(len(places) / self.fraction))
        if number < 1:
            raise InputError(f"1/{self.fraction} of {len(places)} training images is less than one image")
        order = np.random.default_rng(self.seed).permutation(len(places))
        return sorted(places[int(row)] for row in order[:number])


class Memory(NamedTuple):
    """Annotated patches to retrieve from, of 4 D + 2 C bytes each.

    Ten million patches of a ViT-S (D = 384) with COCO-Stuff's 171 classes take 19 GB.
    """

    features: Tensor  # [M, D] float32, of length 1
    histograms: Tensor  # [M, C] int16: how many pixels of the patch are of each class; at least one is


def segment_by_retrieval(
    backbone: nn.Module,
    train_loader: DataLoader,
    val_loader: DataLoader,
    device: torch.device | str,
    settings: Retrieval,
    **options: Any,
) -> IoU:
    """Measure how well patch features alone tell the classes of pixels: see `compare_retrievals`."""
    (found,) = compare_retrievals(backbone, [train_loader], val_loader, device, [settings], **options)
    return found


def compare_retrievals(
    backbone: nn.Module,
    train_loaders: Sequence[DataLoader],
    val_loader: DataLoader,
    device: torch.device | str,
    variants: Sequence[Retrieval],
    *,
    num_classes: int,
    places: Sequence[int] | None = None,
    autocast_dtype: torch.dtype | None = None,
    progress: bool = True,
) -> list[IoU]:
    """Measure dense retrieval with several memories on features that are extracted once.

    The loaders give `MaskBatch`es. Masks of `train_loaders` are of the images' size; several loaders are
    several passes over the same images, differently augmented, which fill the memory together. Masks of
    `val_loader` may be of another size than its images: scores of patches are upsampled to it bilinearly,
    and the largest is the prediction. The backbone (see `patch_features`) is on `device`, and only it
    computes in `autocast_dtype`. The memories are on `device` together.

    With `torch.distributed` initialised, each process brings its part of both data sets, an image that
    several bring counts once, and all get the whole result. If they bring only a part of the training images,
    `places` are its positions, ascending, of which the variants choose theirs (`Retrieval.split`). A training
    around this call is not touched.

    Returns:
        The result of each variant, with the areas of each image.
    """
    device = torch.device(device)
    options: dict[str, Any] = {"places": places, "autocast_dtype": autocast_dtype, "progress": progress}
    built = build_memories(backbone, train_loaders, device, variants, num_classes=num_classes, **options)
    memories = [Memory(*(table.to(device) for table in memory)) for memory in built]
    counts: dict[int, list[Tensor]] = {}  # by image, of each memory
    with measuring(backbone, val_loader, "Segmenting by retrieval", progress) as batches:
        for batch in batches:
            images = batch.images.to(device, non_blocking=True)
            features = patch_features(backbone, images, autocast_dtype=autocast_dtype)
            (height, width), masks = images.shape[-2:], batch.masks.to(device)
            padded = padded_size(backbone, (height, width))
            predictions = []
            for memory, settings in zip(memories, variants, strict=True):
                scores = retrieve(memory, features, settings)
                if padded != (height, width):
                    scores = F.interpolate(scores, padded, mode="bilinear")[..., :height, :width]
                predictions.append(upsampled_argmax(scores, (batch.masks.shape[1], batch.masks.shape[2])))
            for index, annotated, *predicted in zip(batch.indices.tolist(), masks, *predictions, strict=True):
                if index not in counts:
                    of_image = (count_pixels(each, annotated, num_classes) for each in predicted)
                    counts[index] = [each.to_sparse().cpu() for each in of_image]
    with torch.inference_mode(False):
        # Which images other processes have, too, is known only now: the process of smallest rank counts.
        of_each = list(parts(torch.tensor(list(counts), dtype=torch.int64), device))
        before = of_each[: dist.get_rank()] if distributed() else []
        sums = [torch.zeros(num_classes**2 + 1, dtype=torch.int64) for _ in variants]
        for index in counts.keys() - {index for part in before for index in part.tolist()}:
            for total, pixels in zip(sums, counts[index], strict=True):
                total += pixels
        totals = torch.stack(sums).to(device)
        if distributed():
            dist.all_reduce(totals)
        if not totals.any():
            raise InputError(
                "no pixel of the validation images is annotated: check the masks, and which label is ignored"
            )
        areas = [
            image_areas({index: of_image[row] for index, of_image in counts.items()}, device)
            for row in range(len(variants))
        ]
        return [iou(*each) for each in zip(totals, areas, strict=True)]


def build_memories(
    backbone: nn.Module,
    loaders: Sequence[DataLoader],
    device: torch.device | str,
    variants: Sequence[Retrieval],
    *,
    num_classes: int,
    places: Sequence[int] | None = None,
    autocast_dtype: torch.dtype | None = None,
    progress: bool = True,
) -> list[Memory]:
    """Keep the features of training patches with the classes of their pixels, as each variant chooses them.

    Patches without an annotated pixel are left out. Where the memory has a size, every image of every pass
    has an equal share of it, and fills it with a sample in which rare classes are not lost, as in
    Hummingbird: a patch scores u · Σ κ, with κ the number of patches of the image that hold a class, summed
    over the classes that the patch holds, and u uniform in [0, 1); those with the lowest scores are kept.
    What is kept of an image depends on nothing but its mask, its place in the data set, pass and seed.

    Arguments are those of `compare_retrievals`. All images of the loaders' data set, or of `places`, share a
    limited memory, or those of a few-shot split. A memory is in the order of passes, images and patches, on
    the CPU, and whole in every process; while memories are built, they take twice their size.
    """
    check_classes(num_classes)
    device = torch.device(device)
    number = len(loaders[0].dataset)  # type: ignore[arg-type]
    chosen = [_Choice(settings, number, places, len(loaders)) for settings in variants]
    for epoch, loader in enumerate(loaders):
        with measuring(backbone, loader, "Building the memory", progress) as batches:
            for batch in batches:
                images, masks = batch.images.to(device), batch.masks.to(device)
                (_, h, w), (height, width) = masks.shape, images.shape[2:]
                if (h, w) != (height, width):
                    raise InputError(
                        f"masks of {h} × {w} pixels for training images of {height} × {width}: "
                        "retrieval needs a loader that resizes both alike"
                    )
                maps = patch_features(backbone, images, autocast_dtype=autocast_dtype)
                H, W = maps.shape[2:]
                padded = padded_size(backbone, (height, width))
                patch = padded[0] // H, padded[1] // W
                histograms = patch_histograms(masks, (H, W), patch, num_classes).cpu()
                features = maps.permute(0, 2, 3, 1).flatten(0, 2)
                for each in chosen:
                    each.add(epoch, batch.indices.tolist(), features, histograms)
    with torch.inference_mode(False):
        return [each.memory(device) for each in chosen]


@dataclass
class _Choice:
    """The patches of one memory that this process has found so far."""

    settings: Retrieval
    images: int  # in the data set
    places: Sequence[int] | None
    passes: int
    # Keys, features and histograms of each batch, which say at last how large the memory is.
    found: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.split = self.settings.split(range(self.images) if self.places is None else self.places)

    def add(self, epoch: int, indices: list[int], features: Tensor, histograms: Tensor) -> None:
        """Choose patches of a batch: features [B · N, D] on the device, histograms [B, N, C] on the CPU."""
        rows, keys = [], []
        for place, (index, of_image) in enumerate(zip(indices, histograms, strict=True)):
            rank = bisect_left(self.split, index)
            if rank == len(self.split) or self.split[rank] != index:
                continue
            quota, memory_size = None, self.settings.memory_size
            if memory_size is not None:  # quotas of all images and passes add up to the memory's size
                turn, turns = epoch * len(self.split) + rank, self.passes * len(self.split)
                quota = (turn + 1) * memory_size // turns - turn * memory_size // turns
            seed = (self.settings.seed, index, *([epoch] if epoch else []))
            patches = sample_patches(of_image, quota, seed)
            rows.append(place * len(of_image) + patches)
            keys.append((epoch * self.images + index) * PATCHES + patches)
        if rows:
            chosen = torch.cat(rows)
            kept = features[chosen.to(features.device)]
            kept = (kept * inverse_norms(kept, "training")).cpu()
            self.found.append((torch.cat(keys), kept, histograms.flatten(0, 1)[chosen]))

    def memory(self, device: torch.device) -> Memory:
        """Join what all processes have found; `device` is that of their group."""
        nothing = torch.empty(0, dtype=torch.int64), torch.empty(0, 0), torch.empty(0, 0, dtype=torch.int16)
        columns = [torch.cat(column) for column in zip(*self.found or [nothing], strict=True)]
        self.found.clear()
        features, histograms = gather_rows(*columns, device=device)
        if not len(features):
            raise InputError(
                "no patch of the training images is annotated: check the masks, and which label is ignored"
            )
        return Memory(features, histograms)


@torch.no_grad()
def retrieve(memory: Memory, features: Tensor, settings: Retrieval) -> Tensor:
    """Give each patch the mean of its nearest neighbours' classes, weighted softmax(cosine / temperature).

    The search runs on the device of the memory. Features [B, D, H, W] need not be normalised.

    Returns:
        [B, C, H, W] float32, on the device of `features`: shares of the classes, their sum is 1.
    """
    B, _, H, W = features.shape
    classes = memory.histograms.shape[1]
    queries = features.permute(0, 2, 3, 1).flatten(0, 2)
    search = settings.search
    if search == "auto":
        installed = find_spec("faiss") is not None and memory.features.device.type == "cpu"
        search = "faiss" if installed else "torch"
    found = nearest_neighbours if search == "torch" else faiss_neighbours
    neighbours = min(settings.neighbours, len(memory.features))
    rows = max(1, VOTES // (neighbours * classes))
    scores = []
    for similarities, indices in found(memory.features, queries, neighbours):
        weights = (similarities / settings.temperature).softmax(1)
        for weight, index in zip(weights.split(rows), indices.split(rows), strict=True):
            histograms = memory.histograms[index]  # [rows, K, C]
            weight = weight / histograms.sum(2)
            scores.append((histograms * weight[..., None]).sum(1).to(features.device))
    return torch.cat(scores).view(B, H, W, classes).permute(0, 3, 1, 2)


def patch_histograms(
    masks: Tensor, grid: tuple[int, int], patch: tuple[int, int], num_classes: int
) -> Tensor:
    """Count the pixels of each class in each patch, [B, H · W, C] int16.

    In masks [B, h, w] 255 is ignored, as is what a patch has beyond the mask. There is a `grid` of (H, W)
    patches, each of (height, width) pixels.
    """
    (H, W), (height, width) = grid, patch
    below, beside = H * height - masks.shape[1], W * width - masks.shape[2]
    masks = F.pad(masks, (0, beside, 0, below), value=IGNORE)
    pixels = masks.view(-1, H, height, W, width).transpose(2, 3).flatten(3).flatten(1, 2).long()
    unknown = ((pixels < 0) | (pixels >= num_classes)) & (pixels != IGNORE)
    if unknown.any():
        raise InputError(
            f"a mask has a pixel of class {int(pixels[unknown][0])}, which is none of 0..{num_classes - 1}: "
            f"check the number of classes, and that pixels without one are annotated as {IGNORE}"
        )
    counts = torch.zeros(*pixels.shape[:2], num_classes + 1, dtype=torch.int32, device=masks.device)
    counts.scatter_add_(2, pixels.clamp(max=num_classes), torch.ones_like(pixels, dtype=torch.int32))
    return counts[..., :-1].short()


def sample_patches(histograms: Tensor, number: int | None, seed: tuple[int, ...]) -> Tensor:
    """Choose at most `number` annotated patches of an image by histograms [N, C]; see `build_memories`.

    Returns:
        [number or fewer] int64, ascending; all annotated patches if `number` is None.
    """
    held = histograms > 0
    annotated = held.any(1).nonzero()[:, 0]
    if number is None or number >= len(annotated):
        return annotated
    frequency = held.sum(0)
    scores = (held * frequency).sum(1)[annotated]
    uniform = torch.from_numpy(np.random.default_rng(seed).random(len(annotated)))
    return annotated[(scores * uniform).argsort()[:number]].sort().values
