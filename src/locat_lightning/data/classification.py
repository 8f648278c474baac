"""Labelled images to train a classifier on, augmented as timm does."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveFloat
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import posterize
from torchvision.transforms import Compose

from locat_lightning.data.balance import Sampling, Subset, class_shares, labels_of, long_tail
from locat_lightning.data.band_transforms import BandAugmentation
from locat_lightning.data.base import check_span
from locat_lightning.data.dataset import Source
from locat_lightning.data.labelled import LabelledData
from locat_lightning.data.loading import ImageLoader
from locat_lightning.errors import InputError, check_finite, in_a_line

UNTOLD = "the data set does not tell the labels of its training images"


class ImageData(LabelledData):
    """Images with a label each, in batches for training, evaluation and prediction.

    Args:
        scale: smallest and largest share of the image's area in a random crop.
        ratio: smallest and largest width-to-height ratio of a random crop.
        hflip: probability of a horizontal flip.
        color_jitter: strength of the jitter of brightness, contrast and saturation; timm leaves it out where
            auto_augment does the same, that is, for every policy but `3a`. With `channels`, strength of the
            gain and offset of each channel; 0 for none.
        auto_augment: timm's name of a policy (`rand-m9-mstd0.5-inc1`, `3a`, `augmix-…`); null for none. RGB
            only; ignored with `channels`.
        random_erasing: probability of replacing a rectangle by noise.
        interpolation: how the random crop is resized: `random` (bilinear or bicubic), `bilinear`, `bicubic`.
        sampling: how often images are drawn in an epoch: `plain` draws each once, `balanced` each class
            equally often, `sqrt` in proportion to the square root of its images. An epoch has as many images.
        imbalance: makes the training images a long tail: the classes shrink, in their order, to 1 / imbalance
            of the first (see `long_tail`); null keeps all.
        kwargs: those of `LabelledData`, `StreamableModule` and `ImageModule`.
    """

    def __init__(
        self,
        *,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        hflip: ClosedUnitInterval = 0.5,
        color_jitter: NonNegativeFloat = 0.4,
        auto_augment: str | None = "rand-m9-mstd0.5-inc1",
        random_erasing: ClosedUnitInterval = 0.25,
        interpolation: str = "random",
        sampling: Sampling = "plain",
        imbalance: PositiveFloat | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_span("scale", scale, most=1)
        check_span("ratio", ratio)
        check_finite("data", {"color_jitter": color_jitter, "imbalance": imbalance})
        if imbalance is not None and imbalance < 1:
            ratio_of_sizes = "how many times the smallest class the largest is, at least 1"
            raise InputError(f"data.imbalance ({imbalance:g}): {ratio_of_sizes}")
        self.sampling: Sampling = sampling
        self.imbalance = imbalance
        self.augmentation = {
            "scale": tuple(scale),
            "ratio": tuple(ratio),
            "hflip": hflip,
            "color_jitter": color_jitter,
            "auto_augment": auto_augment,
            "interpolation": interpolation,
            "re_prob": random_erasing,
            "re_mode": "pixel",
        }
        self.train_transform()  # finds a mistake in it before any image is looked for

    def train_transform(self) -> Callable[[Image.Image], Any]:
        """Make the augmentation: image to tensor [C, img_size, img_size]."""
        if self.channels is not None:
            own = {name: self.augmentation[name] for name in ("scale", "ratio", "hflip", "interpolation")}
            jitter, erasing = self.augmentation["color_jitter"], self.augmentation["re_prob"]
            return BandAugmentation(self.img_size, jitter=jitter, erasing=erasing, **own)  # type: ignore[return-value]
        try:
            return timm_augmentation(self.img_size, **self.normalisation, **self.augmentation)  # type: ignore[no-any-return]
        except (AssertionError, KeyError, ValueError) as error:
            policy, interpolation = self.augmentation["auto_augment"], self.augmentation["interpolation"]
            raise InputError(
                f"timm cannot make an augmentation of data.auto_augment {policy!r} and data.interpolation"
                f" {interpolation!r}: {in_a_line(error)}"
            ) from error

    @cached_property
    def class_counts(self) -> np.ndarray | None:
        """The training images of each class, int64 [C]; None if the data set does not tell their labels."""
        labels = labels_of(self.source("train"))
        if labels is None:
            return None
        return np.bincount(labels, minlength=self.num_classes)

    @property
    def class_shares(self) -> np.ndarray | None:
        if self.sampling == "plain":
            return None
        if self.class_counts is None:
            raise InputError(f"data.sampling {self.sampling}: {UNTOLD}: leave it out")
        return class_shares(self.class_counts, self.sampling)

    def train_dataloader(self) -> ImageLoader:
        return self._loader("train", self.train_transform(), training=True)

    def _find(self, split: str) -> Source:
        found = super()._find(split)
        if split != "train" or self.imbalance is None:
            return found
        labels = labels_of(found)
        if labels is None:
            raise InputError(f"data.imbalance: {UNTOLD}: leave it out")
        return Subset(found, long_tail(labels, self.imbalance))


def timm_augmentation(img_size: int, **options: Any) -> Compose:
    """Make timm's augmentation of an RGB image by the options of `timm.data.create_transform`."""
    transform = create_transform(img_size, is_training=True, **options)
    for step in transform.transforms:
        # RandAugment and AugMix have operations, AutoAugment a policy, which is a list of lists of them.
        for operations in [step.ops] if hasattr(step, "ops") else getattr(step, "policy", []):
            for operation in operations:
                if operation.aug_fn is posterize:
                    operation.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """Posterize like timm, which may keep 0 bits: black up to Pillow 12, an error since Pillow 13."""
    return posterize(image, bits, **options) if bits > 0 else Image.new(image.mode, image.size)
