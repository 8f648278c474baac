"""k-NN against the original's semantics written as loops, its golden numbers, and its awkward inputs."""

import math
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from locat_lightning.errors import InputError
from locat_lightning.evaluation.knn import knn_classify, label_ranks, nearest_neighbours

GOLDEN = Path(__file__).parents[1] / "golden" / "knn.safetensors"


def clustered(n, dim, classes, seed, noise=2.0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (n,), generator=generator)
    return centres[labels] + noise * torch.randn(n, dim, generator=generator), labels


def reference(train, train_labels, test, test_labels, k, temperature):
    """The original, one test image after another, in float64."""
    train, test = F.normalize(train.double(), dim=1), F.normalize(test.double(), dim=1)
    top1 = top5 = 0
    for query, label in zip(test, test_labels.tolist(), strict=True):
        ranked = sorted(((float(row @ query), i) for i, row in enumerate(train)), reverse=True)[:k]
        votes = [0.0] * (max(train_labels.max().item(), test_labels.max().item()) + 1)
        for cosine, i in ranked:
            votes[train_labels[i]] += math.exp(cosine / temperature)
        order = sorted(range(len(votes)), key=lambda c: -votes[c])
        top1 += label in order[:1]
        top5 += label in order[: min(5, k)]
    return top1 / len(test), top5 / len(test)


def chunks(monkeypatch, queries, rows):
    monkeypatch.setattr("locat_lightning.evaluation.knn.QUERIES", queries)
    monkeypatch.setattr("locat_lightning.evaluation.knn.ROWS", rows)


def test_golden():
    golden = load_file(GOLDEN)
    accuracy = knn_classify(*(golden[f"{s}_{t}"] for s in ("train", "test") for t in ("features", "labels")))
    for k in (10, 20, 100, 200):
        assert accuracy[k].top1 == pytest.approx(golden[f"top1_k{k}"].item() / 100, abs=1.01 / 500)
        assert accuracy[k].top5 == pytest.approx(golden[f"top5_k{k}"].item() / 100, abs=1.01 / 500)


@pytest.mark.parametrize("temperature", [0.02, 0.07, 5.0])
@pytest.mark.parametrize(("classes", "queries", "rows"), [(12, 1024, 8192), (12, 7, 29), (3, 64, 5)])
def test_equals_the_original_written_as_loops(monkeypatch, temperature, classes, queries, rows):
    chunks(monkeypatch, queries, rows)
    train, test = clustered(203, 8, classes, 0), clustered(61, 8, classes, 1)
    ks = (1, 3, 10, 40, 203)
    accuracy = knn_classify(*train, *test, k=ks, temperature=temperature)
    for k in ks:
        assert accuracy[k][1:] == pytest.approx(reference(*train, *test, k, temperature))
        assert accuracy[k].neighbours == k


@pytest.mark.parametrize("rows", [1, 8, 64, 100, 1000])
@pytest.mark.parametrize("order", ["random", "ascending", "descending"])
def test_neighbours_are_exact_in_any_order_of_the_bank(monkeypatch, rows, order):
    chunks(monkeypatch, 20, rows)
    bank, _ = clustered(500, 16, 5, 0)
    query = clustered(1, 16, 5, 1)[0]
    if order != "random":
        bank = bank[F.cosine_similarity(bank, query).argsort(descending=order == "descending")]
    queries = torch.cat([query, clustered(30, 16, 5, 2)[0]])
    cosines = F.normalize(queries) @ F.normalize(bank).T
    expected = cosines.topk(37)
    found = list(nearest_neighbours(bank, queries, 37))
    assert [len(part.indices) for part in found] == [20, 11]
    torch.testing.assert_close(torch.cat([part.similarities for part in found]), expected.values)
    assert torch.equal(torch.cat([part.indices for part in found]), expected.indices)


def test_equal_similarities_fill_k_without_repeating_a_row(monkeypatch):
    chunks(monkeypatch, 1024, 8)
    found = next(nearest_neighbours(torch.ones(50, 4), torch.ones(3, 4), 20))
    assert all(len(set(row)) == 20 for row in found.indices.tolist())


def test_k_is_capped_at_the_bank_and_says_so():
    train, test = clustered(30, 8, 3, 0), clustered(20, 8, 3, 1)
    accuracy = knn_classify(*train, *test, k=(10, 200))
    assert list(accuracy) == [10, 200]
    assert accuracy[200].neighbours == 30
    assert accuracy[200][1:] == pytest.approx(reference(*train, *test, 30, 0.07))


def test_one_class_one_image_and_unknown_classes():
    one = torch.zeros(4, dtype=torch.int64)
    assert knn_classify(torch.randn(4, 3), one, torch.randn(4, 3), one, k=[2])[2] == (2, 1.0, 1.0)
    assert knn_classify(torch.ones(1, 3), one[:1], torch.ones(1, 3), one[:1], k=[20])[20] == (1, 1.0, 1.0)
    assert knn_classify(torch.randn(4, 3), one, torch.randn(4, 3), one + 70_000, k=[2])[2] == (2, 0.0, 0.0)


def test_many_classes_vote_in_parts(monkeypatch):
    monkeypatch.setattr("locat_lightning.evaluation.knn.VOTES", 12 * 5)
    train, test = clustered(203, 8, 12, 0), clustered(61, 8, 12, 1)
    assert knn_classify(*train, *test, k=[10])[10][1:] == pytest.approx(reference(*train, *test, 10, 0.07))


@pytest.mark.parametrize("temperature", [1e-6, 1e6])
def test_any_temperature_is_stable(temperature):
    train, test = clustered(300, 8, 10, 0), clustered(100, 8, 10, 1)
    top1 = knn_classify(*train, *test, k=[30], temperature=temperature)[30].top1
    if temperature < 1:  # the nearest neighbour decides
        assert top1 == knn_classify(*train, *test, k=[1])[1].top1
    else:  # a plain majority, ties to the smaller class
        nearest = next(nearest_neighbours(train[0], test[0], 30)).indices
        votes = F.one_hot(train[1][nearest], 10).sum(1)
        assert top1 == pytest.approx((votes.argmax(1) == test[1]).float().mean().item(), abs=0.03)


def test_zero_features_and_half_precision():
    train, test = clustered(50, 8, 3, 0), clustered(20, 8, 3, 1)
    exact = knn_classify(train[0].half().float(), train[1], *test, k=[5])
    assert knn_classify(train[0].half(), train[1], *test, k=[5]) == exact
    train[0][0] = 0
    assert 0 <= knn_classify(*train, *test, k=[50])[50].top1 <= 1


def test_settings_of_the_training_around_it_stay_and_do_not_matter():
    train, test = clustered(500, 64, 10, 0), clustered(100, 64, 10, 1)
    exact = next(nearest_neighbours(train[0], test[0], 9)).similarities
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            found = next(nearest_neighbours(train[0].clone().requires_grad_(), test[0], 9)).similarities
        assert torch.is_grad_enabled()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found, exact)


def test_label_ranks_are_those_of_a_stable_sort_and_nan_is_no_hit():
    scores = torch.randint(4, (50, 9), generator=torch.Generator().manual_seed(0)).float()
    labels = torch.arange(50) % 9
    order = scores.sort(dim=1, descending=True, stable=True).indices
    assert torch.equal(label_ranks(scores, labels), (order == labels[:, None]).int().argmax(1))
    assert label_ranks(torch.full((1, 4), torch.nan), torch.tensor([0])).item() == 4


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all living tensors made under it, the inputs aside; `peak` is their maximum."""

    def __init__(self, inputs):
        super().__init__()
        self.inputs = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        self.tensors, self.peak = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.tensors = [ref for ref in self.tensors if ref() is not None]
        self.tensors += [weakref.ref(leaf) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        storages = [ref().untyped_storage() for ref in self.tensors]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        self.peak = max(self.peak, sum(size for start, size in sizes.items() if start not in self.inputs))
        return result


def scratch(n, m, classes=10):
    train, test = clustered(n, 32, classes, 0), clustered(m, 32, classes, 1)
    with LiveMemory((*train, *test)) as memory:
        knn_classify(*train, *test, k=[50])
    return memory.peak


def test_scratch_is_of_the_size_of_the_chunks(monkeypatch):
    chunks(monkeypatch, 128, 1024)
    small, large = scratch(3_000, 500), scratch(15_000, 900)
    # A scale for each row; the similarities of all would be 30 MB, a normalised bank 2 MB.
    assert 128 * 1024 * 4 < small <= large < small + 5 * 12_400


def test_a_search_needs_k_within_the_bank():
    for k in (0, 4):
        with pytest.raises(InputError, match=f"k is {k}: .* from 1 to 3"):
            next(nearest_neighbours(torch.ones(3, 2), torch.ones(1, 2), k))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_labels": torch.full((20,), -1)}, "20 of 20 training images have no label"),
        ({"train_labels": torch.tensor([-1] + 19 * [0])}, "1 of 20 training images"),
        ({"test_labels": torch.full((6,), -1)}, "6 of 6 test images"),
        ({"train_labels": torch.zeros(0, dtype=torch.int64)}, "20 training features with 0 labels"),
        ({"train_features": torch.zeros(0, 4), "train_labels": torch.zeros(0)}, "0 training features"),
        ({"test_features": torch.ones(6, 5)}, "same backbone"),
        ({"train_features": torch.ones(20, 4).index_fill_(0, torch.tensor([3]), torch.nan)}, "row 3"),
        ({"test_features": torch.full((6, 4), torch.inf)}, "6 of 6 query features are not finite"),
        ({"k": (0,)}, r"k is \[0\]"),
        ({"k": ()}, r"k is \[\]"),
        ({"k": (-3, 10)}, r"k is \[-3, 10\]"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_mistakes(change, message):
    inputs = {
        "train_features": torch.ones(20, 4),
        "train_labels": torch.zeros(20, dtype=torch.int64),
        "test_features": torch.ones(6, 4),
        "test_labels": torch.zeros(6, dtype=torch.int64),
    }
    with pytest.raises(InputError, match=message):
        knn_classify(**(inputs | change))
