"""`metrics.csv`, also of a run that was cut off."""

import csv

import torch

from locat_lightning.callbacks.record import MetricsTable


def rows(file):
    with file.open(newline="") as opened:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(opened)]


def test_a_table_gets_columns_as_they_come(tmp_path):
    table = MetricsTable(str(tmp_path), 0)
    table.log_metrics({"loss": 1.0, "epoch": 0}, 0)
    table.log_metrics({"top1": torch.tensor(0.5)}, 0)
    table.log_metrics({"loss": 2.0, "epoch": 0}, 1)
    assert rows(tmp_path / "metrics.csv") == [
        {"epoch": "0", "loss": "1.0", "step": "0"},
        {"step": "0", "top1": "0.5"},
        {"epoch": "0", "loss": "2.0", "step": "1"},
    ]


def test_a_resumed_table_keeps_what_was_before_its_step_once(tmp_path):
    file = tmp_path / "metrics.csv"
    file.write_text("loss,step\n1.0,0\n2.0,1\n3.0,2\n4.0,3\n5.")  # killed while it wrote
    table = MetricsTable(str(tmp_path), 2)
    table.log_metrics({"loss": 9.0}, 1)  # measured again
    assert rows(file) == [{"loss": "1.0", "step": "0"}, {"loss": "2.0", "step": "1"}]
    table.log_metrics({"loss": 30.0}, 2)
    assert rows(file)[2:] == [{"loss": "30.0", "step": "2"}]
    file.write_text("loss,step\n1.0,0\n")
    MetricsTable(str(tmp_path), 0).log_metrics({"loss": 7.0}, 0)  # the run was cut off before its first step
    assert rows(file) == [{"loss": "7.0", "step": "0"}]
