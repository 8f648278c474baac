"""Linear probes against heads trained one by one with torch's own autograd, SGD and cosine schedule."""

import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torchmetrics.functional.classification import multiclass_accuracy

from locat_lightning.errors import InputError
from locat_lightning.evaluation.linear import sweep_linear, train_linear


class Batch(NamedTuple):
    images: Tensor
    labels: Tensor
    indices: Tensor


def digits():
    data = load_digits()
    features = torch.tensor(data.data, dtype=torch.float32) / 16
    labels = torch.tensor(data.target)
    return features[:1200], labels[:1200], features[1200:], labels[1200:]


def batches(images, labels, size):
    indices = torch.arange(len(images))
    return [Batch(*part) for part in zip(*(t.split(size) for t in (images, labels, indices)), strict=True)]


def reference(features, labels, order, classes, rate, momentum, seed):
    """One head, trained as any torch code would, on the batches of rows `order`."""
    head = nn.Linear(features.shape[1], classes)
    nn.init.normal_(head.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(head.parameters(), rate, momentum=momentum)
    schedule = CosineAnnealingLR(optimizer, len(order))
    for rows in order:
        optimizer.zero_grad()
        F.cross_entropy(head(features[rows]), labels[rows]).backward()
        optimizer.step()
        schedule.step()
    return head


def test_heads_of_a_sweep_equal_heads_trained_alone():
    train, train_labels, val, val_labels = digits()
    rates = (0.01, 0.3, 2.0)
    sweep = sweep_linear(
        train, train_labels, val, val_labels, learning_rates=rates, epochs=3, batch_size=100, seed=5,
        progress=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    order = [rows for _ in range(3) for rows in torch.randperm(1200, generator=generator).split(100)]
    for rate, result in zip(rates, sweep.results, strict=True):
        expected = reference(train, train_labels, order, 10, rate * 100 / 256, 0.9, 5)
        torch.testing.assert_close(result.head.weight, expected.weight, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(result.head.bias, expected.bias, atol=1e-5, rtol=1e-5)
        for name, top_k in (("top1", 1), ("top5", 5)):
            accuracy = multiclass_accuracy(expected(val), val_labels, 10, average="micro", top_k=top_k)
            assert getattr(result, name) == pytest.approx(accuracy.item())
        assert (result.learning_rate, result.effective_learning_rate) == (rate, rate * 100 / 256)
    assert sweep.best.top1 == max(result.top1 for result in sweep.results) > 0.85


def test_sweep_is_seeded_leaves_the_global_generator_and_works_under_inference_mode():
    state = torch.get_rng_state()
    once = sweep_linear(*digits(), learning_rates=[0.1], epochs=1, seed=1, progress=False).best.head.weight
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        head = sweep_linear(*digits(), learning_rates=[0.1], epochs=1, seed=1, progress=False).best.head
    other = sweep_linear(*digits(), learning_rates=[0.1], epochs=1, seed=2, progress=False).best.head.weight
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(once, head.weight)
    assert not torch.equal(once, other)
    head(torch.ones(1, 64)).sum().backward()


def test_a_diverged_head_scores_nothing_and_spoils_no_other():
    train, train_labels, val, val_labels = digits()
    sweep = sweep_linear(
        train, train_labels, val, val_labels, learning_rates=[1e38, 0.1], epochs=2, progress=False
    )
    assert sweep.results[0].top1 == sweep.results[0].top5 == 0
    assert sweep.best.learning_rate == 0.1


def test_fewer_images_than_a_batch_few_classes_and_unseen_classes():
    features, labels = torch.eye(2).repeat(3, 1), torch.tensor([0, 1]).repeat(3)
    result = sweep_linear(
        features, labels, features, labels + 1, learning_rates=[2.0], epochs=50, batch_size=64, progress=False
    ).best
    assert result.effective_learning_rate == 2.0 * 6 / 256
    assert result.top1 == 0  # each image is recognised, and its label is another
    assert result.top5 == 1  # of three classes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_labels": torch.zeros(8, dtype=torch.int64)}, "one class"),
        ({"train_labels": torch.full((8,), -1)}, "8 of 8 training images have no label"),
        ({"val_labels": torch.tensor([0, -1, 1, 1])}, "1 of 4 validation images"),
        ({"val_labels": torch.zeros(0, dtype=torch.int64)}, "4 validation features with 0 labels"),
        ({"train_features": torch.full((8, 3), torch.nan)}, "finite"),
        ({"val_features": torch.ones(4, 2)}, "same backbone"),
        ({"learning_rates": ()}, "trains nothing"),
        ({"epochs": 0}, "trains nothing"),
    ],
)
def test_mistakes_in_a_sweep(change, message):
    inputs = {
        "train_features": torch.ones(8, 3),
        "train_labels": torch.arange(8) % 2,
        "val_features": torch.ones(4, 3),
        "val_labels": torch.arange(4) % 2,
    }
    with pytest.raises(InputError, match=message):
        sweep_linear(**(inputs | change), progress=False)


def test_heads_that_all_diverged_are_no_result():
    with pytest.raises(InputError, match=r"diverged at learning rate 1e\+38: lower it"):
        sweep_linear(*digits(), learning_rates=[2e38, 1e38], epochs=20, progress=False)


def backbone():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Dropout(0.5)).train()


def test_train_linear_is_sgd_on_frozen_features():
    train, train_labels, val, val_labels = digits()
    model = backbone()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    with torch.inference_mode():  # as in Lightning's validation
        result = train_linear(
            model, batches(train, train_labels, 100), batches(val, val_labels, 77), "cpu", num_classes=10,
            batch_size=100, epochs=2, learning_rate=1.0, seed=3, progress=False,
        )  # fmt: skip
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    features = model.eval()(train).detach()
    order = [rows for _ in range(2) for rows in torch.arange(1200).split(100)]
    expected = reference(features, train_labels, order, 10, 100 / 256, 0.9, 3)
    torch.testing.assert_close(result.head.weight, expected.weight, atol=1e-5, rtol=1e-5)
    hits = expected(model(val)).argmax(1) == val_labels
    assert result.top1 == pytest.approx(hits.float().mean().item())
    assert math.isclose(result.effective_learning_rate, 100 / 256)


@pytest.mark.parametrize(
    ("train_labels", "val_labels", "batch", "classes", "message"),
    [
        ([0, 1, 1, 0], [0, 1], 0, 2, "fewer images than in a batch"),
        ([0, 1, -1, 0], [0, 1], 2, 2, "1 of 2 training images have no label"),
        ([0, 1, 1, 0], [0, 5], 2, 2, "1 of 2 validation images have no label in 0..1"),
        ([0, 0, 0, 0], [0, 0], 2, 1, "one class"),
    ],
)
def test_mistakes_in_train_linear(train_labels, val_labels, batch, classes, message):
    train = batches(torch.rand(4, 64), torch.tensor(train_labels), batch) if batch else []
    val = batches(torch.rand(2, 64), torch.tensor(val_labels), 2)
    with pytest.raises(InputError, match=message):
        train_linear(
            backbone(), train, val, "cpu", num_classes=classes, batch_size=2, epochs=1, progress=False
        )


@pytest.mark.parametrize("split", ["training", "validation"])
def test_features_that_are_not_finite_train_no_head(split):
    images = {"training": torch.rand(4, 64), "validation": torch.rand(4, 64)}
    images[split][3, 0] = torch.inf
    train, val = (batches(each, torch.tensor([0, 1, 1, 0]), 2) for each in images.values())
    with pytest.raises(InputError, match=f"1 of . {split} features are not finite"):
        train_linear(backbone(), train, val, "cpu", num_classes=2, batch_size=2, epochs=1, progress=False)
