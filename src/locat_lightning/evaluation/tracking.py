"""Video object segmentation without training: objects of the first frame follow the patches most like them.

Sources: the propagation of `eval_video_segmentation.py` in github.com/facebookresearch/dino (Caron et al.
2021, after Jabri et al. 2020); J and F of "A Benchmark Dataset and Evaluation Methodology for Video Object
Segmentation" (Perazzi et al. 2016) as github.com/davisvideochallenge/davis2017-evaluation computes them.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from math import ceil, hypot

import torch
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from locat_lightning.data.videos import Frames
from locat_lightning.errors import InputError
from locat_lightning.evaluation.batches import measuring
from locat_lightning.evaluation.dense import patch_features
from locat_lightning.evaluation.gather import gather_rows
from locat_lightning.labels import IGNORE

TOLERANCE = 0.008  # of boundaries, as a share of the image's diagonal
OBJECTS = 256  # more than a video has: the key of an object is video · OBJECTS + object


@dataclass(frozen=True)
class Propagation:
    """Settings of the propagation.

    Args:
        previous: frames before a frame that its objects come from, besides the first.
        radius: patches from a patch to the farthest that its object may come from, in height and width.
        neighbours: patches that vote, in all these frames together.
        temperature: of the votes, exp(cosine / temperature).
    """

    previous: NonNegativeInt = 7
    radius: PositiveInt = 12
    neighbours: PositiveInt = 5
    temperature: PositiveFloat = 0.1


def measure_tracking(
    backbone: nn.Module,
    loader: DataLoader,
    frames: Frames,
    device: torch.device | str,
    settings: Propagation,
    *,
    write: Callable[[int, Tensor], None] | None = None,
    autocast_dtype: torch.dtype | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Follow the objects of every video's first frame, and compare them with the annotation.

    The features are the patch tokens of the last block after the final norm. Memory is that of a few frames,
    however long the videos are.

    Args:
        backbone: on `device`.
        loader: `VideoData.frames_dataloader`, of this process's share of the videos.
        frames: the source of all videos.
        device: of the backbone.
        settings: of the propagation.
        write: takes the position of a frame and the objects found in it, [H, W] uint8 on the CPU.
        autocast_dtype: mixed precision in this type; None computes in the type of the weights.
        progress: whether to show a progress bar, on the first process.

    Returns:
        J and F of each object, [objects, 2] float64, by video, of all processes: means over the frames
        without the first and the last one. Videos that are not annotated throughout are left out.
    """
    device = torch.device(device)
    keys, rows = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, 2, dtype=torch.float64)]
    with measuring(backbone, loader, "Tracking", progress) as batches:
        for number, of_video in groupby(batches, lambda batch: frames.places[int(batch.indices)][0]):
            video, tracker, scores = frames.videos[number], None, list[Tensor]()
            for batch in of_video:
                (annotated,), place = batch.masks.to(device), int(batch.indices)
                annotated = annotated.where(annotated != IGNORE, 0)
                frame, images = frames.places[place][1], batch.images.to(device)
                (features,) = patch_features(backbone, images, norm=True, autocast_dtype=autocast_dtype)
                if frame and tracker is None:
                    raise InputError(f"the first frame of {video.name} cannot be read: it says what to track")
                if tracker is None:
                    tracker, found = Tracker(features, annotated, settings), annotated
                else:
                    found = tracker.follow(features, images.shape[2:])
                if write is not None:
                    write(place, found.cpu())
                if video.is_annotated and 0 < frame < len(video.frames) - 1:
                    labels = torch.arange(1, tracker.objects + 1, device=device)[:, None, None]
                    masks = found == labels, annotated == labels
                    scores.append(torch.stack([region_similarity(*masks), boundary_accuracy(*masks)], 1))
            if scores:
                rows.append(torch.stack(scores).double().mean(0).cpu())
                keys.append(number * OBJECTS + torch.arange(len(rows[-1])))
    with torch.inference_mode(False):
        tables = [torch.cat(column).clone() for column in (keys, rows)]
        numbers, table = gather_rows(tables[0], *tables, device=device)
    return {
        frames.videos[number].name: table[numbers // OBJECTS == number]
        for number in (numbers // OBJECTS).unique().tolist()
    }


class Tracker:
    """Objects that are followed from one frame to the next.

    Args:
        features: [D, h, w] of the first frame's patches.
        objects: [H, W] uint8 of the first frame, 0 for the background.
        settings: of the propagation.
    """

    def __init__(self, features: Tensor, objects: Tensor, settings: Propagation) -> None:
        self.size = objects.shape
        self.objects = int(objects.max())
        self.settings = settings
        self.first = F.normalize(features, dim=0), one_hot(objects, features.shape[1:])
        self.before: deque[tuple[Tensor, Tensor]] = deque(maxlen=settings.previous)

    def follow(self, features: Tensor, size: torch.Size) -> Tensor:
        """Return the objects [H, W] uint8 of the next frame, of its patch features [D, h, w] and its size."""
        features = F.normalize(features, dim=0)
        sources, labels = map(torch.stack, zip(self.first, *self.before, strict=True))
        shares = propagate(features, sources, labels, self.settings)
        self.before.append((features, shares))
        return objects_of(shares, size, self.size)


def one_hot(objects: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Return the objects [H, W] on a grid (h, w) of patches, [1 + number of objects, h, w] float32.

    Each patch has the object of the pixel in its middle.
    """
    small = F.interpolate(objects[None, None].float(), grid, mode="nearest-exact")[0, 0].long()
    return F.one_hot(small, int(objects.max()) + 1).permute(2, 0, 1).float()


def propagate(features: Tensor, sources: Tensor, labels: Tensor, settings: Propagation) -> Tensor:
    """Give each patch the labels of the patches most like it, near its place in several frames.

    Weights are exp(cosine / temperature) of the nearest neighbours in all frames together, divided by their
    sum; those as near as the last of the neighbours count, too.

    Args:
        features: [D, H, W] of length 1.
        sources: [N, D, H, W], those of N frames.
        labels: [N, C, H, W], those of their patches.
        settings: of the propagation.

    Returns:
        [C, H, W] float32.
    """
    _, H, W = features.shape
    radius, rows = settings.radius, []
    places = torch.arange(W, device=features.device)
    far = (places[:, None] - places).abs() > radius  # [W, W]: from a patch, and to it
    for y in range(H):  # a row of patches at a time, so that memory is bounded
        near = slice(max(0, y - radius), y + radius + 1)
        cosines = torch.einsum("dq,ndyx->qnyx", features[:, y], sources[:, :, near])
        cosines = cosines.masked_fill(far[:, None, None], -torch.inf).flatten(1)
        best = cosines.topk(min(settings.neighbours, cosines.shape[1])).values
        weights = ((cosines - best[:, :1]) / settings.temperature).exp()
        weights = weights.where(cosines >= best[:, -1:], 0)
        weights = weights / weights.sum(1, keepdim=True)
        rows.append(labels[:, :, near].transpose(0, 1).flatten(1) @ weights.T)
    return torch.stack(rows, 1)


def objects_of(shares: Tensor, size: torch.Size, original: torch.Size) -> Tensor:
    """Return the object of each pixel, uint8 of an `original` size, of shares of patches [C, h, w].

    The shares are upsampled bilinearly to `size`, each object's from its smallest to its largest is brought
    to 0 to 1, and the largest wins; what is then resized takes the nearest neighbour.
    """
    scores = F.interpolate(shares[None], tuple(size), mode="bilinear")[0]
    low, high = scores.amin((1, 2), keepdim=True), scores.amax((1, 2), keepdim=True)
    # An object that is everywhere alike, or nowhere, keeps 0; the original divides 0 by 0 for the former.
    scores = (scores - low) / (high - low).where(high > low, 1)
    found = scores.argmax(0).byte()
    return F.interpolate(found[None, None], tuple(original), mode="nearest-exact")[0, 0]


def region_similarity(predicted: Tensor, annotated: Tensor) -> Tensor:
    """Return J [...], the intersection over union of masks [..., H, W] bool; 1 where both are empty."""
    both, either = (predicted & annotated).sum((-2, -1)), (predicted | annotated).sum((-2, -1))
    return (both / either).where(either > 0, 1.0)


def boundary_accuracy(predicted: Tensor, annotated: Tensor) -> Tensor:
    """Return F [K], the harmonic mean of precision and recall of the boundaries of masks [K, H, W] bool.

    A pixel of a boundary is right if the other mask's boundary is within 0.008 of the image's diagonal,
    rounded up to whole pixels. Where a mask alone is empty F is 0, where both are it is 1.
    """
    own, true = boundaries(predicted), boundaries(annotated)
    radius = ceil(TOLERANCE * hypot(*own.shape[-2:]))
    own_near, true_near = dilated(own, radius), dilated(true, radius)
    of_own, of_true = own.sum((1, 2)), true.sum((1, 2))
    right, found = (own & true_near).sum((1, 2)), (true & own_near).sum((1, 2))
    precision = (right / of_own).where(of_own > 0, 1.0)
    recall = (found / of_true).where(of_true > 0, 1.0)
    together = precision + recall
    return (2 * precision * recall / together).where(together > 0, 0.0)


def boundaries(masks: Tensor) -> Tensor:
    """Return which pixels differ from that to the right, below, or below to the right, [K, H, W] bool."""
    right, below, both = (F.pad(masks[:, y:, x:], (0, x, 0, y)) for y, x in ((0, 1), (1, 0), (1, 1)))
    found = (masks ^ right) | (masks ^ below) | (masks ^ both)
    # Beyond the last row and column nothing counts.
    found[:, -1] = masks[:, -1] ^ right[:, -1]
    found[:, :, -1] = masks[:, :, -1] ^ below[:, :, -1]
    found[:, -1, -1] = False
    return found


def dilated(masks: Tensor, radius: int) -> Tensor:
    """Return where a pixel of masks [K, H, W] bool is within a radius, in pixels."""
    place = torch.arange(-radius, radius + 1, device=masks.device)
    disk = (place[:, None] ** 2 + place**2 <= radius**2).float()
    return F.conv2d(masks[:, None].float(), disk[None, None], padding=radius)[:, 0] > 0.5
