"""Segmentation without training: every patch takes the classes of the training patches most like it.

Source: "Towards In-context Scene Understanding" (Balažević et al., NeurIPS 2023), Hummingbird's retrieval.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
from locat_lightning.evaluation.knn import VOTES, Neighbours, inverse_norms, nearest_neighbours
from locat_lightning.labels import IGNORE
from locat_lightning.nn.decoder import upsampled_argmax

Search = Literal["auto", "torch", "faiss"]
PATCHES = 2**32  # more than an image has: the key of a patch is image · PATCHES + patch


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
        seed: seed of the choice of patches.
    """

    memory_size: PositiveInt | None = None
    neighbours: PositiveInt = 30
    temperature: PositiveFloat = 0.02
    search: Search = "auto"
    seed: int = 0

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
        if self.search == "faiss" and find_spec("faiss") is None:
            raise InputError(
                "search='faiss' needs faiss: pip install 'locat-lightning[retrieval]', or take search='torch'"
            )


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
    *,
    num_classes: int,
    places: Sequence[int] | None = None,
    autocast_dtype: torch.dtype | None = None,
    progress: bool = True,
) -> IoU:
    """Measure how well patch features alone tell the classes of pixels: build a memory, then `retrieve`.

    Both loaders give `MaskBatch`es. Masks of `train_loader` are of the images' size and not augmented at
    random; those of `val_loader` may be of another size: scores of patches are upsampled to it bilinearly,
    and the largest is the prediction. The backbone (see `patch_features`) is on `device`, and only it
    computes in `autocast_dtype`. The memory is on `device`, too.

    With `torch.distributed` initialised, each process brings its part of both data sets, an image that
    several bring counts once, and all get the whole result. If they bring only a part of the training images,
    `places` are its positions, ascending. A training around this call is not touched.
    """
    device = torch.device(device)
    options: dict[str, Any] = {"places": places, "autocast_dtype": autocast_dtype, "progress": progress}
    memory = build_memory(backbone, train_loader, device, settings, num_classes=num_classes, **options)
    memory = Memory(*(table.to(device) for table in memory))
    counts: dict[int, Tensor] = {}  # by image
    with measuring(backbone, val_loader, "Segmenting by retrieval", progress) as batches:
        for batch in batches:
            images = batch.images.to(device, non_blocking=True)
            features = patch_features(backbone, images, autocast_dtype=autocast_dtype)
            scores = retrieve(memory, features, settings)
            height, width = images.shape[-2:]
            if (padded := padded_size(backbone, (height, width))) != (height, width):
                scores = F.interpolate(scores, padded, mode="bilinear")[..., :height, :width]
            predictions = upsampled_argmax(scores, (batch.masks.shape[1], batch.masks.shape[2]))
            masks = batch.masks.to(device)
            for index, predicted, annotated in zip(batch.indices.tolist(), predictions, masks, strict=True):
                if index not in counts:
                    counts[index] = count_pixels(predicted, annotated, num_classes).to_sparse().cpu()
    with torch.inference_mode(False):
        # Which images other processes have, too, is known only now: the process of smallest rank counts.
        of_each = list(parts(torch.tensor(list(counts), dtype=torch.int64), device))
        before = of_each[: dist.get_rank()] if distributed() else []
        total = torch.zeros(num_classes**2 + 1, dtype=torch.int64)
        for index in counts.keys() - {index for part in before for index in part.tolist()}:
            total += counts[index]
        total = total.to(device)
        if distributed():
            dist.all_reduce(total)
        images = image_areas(counts, device)
        if not total.any():
            raise InputError(
                "no pixel of the validation images is annotated: check the masks, and which label is ignored"
            )
        return iou(total, images)


def build_memory(
    backbone: nn.Module,
    loader: DataLoader,
    device: torch.device | str,
    settings: Retrieval,
    *,
    num_classes: int,
    places: Sequence[int] | None = None,
    autocast_dtype: torch.dtype | None = None,
    progress: bool = True,
) -> Memory:
    """Keep the features of training patches with the classes of their pixels.

    Patches without an annotated pixel are left out. Where the memory has a size, every image has an equal
    share of it, and fills it with a sample in which rare classes are not lost, as in Hummingbird: a patch
    scores u · Σ κ, with κ the number of patches of the image that hold a class, summed over the classes that
    the patch holds, and u uniform in [0, 1); those with the lowest scores are kept. What is kept of an image
    depends on nothing but its mask, its place in the data set and the seed.

    Arguments are those of `segment_by_retrieval`. All images of the loader's data set, or of `places`, share
    a limited memory. It is in the order of images and patches, on the CPU, and whole in every process; while
    it is built, it takes twice its size.
    """
    check_classes(num_classes)
    device = torch.device(device)
    number = len(loader.dataset if places is None else places)  # type: ignore[arg-type]
    # Keys, features and histograms of each batch, which say at last how large the memory is.
    found: list[tuple[Tensor, Tensor, Tensor]] = []
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
            rows, keys = [], []
            for place, (of_image, index) in enumerate(zip(histograms, batch.indices.tolist(), strict=True)):
                quota, memory_size = None, settings.memory_size
                if memory_size is not None:  # quotas of all images add up to the memory's size
                    rank = index if places is None else bisect_left(places, index)
                    quota = (rank + 1) * memory_size // number - rank * memory_size // number
                patches = sample_patches(of_image, quota, (settings.seed, index))
                rows.append(place * len(of_image) + patches)
                keys.append(index * PATCHES + patches)
            chosen = torch.cat(rows)
            features = maps.permute(0, 2, 3, 1).flatten(0, 2)[chosen.to(device)]
            features = (features * inverse_norms(features, "training")).cpu()
            found.append((torch.cat(keys), features, histograms.flatten(0, 1)[chosen]))
    with torch.inference_mode(False):
        nothing = torch.empty(0, dtype=torch.int64), torch.empty(0, 0), torch.empty(0, 0, dtype=torch.int16)
        columns = [torch.cat(column) for column in zip(*found or [nothing], strict=True)]
        found.clear()
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
    found = nearest_neighbours if search == "torch" else _faiss_neighbours
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
    """Choose at most `number` annotated patches of an image by histograms [N, C]; see `build_memory`.

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


def _faiss_neighbours(bank: Tensor, queries: Tensor, k: int) -> Iterator[Neighbours]:
    """Do what `nearest_neighbours` does by faiss's exact search; `bank` is normalised."""
    import faiss

    queries = queries * inverse_norms(queries, "query")
    found = faiss.knn(queries.cpu().numpy(), bank.cpu().numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
    yield Neighbours(*(torch.from_numpy(table).to(bank.device) for table in found))
