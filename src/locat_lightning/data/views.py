"""Views of an image for self-supervision: what a method's batch holds, and DINO's multi-crop.

A method that wants other views names a `ViewTransform` of its own in the config, as `data.views.class_path`.
All random numbers come from one generator per image: (seed, epoch, index) fix its views.

Source of `MultiCrop`: `DataAugmentationDINO` in `main_dino.py` of github.com/facebookresearch/dino.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveInt
from PIL import Image
from torch import Tensor, tensor
from torch.utils.data import default_collate

from locat_lightning.data.band_transforms import apply_jitter, draw_jitter
from locat_lightning.data.bands import Bands
from locat_lightning.data.base import check_side, check_span
from locat_lightning.data.colour import apply_colour, draw_colour
from locat_lightning.errors import InputError

ASPECT_RATIOS = (3 / 4, 4 / 3)
ATTEMPTS = 10  # to draw a box inside the image, as torchvision's RandomResizedCrop


class Views:
    """The V views of one size, of one image or (behind V) of a batch of B.

    Lightning moves it by `to`, and does not look inside, as it would with a dataclass or a tuple: the colour
    parameters stay on the CPU, where they are read without a wait, and in float32.

    Args:
        crops: uint8 [V, 3, H, W] or [V, B, 3, H, W]; once coloured, normalised float32. Images of other
            channels are float32 [V, C, H, W] or [V, B, C, H, W], normalised already.
        colour: float32 [V, 8] or [V, B, 8] from `draw_colour`, of other channels from `draw_jitter`; None
            once the crops are coloured.
        seed: of what `ViewTransform.collate` may draw for this image.
    """

    def __init__(self, crops: Tensor, colour: Tensor | None, seed: int = 0) -> None:
        self.crops = crops
        self.colour = colour
        self.seed = seed

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> "Views":
        """Move the crops to a device; by default only CUDA is not waited for, elsewhere that is unsafe."""
        if non_blocking is None:
            non_blocking = torch.device(device).type == "cuda"
        return Views(self.crops.to(device, non_blocking=non_blocking), self.colour)

    def pin_memory(self) -> "Views":
        """Return the views with their crops in pinned memory (DataLoader calls it)."""
        return Views(self.crops.pin_memory(), self.colour)

    def coloured(self) -> "Views":
        """Augment the colours and normalise, on the device of the crops."""
        if self.colour is None:
            return self
        apply = apply_colour if self.crops.dtype == torch.uint8 else apply_jitter
        crops = apply(self.crops.flatten(0, -4), self.colour.flatten(0, -2))
        return Views(crops.view(self.crops.shape), None, self.seed)


class ViewBatch(NamedTuple):
    """The views of B images.

    Attributes:
        views: of each size, [V, B, C, H, W]; the global ones come first.
        labels: int64 [B]; -1 where unknown.
        indices: int64 [B], the images' positions in the data set.
        masks: of the method's patches, if its views come with any: for `MaskedMultiCrop` bool [V, B, H, W],
            true for the masked patches of the global views.
        mask_indices: int64 [M], positions of the masked patches in the flattened masks. Found where the batch
            is made, so that a GPU does not have to be waited for.
        undistorted: the global views again with their own colours, [V, B, 3, H', W'], if a method wants them.
    """

    views: list[Views]
    labels: Tensor
    indices: Tensor
    masks: Tensor | None = None
    mask_indices: Tensor | None = None
    undistorted: Views | None = None


class ViewTransform(ABC):
    """Make the views of an image, and batches of them, for a self-supervised method.

    A subclass is a dataclass: checkpoints keep its fields, which must be plain values.
    """

    @property
    @abstractmethod
    def sizes(self) -> list[int]:
        """Side of each view in pixels, the global ones first."""

    @property
    def size(self) -> int:
        """Side of the images in evaluation in pixels: that of the global views."""
        return self.sizes[0]

    @abstractmethod
    def decode(self, image: Image.Image | Bands, rng: np.random.Generator) -> Any:
        """Draw what the views show and decode the image; any exception counts it as unreadable.

        Args:
            image: RGB; a JPEG is opened but not loaded, so that it can be decoded at a lower resolution. Or
                an image of other channels.
            rng: the image's own generator. Take all random numbers from it.
        """

    @abstractmethod
    def cut(self, decoded: Any) -> list[Views]:
        """Cut the views out of what `decode` returned."""

    def of_batch(self, rng: np.random.Generator) -> "ViewTransform":
        """Return the transform of a batch: itself, unless something is drawn for all images of the batch."""
        return self

    def __call__(self, image: Image.Image | Bands, rng: np.random.Generator) -> list[Views]:
        """Make the views of an image."""
        return self.cut(self.decode(image, rng))

    def collate(self, items: Sequence[tuple[list[Views], int, int]]) -> ViewBatch:
        """Batch the views, labels and indices of B images, the views size by size.

        The crops are a transposed view of [B, V, ...]: flattened, the first view of every image comes first,
        as DINO's loss wants it.
        """
        images, labels, indices = zip(*items, strict=True)
        batched = []
        for views in zip(*images, strict=True):
            crops = default_collate([v.crops for v in views]).transpose(0, 1)
            colours = [v.colour for v in views if v.colour is not None]
            batched.append(Views(crops, torch.stack(colours, dim=1) if colours else None))
        return ViewBatch(batched, tensor(labels), tensor(indices))


class Drawn(NamedTuple):
    """A decoded image, and what its V views show of it."""

    pixels: np.ndarray  # uint8 [H, W, 3], or float32 [H, W, C]
    boxes: np.ndarray  # int [V, 4]: left, top, width, height
    flipped: np.ndarray  # bool [V]
    colour: Tensor  # float32 [V, 8], see `draw_colour`; or [V, 2 C + 1], see `draw_jitter`
    sizes: list[int]  # [V], pixels
    seed: int = 0


@dataclass(frozen=True)
class MultiCrop(ViewTransform):
    """Cut an image into two global and several local views, at random, as DINO does.

    Workers decode, crop, resize and flip uint8 pixels. The colours follow batched on the training device, or
    in the worker, too.

    Args:
        global_size: side of the global views, and of the images in evaluation, in pixels.
        local_size: side of the local views in pixels.
        local_views: how many local views; 0 leaves them out.
        global_scale: smallest and largest share of the image's area that a global view shows.
        local_scale: the same for local views.
        colour_on: where the colours are augmented: `device` (batched, see `Views.coloured`), or `worker`, at
            four times the memory and thrice the time.
        hflip: probability of a horizontal flip of each view.
        mixed_sizes: [global size, local size, share]: each batch of a process draws its sizes from these, and
            `global_size` is then that of evaluation alone; null for none.
        jitter: of images of other channels than RGB: strength of the gain and offset of each channel in a
            view, which take the place of DINO's colours; 0 leaves only the blur.
    """

    global_size: PositiveInt = 224
    local_size: PositiveInt = 96
    local_views: NonNegativeInt = 8
    global_scale: tuple[float, float] = (0.4, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.4)
    colour_on: Literal["device", "worker"] = "device"
    hflip: ClosedUnitInterval = 0.5
    mixed_sizes: list[tuple[int, int, float]] | None = None
    jitter: NonNegativeFloat = 0.4

    def __post_init__(self) -> None:
        check_span("views.global_scale", self.global_scale, most=1)
        check_span("views.local_scale", self.local_scale, most=1)
        for mixed in self.mixed_sizes or []:
            if not min(mixed) > 0:
                raise InputError(f"data.views.mixed_sizes ({list(mixed)}): sizes and shares must be above 0")
            for size in mixed[:2]:
                check_side("views.mixed_sizes", size)
        check_side("views.global_size", self.global_size)
        check_side("views.local_size", self.local_size)

    @property
    def sizes(self) -> list[int]:
        return [self.global_size] * 2 + [self.local_size] * self.local_views

    def of_batch(self, rng: np.random.Generator) -> Self:
        if not self.mixed_sizes:
            return self
        *sizes, shares = zip(*self.mixed_sizes, strict=True)
        chosen = rng.choice(len(shares), p=np.array(shares) / sum(shares))
        global_size, local_size = (each[chosen] for each in sizes)
        return replace(self, global_size=global_size, local_size=local_size, mixed_sizes=None)

    def decode(self, image: Image.Image | Bands, rng: np.random.Generator) -> Drawn:
        if isinstance(image, Bands):
            drawn = self.draw(image.size, rng, channels=len(image.pixels))
            return drawn._replace(pixels=image.pixels.movedim(0, -1).numpy())
        drawn = self.draw(image.size, rng)
        width, height = image.size
        # A JPEG that is not loaded yet is decoded at 1/2, 1/4 or 1/8 of its resolution where every box then
        # still has twice the pixels of its view on each side; PIL rounds down to one of these.
        spare = max(1.0, (drawn.boxes[:, 2:].min(axis=1) / drawn.sizes).min() / 2)
        image.draft("RGB", (math.ceil(width / spare), math.ceil(height / spare)))
        pixels = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
        reduction = width / pixels.shape[1]
        return drawn._replace(pixels=pixels, boxes=np.rint(drawn.boxes / reduction).astype(int))

    def draw(self, size: tuple[int, int], rng: np.random.Generator, channels: int | None = None) -> Drawn:
        """Draw what the views of an image of (width, height) show, without its pixels; None is RGB."""
        scales = [self.global_scale] * 2 + [self.local_scale] * self.local_views
        boxes = draw_boxes(rng, size, np.array(scales))
        flipped = rng.random(len(boxes)) < self.hflip
        blur = [1.0, 0.1] + [0.5] * self.local_views  # probabilities
        solarize = [0.0, 0.2] + [0.0] * self.local_views
        if channels is None:
            colour = draw_colour(rng, blur, solarize)
        else:
            colour = draw_jitter(rng, blur, channels, self.jitter)
        return Drawn(np.empty(0), boxes, flipped, colour, self.sizes)

    def cut(self, decoded: Drawn) -> list[Views]:
        pixels, boxes, flipped, colour, sizes, seed = decoded
        last = 2 + self.local_views
        parts = [slice(0, 2), slice(2, last), slice(last, None)]
        parts = [part for part in parts if len(boxes[part])]
        views = [Views(_cut(pixels, boxes[p], flipped[p], sizes[p][0]), colour[p], seed) for p in parts]
        return [v.coloured() for v in views] if self.colour_on == "worker" else views


def draw_boxes(rng: np.random.Generator, size: tuple[int, int], scales: np.ndarray) -> np.ndarray:
    """Draw the boxes of an image's V views as torchvision's `RandomResizedCrop` does.

    `size` is (width, height), `scales` [V, 2] the smallest and largest share of the image's area.

    Returns:
        int [V, 4]: left, top, width, height. Where ten attempts do not fit, the largest central box of an
        allowed aspect ratio.
    """
    shape = (len(scales), ATTEMPTS)
    low, high = ASPECT_RATIOS
    area = size[0] * size[1] * rng.uniform(scales[:, :1], scales[:, 1:], shape)
    ratio = np.exp(rng.uniform(math.log(low), math.log(high), shape))
    extent = np.rint(np.sqrt(np.stack([area * ratio, area / ratio], axis=-1))).astype(int)  # [V, 10, 2]
    inside = (extent > 0) & (extent <= size)
    fits = inside[..., 0] & inside[..., 1]
    first = extent[np.arange(len(extent)), fits.argmax(axis=1)]  # [V, 2]
    corner = rng.integers(np.maximum(size - first, 0) + 1)
    largest = np.array([min(size[0], round(size[1] * high)), min(size[1], round(size[0] / low))])
    central = np.concatenate([(size - largest) // 2, largest])
    return np.where(fits.any(axis=1, keepdims=True), np.concatenate([corner, first], axis=1), central)


def _cut(pixels: np.ndarray, boxes: np.ndarray, flipped: np.ndarray, size: int) -> Tensor:
    """Resize V boxes of [H, W, C] to [V, C, size, size]; uint8 as PIL's bicubic to within one level."""
    dtype = torch.uint8 if pixels.dtype == np.uint8 else torch.float32
    crops = torch.empty(len(boxes), pixels.shape[-1], size, size, dtype=dtype)
    for crop, (left, top, width, height), flip in zip(crops, boxes.tolist(), flipped.tolist(), strict=True):
        box = torch.from_numpy(pixels[top : top + height, left : left + width].copy()).permute(2, 0, 1)
        resized = F.interpolate(box[None], (size, size), mode="bicubic", antialias=True)
        crop.copy_(resized[0].flip(-1) if flip else resized[0])
    return crops
