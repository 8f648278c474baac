"""Transforms of an image together with its mask: torchvision's, and ours where mmsegmentation's differ.

They take an image, uint8 [3, H, W], and its mask, uint8 [H, W], and draw from torch's global random numbers,
like torchvision's. An image of other channels is float32 [C, H, W], normalised already: `normalisation` is
then None, and a jitter of each channel stands for all changes of the colours. An image is resized fastest if
a pixel's channels lie together, as in `pil_to_tensor`.

Source: `RandomResize`, `RandomCrop`, `RandomFlip`, `PhotoMetricDistortion` and `Pad` in
`mmseg/datasets/transforms` of github.com/open-mmlab/mmsegmentation, with the settings of its
`configs/_base_/datasets/ade20k.py`.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import ColorJitter, RandomApply, RandomPhotometricDistort, RandomResizedCrop
from torchvision.transforms.v2.functional import normalize, resize

from locat_lightning.data.band_transforms import jittered
from locat_lightning.data.colour import turn_hue
from locat_lightning.labels import IGNORE

ATTEMPTS = 10  # at a crop that shows more than one class

# mmsegmentation gives the ranges as 32 (of 255) and 18 (of 180, OpenCV's scale of the hue).
DISTORTION = RandomPhotometricDistort(
    brightness=(-32 / 255, 32 / 255), contrast=(0.5, 1.5), saturation=(0.5, 1.5), hue=(-0.1, 0.1)
)

BAND_JITTER = 0.3  # of gain and offset of each channel, where there are others than RGB

# Of Hummingbird's memory, as open-hummingbird-eval has it: each with probability 1/2, in this order.
JITTER = [
    RandomApply([ColorJitter(**{name: 0.1})], p=0.5)
    for name in ("brightness", "contrast", "saturation", "hue")
]


def joint_augmentation(
    image: Tensor,
    mask: Tensor,
    *,
    crop_size: int,
    scale: Sequence[int],
    ratio: Sequence[float],
    cat_max_ratio: float,
    hflip: float,
    distortion: bool,
    normalisation: Mapping[str, Sequence[float]] | None,
) -> tuple[Tensor, Tensor]:
    """Resize, crop, flip, distort the colours, normalise and pad, at random: see `SegmentationData`.

    The image becomes float32 [3, crop_size, crop_size], its mask uint8 [crop_size, crop_size]. Padding, on
    the right and below, is 0 in the image and 255 in the mask.
    """
    factor = torch.empty(()).uniform_(*ratio).item()
    size = fitted_size(mask.shape, [int(side * factor) for side in scale])
    image, mask = resize(image, size), resize_mask(mask, size)
    crop = varied_crop(mask, crop_size, cat_max_ratio)
    image, mask = image[:, *crop], mask[crop]
    if torch.rand(1) < hflip:
        image, mask = image.flip(-1), mask.flip(-1)
    if normalisation is None:
        image = jittered(image, BAND_JITTER) if distortion else image
    else:
        image = to_float(image)
        if distortion:
            distort_colours(image)
        image = normalize(image, **normalisation, inplace=True)
    below, right = (crop_size - side for side in mask.shape)
    return F.pad(image, (0, right, 0, below)), F.pad(mask, (0, right, 0, below), value=IGNORE)


def joint_evaluation(
    image: Tensor,
    mask: Tensor,
    *,
    scale: Sequence[int],
    normalisation: Mapping[str, Sequence[float]] | None,
    keep_ratio: bool = True,
    with_mask: bool = False,
) -> tuple[Tensor, Tensor]:
    """Resize the image, and its mask if told to, and normalise the image.

    The image keeps its shape and fits within the scale; or else its height and width are the scale.
    """
    size = fitted_size(mask.shape, scale) if keep_ratio else list(scale)
    return normalised(resize(image, size), normalisation), resize_mask(mask, size) if with_mask else mask


def square_augmentation(
    image: Tensor, mask: Tensor, *, side: int, normalisation: Mapping[str, Sequence[float]] | None
) -> tuple[Tensor, Tensor]:
    """Crop at random, resize to a square, change the colours at random and normalise: see `JITTER`.

    The crop has from half to twice the image's area and is from 3 : 4 to 4 : 3 wide to high, both at random;
    what does not fit into the image is drawn again, at most ten times, and then it is the largest in the
    middle. Nothing is flipped. The image becomes float32 [3, side, side], its mask uint8 [side, side].

    Source: `get_hbird_train_transforms` in github.com/vpariza/open-hummingbird-eval.
    """
    crop = RandomResizedCrop(side, scale=(0.5, 2.0)).make_params([image])
    area = slice(crop["top"], crop["top"] + crop["height"]), slice(crop["left"], crop["left"] + crop["width"])
    image = resize(image[:, *area], [side, side])
    if normalisation is None:
        image = jittered(image, 0.1)
    else:
        for jitter in JITTER:
            image = jitter(image)
    return normalised(image, normalisation), resize_mask(mask[area], [side, side])


def fitted_size(size: Sequence[int], scale: Sequence[int]) -> list[int]:
    """Return the largest [height, width] in the shape of a size whose sides are within a scale."""
    factor = min(max(scale) / max(size), min(scale) / min(size))
    return [max(1, int(side * factor + 0.5)) for side in size]


def resize_mask(mask: Tensor, size: list[int]) -> Tensor:
    """Resize a mask by the nearest neighbours of the pixels' centres."""
    return F.interpolate(mask[None, None], size, mode="nearest-exact")[0, 0]


def varied_crop(mask: Tensor, crop_size: int, cat_max_ratio: float) -> tuple[slice, slice]:
    """Draw a crop, as an index, until it shows enough variety (`is_varied`) or ten attempts have failed."""
    height, width = (min(side, crop_size) for side in mask.shape)
    for attempt in range(ATTEMPTS + 1):
        top = int(torch.randint(mask.shape[0] - height + 1, ()))
        left = int(torch.randint(mask.shape[1] - width + 1, ()))
        crop = slice(top, top + height), slice(left, left + width)
        if cat_max_ratio >= 1 or attempt == ATTEMPTS or is_varied(mask[crop], cat_max_ratio):
            break
    return crop


def is_varied(mask: Tensor, cat_max_ratio: float) -> bool:
    """Return whether a mask shows more than one class, each on less than a share of its annotated pixels."""
    counts = mask.flatten().bincount(minlength=256)[:IGNORE]
    return bool(counts.count_nonzero() > 1 and counts.max() < cat_max_ratio * counts.sum())


def normalised(pixels: Tensor, normalisation: Mapping[str, Sequence[float]] | None) -> Tensor:
    """Convert pixels to what a model takes; None if they are that already."""
    if normalisation is None:
        return pixels
    found: Tensor = normalize(to_float(pixels), **normalisation, inplace=True)
    return found


def to_float(pixels: Tensor) -> Tensor:
    """Convert uint8 pixels to float32 from 0 to 1, one channel after the other in memory."""
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def distort_colours(pixels: Tensor) -> None:
    """Change brightness, contrast, saturation and hue of RGB pixels [3, H, W] from 0 to 1, in place.

    torchvision draws the changes, each with probability 1/2. They are applied as mmsegmentation does:
    brightness is added, contrast and saturation are factors, the hue is turned. torchvision would multiply
    the brightness, change contrast and saturation about grey values, and permute the channels.
    """
    drawn = DISTORTION.make_params([pixels])
    contrast = drawn["contrast_factor"]
    if drawn["brightness_factor"] is not None:
        pixels.add_(drawn["brightness_factor"]).clamp_(0, 1)
    if contrast is not None and drawn["contrast_before"]:
        pixels.mul_(contrast).clamp_(0, 1)
    if drawn["saturation_factor"] is not None:
        scale_saturation(pixels, drawn["saturation_factor"])
    if drawn["hue_factor"] is not None:
        turn_hue(pixels[None], torch.full((1, 1, 1, 1), drawn["hue_factor"]))
    if contrast is not None and not drawn["contrast_before"]:
        pixels.mul_(contrast).clamp_(0, 1)


def scale_saturation(pixels: Tensor, factor: float) -> None:
    """Multiply the saturation of HSV in RGB pixels from 0 to 1, [3, H, W], in place, up to its limit."""
    value = pixels.amax(0, keepdim=True)
    chroma = value - pixels.amin(0, keepdim=True)
    most = value / chroma.clamp_(min=1 / 1024)  # the factor that makes the smallest channel 0
    torch.sub(value, pixels, out=pixels).mul_(most.clamp_(max=factor)).sub_(value).neg_()
