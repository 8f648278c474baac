"""Masks by image, and pictures of what is predicted."""

import pytest
import torch
from torch.testing import assert_close

from locat_lightning.data import MultiViewData, SingleCrop
from locat_lightning.errors import InputError
from locat_lightning.methods.pixels import image_noise
from tests.methods.runs import random_batch, small, trainer

METHODS = pytest.mark.parametrize("name", ["Mae", "SimMim"])


def test_the_noise_of_an_image_does_not_depend_on_its_batch():
    indices = torch.tensor([7, 0, 123456789])
    noise = image_noise(indices, 16, 1, 2)
    assert noise.shape == (3, 16)
    assert torch.equal(noise[2:], image_noise(indices[2:], 16, 1, 2))
    assert torch.equal(noise[:, :4], image_noise(indices, 4, 1, 2))
    for key in ((2, 1), (1, 3), (2**64 - 1, 2)):
        assert not (image_noise(indices, 16, *key) == noise).any()


def test_every_place_is_hidden_alike():
    order = image_noise(torch.arange(4000), 8, 0, 0).argsort(1)
    shares = torch.stack([(order == place).float().mean(0) for place in range(8)])
    assert_close(shares, torch.full((8, 8), 1 / 8), atol=0.03, rtol=0)
    neighbours = (order[1:, 0] == order[:-1, 0]).double().mean()  # images one after the other
    assert_close(neighbours.item(), 1 / 8, atol=0.03, rtol=0)


@METHODS
def test_masks_are_of_seed_epoch_view_and_image(name):
    task = small(name)
    batch = random_batch(4)
    images, noise = task.images_and_noise(batch)
    assert torch.equal(images, batch.views[0].crops.flatten(0, 1))
    assert noise.shape == (8, 16)
    assert not (noise[:4] == noise[4:]).any()
    task.of_data = {"seed": 5}.get
    assert not (task.images_and_noise(batch)[1] == noise).any()


@METHODS
def test_a_reconstruction_is_drawn(name):
    task = small(name).eval()
    samples = [(image, -1, 0) for image in torch.randn(2, 3, 32, 32)]
    with torch.no_grad():
        assert task.pictures(samples, None, 32).keys() == {"validation", "reconstruction"}
        images, noise = task.images_and_noise(random_batch(2))
        predicted, hidden = task.reconstruct(images, noise)
    assert predicted.shape == images.shape
    assert hidden.shape == (4, 1, 32, 32)
    shares = hidden.float().mean((1, 2, 3))
    assert_close(shares, torch.full((4,), {"Mae": 12 / 16, "SimMim": 10 / 16}[name]))


@METHODS
def test_images_of_another_size_than_the_model_are_an_error(name):
    data = MultiViewData(dataset="digits", views=SingleCrop(global_size=64), batch_size=8, num_workers=0)
    with pytest.raises(InputError, match=r"data\.views\.global_size \(64\) .* \(32 × 32\): set model"):
        trainer(max_steps=1).fit(small(name), data)


@METHODS
def test_what_pools_is_not_trained(name):
    """Its parameters would wait for a gradient with several processes."""
    task = small(name, locat={"start": "identity"}, backbone_args={"gaug": False, "prr": False})
    task.compute_loss(random_batch(2)).loss.backward()
    assert not task.backbone.attn_pool.gate.requires_grad
    for key, parameter in task.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, key
