"""SimMIM against its definition."""

import pytest
import torch
from torch.testing import assert_close

from locat_lightning.errors import InputError
from locat_lightning.methods import SimMim
from tests.methods.runs import fit, random_batch, small


def test_loss_and_mask_are_the_definitions():
    """Image after image, by a backbone that is told what to embed; squares of 2 × 2 patches of 8 pixels."""
    task = small("SimMim", mask_size=16)
    batch = random_batch(3)
    images, noise = task.images_and_noise(batch)
    assert noise.shape == (6, 4)
    expected, pixels = 0.0, 0
    for image, of_image in zip(images, noise, strict=True):
        squares = sorted(range(4), key=of_image.tolist().__getitem__)[:3]  # 0.6 · 4, rounded up
        hidden = torch.zeros(32, 32, dtype=torch.bool)
        for square in squares:
            i, j = 16 * (square // 2), 16 * (square % 2)
            hidden[i : i + 16, j : j + 16] = True

        def replace(module, inputs, patches, hidden=hidden):
            patches = patches.clone()
            for i in range(4):
                for j in range(4):
                    if hidden[8 * i, 8 * j]:
                        patches[0, i, j] = task.mask_token.token
            return patches

        hook = task.backbone.patch_embed.register_forward_hook(replace)
        tokens = task.backbone.forward_features(image[None])[0, 1:]
        hook.remove()
        weight = task.decoder[0].weight.flatten(1)
        for patch, token in enumerate(tokens):
            i, j = 8 * (patch // 4), 8 * (patch % 4)
            predicted = (weight @ token + task.decoder[0].bias).view(3, 8, 8)
            if hidden[i, j]:
                expected = expected + (predicted - image[:, i : i + 8, j : j + 8]).abs().sum()
                pixels += 3 * 64
    loss = task.compute_loss(batch).loss
    assert_close(loss, expected / pixels)
    trained = [p for p in task.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(each, trained) for each in (loss, expected / pixels)]
    assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert_close(task(images), task.backbone(images))  # nothing is hidden where features are measured


def test_squares_that_the_image_cuts():
    task = small("SimMim", mask_size=24)
    images, noise = task.images_and_noise(random_batch(2))
    _, hidden, _ = task.predict(images, noise)
    assert noise.shape == (4, 4)
    shown = 32 * 32 - hidden.flatten(1).sum(1)  # one square of four
    assert set(shown.tolist()) <= {side * other for side in (8, 24) for other in (8, 24)}


def test_swin():
    arguments = {"img_size": 64, "window_size": 4, "embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2)}
    task = SimMim("locatswin_tiny", backbone_args=arguments, mask_size=16, warmup_epochs=0, lr=1e-3)
    task.configure_model()
    batch = random_batch(2)
    batch.views[0].crops = torch.randn(1, 2, 3, 64, 64)
    assert fit(task, [batch] * 3).losses[2] > 0


def test_a_square_is_a_whole_number_of_patches():
    with pytest.raises(InputError, match=r"mask_size \(20\) has to be a multiple of a patch \(16 pixels\)"):
        SimMim("vit_tiny_patch16_224", mask_size=20).configure_model()
