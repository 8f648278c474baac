"""One plain view of an image: a crop at random, perhaps flipped, for methods that predict its pixels."""

from dataclasses import dataclass

import numpy as np
import torch
from jsonargparse.typing import ClosedUnitInterval, PositiveInt
from PIL import Image
from torch import Tensor, tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resized_crop

from locat_lightning.data.band_transforms import no_jitter
from locat_lightning.data.bands import Bands
from locat_lightning.data.base import check_span
from locat_lightning.data.colour import NEUTRAL
from locat_lightning.data.views import Views, ViewTransform, draw_boxes


@dataclass(frozen=True)
class SingleCrop(ViewTransform):
    """Cut a part of an image at random, and leave its colours as they are.

    Args:
        global_size: side of the view, and of the images in evaluation, in pixels.
        global_scale: smallest and largest share of the image's area that the view shows.
        hflip: probability of a horizontal flip.
    """

    global_size: PositiveInt = 224
    global_scale: tuple[float, float] = (0.2, 1.0)
    hflip: ClosedUnitInterval = 0.5

    def __post_init__(self) -> None:
        check_span("views.global_scale", self.global_scale, most=1)

    @property
    def sizes(self) -> list[int]:
        return [self.global_size]

    def decode(self, image: Image.Image | Bands, rng: np.random.Generator) -> Tensor:
        [(left, top, width, height)] = draw_boxes(rng, image.size, np.array([self.global_scale])).tolist()
        flipped = rng.random() < self.hflip
        if isinstance(image, Bands):
            pixels = image.pixels
        else:
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).movedim(-1, 0)
        size = [self.global_size] * 2
        crop: Tensor = resized_crop(
            pixels, top, left, height, width, size, InterpolationMode.BICUBIC, antialias=True
        )
        return crop.flip(-1) if flipped else crop

    def cut(self, decoded: Tensor) -> list[Views]:
        neutral = tensor([NEUTRAL]) if decoded.dtype == torch.uint8 else no_jitter(1, len(decoded))
        return [Views(decoded[None], neutral)]
