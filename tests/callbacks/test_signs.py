"""Signs of quality: of the same images throughout, where a step is logged, and training as without them."""

import csv

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from locat_lightning.callbacks.signs import FeatureSigns
from locat_lightning.evaluation.rank import effective_rank, patch_signs
from locat_lightning.methods.base import features
from tests.methods.runs import METHODS, copied, images, of_folder, same, small, trainer


def fit(task, folder, *callbacks):
    folder.mkdir(exist_ok=True)
    data = of_folder(images(folder / "images", 6))
    trainer(*callbacks, logger=CSVLogger(folder / "log", name="", version=""), log_every_n_steps=2).fit(
        task, data
    )
    with (folder / "log/metrics.csv").open() as file:
        return data, [row for row in csv.DictReader(file) if row.get("signs/patch_cosine")]


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")  # a teacher
@pytest.mark.parametrize("name", METHODS)
def test_each_method_logs_those_of_its_backbone(name, tmp_path):
    plain, task = small(name), small(name)
    assert not fit(plain, tmp_path / "without")[1]
    [row] = fit(task, tmp_path / "with", FeatureSigns())[1]
    assert row["step"] == "1"
    assert same(copied(task), copied(plain))


def test_they_are_of_the_validation_images(tmp_path):
    task = small("Dino", lr=0.0, min_lr=0.0, momentum=1.0)  # nothing moves
    data, [row] = fit(task, tmp_path, FeatureSigns())
    dataset = data.eval_dataloader("val").dataset
    task.backbone.eval()
    with torch.no_grad():
        found, maps = features(task.backbone, torch.stack([dataset[index][0] for index in range(6)]))
    signs = patch_signs(found, maps.flatten(2).mT) | {"effective_rank": effective_rank(found)}
    assert len(signs) == 4
    for name, value in signs.items():
        assert float(row[f"signs/{name}"]) == pytest.approx(value.item(), rel=1e-4)
