"""How often images of unequal classes are drawn, against counts in plain loops."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from locat_lightning.data import ImageData
from locat_lightning.data.balance import Subset, class_shares, copies, labels_of, long_tail, repeats
from locat_lightning.data.dataset import Images, Source
from locat_lightning.data.sampling import TrainOrder, laned_order
from locat_lightning.data.timm_sources import TimmSource
from locat_lightning.errors import InputError
from tests.data.conftest import pack_all

LABELS = np.array([0] * 40 + [1] * 15 + [2] * 4 + [4] * 1)  # none of class 3


class Tail(Source):
    """60 grey images of unequal classes, not in their order."""

    labels = np.random.default_rng(1).permutation(LABELS)

    def __len__(self):
        return len(self.labels)

    def path(self, index):
        return str(index)

    def read(self, index):
        return Image.new("RGB", (2, 2), (index,) * 3), int(self.labels[index])


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ("plain", [40, 15, 4, 0, 1]),
        ("sqrt", [40**0.5, 15**0.5, 2, 0, 1]),
        ("balanced", [1, 1, 1, 0, 1]),
    ],
)
def test_the_share_of_a_class_follows_a_power_of_its_images(sampling, expected):
    shares = class_shares(np.array([40, 15, 4, 0, 1]), sampling)
    np.testing.assert_allclose(shares, np.array(expected) / sum(expected))


@pytest.mark.parametrize("sampling", ["sqrt", "balanced"])
@pytest.mark.parametrize("seed", range(5))
def test_classes_and_their_images_are_drawn_as_often_as_told(sampling, seed):
    labels = Tail.labels
    shares = class_shares(np.bincount(labels), sampling)
    drawn = copies(labels, shares, np.random.default_rng(seed))
    assert drawn.sum() == 60
    for label in (0, 1, 2, 4):
        own = drawn[labels == label]
        assert abs(own.sum() - 60 * shares[label]) < 1
        assert abs(own - 60 * shares[label] / len(own)).max() < 1  # each as often as the others


def test_over_many_epochs_each_image_of_a_class_is_drawn_equally_often():
    labels, epochs = Tail.labels, 400
    shares = class_shares(np.bincount(labels), "balanced")
    drawn = sum(copies(labels, shares, np.random.default_rng([0, epoch])) for epoch in range(epochs))
    expected = 60 * (shares / np.maximum(1, np.bincount(labels)))[labels]
    deviation = np.sqrt(
        epochs * (expected % 1) * (1 - expected % 1)
    )  # of a number that is rounded up or down
    assert (abs(drawn - epochs * expected) <= 4 * deviation).all()
    assert (deviation == 0).any()  # of images that are drawn equally often in each epoch


def test_an_entry_of_an_order_knows_how_often_it_came_before():
    order = np.random.default_rng(0).integers(7, size=50)
    seen = Counter()
    expected = []
    for value in order.tolist():
        expected.append(seen[value])
        seen[value] += 1
    assert repeats(order).tolist() == expected


def orders(world, size, seen=0, epoch=1, source=None, shares=None):
    """The items of an epoch as processes draw them in turn."""
    source = source or Tail()
    shares = class_shares(np.bincount(source.labels), "balanced") if shares is None else shares
    images = Images(source, None)
    each = [TrainOrder(images, world, rank, batch_size=size, shares=shares) for rank in range(world)]
    for order in each:
        order.set_epoch(epoch)
        order.seen = seen
    return [item for items in zip(*each, strict=True) for item in items]


def test_processes_share_the_draws_of_one_and_another_number_of_them_goes_on():
    alone = orders(1, 1)
    labels = Tail.labels[np.array(alone) % 60]
    assert np.bincount(labels, minlength=5).tolist() == [15, 15, 15, 0, 15]
    assert orders(2, 1) == orders(3, 2) == alone
    assert orders(3, 2, seen=24) == alone[24:]
    assert orders(1, 1, epoch=2) != alone


def test_an_image_that_comes_again_is_augmented_anew():
    items = orders(1, 1)
    assert len(set(items)) == 60  # of which fifteen are of the only image of class 4
    images = Images(Tail(), lambda image: torch.rand(()).item())
    [only] = np.flatnonzero(Tail.labels == 4)
    drawn = [images[item] for item in items if item % 60 == only]
    assert len(drawn) == 15
    assert len({value for value, *_ in drawn}) == 15
    assert {index for *_, index in drawn} == {only}
    of_epochs = {item // 60 for epoch in range(3) for item in orders(1, 1, epoch=epoch) if item % 60 == only}
    assert len(of_epochs) == 45


def test_shards_are_read_few_at_once_with_copies_too():
    starts, lanes = np.arange(0, 161, 10), 4
    drawn = np.random.default_rng(0).integers(3, size=160)
    order = laned_order(starts, lanes, 0, 0, drawn)
    assert np.bincount(order, minlength=160).tolist() == drawn.tolist()
    runs = [np.flatnonzero(order // 10 == shard) for shard in range(16)]
    at_once = [sum(run[0] <= place <= run[-1] for run in runs) for place in range(len(order))]
    assert max(at_once) <= lanes


@pytest.mark.parametrize(("imbalance", "kept"), [(1, [20] * 3), (100, [20, 2, 1]), (4, [20, 10, 5])])
def test_a_long_tail_shrinks_class_by_class(imbalance, kept):
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], 20))
    places = long_tail(labels, imbalance)
    assert np.bincount(labels[places]).tolist() == kept
    assert (np.diff(places) > 0).all()
    assert long_tail(labels, imbalance).tolist() == places.tolist()


def test_cifar_with_an_imbalance_of_100_has_the_usual_numbers():
    places = long_tail(np.arange(50_000) % 10, 100)
    counts = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert np.bincount(places % 10).tolist() == counts


def test_a_subset_reads_and_shuffles_its_own_images():
    source = Tail()
    subset = Subset(source, np.array([3, 8, 13, 59]))
    assert [subset.path(index) for index in range(4)] == ["3", "8", "13", "59"]
    assert subset.labels.tolist() == source.labels[[3, 8, 13, 59]].tolist()
    image, label = subset.read(2)
    assert (image.getpixel((0, 0))[0], label) == (13, source.labels[13])
    assert sorted(subset.shuffled(0, 0).tolist()) == [0, 1, 2, 3]
    assert sorted(subset.shuffled(0, 0, np.array([2, 0, 0, 3])).tolist()) == [0, 0, 3, 3, 3]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([2, 0, 1], [2, 0, 1]),
        (torch.tensor([2, 0, 1]), [2, 0, 1]),
        (np.zeros((3, 8), np.int64), None),  # as of QMNIST
        (["cat", "dog", "cat"], None),
        ([0, None, 1], None),
        ([[0], [0, 1], []], None),
        ([0.5, 1.0, 2.0], None),
        ([0, 1], None),
    ],
)
@pytest.mark.parametrize("of_hub", [False, True])
def test_labels_of_timms_data_sets_are_those_of_classes_or_none(labels, expected, of_hub):
    class Made:
        def __len__(self):
            return 3

    made = Made()
    if of_hub:
        made.reader = SimpleNamespace(label_key="label", dataset={"label": labels})
    else:
        made.targets = labels
    found = labels_of(TimmSource(made, "made"))
    assert expected == (None if found is None else found.tolist())


def of_epoch(data):
    """The positions that the training batches of an epoch have."""
    data.setup("fit")
    return torch.cat([batch.indices for batch in data.train_dataloader()]).tolist()


@pytest.mark.parametrize("imbalance", [None, 3])
def test_folders_and_their_shards_are_balanced_alike(folder, tmp_path, imbalance):
    for number in range(1, 5):  # of bees two are left, and of cats six
        (folder / "train" / "bee" / f"{number}.png").unlink()
    common = {"img_size": 16, "batch_size": 1, "num_workers": 0, "imbalance": imbalance, "auto_augment": None}
    pack_all(ImageData(root=str(folder), img_size=16), tmp_path / "shards", shard_size=10_000)
    kinds = {"root": str(folder)}, {"stream": str(tmp_path / "shards"), "shards_at_once": 2}
    for kind in kinds:
        data = ImageData(**kind, **common, sampling="balanced")
        drawn = of_epoch(data)
        counts = [6, 2, 6] if imbalance is None else [6, 1, 2]
        assert data.class_counts.tolist() == counts
        labels = np.asarray(data.source("train").labels)
        assert len(drawn) == sum(counts)
        assert max(np.bincount(labels[drawn])) - min(np.bincount(labels[drawn])) <= 1
        plain = ImageData(**kind, **common)
        assert sorted(of_epoch(plain)) == list(range(sum(counts)))
        evaluated = torch.cat([batch.labels for batch in plain.eval_dataloader("train")])
        assert np.bincount(evaluated).tolist() == counts


def test_what_cannot_be_balanced_is_said(monkeypatch):
    with pytest.raises(InputError, match=r"data.imbalance \(0.5\): how many times"):
        ImageData(dataset="digits", imbalance=0.5)
    data = ImageData(dataset="digits", sampling="balanced")
    monkeypatch.setattr(data, "source", lambda split: object())
    assert data.class_counts is None
    with pytest.raises(InputError, match=r"data.sampling balanced: the data set does not tell the labels"):
        data.train_dataloader()
