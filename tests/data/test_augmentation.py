import random

import pytest
from PIL import Image
from timm.data.auto_augment import RandAugment

from locat_lightning.data.augmentation import train_transform


@pytest.mark.parametrize(
    "policy", ["rand-m9-mstd0.5-inc1", "rand-m10-n9-inc1", "rand-m0-n9", "v0", "augmix-m10"]
)
def test_every_policy_runs_to_its_last_operation(policy):
    random.seed(0)
    transform = train_transform(8, auto_augment=policy)
    image = Image.linear_gradient("L").resize((9, 9)).convert("RGB")
    for _ in range(150):
        assert transform(image).shape == (3, 8, 8)


def test_posterizing_to_no_bits_gives_black_and_to_some_what_timm_gives():
    transform = train_transform(8, auto_augment="rand-m10-inc1")
    [augment] = [step for step in transform.transforms if isinstance(step, RandAugment)]
    [operation] = [op for op in augment.ops if op.name == "PosterizeIncreasing"]
    image = Image.new("RGB", (2, 2), (255, 130, 10))
    assert operation.aug_fn(image, 0).getextrema() == ((0, 0),) * 3
    assert operation.aug_fn(image, 1).getpixel((0, 0)) == (128, 128, 0)
