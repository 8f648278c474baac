"""The README is short, runs as it stands, and shows the figures that were measured."""

import re
from pathlib import Path

import torch

from locat import configs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_it_is_short():
    assert len(README.splitlines()) <= 160


def test_every_snippet_runs():
    snippets = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert snippets
    names = {}
    torch.manual_seed(0)
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)
    assert names["logits"].shape == (2, 10)
    assert names["patches"].shape == (2, 384, 8, 8)


def test_every_config_is_in_its_table():
    rows = re.findall(r"^\|((?: `[\w.]+\.yaml`,?)+) \|", README, flags=re.MULTILINE)
    named = re.findall(r"`([\w.]+)`", " ".join(rows))
    assert sorted(named) == sorted(path.name for path in configs.config_directory().rglob("*.yaml"))


def test_the_costs_are_those_that_were_measured():
    measured = (ROOT / "benchmarks" / "results" / "backbones-cpu.md").read_text()
    rows = [line for line in measured.splitlines() if line.startswith("|")]
    assert len(rows) > 5
    assert "\n".join(rows) in README
