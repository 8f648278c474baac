"""Sliding windows and several scales, against loops over images and windows."""

import pytest
import torch
from torch.nn import functional as F

from locat_lightning.tasks import windows
from locat_lightning.tasks.windows import over_scales, slide

WEIGHT = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(1))


def logits(images):
    """A model whose borders are felt."""
    return F.conv2d(images, WEIGHT, padding=1)


def images(*size):
    return torch.randn(*size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("at_once", "pixels"),
    [(1, 2**22), (2**28, 1), (4 * 8 * 8 * 4, 2**22), (2**28, 8 * 8 * 4), (2**28, 2**22)],
)
@pytest.mark.parametrize("size", [(18, 13), (8, 8), (5, 20)])
def test_windows_of_all_images_are_computed_together(monkeypatch, size, at_once, pixels):
    monkeypatch.setattr(windows, "LOGITS_AT_ONCE", at_once)
    monkeypatch.setattr(windows, "PIXELS_AT_ONCE", pixels)
    given, batches = images(2, 3, *size), []

    def watched(some):
        batches.append(some.shape)
        return logits(some)

    found = slide(watched, given, 4, window=8, stride=5)
    total, times = torch.zeros(2, 4, *size), torch.zeros(size)
    tops, lefts = ({min(start, max(0, side - 8)) for start in range(0, side, 5)} for side in size)
    for top in tops:
        for left in lefts:
            for number in range(2):
                part = given[number : number + 1, :, top : top + 8, left : left + 8]
                total[number : number + 1, :, top : top + 8, left : left + 8] += logits(part)
            times[top : top + 8, left : left + 8] += 1
    torch.testing.assert_close(found, total / times)
    number = 2 * len(tops) * len(lefts)
    assert sum(batch[0] for batch in batches) == number
    of_one = min(8, size[0]) * min(8, size[1])
    most = max(1, min(at_once // (4 * of_one), pixels // of_one))
    assert len(batches) == -(-number // most)


def test_windows_of_half_precision_are_added_up_in_float32():
    found = slide(lambda some: logits(some.float()).bfloat16(), images(1, 3, 9, 9).bfloat16(), 4, 8, 4)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("flip", [False, True])
def test_scales_are_averaged_as_probabilities(flip):
    given = images(2, 3, 12, 17)
    found = over_scales(logits, given, 2, [0.75, 1.0, 1.25], flip)  # two heads of two classes
    parts = []
    for size in ((9, 13), (12, 17), (15, 21)):
        scaled = F.interpolate(given, size, mode="bilinear", antialias=True, align_corners=False)
        for mirrored in (False, True)[: 1 + flip]:
            at_scale = logits(scaled.flip(3)).flip(3) if mirrored else logits(scaled)
            whole = F.interpolate(at_scale, (12, 17), mode="bilinear", align_corners=False)
            parts.append(torch.cat([whole[:, :2].softmax(1), whole[:, 2:].softmax(1)], 1))
    torch.testing.assert_close(found, torch.stack(parts).mean(0))


def test_one_scale_decides_as_the_logits_do():
    found = over_scales(logits, images(1, 3, 12, 17), 4, [1.0], flip=False)
    assert torch.equal(found.argmax(1), logits(images(1, 3, 12, 17)).argmax(1))


def test_a_tiny_image_keeps_a_pixel():
    assert over_scales(logits, images(1, 3, 1, 4), 4, [0.1], flip=False).shape == (1, 4, 1, 4)
