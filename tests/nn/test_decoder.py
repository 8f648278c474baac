"""The decoder's loss and its predictions, against the plain expressions."""

import pytest
import torch
from torch.nn import functional as F

from locat_lightning.labels import IGNORE
from locat_lightning.nn.decoder import (
    LinearDecoder,
    MlpDecoder,
    upsampled_argmax,
    upsampled_cross_entropy,
)


def case(classes=5, images=3, small=(4, 6), size=(16, 23), dtype=torch.uint8):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(images, classes, *small, generator=generator, requires_grad=True)
    masks = torch.randint(classes, (images, *size), generator=generator, dtype=dtype)
    masks[torch.rand(masks.shape, generator=generator) < 0.2] = IGNORE
    return logits, masks


def plain(logits, masks):
    upsampled = F.interpolate(logits, masks.shape[-2:], mode="bilinear", align_corners=False)
    return F.cross_entropy(upsampled, masks.long(), ignore_index=IGNORE)


def test_the_decoder_is_the_papers():
    decoder = MlpDecoder(24, 7)
    shapes = [tuple(p.shape) for p in decoder.parameters()]
    assert shapes == [(512, 24, 1, 1), (512,), (512,), (512,), (7, 512, 1, 1), (7,)]
    assert decoder(torch.randn(2, 24, 3, 5)).shape == (2, 7, 3, 5)


def test_the_linear_head_is_dinov2s():
    torch.manual_seed(0)
    head, features = LinearDecoder(24, 70), torch.randn(2, 24, 3, 5) * 3 + 1
    classifier = head[1]
    assert classifier.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert not classifier.bias.any()
    logits = head(features)  # in training, by the batch's own statistics
    normed = features - features.mean((0, 2, 3), keepdim=True)
    normed = normed / (normed.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()
    plain = torch.einsum("cd,bdhw->bchw", classifier.weight[:, :, 0, 0], normed)
    torch.testing.assert_close(logits, plain, atol=1e-6, rtol=1e-4)
    assert not torch.equal(head.eval()(features), logits)


@pytest.mark.parametrize("size", [(16, 23), (4, 6), (3, 5)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
@pytest.mark.parametrize("images_at_once", [0, 2, 3])
def test_loss_and_gradient_are_those_of_the_plain_expression(size, dtype, images_at_once, monkeypatch):
    at_once = images_at_once * 5 * size[0] * size[1]
    monkeypatch.setattr("locat_lightning.nn.decoder.LOGITS_AT_ONCE", at_once)
    logits, masks = case(size=size, dtype=dtype)
    loss = upsampled_cross_entropy(logits, masks)
    (3 * loss).backward()
    ours, logits.grad = logits.grad, None
    reference = plain(logits, masks)
    (3 * reference).backward()
    torch.testing.assert_close(loss, reference)
    torch.testing.assert_close(ours, logits.grad, atol=1e-8, rtol=1e-5)


def test_images_count_by_their_annotated_pixels():
    logits, masks = case()
    masks[0] = IGNORE
    masks[1, 2:] = IGNORE
    torch.testing.assert_close(upsampled_cross_entropy(logits, masks), plain(logits, masks))


def test_without_an_annotated_pixel_there_is_nothing_to_learn():
    logits, masks = case()
    loss = upsampled_cross_entropy(logits, masks.fill_(IGNORE))
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


def test_half_precision_is_upsampled_in_float32():
    logits, masks = case()
    half = logits.detach().bfloat16().requires_grad_()
    loss = upsampled_cross_entropy(half, masks)
    loss.backward()
    torch.testing.assert_close(loss, plain(half.detach().float(), masks))
    assert loss.dtype == torch.float32
    assert half.grad.dtype == torch.bfloat16


def test_a_scaled_loss_keeps_small_gradients_in_float16():
    logits, masks = case(images=8, size=(64, 64))
    half = logits.detach().half().requires_grad_()
    (upsampled_cross_entropy(half, masks) * 2**16).backward()
    (plain(logits, masks) * 2**16).backward()
    torch.testing.assert_close(half.grad.float(), logits.grad, atol=0.05, rtol=2e-3)
    assert (half.grad == 0).sum() == 0


@pytest.mark.parametrize("classes", [1, 3, 16, 17, 40])
@pytest.mark.parametrize("size", [(19, 31), (4, 6)])
def test_argmax_is_that_of_all_classes_at_once(classes, size):
    logits, _ = case(classes)
    whole = F.interpolate(logits, size, mode="bilinear", align_corners=False).argmax(1)
    assert torch.equal(upsampled_argmax(logits.detach(), size), whole)


def test_of_equal_logits_the_first_class_wins():
    assert not upsampled_argmax(torch.zeros(1, 40, 2, 2), (5, 5)).any()
