import numpy as np
import pytest

from locat_lightning.data.scenes import CLASS_NAMES, Scenes


@pytest.fixture(scope="module")
def scenes():
    return Scenes(train=True, count=40)


def test_a_scene_follows_from_its_split_and_number(scenes):
    image, mask = scenes.read(7)
    same, same_mask = Scenes(train=True, count=8).read(7)
    other, _ = Scenes(train=False, count=8).read(7)
    assert (image.mode, image.size) == ("RGB", (64, 64))
    assert (mask.dtype, mask.shape) == (np.uint8, (64, 64))
    assert np.array_equal(image, same)
    assert np.array_equal(mask, same_mask)
    assert not np.array_equal(image, other)
    assert scenes.path(7) == "scenes/train/7"


def test_scenes_show_two_to_four_digits_on_ground(scenes):
    assert len(scenes) == 40
    assert ["ground", *"0123456789"] == CLASS_NAMES
    classes = [np.unique(scenes.read(index)[1]) for index in range(40)]
    assert all(found[0] == 0 and 2 <= len(found) <= 5 for found in classes)
    assert set(np.concatenate(classes)) == set(range(11))
    ground = np.mean([(scenes.read(index)[1] == 0).mean() for index in range(40)])
    assert 0.6 < ground < 0.95


def test_digits_differ_from_the_ground_around_them(scenes):
    differences = []
    for index in range(40):
        image, mask = scenes.read(index)
        pixels = np.asarray(image).astype(float)
        ground = pixels[mask == 0].mean(0)
        differences += [abs(pixels[mask == label].mean(0) - ground).max() for label in np.unique(mask)[1:]]
    assert min(differences) > 30
