"""Corrupted patches against loops, on images that are not square."""

import numpy as np
import pytest
import torch

from locat_lightning.errors import InputError
from locat_lightning.evaluation.perturbation import (
    BLUR,
    CONTRAST,
    KINDS,
    NOISE,
    orders,
    patch_grid,
    perturbed,
)

PATCH, ROWS, COLUMNS = 4, 2, 3
INDICES = [5, 2, 9]
NUMBERS = [0, 1, 4, 6]


def images():
    pixels = torch.rand(3, 3, ROWS * PATCH, COLUMNS * PATCH, generator=torch.Generator().manual_seed(0))
    return 0.25 + pixels / 2


def order(index, seed=0):
    return np.random.default_rng([seed, index]).permutation(ROWS * COLUMNS).tolist()


def cell(number):
    """The pixels of a patch."""
    y, x = divmod(number, COLUMNS)
    return np.s_[..., y * PATCH : (y + 1) * PATCH, x * PATCH : (x + 1) * PATCH]


def corrupted(kind, **options):
    return list(perturbed(images(), INDICES, kind, NUMBERS, patch=PATCH, **options))


def changed(image, original):
    return {
        number
        for number in range(ROWS * COLUMNS)
        if not torch.equal(image[cell(number)], original[cell(number)])
    }


@pytest.mark.parametrize("kind", ["noise", "blur", "contrast", "occlusion"])
def test_the_first_of_each_images_own_order(kind):
    """So with more of them, the others stay corrupted, and in the same way."""
    found = corrupted(kind)
    for row, index in enumerate(INDICES):
        for batch, number in zip(found, NUMBERS, strict=True):
            assert changed(batch[row], images()[row]) == set(order(index)[:number])
            for patch in order(index)[:number]:
                assert torch.equal(batch[row][cell(patch)], found[-1][row][cell(patch)])


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_corrupted_alike_in_every_batch(kind):
    together = corrupted(kind, seed=3)
    for row, index in enumerate(INDICES):
        alone = perturbed(images()[row : row + 1], [index], kind, NUMBERS, patch=PATCH, seed=3)
        for one, batch in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], batch[row])
    other = corrupted(kind, seed=4)
    assert not torch.equal(other[2], together[2])


def test_occluded_patches_have_the_mean():
    found = corrupted("occlusion", mean=(0.1, 0.2, 0.3))[1]
    for row, index in enumerate(INDICES):
        patch = found[row][cell(order(index)[0])]
        assert torch.equal(patch, torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1).expand(3, PATCH, PATCH))


def test_shuffled_patches_change_places():
    found = corrupted("shuffle")
    for row, index in enumerate(INDICES):
        original = images()[row]
        for batch, number in zip(found, NUMBERS, strict=True):
            first = order(index)[:number]
            expected = original.clone()
            for place, patch in enumerate(first):
                expected[cell(first[(place + 1) % number])] = original[cell(patch)]
            assert torch.equal(batch[row], expected)
        assert len(changed(found[2][row], original)) == 4


def test_the_natural_corruptions():
    severity = 2
    whole = {kind: corrupted(kind, severity=severity)[-1] for kind in ("noise", "blur", "contrast")}
    mean = images().mean((2, 3), keepdim=True)
    torch.testing.assert_close(whole["contrast"], mean + CONTRAST[severity - 1] * (images() - mean))
    for row, index in enumerate(INDICES):
        noise = np.random.default_rng([0, index, 1]).standard_normal(
            (3, ROWS * PATCH, COLUMNS * PATCH), np.float32
        )
        expected = (images()[row] + NOISE[severity - 1] * torch.from_numpy(noise)).clamp(0, 1)
        torch.testing.assert_close(whole["noise"][row], expected)
    sigma = BLUR[severity - 1] * ROWS * PATCH / 224
    x = np.arange(-1, 2)
    kernel = np.exp(-0.5 * (x / sigma) ** 2) / np.exp(-0.5 * (x / sigma) ** 2).sum()
    inner = images()[0, 0].numpy()[2:5, 2:5]
    assert float(whole["blur"][0, 0, 3, 3]) == pytest.approx(float(kernel @ inner @ kernel), abs=1e-5)


def test_orders_follow_from_seed_and_index():
    found = orders(INDICES, 6, seed=7)
    assert found.tolist() == [order(index, seed=7) for index in INDICES]


def test_mistakes():
    with pytest.raises(
        InputError, match=r"images of 8 × 12 pixels have no whole patches of 5: set --patch_size"
    ):
        patch_grid(images(), 5)
    with pytest.raises(InputError, match="there is no corruption 'fog': use one of noise, blur"):
        corrupted("fog")
