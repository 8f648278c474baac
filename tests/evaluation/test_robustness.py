"""Ranks of classes and pixels of segments with corrupted patches, against the model alone on such images."""

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from locat_lightning.data.dataset import ImageBatch
from locat_lightning.data.segmentation import MaskBatch
from locat_lightning.errors import InputError
from locat_lightning.evaluation.per_image import ConditionAreas
from locat_lightning.evaluation.perturbation import KINDS, perturbed
from locat_lightning.evaluation.robustness import (
    Condition,
    Robustness,
    count_perturbed,
    patch_of,
    perturbed_outputs,
    rank_perturbed,
)
from locat_lightning.nn.temperature import attention_temperature

NORMALISATION = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25)}
PIXELS = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 3, 2, 1, 3])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    made = timm.create_model("locatvit_tiny", num_classes=4, **sizes).train()
    torch.nn.init.normal_(made.head.weight)
    return made


def normalised(pixels):
    mean, std = (torch.tensor(NORMALISATION[name]).view(3, 1, 1) for name in ("mean", "std"))
    return (pixels - mean) / std


class Loader(list):
    """Batches of images in some order."""

    def __init__(self, *batches):
        super().__init__(ImageBatch(normalised(PIXELS[b]), LABELS[b], torch.tensor(b)) for b in batches)


def ranked(model, loader, **settings):
    settings = Robustness(**settings)
    return rank_perturbed(model, loader, "cpu", settings, normalisation=NORMALISATION, progress=False)


def test_ranks_are_those_of_the_corrupted_images(model):
    found = ranked(
        model, Loader([4, 2], [0, 1, 3]), kinds=["noise", "shuffle"], numbers=[3], temperatures=[1, 2.0]
    )
    assert found.indices.tolist() == list(range(5))
    assert found.labels.tolist() == LABELS.tolist()
    assert {each.named("top1") for each in found.ranks} == {
        *("top1", "top1_noise_n3", "top1_shuffle_n3"),
        *("top1_t2", "top1_noise_n3_t2", "top1_shuffle_n3_t2"),
    }
    assert model.training  # as before
    model.eval()
    try:
        for (kind, number, temperature), ranks in found.ranks.items():
            (pixels,) = perturbed(PIXELS, range(5), kind, [number], patch=8, mean=NORMALISATION["mean"])
            with torch.no_grad(), attention_temperature(model, temperature):
                logits = model(normalised(pixels))
            expected = [int((row > row[label]).sum()) for row, label in zip(logits, LABELS, strict=True)]
            assert ranks.tolist() == expected
    finally:
        model.train()


def test_channels_that_are_not_rgb_are_corrupted_by_their_own_mean_and_deviation():
    torch.manual_seed(0)
    images = 3 * torch.randn(2, 5, 16, 16)  # normalised: some values are far from the mean
    batch = ImageBatch(images, torch.tensor([0, 1]), torch.tensor([7, 3]))
    settings = Robustness(kinds=KINDS, numbers=[2, 4], patch_size=8)
    found = dict(perturbed_outputs(nn.Identity(), batch, torch.device("cpu"), settings, None, None))
    torch.testing.assert_close(found.pop(Condition("none", 0, 1.0)), images)
    assert len(found) == 2 * len(KINDS)
    for (kind, number, _), outputs in found.items():
        of_rgb = {"mean": [0.449], "bounded": False}
        (expected,) = perturbed(images * 0.226 + 0.449, [7, 3], kind, [number], patch=8, **of_rgb)
        torch.testing.assert_close(outputs, (expected - 0.449) / 0.226, rtol=1e-4, atol=1e-5)
    noise = found[Condition("noise", 4, 1.0)] - images
    assert 1.5 < noise.std() < 1.9  # 0.38 / 0.226
    assert found[Condition("occlusion", 4, 1.0)].abs().max() < 1e-6  # the mean


def test_numbers_are_powers_of_two_and_all():
    assert Robustness().counts(12) == [1, 2, 4, 8, 12]
    assert Robustness().counts(16) == [1, 2, 4, 8, 16]
    assert Robustness(numbers=[5, 2, 5]).counts(16) == [2, 5]
    assert Condition("blur", 4, 0.5).named("top1") == "top1_blur_n4_t0.5"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kinds": ["fog"]}, "there is no corruption 'fog': use noise"),
        ({"severity": 6}, "severity 6 must be from 1 to 5"),
        ({"temperatures": []}, "temperatures: give one or more"),
        ({"numbers": [17]}, "an image has 16 patches, of which 17 are too many"),
        ({"patch_size": 7}, "images of 32 × 32 pixels have no whole patches of 7"),
    ],
)
def test_mistakes(settings, message, model):
    with pytest.raises(InputError, match=message):
        ranked(model, Loader([0]), **settings)


def test_patches_are_those_of_the_model_if_they_are_square(model):
    assert patch_of(model) == 8
    with pytest.raises(InputError, match="Linear has no square patches: set --patch_size"):
        patch_of(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="no images to measure on"):
        ranked(model, Loader())
    assert patch_of(torch.nn.ModuleDict({"backbone": model})) == 8


# Of two images, which are not square, the annotations: larger than they are, with void pixels; of four
# classes the third occurs nowhere, and the last is never predicted.
WIDE = PIXELS[:2, :, :16, :24]
MASKS = torch.randint(2, (2, 20, 28), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
MASKS[0, 3:9] = 3
MASKS[:, :, 20:] = 255
LARGEST = torch.tensor([-1e4, -1e4])[:, None, None]  # logits of the last two classes


class Segments(torch.nn.Module):
    """Two classes by the colour at the corner of each patch of 8 pixels, and two that never win."""

    def forward(self, images):
        red, _, blue = images[..., ::8, ::8].unbind(1)
        rest = LARGEST.expand(len(images), 2, *red.shape[1:])
        return torch.cat([torch.stack([red, blue], 1), rest], 1)


def counted(*batches, masks=MASKS, **settings):
    loader = [MaskBatch(normalised(WIDE[b]), masks[b], torch.tensor(b) + 3) for b in batches]
    options = {"normalisation": NORMALISATION, "num_classes": 4, "progress": False}
    return count_perturbed(Segments(), loader, "cpu", Robustness(patch_size=8, **settings), **options)


def test_areas_are_those_of_the_corrupted_images_at_the_size_of_their_masks():
    found = counted([1, 0], [1], kinds=["noise", "shuffle"], numbers=[4])  # the second is there twice
    assert found.indices.tolist() == [3, 4]
    named = {condition.named("miou"): areas for condition, areas in found.areas.items()}
    results = ConditionAreas(found.indices, ["a", "b"], list("wxyz"), named)
    figures = results.figures(results.statistics().sum(0), 2)
    assert list(figures) == ["miou", "miou_noise_n4", "miou_shuffle_n4"]
    for condition, areas in found.areas.items():
        kind, number, _ = condition
        (pixels,) = perturbed(WIDE, [3, 4], kind, [number], patch=8, mean=NORMALISATION["mean"])
        logits = F.interpolate(Segments()(normalised(pixels)), MASKS.shape[1:], mode="bilinear")
        predicted, annotated = logits.argmax(1).numpy(), MASKS.numpy()
        shares = []
        for label in range(4):
            known = annotated != 255
            ours, theirs = (predicted == label) & known, annotated == label
            of_images = np.stack([(each).sum((1, 2)) for each in (ours & theirs, theirs, ours)], 1)
            assert areas[:, :, label].tolist() == of_images.tolist()
            if (ours | theirs).any():
                shares.append((ours & theirs).sum() / (ours | theirs).sum())
        assert len(shares) == 3  # the absent class does not count, the one that is not found does, as 0
        assert shares[-1] == 0
        assert float(figures[condition.named("miou")]) == pytest.approx(np.mean(shares))
    assert len({float(each) for each in figures.values()}) == 3


def test_masks_that_say_nothing_or_too_much_are_refused():
    for value, message in ((255, "no pixel of the validation images is annotated"), (4, "560 pixels are of")):
        with pytest.raises(InputError, match=message):
            counted([0], masks=torch.full_like(MASKS, value), kinds=["blur"])
