"""Features: every image once, in order, and the training around them untouched."""

from typing import NamedTuple

import pytest
import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from locat_lightning.errors import InputError
from locat_lightning.evaluation.features import (
    autocast_type,
    check_size,
    extract_features,
    image_features,
)
from locat_lightning.evaluation.linear import train_linear


class Batch(NamedTuple):
    images: Tensor
    labels: Tensor
    indices: Tensor


class Images(Dataset):
    """Image i has the value i everywhere and the label 100 + i (or i modulo `classes`)."""

    def __init__(self, places, classes=None):
        self.places, self.classes = list(places), classes

    def __len__(self):
        return len(self.places)

    def __getitem__(self, row):
        i = self.places[row]
        return Batch(torch.full((3, 2, 2), float(i)), i % self.classes if self.classes else 100 + i, i)


def loader(places, batch_size=3, classes=None, **options):
    return DataLoader(Images(places, classes), batch_size, **options)


class Backbone(nn.Module):
    """[B, 3, H, W] to [B, 2]: the first value and the one after it; not in training mode only."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, images):
        value = images[:, 0, 0, :1]
        return self.drop(torch.cat([value, value + 1], 1) * self.weight)


def expected(places):
    places = torch.tensor(sorted(set(places)))
    return torch.stack([places, places + 1], 1).float(), 100 + places


@pytest.mark.parametrize("places", [range(10), [5, 2, 9, 0, 7], [3, 1, 3, 2, 1], [4]])
def test_every_image_once_and_in_order(places):
    features, labels, indices = extract_features(Backbone(), loader(places), "cpu", progress=False)
    assert torch.equal(features, expected(places)[0])
    assert torch.equal(labels, expected(places)[1])
    assert indices.tolist() == sorted(set(places))


def test_the_training_around_it_is_untouched():
    model = Backbone().train()
    model.drop.eval()
    state = torch.get_rng_state()
    extract_features(model, loader(range(10), shuffle=True), "cpu", progress=False)
    assert torch.equal(state, torch.get_rng_state())
    assert (model.training, model.drop.training) == (True, False)
    with pytest.raises(InputError), torch.no_grad():
        extract_features(nn.Sequential(nn.Identity()).train(), loader(range(4)), "cpu", progress=False)


@pytest.mark.parametrize("batch_size", [3, 100])
@pytest.mark.parametrize("outer", [torch.inference_mode, torch.enable_grad])
def test_features_can_be_trained_on(batch_size, outer):
    with outer():
        features, *_ = extract_features(Backbone(), loader(range(10), batch_size), "cpu", progress=False)
    head = nn.Linear(2, 1)
    head(features).sum().backward()
    assert head.weight.grad is not None
    features += 1


def test_autocast_leaves_no_inference_tensor_to_the_training():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    images = torch.randn(2, 3, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.inference_mode():
            mixed = image_features(model, images, autocast_dtype=torch.bfloat16)
            exact = image_features(model, images)
        model(images).sum().backward()
    assert mixed.dtype == exact.dtype == torch.float32
    assert not torch.equal(mixed, exact)
    torch.testing.assert_close(exact, model(images).detach())


@pytest.mark.parametrize(
    ("names", "dtype"),
    [
        (("bf16-mixed", "bf16-true", "bf16"), torch.bfloat16),
        (("16-mixed", "16-true", "16", 16), torch.float16),
        (("32-true", "32", 32, None), None),
    ],
)
def test_every_precision_has_its_type(names, dtype):
    assert {autocast_type(name) for name in names} == {dtype}


@pytest.mark.parametrize("precision", ["64-true", "transformer-engine", "32-mixed", "fast"])
def test_other_precisions_are_refused(precision):
    with pytest.raises(
        InputError,
        match=rf"'{precision}' is not supported .*: use one of 32-true, bf16-mixed, bf16-true, 16-m",
    ):
        autocast_type(precision)


def test_timm_models_give_what_their_classifier_reads():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("test_vit", num_classes=7, img_size=32).eval()
        images = torch.randn(2, 3, 32, 32)
    features = image_features(model, images)
    torch.testing.assert_close(model.head(features), model(images))
    model.reset_classifier(0)
    torch.testing.assert_close(features, model(images))


def test_mistakes():
    with pytest.raises(InputError, match="loader is empty"):
        extract_features(Backbone(), [], "cpu", progress=False)
    with pytest.raises(InputError, match=r"gives \[3, 3, 2, 2\] for 3 images"):
        extract_features(nn.Identity(), loader(range(4)), "cpu", progress=False)


def probe(places, labelled, batch_size):
    return train_linear(
        Backbone(), loader(places, batch_size, 3), loader(labelled, 4, 3), "cpu", num_classes=3, batch_size=4,
        epochs=2, learning_rate=1.0, progress=False,
    )  # fmt: skip


def process(rank, out):
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        unequal = [[8, 0, 5, 2, 3, 3, 1], [4, 7, 6]][rank]
        one_empty = [[], [2, 0, 1]][rank]
        results = [
            extract_features(Backbone(), loader(unequal), "cpu", progress=False),
            extract_features(Backbone(), loader(one_empty), "cpu", progress=False),
            probe([[0, 1, 4, 5], [2, 3, 6, 7]][rank], [[0, 1, 2, 3, 4], [5, 6]][rank], 2),
        ]
        torch.save(
            [list(results[0]), list(results[1]), results[2].top1, results[2].head.weight], f"{out}{rank}"
        )
    finally:
        dist.destroy_process_group()


def test_two_processes_with_unequal_parts_both_get_the_whole(two_processes, tmp_path):
    two_processes(process, tmp_path / "out")
    alone = probe(range(8), range(7), 4)
    for rank in range(2):
        first, second, top1, weight = torch.load(tmp_path / f"out{rank}")
        assert torch.equal(first[0], expected(range(9))[0])
        assert torch.equal(first[1], expected(range(9))[1])
        assert torch.equal(second[0], expected(range(3))[0])
        assert top1 == alone.top1
        torch.testing.assert_close(weight, alone.head.weight.detach())


def test_a_size_that_a_backbone_does_not_take_is_an_error():
    backbone = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(48), nn.Linear(48, 8)).train()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    check_size(backbone, 4, "cpu", advice="do this")
    with pytest.raises(InputError, match=r"it does not take images of 5 pixels \(.*\): do this") as error:
        check_size(backbone, 5, "cpu", advice="do this", name="it")
    assert "\n" not in str(error.value)
    assert all(module.training for module in backbone.modules())
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
