"""Signs of quality: of the same images throughout, where a step is logged, and training as without them."""

import csv

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

from locat_lightning.callbacks.signs import FeatureSigns
from locat_lightning.evaluation.dense import patch_features
from locat_lightning.evaluation.rank import effective_rank, outlying_share, patch_signs
from locat_lightning.methods.base import features
from tests.methods.runs import METHODS, copied, images, of_folder, same, small, trainer


def fit(task, folder, *callbacks, **options):
    folder.mkdir(exist_ok=True)
    data = of_folder(images(folder / "images", 6))
    logger = CSVLogger(folder / "log", name="", version="")
    trainer(*callbacks, logger=logger, log_every_n_steps=2, **options).fit(task, data)
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
        images = torch.stack([dataset[index][0] for index in range(6)])
        found, maps = features(task.backbone, images)
        tokens = patch_features(task.backbone, images).flatten(2).mT
    signs = patch_signs(found, maps.flatten(2).mT) | {"effective_rank": effective_rank(found)}
    signs["outlying_share"] = outlying_share(tokens)
    assert len(signs) == 5
    for name, value in signs.items():
        assert float(row[f"signs/{name}"]) == pytest.approx(value.item(), rel=1e-4)


def test_features_that_have_become_the_same_are_warned_of_once(tmp_path):
    class Collapse(Callback):
        def on_train_start(self, trainer, module):
            for network in module.networks().values():
                network.norm.weight.data.zero_()  # each token is the bias
                network.norm.bias.data.fill_(1.0)

    task = small("Dino", lr=0.0, min_lr=0.0, backbone_args={"prr": False})
    with pytest.warns(UserWarning, match="the same at step") as warned:
        fit(task, tmp_path, FeatureSigns(), Collapse(), max_epochs=3)
    said = [str(each.message) for each in warned if "the same at step" in str(each.message)]
    assert [line.partition(" are ")[0] for line in said] == [
        "the features of all images",
        "the patches of each image",
    ]
