"""One plain view: torchvision's crop, by the random numbers of the image."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms.functional import normalize, pil_to_tensor

from locat_lightning.data import SingleCrop
from locat_lightning.data.views import draw_boxes
from locat_lightning.errors import InputError


@pytest.fixture(scope="module")
def photograph():
    return Image.fromarray(load_sample_image("china.jpg")).resize((500, 375))


def test_it_is_pils_crop_to_a_level_in_its_own_colours(photograph):
    transform, flips = SingleCrop(global_size=64, global_scale=(0.1, 1.0)), []
    for seed in range(10):
        [views] = transform(photograph, np.random.default_rng(seed))
        assert views.crops.shape == (1, 3, 64, 64)
        rng = np.random.default_rng(seed)
        [(left, top, width, height)] = draw_boxes(rng, photograph.size, np.array([[0.1, 1.0]])).tolist()
        flips.append(rng.random() < 0.5)
        part = photograph.crop((left, top, left + width, top + height))
        expected = pil_to_tensor(part.resize((64, 64), Image.Resampling.BICUBIC))
        expected = expected.flip(-1) if flips[-1] else expected
        assert (views.crops[0].int() - expected.int()).abs().max() <= 1
        coloured = normalize(views.crops[0] / 255, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        torch.testing.assert_close(views.coloured().crops[0], coloured)
    assert 0 < sum(flips) < 10


def test_its_sizes_and_errors(photograph):
    assert SingleCrop(global_size=48).sizes == [48]
    [views] = SingleCrop(hflip=0)(photograph.convert("L"), np.random.default_rng(0))
    assert views.crops.shape == (1, 3, 224, 224)
    with pytest.raises(InputError, match=r"views\.global_scale"):
        SingleCrop(global_scale=(0.5, 1.5))
