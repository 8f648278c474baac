"""The table of predictions: order, names, numbers."""

import csv
from types import SimpleNamespace

import pytest
import torch
from torch import distributed as dist

from locat_lightning.callbacks.predictions import PredictionTable


def trainer(folder, **options):
    data = SimpleNamespace(predict_paths=[f"{i}.jpg" for i in range(4)])
    plain = {"world_size": 1, "is_global_zero": True, "log_dir": str(folder / "run"), "datamodule": data}
    return SimpleNamespace(**(plain | options))


def part(*rows):
    positions, probabilities = zip(*rows, strict=True)
    return torch.tensor(positions), torch.tensor(probabilities)


def read(folder):
    with (folder / "run" / "predictions.csv").open(newline="") as file:
        return list(csv.reader(file))


PARTS = [part((2, (0.9, 0.1)), (0, (0.25, 0.75))), part((3, (1 / 3, 2 / 3)))]


@pytest.mark.parametrize("names", [["ant, red", "bee"], []])
def test_rows_are_in_the_order_of_the_data(tmp_path, names):
    PredictionTable().write_on_epoch_end(trainer(tmp_path), SimpleNamespace(class_names=names), PARTS, [])
    a, b = names or ["0", "1"]
    assert read(tmp_path) == [
        ["path", "class", a, b],
        ["0.jpg", b, "0.250000", "0.750000"],
        ["2.jpg", a, "0.900000", "0.100000"],  # 1.jpg could not be read
        ["3.jpg", b, "0.333333", "0.666667"],
    ]


@pytest.mark.parametrize("first", [True, False])
def test_the_first_process_writes_those_of_all(tmp_path, monkeypatch, first):
    def gather(into, own):
        into[:] = [own, [part((1, (0.0, 1.0)))]]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    many = trainer(tmp_path, world_size=2, is_global_zero=first)
    PredictionTable().write_on_epoch_end(many, SimpleNamespace(class_names=["a", "b"]), PARTS, [])
    if first:
        assert [row[0] for row in read(tmp_path)[1:]] == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    else:
        assert not (tmp_path / "run").exists()
