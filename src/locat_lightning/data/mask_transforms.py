"""Transforms of an image together with its mask: torchvision's, and ours where mmsegmentation's differ.

They take a `tv_tensors.Image`, uint8 [3, H, W], and a `tv_tensors.Mask`, uint8 [H, W], and draw from torch's
global random numbers, like torchvision's. `to_image` keeps a pixel's channels together in memory, which
torchvision resizes fastest.

Source: `RandomResize`, `RandomCrop`, `RandomFlip`, `PhotoMetricDistortion` and `Pad` in
`mmseg/datasets/transforms` of github.com/open-mmlab/mmsegmentation, with the settings of its
`configs/_base_/datasets/ade20k.py`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import (
    Compose,
    Identity,
    InterpolationMode,
    Normalize,
    RandomHorizontalFlip,
    RandomPhotometricDistort,
    ToPureTensor,
    Transform,
    query_size,
)
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import Mask

from locat_lightning.data.colour import turn_hue
from locat_lightning.labels import IGNORE

ATTEMPTS = 10  # at a crop that shows more than one class


def joint_augmentation(
    crop_size: int,
    scale: Sequence[int],
    ratio: Sequence[float],
    cat_max_ratio: float,
    hflip: float,
    distortion: bool,
    mean: Sequence[float],
    std: Sequence[float],
) -> Transform:
    """Resize, crop, flip, distort the colours, normalise and pad, at random: see `SegmentationData`.

    The image becomes float32 [3, crop_size, crop_size], its mask uint8 [crop_size, crop_size]. Padding, on
    the right and below, is 0 in the image and 255 in the mask.
    """
    return Compose(
        [
            Resize(scale, ratio),
            VariedCrop(crop_size, cat_max_ratio),
            RandomHorizontalFlip(hflip),
            ToFloat(),
            PhotometricDistortion() if distortion else Identity(),
            Normalize(mean, std, inplace=True),
            PadTo(crop_size),
            ToPureTensor(),
        ]
    )


def joint_evaluation(resize: "Resize", mean: Sequence[float], std: Sequence[float]) -> Transform:
    """Resize and normalise the image; the mask, too, is resized, or keeps its own size."""
    return Compose([resize, ToFloat(), Normalize(mean, std, inplace=True), ToPureTensor()])


class Resize(Transform):
    """Resize the image (bilinear, antialiased) and its mask (nearest neighbours, of the pixels' centres).

    Args:
        scale: longer and shorter side in pixels, in either order.
        ratio: smallest and largest factor of `scale`, drawn uniformly.
        keep_ratio: whether to keep the shape and fit within the scale; else height and width are the scale.
        with_mask: whether to resize the mask, too.
    """

    def __init__(
        self,
        scale: Sequence[int],
        ratio: Sequence[float] = (1, 1),
        keep_ratio: bool = True,
        with_mask: bool = True,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.ratio = ratio
        self.keep_ratio = keep_ratio
        self.with_mask = with_mask

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        ratio = torch.empty(()).uniform_(*self.ratio).item()
        size = [int(side * ratio) for side in self.scale]
        return {"size": fitted_size(query_size(flat_inputs), size) if self.keep_ratio else size}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, Mask):
            return F.resize(inpt, params["size"], InterpolationMode.NEAREST_EXACT) if self.with_mask else inpt
        return F.resize(inpt, params["size"])


class VariedCrop(Transform):
    """Crop at random until the mask shows enough variety, or ten attempts have failed.

    Args:
        crop_size: greatest height and width of the crop.
        cat_max_ratio: see `is_varied`; 1 takes the first crop.
    """

    def __init__(self, crop_size: int, cat_max_ratio: float) -> None:
        super().__init__()
        self.crop_size = crop_size
        self.cat_max_ratio = cat_max_ratio

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        mask = next(each for each in flat_inputs if isinstance(each, Mask)).as_subclass(Tensor)
        height, width = (min(side, self.crop_size) for side in mask.shape)
        for attempt in range(ATTEMPTS + 1):
            top = int(torch.randint(mask.shape[0] - height + 1, ()))
            left = int(torch.randint(mask.shape[1] - width + 1, ()))
            crop = mask[top : top + height, left : left + width]
            if self.cat_max_ratio >= 1 or attempt == ATTEMPTS or is_varied(crop, self.cat_max_ratio):
                break
        return {"top": top, "left": left, "height": height, "width": width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return F.crop(inpt, **params)


class PhotometricDistortion(RandomPhotometricDistort):
    """Change brightness, contrast, saturation and hue of float pixels in place, each with probability 1/2.

    torchvision draws the changes, which are applied as mmsegmentation does: brightness is added, contrast
    and saturation are factors, the hue is turned. torchvision would multiply the brightness, change contrast
    and saturation about grey values, and permute the channels. mmsegmentation gives the ranges as 32 (of
    255) and 18 (of 180, OpenCV's scale of the hue).
    """

    def __init__(self) -> None:
        super().__init__(
            brightness=(-32 / 255, 32 / 255), contrast=(0.5, 1.5), saturation=(0.5, 1.5), hue=(-0.1, 0.1)
        )

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, Mask):
            return inpt
        pixels, contrast = inpt.as_subclass(Tensor), params["contrast_factor"]
        if params["brightness_factor"] is not None:
            pixels.add_(params["brightness_factor"]).clamp_(0, 1)
        if contrast is not None and params["contrast_before"]:
            pixels.mul_(contrast).clamp_(0, 1)
        if params["saturation_factor"] is not None:
            scale_saturation(pixels, params["saturation_factor"])
        if params["hue_factor"] is not None:
            turn_hue(pixels[None], torch.full((1, 1, 1, 1), params["hue_factor"]))
        if contrast is not None and not params["contrast_before"]:
            pixels.mul_(contrast).clamp_(0, 1)
        return inpt


class ToFloat(Transform):
    """Convert uint8 pixels to float32 from 0 to 1, one channel after the other in memory; leave a mask."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, Mask):
            return inpt
        return inpt.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


class PadTo(Transform):
    """Pad on the right and below to a height and width in pixels, the image with 0, the mask with 255."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        below, right = (max(0, self.size - side) for side in inpt.shape[-2:])
        return F.pad(inpt, [0, 0, right, below], fill=IGNORE if isinstance(inpt, Mask) else 0)


def fitted_size(size: Sequence[int], scale: Sequence[int]) -> list[int]:
    """Return the largest [height, width] in the shape of a size whose sides are within a scale."""
    factor = min(max(scale) / max(size), min(scale) / min(size))
    return [max(1, int(side * factor + 0.5)) for side in size]


def is_varied(mask: Tensor, cat_max_ratio: float) -> bool:
    """Return whether a mask shows more than one class, each on less than a share of its annotated pixels."""
    counts = mask.flatten().bincount(minlength=256)[:IGNORE]
    return bool(counts.count_nonzero() > 1 and counts.max() < cat_max_ratio * counts.sum())


def scale_saturation(pixels: Tensor, factor: float) -> None:
    """Multiply the saturation of HSV in RGB pixels from 0 to 1, [3, H, W], in place, up to its limit."""
    value = pixels.amax(0, keepdim=True)
    chroma = value - pixels.amin(0, keepdim=True)
    most = value / chroma.clamp_(min=1 / 1024)  # the factor that makes the smallest channel 0
    torch.sub(value, pixels, out=pixels).mul_(most.clamp_(max=factor)).sub_(value).neg_()
