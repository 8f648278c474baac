"""Results of images as text: what is read is what was written, without names."""

import json

import torch

from locat_lightning.evaluation.packed import packed, unpacked
from locat_lightning.evaluation.per_image import Areas, ConditionAreas, Scores, fingerprint


def names(number):
    return [f"val/{i}.png" for i in range(number)]


def test_scores_of_the_figures_come_back():
    hits = torch.rand(1003, generator=torch.Generator().manual_seed(0)) < 0.7
    scores = {"top1": hits, "top5": hits | True, "loss": hits + 0.25}
    results = Scores(torch.arange(1003), names(1003), torch.zeros(1003), scores)
    text = json.dumps(packed(results, ["top1", "miou"]))
    assert len(text) < 400  # an eighth of a byte an image
    found = unpacked(json.loads(text))
    assert found.scores.keys() == {"top1"}
    assert torch.equal(found.scores["top1"], hits.double())
    assert torch.equal(found.statistics().sum(0), results.statistics().sum(0)[:1])
    assert json.loads(text)["fingerprint"] == fingerprint(results)
    numbers = unpacked(packed(results, ["loss", "top5"]))
    assert torch.equal(numbers.scores["loss"], scores["loss"].double())
    assert torch.equal(numbers.scores["top5"], scores["top5"].double())
    assert packed(results, ["miou"]) is None


def test_groups_of_classes_come_back():
    labels = torch.arange(300) % 3
    hits = torch.rand(300, generator=torch.Generator().manual_seed(0)) < 0.2 + 0.3 * labels
    scores = {"top1": hits, "top5": hits | True}
    results = Scores(torch.arange(300), names(300), labels, scores, torch.tensor([500, 50, 5])[labels])
    found = unpacked(json.loads(json.dumps(packed(results, ["balanced", "few"]))))
    figures = found.figures(found.statistics().sum(0), 300)
    assert float(figures["few"]) == float(hits[2::3].double().mean())
    expected = results.figures(results.statistics().sum(0), 300)
    assert all(torch.equal(figures[name], expected[name]) for name in ("balanced", "many", "medium", "few"))
    plain = packed(results, ["top1"])
    assert "groups" not in plain
    assert packed(Scores(results.indices, results.names, labels, scores), ["balanced"]) is None


def test_areas_come_back():
    areas = torch.randint(70_000, (5, 3, 4), generator=torch.Generator().manual_seed(0))
    results = Areas(torch.arange(5), names(5), ["sky", "road", "car", "boat"], areas)
    found = unpacked(json.loads(json.dumps(packed(results, ["miou"]))))
    assert torch.equal(found.areas, areas)
    assert found.classes == results.classes
    assert (
        packed(ConditionAreas(results.indices, names(5), results.classes, {"clean": areas}), ["miou"]) is None
    )
