import numpy as np
import pytest
from sklearn.datasets import load_digits

from locat_lightning.data.digits import CLASS_NAMES, Digits


def test_the_splits_are_fixed_disjoint_and_stratified():
    train, val = Digits(train=True), Digits(train=False)
    assert (len(train), len(val)) == (1437, 360)
    assert not set(train.rows) & set(val.rows)
    assert val.rows[:5].tolist() == Digits(train=False).rows[:5].tolist()
    for split in (train, val):
        shares = np.bincount(split.labels, minlength=10) / len(split)
        assert abs(shares - np.bincount(load_digits().target) / 1797).max() < 0.003


@pytest.mark.parametrize("index", [0, 17])
def test_an_image_and_its_label_belong_together(index):
    digits = Digits(train=False)
    image, label = digits.read(index)
    row = int(digits.path(index).removeprefix("digits/"))
    assert (image.mode, image.size) == ("RGB", (8, 8))
    assert label == load_digits().target[row]
    assert CLASS_NAMES[label] == str(label)
    assert np.array_equal(np.asarray(image)[..., 0], np.round(load_digits().images[row] * 255 / 16))
