"""Accuracy by group of classes, against means of the classes' accuracies in plain loops."""

import numpy as np
import pytest
import torch

from locat_lightning.evaluation.intervals import (
    Figures,
    mean_difference,
    paired_differences,
    resampled_sums,
)
from locat_lightning.evaluation.per_image import Scores, fingerprint, read_table, write_table
from locat_lightning.evaluation.shots import is_unbalanced

COUNTS = torch.tensor([500, 101, 100, 20, 19, 1])
GROUPS = {"balanced": range(6), "many": (0, 1), "medium": (2, 3), "few": (4, 5)}


def results(seed=0, counts=COUNTS, labels=None):
    rng = np.random.default_rng(seed)
    labels = torch.from_numpy(np.random.default_rng(7).integers(6, size=90)) if labels is None else labels
    hits = torch.from_numpy(rng.random(len(labels))) < 0.3 + 0.1 * labels
    names = [f"val/{number}.png" for number in range(len(labels))]
    shots = None if counts is None else counts[labels]
    return Scores(torch.arange(len(labels)), names, labels, {"top1": hits, "top5": hits | True}, shots)


def expected(of, classes, rows):
    """The mean over classes of the share of hits among their images."""
    found = []
    for label in classes:
        own = [bool(of.scores["top1"][row]) for row in rows if of.labels[row] == label]
        found += [sum(own) / len(own)] if own else []
    return sum(found) / len(found)


def test_a_group_s_accuracy_is_the_mean_of_its_classes_whatever_their_share_of_the_images():
    of = results()
    values = Figures(of, "val").values
    assert list(values) == ["top1", "top5", *GROUPS]
    for name, classes in GROUPS.items():
        assert values[name] == pytest.approx(expected(of, classes, range(90)))
    assert values["top1"] == pytest.approx(of.scores["top1"].double().mean().item())
    assert values["balanced"] != pytest.approx(values["top1"], abs=0.005)


def test_classes_without_evaluated_images_and_groups_without_classes_do_not_count():
    of = results(labels=torch.tensor([0, 0, 0, 1, 4]), counts=COUNTS)
    values = Figures(of, "val").values
    assert "medium" not in values
    assert values["balanced"] == pytest.approx(expected(of, (0, 1, 4), range(5)))
    assert values["few"] == float(of.scores["top1"][4])


def test_intervals_are_of_resampled_images():
    of = results()
    sums = resampled_sums(of.statistics(), resamples=200)
    rng = np.random.default_rng(0)
    rows = [rng.integers(90, size=90) for _ in range(1)]
    found = of.figures(of.statistics()[rows[0]].sum(0), 90)
    for name, classes in GROUPS.items():  # each class's weight is that of the whole set
        weights = {label: 1 / int((of.labels == label).sum()) for label in range(6)}
        picked = [row for row in rows[0] if int(of.labels[row]) in classes]
        hits = sum(weights[int(of.labels[row])] * bool(of.scores["top1"][row]) for row in picked)
        whole = sum(weights[int(of.labels[row])] for row in picked)
        assert float(found[name]) == pytest.approx(hits / whole)
    spread = of.figures(sums, 90)["few"].std()
    assert 0.01 < spread < 0.2
    low, high = Figures(of, "val").intervals["few"]
    assert low < Figures(of, "val").values["few"] < high


def test_the_table_keeps_the_groups(tmp_path):
    of = results()
    write_table(tmp_path / "images.csv", of)
    again = read_table(tmp_path / "images.csv")
    assert again.shots.tolist() == of.shots.tolist()
    assert Figures(again, "val").values == pytest.approx(Figures(of, "val").values)
    assert fingerprint(again) == fingerprint(results(counts=None))  # the images are the same
    other = results(seed=1)
    paired = paired_differences(again, other)
    assert paired["few"].difference == pytest.approx(
        Figures(of, "val").values["few"] - Figures(other, "val").values["few"]
    )
    assert mean_difference([(again, other)], "few").low < paired["few"].difference
    assert mean_difference([(again, results(counts=None))], "few") is None
    elsewhere = paired_differences(of, results(counts=COUNTS.flip(0)))  # trained on other images
    assert list(elsewhere) == ["top1", "top5", "balanced"]
    hits, others = (each.scores["top1"][of.labels >= 4] for each in (of, other))
    assert paired["few"].first_better == int((hits & ~others).sum())


@pytest.mark.parametrize(
    ("counts", "told"), [([], False), ([5, 5], False), ([10, 19], False), ([10, 20], True), ([0, 3], True)]
)
def test_classes_of_about_one_size_are_not_told_apart(counts, told):
    assert is_unbalanced(counts) is told
