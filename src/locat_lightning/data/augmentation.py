"""timm's augmentation for training, mended for Pillow 13."""

from typing import Any

from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import posterize
from torchvision.transforms import Compose


def train_transform(img_size: int, **options: Any) -> Compose:
    """Make timm's augmentation of an RGB image; `options` are those of `timm.data.create_transform`."""
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
