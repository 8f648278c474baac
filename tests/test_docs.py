"""The pages hold: links, snippets, commands, options, configs, figures, names of the method's code."""

import contextlib
import io
import json
import re
import runpy
import statistics
from functools import cache
from importlib import import_module
from inspect import signature
from operator import attrgetter
from pathlib import Path

import pytest
import torch
import yaml

import locat_lightning
from locat import configs
from locat.command import COMMANDS, main
from locat_lightning import data, methods, tasks
from locat_lightning.commands.study.command import read_study
from locat_lightning.commands.study.report import NOTHING
from tests.methods.runs import METHODS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [path.relative_to(ROOT).as_posix() for path in sorted(DOCS.rglob("*.md"))]
TEXTS = {name: (ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md", *PAGES)}
SHIPPED = sorted(configs.config_directory().rglob("*.yaml"))
CONFIGS = {path.name for path in SHIPPED}
OWN = {"own.yaml", "own_task.yaml", "probes.yaml", "loggers.yaml"}  # configs that a reader writes
METHOD, RESULTS = TEXTS["docs/method.md"], TEXTS["docs/results.md"]
# `file.py`: `name`, `name`
NAMED = re.findall(r"`([\w/]+\.py)`: (`[\w.]+`(?:, `[\w.]+`)*)", METHOD)


def blocks(text, language):
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def snippets(page):
    """The blocks of Python of a page that are no files (`# own.py`)."""
    return [block for block in blocks(TEXTS[page], "python") if not re.match(r"# \w+\.py\n", block)]


def prose(text):
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def words(option):
    """An option up to what is the same for every model: `--model.backbone_args` of `…backbone_args.depth`."""
    return ".".join(option.split(".")[:2])


@cache
def options_of(command):
    """The options in a command's help."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([command, "--help"])
    return {words(option) for option in re.findall(r"--[\w.]+", printed.getvalue())}


@cache
def options_of_classes(group, *names):
    """`--model.…` or `--data.…` of some classes; of all if none is named."""
    modules = {"model": (tasks, methods), "data": (data,)}[group]
    classes = [getattr(module, name) for module in modules for name in module.__all__]
    bases = {base for each in classes if each.__name__ in names or not names for base in each.__mro__}
    return {f"--{group}.{name}" for base in bases - {object} for name in signature(base.__init__).parameters}


def anchor(heading):
    """The name that GitHub and mkdocs give to a heading."""
    words = re.sub(r"[^\w\s-]", "", heading.lower()).strip()
    return re.sub(r"\s+", "-", words)


@pytest.mark.parametrize("page", TEXTS)
def test_every_relative_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", prose(TEXTS[page]))
    for link in links:
        if link.startswith(("https://", "http://")):
            continue
        path, _, fragment = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.is_file(), link
        assert target.is_relative_to(ROOT), link
        if fragment:
            headings = re.findall(r"^#+ (.*)$", prose(target.read_text()), flags=re.MULTILINE)
            assert fragment in [anchor(each) for each in headings], link


def test_every_page_is_in_the_navigation_of_the_site():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("nav:\n")[2].partition("\n\n")[0]
    assert sorted(re.findall(r": ([\w/-]+\.md)$", navigation, flags=re.MULTILINE)) == sorted(
        page.removeprefix("docs/") for page in PAGES
    )


def test_every_file_of_contributing_is_there():
    named = re.findall(r"`((?:src|tests|configs|benchmarks|docs)/[\w./]*)`", TEXTS["CONTRIBUTING.md"])
    assert len(named) > 15
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_readme_links_every_guide():
    for page in PAGES:
        if "/api/" not in page and page != "docs/index.md":
            assert f"({page})" in TEXTS["README.md"]


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)])
def test_every_snippet_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"__name__": "__snippet__"}
    for snippet in snippets(page):
        exec(compile(snippet, page, "exec"), names)
    if page == "docs/python.md":
        assert [each.shape for each in names["kernels"]] == [(2, 64, 8, 8)] * 12
        assert names["attention"].shape == (2, 6, 8, 8)
        assert names["vectors"].shape == (2, 384)
        assert names["embeddings"].shape == (3, 384)


@pytest.fixture
def own_files(tmp_path, monkeypatch):
    """The files of the page on extensions, in the current directory, from which they can be imported."""
    page = TEXTS["docs/extend.md"]
    for block in blocks(page, "python"):
        (tmp_path / re.match(r"# (\w+\.py)\n", block)[1]).write_text(block)
    for name, config in zip(("own.yaml", "own_task.yaml"), blocks(page, "yaml"), strict=True):
        (tmp_path / name).write_text(config)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    commands = re.findall(r"^PYTHONPATH=\. locat (.*)$", page, flags=re.MULTILINE)
    short = ["--trainer.max_epochs=1", "--trainer.enable_progress_bar=false"]
    short += ["--trainer.accelerator=cpu", "--data.num_workers=0", "--trainer.limit_train_batches=1"]
    short += ["--trainer.limit_val_batches=1", "--pictures.every_n_epochs=0", "--knn.every_n_epochs=0"]
    warmup = [[] if "own_task" in command else ["--model.warmup_epochs=0"] for command in commands]
    return [
        [*command.split(), *(short + more if command.startswith("fit") else [])]
        for command, more in zip(commands, warmup, strict=True)
    ]


@pytest.mark.slow
def test_every_extension_trains(own_files, tmp_path):
    assert len(own_files) >= 4
    for command in own_files:
        main(command)
    measured = json.loads((tmp_path / "runs/own_knn/version_0/metrics.json").read_text())
    assert 0 < measured["knn/top1_k20"] < 1
    heads = [path.read_text().splitlines()[0] for path in (tmp_path / "runs").rglob("metrics.csv")]
    assert len(heads) == len(own_files) - 1
    assert any("features/rank" in head for head in heads)


@pytest.mark.parametrize("page", TEXTS)
def test_commands_name_commands_and_configs_that_there_are(page):
    text = TEXTS[page]
    for name in re.findall(r"--config ([\w.]+)(?![\w.…])", text):
        assert name.removesuffix(".yaml") + ".yaml" in CONFIGS | OWN, name
    lines = "\n".join(blocks(text, "bash"))
    assert set(re.findall(r"^locat (\w+)", lines, flags=re.MULTILINE)) <= set(COMMANDS)


@pytest.mark.parametrize("page", TEXTS)
def test_every_option_exists(page):
    lines = "\n".join(blocks(TEXTS[page], "bash")).replace("\\\n", " ")
    for command, rest in re.findall(r"\blocat (\w+) (.*)", lines):
        known = options_of(command)
        if command in ("fit", "validate", "test", "predict", "pack"):
            shipped = [path for path in SHIPPED if f"--config {path.stem}" in rest]
            config = yaml.safe_load(shipped[0].read_text()) if len(shipped) == 1 else {}
            for group in ("model", "data"):
                chosen = [config[group]["class_path"]] if group in config else []
                known = known | options_of_classes(group, *chosen) | {f"--{group}.help"}
        if command == "compare" and (protocol := re.search(r"--protocol (\w+)", rest)):
            known = known | options_of(protocol[1])
        for option in re.findall(r"--[a-z][\w.]*", rest.partition(" # ")[0]):
            option = re.sub(r"--folders\.\w+", "--folders.NAME", option)
            assert words(option) in known, f"{command}: {option}"
    for option in re.findall(
        r"--(?:model|data|trainer|knn|linear|retrieval|pictures|checkpoint)\.\w+", TEXTS[page]
    ):
        known = options_of("fit") | options_of_classes("model") | options_of_classes("data")
        assert option in known | {"--model.help", "--data.help"}, option


def test_the_study_that_is_shown_is_the_shipped_one():
    (shown,) = blocks(TEXTS["docs/study.md"], "yaml")
    assert yaml.safe_load(shown) == yaml.safe_load(
        (configs.config_directory() / "study_digits.yaml").read_text()
    )


def test_make_targets_are_those_of_the_makefile():
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page, text in TEXTS.items():
        named = re.findall(r"`make ([a-z-]+)`", text)
        named += re.findall(r"^make ([a-z-]+)", "\n".join(blocks(text, "bash")), flags=re.MULTILINE)
        assert set(named) <= targets, page


def test_every_config_has_a_row_and_every_row_a_config():
    rows = re.findall(r"^\| `([\w.]+\.yaml)` \|", TEXTS["docs/recipes.md"], flags=re.MULTILINE)
    assert sorted(rows) == sorted(CONFIGS)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_is_in_the_docs(method):
    assert f".{method}\n" in TEXTS["docs/api/tasks.md"]


@pytest.mark.parametrize("result", ["backbones-cpu.md", "segmentation-cpu.md"])
def test_the_costs_are_those_that_were_measured(result):
    rows = [
        line for line in (ROOT / "benchmarks/results" / result).read_text().splitlines() if line[:1] == "|"
    ]
    assert "\n".join(rows) in TEXTS["docs/costs.md"]


def test_figures_are_replaced_where_they_stand(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    refresh = runpy.run_path(str(ROOT / "benchmarks" / "refresh.py"))
    page = "| | ms |\n|-|-|\n| step | 5 |\n\n| | s |\n|-|-|\n| load | 5 |\n"
    assert refresh["replace_tables"](page, "| | ms |\n|-|-|\n| step | 7 |\n") == page.replace(
        "step | 5", "step | 7"
    )
    old, new = "a/version_0 top1 0.9528 (best 0.975)", "a/version_0  top1 0.975 (best 0.98)"
    figures = refresh["replaced_figures"](old, new)
    assert (
        refresh["replace_figures"](f"{old}\n0.9528, 10.9528, 0.975", figures)
        == f"{new}\n0.975, 10.9528, 0.98"
    )


@pytest.mark.slow
def test_the_table_of_models_is_up_to_date():
    """By the smallest model of each architecture, which each cell begins with."""
    lines = runpy.run_path(str(ROOT / "benchmarks" / "rows.py"))["costs"](["tiny"])
    table = TEXTS["docs/models.md"].partition("| parameters (M) |")[2].splitlines()[2:]
    firsts = [
        " | ".join(cell.partition(" / ")[0] for cell in line[:-2].split(" | ")) + " |" for line in table
    ]
    assert lines == firsts[: len(lines)]


def test_every_file_of_the_method_is_there():
    package = Path(locat_lightning.__file__).parent
    files = re.findall(r"`([\w/]+\.py)`", METHOD)
    assert len(NAMED) >= 15
    assert [file for file in files if not ((package / file).is_file() or (ROOT / file).is_file())] == []


@pytest.mark.parametrize(("file", "names"), NAMED, ids=lambda each: each.replace("`", ""))
def test_every_function_of_the_method_is_there(file, names):
    module = import_module("locat_lightning." + file.removesuffix(".py").replace("/", "."))
    for name in re.findall(r"`([\w.]+)`", names):
        found = attrgetter(name)(module)
        while hasattr(found, "fn"):  # a Triton kernel and what tunes it
            found = found.fn
        # It is written in this file, not merely imported there.
        assert getattr(found, "__module__", module.__name__) == module.__name__, name


def test_the_results_are_those_of_three_finished_seeds_of_every_arm():
    raw = json.loads((DOCS / "results.json").read_text())
    study, _ = read_study(raw["command"].removeprefix("locat study ").split())
    assert len(study.seeds) >= 3
    assert [(result["arm"], result["seed"]) for result in raw["results"]] == study.runs()
    assert raw["command"] in RESULTS
    for result in raw["results"]:
        assert set(result["measures"]) == set(study.measures)
    for arm in study.arms:
        (row,) = re.findall(rf"^\| {arm} \| {len(study.seeds)} \| (.*) \|$", RESULTS, flags=re.MULTILINE)
        for name, cell in zip(study.measures, row.split(" | "), strict=True):
            of_arm = (r["measures"][name] for r in raw["results"] if r["arm"] == arm)
            found = [100 * value for value in of_arm if value is not None]
            assert cell == (
                f"{statistics.mean(found):.2f} ± {statistics.stdev(found):.2f}" if found else NOTHING
            )
    assert len(re.findall(r"\]\((results_\w+\.png)\)", RESULTS)) >= 4


def test_the_words_on_the_results_are_of_that_page():
    (words,) = re.findall(r"## Results\n.*?(?=\n## )", TEXTS["docs/index.md"], flags=re.DOTALL)
    figures = re.findall(r"\d+\.\d\d", words)
    assert len(figures) == 5
    assert [figure for figure in figures if f"| {figure} ±" not in RESULTS] == []
