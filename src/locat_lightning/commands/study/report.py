"""The report of a study: a page of tables, words and pictures of the results so far."""

import json
from collections.abc import Mapping, Sequence
from math import inf, sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from jinja2 import Template
from scipy.stats import t as student

from locat.runs import write_json
from locat_lightning.commands.study.pictures import draw
from locat_lightning.commands.study.plan import Study
from locat_lightning.commands.study.steps import Results, by_seed

NOTHING = "–"  # noqa: RUF001 - an empty cell
TEMPLATE = Path(__file__).with_name("report.md.jinja")
COST = {  # title, scale and format of each number
    "parameters": ("parameters", 1, "{:,.0f}"),
    "multiply_adds": ("multiply-adds", 1e-6, "{:,.1f} M"),
    "activation_bytes": ("memory", 2**-20, "{:,.2f} MiB"),
    "seconds_per_step": ("training step", 1000, "{:,.0f} ms"),
    "ratio": ("compared with the baseline", 1, "{:.2f}×"),
    "data_wait": ("waits for data", 1, "{:.0%}"),
    "peak_gpu_memory_bytes": ("peak GPU memory", 2**-30, "{:.2f} GiB"),
}


def write_report(
    page: Path, study: Study, results: Results, directory: Path, folders: Mapping[str, str], command: str
) -> None:
    """Write a Markdown page with the results of `read_results`, its pictures and a `.json` beside it."""
    write_json(page.with_suffix(".json"), {"command": command, "results": results})
    figures = draw(study, results, directory, folders)
    for name, figure in figures.items():
        figure.savefig(page.with_name(f"{page.stem}_{name}.png"))
    measured = {
        measure.title: name
        for name, measure in study.measures.items()
        if any(by_seed(arm, name, results) for arm in study.arms)
    }
    quality, differences, verdicts = [], [], {}
    for arm in study.arms:
        values = [[*by_seed(arm, name, results).values()] for name in measured.values()]
        quality.append([arm, sum(result["arm"] == arm for result in results), *map(_spread, values)])
        baseline = study.baseline_of(arm)
        found = {title: difference_between(baseline, arm, name, results) for title, name in measured.items()}
        if arm != baseline and any(found.values()):
            differences.append([f"{arm} − {baseline}", *map(_interval, found.values())])
            verdicts[arm] = in_words(found)
    finished = [(result["arm"], result["seed"]) for result in results]
    template = Template(TEMPLATE.read_text(encoding="utf-8"), trim_blocks=True, lstrip_blocks=True)
    text = template.render(
        study=study,
        results=results,
        command=command,
        page=page.stem,
        nothing=NOTHING,
        versions=dict.fromkeys(", ".join(map(" ".join, result["versions"].items())) for result in results),
        seconds=sum(sum(result["seconds"].values()) for result in results),
        options={name: [_option(*each) for each in arm.options.items()] for name, arm in study.arms.items()},
        missing=[f"{arm} (seed {seed})" for arm, seed in study.runs() if (arm, seed) not in finished],
        measured=list(measured),
        quality=quality,
        differences=differences,
        verdicts=verdicts,
        costs=_costs(study, results),
        figures=figures,
        baselines=dict.fromkeys(map(study.baseline_of, study.arms)),
    )
    page.write_text(text.rstrip() + "\n", encoding="utf-8")


class Difference(NamedTuple):
    """A mean of paired differences and its 95 % interval, which has no ends for a single pair."""

    mean: float
    low: float
    high: float
    pairs: int


def paired_difference(differences: Sequence[float]) -> Difference:
    """Return the mean of paired differences with Student's 95 % interval, mean ± t · s / √n."""
    n, middle = len(differences), mean(differences)
    half = float(student.ppf(0.975, n - 1)) * stdev(differences) / sqrt(n) if n > 1 else inf
    return Difference(middle, middle - half, middle + half, n)


def difference_between(baseline: str, arm: str, measure: str, results: Results) -> Difference | None:
    """Return the mean difference of a measure between runs of the same seed; None without a pair."""
    before, after = (by_seed(name, measure, results) for name in (baseline, arm))
    differences = [after[seed] - before[seed] for seed in sorted(before.keys() & after.keys())]
    return paired_difference(differences) if differences else None


def in_words(differences: Mapping[str, Difference | None]) -> str:
    """Say by title of the measure where an arm is better, where worse, and where no difference is shown."""
    titles: dict[str, list[str]] = {}
    for title, difference in differences.items():
        if difference is not None:
            titles.setdefault(_verdict(difference), []).append(title)
    return "; ".join(f"{verdict} in {', '.join(names)}" for verdict, names in sorted(titles.items()))


def _verdict(difference: Difference) -> str:
    if difference.pairs == 1:
        return "no interval with one seed"
    if difference.low > 0:
        return "better"
    return "worse" if difference.high < 0 else "no difference shown (the interval includes 0)"


def _option(name: str, value: object) -> str:
    return f"`{name.removeprefix('model.backbone_args.')}: {json.dumps(value)}`"


def _spread(values: list[float]) -> str:
    if not values:
        return NOTHING
    spread = f" ± {100 * stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.2f}{spread}"


def _interval(difference: Difference | None) -> str:
    if difference is None:
        return NOTHING
    average, low, high = (f"{100 * value:+.2f}" for value in difference[:3])
    return average if difference.pairs == 1 else f"{average} [{low}, {high}]"


def _costs(study: Study, results: Results) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of the table of costs: the least of each over the seeds of an arm."""
    costs: dict[str, dict[str, float]] = {arm: {} for arm in study.arms}
    for arm, cost in costs.items():
        for key in COST:
            if values := [r[key] for r in results if r["arm"] == arm and r.get(key) is not None]:
                cost[key] = min(values)
        baseline = costs[study.baseline_of(arm)]
        if "seconds_per_step" in cost and "seconds_per_step" in baseline:
            cost["ratio"] = cost["seconds_per_step"] / baseline["seconds_per_step"]
    shown = {key: each for key, each in COST.items() if any(key in cost for cost in costs.values())}
    rows = []
    for arm, cost in costs.items():
        numbers = (
            form.format(scale * cost[k]) if k in cost else NOTHING for k, (_, scale, form) in shown.items()
        )
        rows.append([arm, *numbers])
    return ["arm", *(title for title, _, _ in shown.values())], rows
