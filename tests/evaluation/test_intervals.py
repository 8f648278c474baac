"""Intervals against bootstrap written in loops: of hits, and of IoU over summed areas."""

import numpy as np
import pytest
import torch

from locat_lightning.evaluation import intervals as module
from locat_lightning.evaluation.intervals import (
    RESAMPLES,
    Figures,
    intervals,
    mean_difference,
    paired_differences,
    resampled_sums,
)
from locat_lightning.evaluation.per_image import Areas, Scores

CLASSES = ["sky", "road", "car", "boat"]


def scores(**values):
    number = len(next(iter(values.values())))
    names = [f"val/{i}.png" for i in range(number)]
    tables = {name: torch.tensor(each) for name, each in values.items()}
    return Scores(torch.arange(number), names, torch.zeros(number, dtype=torch.int64), tables)


def areas(seed=0, images=12, wrong=0.3):
    """Images of few pixels: cars in two of them only, boats never annotated, and one image without any."""
    rng = np.random.default_rng(seed)
    table = []
    for image in range(images):
        annotated = np.random.default_rng(image).choice([0, 0, 0, 1, 2 if image in (3, 5) else 1], 40)
        predicted = np.where(rng.random(40) < wrong, rng.integers(0, 4, 40), annotated)
        annotated = annotated[: 0 if image == 7 else 40]
        predicted = predicted[: len(annotated)]
        table.append(
            [
                [((predicted == c) & (annotated == c)).sum() for c in range(4)],
                [(annotated == c).sum() for c in range(4)],
                [(predicted == c).sum() for c in range(4)],
            ]
        )
    names = [f"val/{i}.png" for i in range(images)]
    return Areas(torch.arange(images), names, CLASSES, torch.tensor(np.array(table)))


def samples(number):
    """The images of each bootstrap sample, drawn at once."""
    return np.random.default_rng(0).integers(number, size=(RESAMPLES, number))


def miou(right, annotated, predicted):
    """Mean over the classes that occur."""
    shares = [r / (a + p - r) for r, a, p in zip(right, annotated, predicted, strict=True) if a + p]
    return sum(shares) / len(shares)


def percentiles(values):
    ordered = sorted(values)
    at = [share * (len(ordered) - 1) for share in (0.025, 0.975)]
    return [ordered[int(i)] + (i - int(i)) * (ordered[int(i) + 1] - ordered[int(i)]) for i in at]


def test_top1_is_the_mean_of_the_hits_of_each_sample():
    hits = [True, False, True, True, True, False, True, True]
    found = intervals(scores(top1=hits))["top1"]
    assert list(found) == pytest.approx(percentiles([sum(hits[i] for i in each) / 8 for each in samples(8)]))


def test_miou_is_of_the_summed_areas_of_each_sample():
    """Not the mean of the images' own; over the classes that occur in the sample."""
    result = areas()
    table = result.areas.numpy()
    found = intervals(result)
    expected = [miou(*table[each].sum(0)) for each in samples(12)]
    assert list(found["miou"]) == pytest.approx(percentiles(expected))
    of_images = [miou(*each) for each in table if each.any()]
    assert abs(np.mean(of_images) - miou(*table.sum(0))) > 0.01
    cars = [
        each[0, 2] / (each[1, 2] + each[2, 2] - each[0, 2]) for each in (table[i].sum(0) for i in samples(12))
    ]
    assert list(found["iou_car"]) == pytest.approx(
        percentiles([share for share in cars if not np.isnan(share)])
    )
    assert found["iou_boat"] == (0, 0)  # predicted, never annotated


def test_a_class_that_occurs_nowhere_has_no_interval():
    result = areas()
    cut = Areas(result.indices, result.names, CLASSES, result.areas * torch.tensor([1, 1, 1, 0]))
    figures = Figures(cut, "val")
    assert "iou_boat" not in figures.values.keys() | figures.intervals.keys()
    assert figures.values["miou"] == pytest.approx(miou(*cut.areas.sum(0).tolist()))


def test_how_often_it_holds_the_true_value():
    """Of 200 measurements of 100 images whose true top-1 is 80 %, some 95 % have it in their interval."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        low, high = intervals(scores(top1=rng.random(100) < 0.8))["top1"]
        held += low <= 0.8 <= high
    assert 0.9 < held / 200 < 0.99


@pytest.mark.parametrize("entries", [1, 50, 2**20])
def test_chunks_change_nothing(entries, monkeypatch):
    statistics = torch.rand(9, 3, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([statistics[torch.from_numpy(each)].double().sum(0) for each in samples(9)])
    monkeypatch.setattr(module, "ENTRIES", entries)
    torch.testing.assert_close(resampled_sums(statistics), expected)


def test_a_pair_is_compared_on_the_same_images_of_each_sample():
    a, b = areas(seed=1, wrong=0.2), areas(seed=2, wrong=0.4)
    found = paired_differences(a, b)["miou"]
    tables = [each.areas.numpy() for each in (a, b)]
    differences = [miou(*tables[0][each].sum(0)) - miou(*tables[1][each].sum(0)) for each in samples(12)]
    assert list(found.interval) == pytest.approx(percentiles(differences))
    assert found.difference == pytest.approx(found.first - found.second)
    assert found.first == pytest.approx(miou(*tables[0].sum(0)))
    alone = [(miou(*one), miou(*other)) for one, other in zip(*tables, strict=True) if one.any()]
    assert found.first_better == sum(one > other for one, other in alone)
    assert found.second_better == sum(one < other for one, other in alone)
    assert found.first_better + found.second_better <= 11  # one image has nothing annotated


def test_what_is_hard_for_both_is_no_difference():
    hits = np.random.default_rng(0).random(300) < 0.7
    better = hits | (np.arange(300) < 30)
    a, b = scores(top1=better), scores(top1=hits)
    found = paired_differences(a, b)["top1"]
    alone = [intervals(each)["top1"] for each in (a, b)]
    assert found.interval.low > 0
    assert alone[0].low < alone[1].high  # which overlap
    assert (found.first_better, found.second_better) == ((better & ~hits).sum(), 0)
    same = paired_differences(a, a)["top1"]
    assert (same.difference, *same.interval, same.first_better, same.second_better) == (0, 0, 0, 0, 0)


def test_figures_that_only_one_has_are_left_out():
    a, b = scores(top1_k5=[1, 0], top1_k9=[1, 0]), scores(top1_k9=[1, 1], top1_k1=[0, 0])
    assert list(paired_differences(a, b)) == ["top1_k9"]


def test_errors_are_no_shares_and_better_where_they_are_lower():
    a, b = (
        scores(rmse=[0.5, 0.3, 0.4], delta1=[0.9, 0.7, 0.8]),
        scores(rmse=[0.6, 0.4, 0.2], delta1=[1, 0, 0]),
    )
    figures = Figures(a, "val")
    assert figures.cell("rmse") == "0.4000 m [0.3000, 0.5000]"
    assert figures.cell("delta1") == "80.00% [70.0, 90.0]"
    found = paired_differences(a, b)
    assert (found["rmse"].first_better, found["rmse"].second_better) == (2, 1)
    assert (found["delta1"].first_better, found["delta1"].second_better) == (2, 1)


def test_a_mean_over_runs_has_an_interval_over_the_images_of_all():
    pairs = [(areas(seed, wrong=0.2), areas(seed + 10, wrong=0.4)) for seed in (1, 2)]
    expected = []
    for drawn in samples(12)[:200]:
        figures = [[miou(*each.areas[drawn].sum(0).tolist()) for each in pair] for pair in pairs]
        expected.append(sum(first - second for first, second in figures) / 2)
    found = mean_difference(pairs, "miou")
    assert list(found) == pytest.approx(percentiles(expected), abs=0.02)  # of a tenth of the samples
    [pair] = pairs[:1]
    assert mean_difference([pair], "miou") == paired_differences(*pair)["miou"].interval
