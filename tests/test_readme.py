"""The README's Python runs as it stands, and its table of models is the one that a command prints."""

import re
import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_every_snippet_runs():
    snippets = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(snippets) >= 2
    names = {}
    torch.manual_seed(0)
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)
    assert names["logits"].shape == (2, 10)
    assert names["patches"].shape == (2, 384, 8, 8)
    assert [each.shape for each in names["kernels"]] == [(2, 64, 8, 8)] * 12
    assert names["attention"].shape == (2, 6, 8, 8)


@pytest.mark.slow
def test_the_table_of_models_is_up_to_date(capsys):
    runpy.run_path(str(ROOT / "benchmarks" / "rows.py"), run_name="__main__")
    for row in capsys.readouterr().out.splitlines():
        assert row in README
