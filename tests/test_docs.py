"""The pages name every config, and nothing that is not there."""

import json
import re
import statistics
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import yaml

import locat_lightning
from locat import configs
from locat_lightning.commands.study.plan import MEASURES, Study
from locat_lightning.commands.study.report import NOTHING

ROOT = Path(__file__).parents[1]
PAGES = ("method.md", "recipes.md", "scaling.md", "results.md")
TEXT = {page: (ROOT / "docs" / page).read_text() for page in PAGES}
CONFIGS = {path.name for path in configs.config_directory().rglob("*.yaml")}
# `file.py`: `name`, `name`
NAMED = re.findall(r"`([\w/]+\.py)`: (`[\w.]+`(?:, `[\w.]+`)*)", TEXT["method.md"])


def test_the_readme_links_the_pages():
    readme = (ROOT / "README.md").read_text()
    assert [page for page in PAGES if f"(docs/{page})" not in readme] == []


def test_every_config_has_a_row_and_every_row_a_config():
    rows = re.findall(r"^\| `([\w.]+\.yaml)` \|", TEXT["recipes.md"], flags=re.MULTILINE)
    assert len(rows) == len(CONFIGS)
    assert set(rows) == CONFIGS


@pytest.mark.parametrize("page", ["recipes.md", "scaling.md"])
def test_commands_name_configs_that_there_are(page):
    named = re.findall(r"--config ([\w.]+)", TEXT[page])
    assert named
    assert {name.removesuffix(".yaml") + ".yaml" for name in named} <= CONFIGS


def test_every_file_of_the_method_is_there():
    package = Path(locat_lightning.__file__).parent
    files = re.findall(r"`([\w/]+\.py)`", TEXT["method.md"])
    assert len(NAMED) >= 15
    assert [file for file in files if not ((package / file).is_file() or (ROOT / file).is_file())] == []


@pytest.mark.parametrize(("file", "names"), NAMED, ids=lambda each: each.replace("`", ""))
def test_every_function_of_the_method_is_there(file, names):
    module = import_module("locat_lightning." + file.removesuffix(".py").replace("/", "."))
    for name in re.findall(r"`([\w.]+)`", names):
        found = attrgetter(name)(module)
        # It is written in this file, not merely imported there.
        assert getattr(found, "__module__", module.__name__) == module.__name__, name


def test_the_results_are_those_of_three_finished_seeds_of_every_arm():
    config = yaml.safe_load((configs.config_directory() / "study_cifar.yaml").read_text())
    raw = json.loads((ROOT / "docs" / "results.json").read_text())
    preset = raw["results"][0]["preset"]
    study = Study.of(config, preset)
    assert f"--preset {preset}" in raw["command"]
    assert len(study.seeds) >= 3
    runs = [(result["arm"], result["seed"]) for result in raw["results"]]
    assert sorted(runs) == sorted((arm, seed) for arm in study.arms for seed in study.seeds)
    text = TEXT["results.md"]
    assert raw["command"] in text
    for result in raw["results"]:
        assert set(result["measures"]) == set(MEASURES)
    for arm in study.arms:
        (row,) = re.findall(rf"^\| {arm} \| {len(study.seeds)} \| (.*) \|$", text, flags=re.MULTILINE)
        for name, cell in zip(MEASURES, row.split(" | "), strict=True):
            of_arm = (r["measures"][name] for r in raw["results"] if r["arm"] == arm)
            found = [100 * value for value in of_arm if value is not None]
            assert cell == (
                f"{statistics.mean(found):.2f} ± {statistics.stdev(found):.2f}" if found else NOTHING
            )
    pictures = re.findall(r"\]\((results_\w+\.png)\)", text)
    assert len(pictures) == 4
    assert all((ROOT / "docs" / picture).is_file() for picture in pictures)


def test_the_readme_s_words_on_the_results_are_of_that_page():
    (words,) = re.findall(r"\*\*Does it do here.*?\n\n", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    figures = re.findall(r"\d+\.\d\d", words)
    assert len(figures) == 5
    assert [figure for figure in figures if f"| {figure} ±" not in TEXT["results.md"]] == []


def test_the_callbacks_of_scaling_do_what_they_say():
    (snippet,) = re.findall(r"```python\n(.*?)```", TEXT["scaling.md"], flags=re.DOTALL)
    own = {}
    exec(compile(snippet, "scaling.md", "exec"), own)
    backbone = timm.create_model("locatvit_tiny", img_size=32, patch_size=16, depth=1, num_classes=0)
    for task in (
        SimpleNamespace(backbone=backbone),
        SimpleNamespace(backbone=None, student=SimpleNamespace(backbone=backbone)),
    ):
        backbone.set_grad_checkpointing(False)
        backbone._compiled_call_impl = None
        own["Checkpointing"]().on_fit_start(None, task)
        own["Compile"]().on_fit_start(None, task)
        assert backbone.grad_checkpointing
        assert backbone._compiled_call_impl is not None
