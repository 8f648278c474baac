"""The report of a study: a page of tables, words and pictures of the results so far."""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev

from jinja2 import Template

from locat.runs import write_json
from locat_lightning.commands.study.differences import (
    Difference,
    Place,
    course,
    difference_between,
    in_words,
)
from locat_lightning.commands.study.pictures import draw, layers_by_epoch
from locat_lightning.commands.study.plan import Study, epoch_of
from locat_lightning.commands.study.steps import IMAGES, Results, by_seed
from locat_lightning.evaluation.layers import MEASURES
from locat_lightning.figures.layers import layers_of, short

NOTHING = "–"  # noqa: RUF001 - an empty cell
TEMPLATE = Path(__file__).with_name("report.md.jinja")
# The last two need checkpoints, and stay as they are where there are none any more.
PICTURES = ("quality", "curves", "kernels", "layers", "features", "predictions")
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
    kept = [{key: value for key, value in each.items() if key != IMAGES} for each in results]
    write_json(page.with_suffix(".json"), {"command": command, "results": kept})
    measured = {
        measure.title: name
        for name, measure in study.measures.items()
        if any(by_seed(arm, name, results) for arm in study.arms)
    }
    quality, differences, verdicts, courses = [], [], {}, {}
    for arm in study.arms:
        values = [[*by_seed(arm, name, results).values()] for name in measured.values()]
        quality.append([arm, sum(result["arm"] == arm for result in results), *map(_spread, values)])
        baseline = study.baseline_of(arm)
        found = {title: difference_between(baseline, arm, name, results) for title, name in measured.items()}
        if arm != baseline and any(found.values()):
            differences.append([f"{arm} − {baseline}", *map(_interval, found.values())])
            courses[arm] = {title: course(study, arm, name, results) for title, name in measured.items()}
            last = {title: places[-1].over_images for title, places in courses[arm].items() if places}
            verdicts[arm] = in_words(found, last)
    over_images = [
        [f"{arm} − {study.baseline_of(arm)}", *(_over_images(places) for places in of_arm.values())]
        for arm, of_arm in courses.items()
    ]
    pictures = draw(study, results, courses, directory, folders)
    for name, figure in pictures.items():
        figure.savefig(_file(page, name))
    figures = [name for name in PICTURES if name in pictures or _file(page, name).is_file()]
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
        missing=[
            *(f"{arm} (seed {seed})" for arm, seed in study.runs() if (arm, seed) not in finished),
            *(
                f"{', '.join(each['missing'])} of {each['arm']} (seed {each['seed']})"
                for each in results
                if each["missing"]
            ),
        ],
        measured=list(measured),
        quality=quality,
        differences=differences,
        over_images=over_images if any(set(row[1:]) - {NOTHING} for row in over_images) else [],
        by_epoch=_by_epoch(study, measured, results),
        layers=_layers(study, results),
        verdicts=verdicts,
        costs=_costs(study, results),
        figures=figures,
        baselines=dict.fromkeys(map(study.baseline_of, study.arms)),
        of_epochs={epoch_of(step, epoch) for step in study.probes for epoch in study.epochs},
    )
    page.write_text(text.rstrip() + "\n", encoding="utf-8")


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


def _over_images(places: list[Place]) -> str:
    """Return the last difference of a course with its interval over images."""
    if not places or places[-1].over_images is None:
        return NOTHING
    difference, interval = places[-1].difference, places[-1].over_images
    return _interval(Difference(difference.mean, *interval, difference.pairs + 1))


def _by_epoch(study: Study, measured: Mapping[str, str], results: Results) -> list[list[str]]:
    """Return the head and the rows of the table of what was measured along the training, or []."""
    curved = {
        title: sorted({epoch for result in results for epoch in result["curves"].get(name, ())})
        for title, name in measured.items()
    }
    epochs = sorted({epoch for of in curved.values() if len(of) > 1 for epoch in of})
    rows = [["", "arm", *map(str, epochs)]]
    for title, name in measured.items():
        for arm in study.arms if len(curved[title]) > 1 else ():
            cells = [_spread([*by_seed(arm, name, results, epoch).values()]) for epoch in epochs]
            rows.append([title, arm, *cells])
    return rows if epochs else []


def _layers(study: Study, results: Results) -> list[list[str]]:
    """Return the head and the rows of the table of what layers do after an arm's last epoch, or []."""
    last = {
        arm: found for of_epoch in layers_by_epoch(study, results).values() for arm, found in of_epoch.items()
    }
    layers = layers_of(last.values())
    rows = [["", "arm", *map(short, layers)]]
    for measure, title in MEASURES.items():
        for arm in [arm for arm in study.arms if measure in last.get(arm, {})]:
            cells = [last[arm][measure].get(layer) for layer in layers]
            rows.append([title, arm, *(NOTHING if cell is None else f"{cell:.3f}" for cell in cells)])
    return rows if last else []


def _file(page: Path, picture: str) -> Path:
    return page.with_name(f"{page.stem}_{picture}.png")


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
