"""The command that measures on a GPU: how it writes, what a cut leaves, and what pages hold of it."""

import json
import logging
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from locat_lightning.nn import GaussianAugmentation, gaussian_attention

ROOT = Path(__file__).parents[1]
MACHINE = {"card": "NVIDIA H200", "torch": "2.11", "triton": "3.6", "python": "3.12"}


@pytest.fixture
def benchmarks(monkeypatch):
    """Import a module of `benchmarks/`, which is no package."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield lambda name: __import__(name)
    for name in ("gpu", "gpu_training", "refresh"):
        sys.modules.pop(name, None)


def test_a_table_has_the_columns_of_all_rows(benchmarks):
    rows = [{"row": "a", "ms": 1234.4, "GiB": None}, {"row": "b", "ms": 0.12345, "kernel": "flash"}]
    assert benchmarks("gpu").table(rows).splitlines() == [
        "|  | ms | GiB | kernel |",
        "| --- | --- | --- | --- |",
        "| a | 1,234 |  |  |",
        "| b | 0.123 |  | flash |",
    ]


def test_pages_hold_what_each_card_measured_or_say_that_none_has(benchmarks):
    refresh = benchmarks("refresh")
    rows = [{"row": "small, eager", "LocAtViT": 1000.0, refresh.RATIO: 1.0621}]
    groups = {"step": {"state": "cut off", "rows": rows}, "dino": {"state": "not measured", "rows": []}}
    words = refresh.gpu_pages([{"machine": MACHINE, "groups": groups}])
    assert words["README.md"] == "NVIDIA H200, training step, 1.06x (small, eager)"
    filled = refresh.with_gpu("a <!-- gpu -->old<!-- /gpu --> b", words["docs/scaling.md"])
    assert filled.startswith("a <!-- gpu -->\nNVIDIA H200, torch 2.11, Triton 3.6:\n\nTraining step")
    assert "(cut off):\n\n|  | LocAtViT | time, LocAtViT / plain |\n" in filled
    assert "| small, eager | 1,000 | 1.06 |\n\nDINO" in filled
    found = [json.loads(path.read_text()) for path in sorted(refresh.RESULTS.glob("gpu-*.json"))]
    for name, expected in refresh.gpu_pages(found).items():
        page = (ROOT / name).read_text()
        assert page.count("<!-- gpu -->") == 1
        assert refresh.with_gpu(page, expected) == page


def test_each_row_is_written_at_once(benchmarks, tmp_path, capsys, monkeypatch):
    """A group that fails and one without time leave what the others found."""
    gpu = benchmarks("gpu")

    def rows_of(name, arguments, seconds):
        yield {"machine": MACHINE}
        yield {"row": "first", "ms": 1.0}
        written = json.loads((tmp_path / "gpu-h200.json").read_text())
        assert written["groups"][name] == {"state": "cut off", "rows": [{"row": "first", "ms": 1.0}]}
        if name == "layer":
            yield {"state": "failed with exit code 1"}
        else:
            yield {"row": "second", "ms": 2.0}
            yield {"state": "done"}

    monkeypatch.setattr(gpu, "rows_of", rows_of)
    gpu.main(["--groups", "exact", "layer", "study", "--output", str(tmp_path)])
    groups = json.loads((tmp_path / "gpu-h200.json").read_text())["groups"]
    found = {name: (group["state"], len(group["rows"])) for name, group in groups.items()}
    failed = ("failed with exit code 1", 1)
    assert found == {"exact": ("done", 2), "layer": failed, "study": ("not measured", 0)}
    assert (tmp_path / "gpu-h200.md").read_text() in capsys.readouterr().out


@pytest.mark.slow
def test_training_steps_are_measured(benchmarks, caplog):
    """In this process; the test of `exact` below starts one for a group."""
    caplog.set_level(logging.ERROR, "lightning.pytorch")  # as the group does; a fixture undoes it
    measured = benchmarks(benchmarks("gpu").GROUPS["step"].module).rows(
        "step", Namespace(device="cpu", tiny=True)
    )
    rows = json.loads(json.dumps(list(measured)))
    assert all(row["plain ViT"] > 0 and row["LocAtViT"] > 0 for row in rows)
    assert any(row["S in full"] is not None for row in rows)


@pytest.mark.parametrize("side", [4, 32])
def test_the_authors_way_gives_the_same_below_32_patches(benchmarks, side):
    authors = benchmarks("gpu_training").authors_attention
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, side**2 + 1, 8)
    gaussians = GaussianAugmentation(8)(q, (side, side), (side, side))
    same = torch.allclose(authors(q, k, v, gaussians), gaussian_attention(q, k, v, gaussians), atol=1e-5)
    assert same == (side < 32)


@pytest.mark.slow
def test_a_process_measures_a_group_and_is_ended_in_time(benchmarks):
    gpu = benchmarks("gpu")
    *rows, state = gpu.rows_of("exact", ["--device", "cpu", "--tiny"], seconds=300)
    assert state == {"state": "done"}
    assert rows[0]["machine"]["card"] == "CPU"
    bf16, fp16 = rows[1:]
    assert 0 < fp16["error"] < bf16["error"] < 0.03
    assert bf16["same twice"] == "yes"
    assert list(gpu.rows_of("exact", ["--device", "cpu", "--tiny"], seconds=0.1)) == [{"state": "cut off"}]
