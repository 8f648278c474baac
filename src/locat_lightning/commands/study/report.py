"""The report of a study: a page of tables, words and pictures of the results so far."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

from matplotlib.figure import Figure

from locat_lightning.commands.study.pictures import (
    features_figure,
    lines_figure,
    points_figure,
    predictions_figure,
)
from locat_lightning.commands.study.plan import Study
from locat_lightning.commands.study.statistics import Difference, paired_difference
from locat_lightning.commands.study.steps import Results, write_json, write_whole

NOTHING = "–"  # noqa: RUF001 - an empty cell
BACKBONE = "model.backbone_args."
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
    """Write a page with the results so far; its pictures and a `.json` beside it.

    Args:
        page: the Markdown file.
        study: what was planned.
        results: of the finished arms and seeds (`read_results`).
        directory: of the study's runs.
        folders: that it reads, by name.
        command: that writes the page.
    """
    raw = page.with_suffix(".json")
    write_json(raw, {"command": command, "results": results})
    sections = [_head(study, results, command, raw.name)]
    if results:
        sections += [_quality(study, results), *_differences(study, results), _cost(study, results)]
        sections += _pictures(page, study, results, directory, folders)
        sections.append(_commands(study, results))
    write_whole(page, "\n\n".join(sections) + "\n")


def difference_between(baseline: str, arm: str, measure: str, results: Results) -> Difference | None:
    """Return the mean difference of a measure between runs of the same seed; None without a pair."""
    before, after = (_by_seed(name, measure, results) for name in (baseline, arm))
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


def _head(study: Study, results: Results, command: str, raw: str) -> str:
    machines = dict.fromkeys(result["machine"] for result in results)
    versions = dict.fromkeys(", ".join(map(" ".join, result["versions"].items())) for result in results)
    hours = sum(sum(result["seconds"].values()) for result in results) / 3600
    lines = [
        f"Written by `{command}`. All numbers, and the commands of each run, are in [{raw}]({raw}); "
        "[Commands](#commands) shows how each was measured.",
        "",
        f"- **Arms**: {len(study.arms)}, each with seeds {', '.join(map(str, study.seeds))}. Arms of one "
        "recipe differ only in the options below.",
        f"- **Machine**: {'; '.join(machines) or NOTHING}; {hours:.1f} hours of finished steps.",
        f"- **Versions**: {'; '.join(versions) or NOTHING}.",
    ]
    for name, arm in study.arms.items():
        own = [f"`{key.removeprefix(BACKBONE)}: {json.dumps(value)}`" for key, value in arm.options.items()]
        lines.append(f"- **{name}**: {', '.join([arm.recipe, *(own or ['the recipe unchanged'])])}.")
    for name, count in study.per_class.items():
        lines.append(f"- {count:,} training images of each class of `{{{name}}}`, the same for all arms.")
    lines += [f"- {note}" for note in study.notes]
    if results:
        missing = [each for each in study.measures.values() if each.title not in _measured(study, results)]
        lines += [f"- No {each.title}: step `{each.step}` has no `{each.metric}`." for each in missing]
    finished = [(result["arm"], result["seed"]) for result in results]
    if left := [f"{arm} (seed {seed})" for arm, seed in study.runs() if (arm, seed) not in finished]:
        lines += ["", f"**Not finished.** Missing: {', '.join(left)}. The same command resumes the study."]
    return "\n".join(["# Results", "", *lines])


def _quality(study: Study, results: Results) -> str:
    shown, rows = _measured(study, results), []
    for arm in study.arms:
        row = [arm, str(sum(result["arm"] == arm for result in results))]
        for measure in shown.values():
            values = [100 * value for value in _by_seed(arm, measure, results).values()]
            spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
            row.append(f"{mean(values):.2f}{spread}" if values else NOTHING)
        rows.append(row)
    table = _table(["arm", "seeds", *shown], rows)
    return f"## Quality\n\nPer cent: mean ± standard deviation over the seeds.\n\n{table}"


def _differences(study: Study, results: Results) -> list[str]:
    shown, rows, words = _measured(study, results), [], []
    for arm in study.arms:
        baseline = study.baseline_of(arm)
        found = {title: difference_between(baseline, arm, name, results) for title, name in shown.items()}
        if arm != baseline and any(found.values()):
            rows.append([f"{arm} − {baseline}", *map(_interval, found.values())])
            words.append(f"- **{arm}** compared with {baseline}: {in_words(found)}.")
    if not rows:
        return []
    return [
        "## Difference by seed\n\nPercentage points: mean difference between runs of the same seed, with its "
        "95 % interval (Student's t over the seeds, which are all measured on the same images). With few "
        "seeds the intervals are wide. They are not corrected for multiple comparisons: by chance alone, one "
        f"in twenty excludes 0.\n\n{_table(['', *shown], rows)}\n\n" + "\n".join(words)
    ]


def _interval(difference: Difference | None) -> str:
    if difference is None:
        return NOTHING
    average, low, high = (f"{100 * value:+.2f}" for value in difference[:3])
    return average if difference.pairs == 1 else f"{average} [{low}, {high}]"


def _cost(study: Study, results: Results) -> str:
    costs: dict[str, dict[str, float]] = {arm: {} for arm in study.arms}
    for arm, cost in costs.items():
        for key in COST:
            if values := [r[key] for r in results if r["arm"] == arm and r.get(key) is not None]:
                cost[key] = min(values)
        baseline = costs[study.baseline_of(arm)]
        if "seconds_per_step" in cost and "seconds_per_step" in baseline:
            cost["ratio"] = cost["seconds_per_step"] / baseline["seconds_per_step"]
    keys = [key for key in COST if any(key in cost for cost in costs.values())]
    rows = [[arm, *(_number(key, cost.get(key)) for key in keys)] for arm, cost in costs.items()]
    table = _table(["arm", *(COST[key][0] for key in keys)], rows)
    return (
        "## Cost\n\nOf the backbone without its head. Multiply-adds are for the forward pass of one image; "
        "memory is what autograd keeps of one image for the backward pass, in float32. The training step "
        "includes waiting for data and is the fastest that was logged. Each number is the least over the "
        f"seeds, as other work on the machine only adds to it.\n\n{table}"
    )


def _number(key: str, value: float | None) -> str:
    _, scale, form = COST[key]
    return NOTHING if value is None else form.format(scale * value)


def _pictures(
    page: Path, study: Study, results: Results, directory: Path, folders: Mapping[str, str]
) -> list[str]:
    """Draw what can be drawn so far, beside the page, and return the sections that show it."""
    sections: list[str] = []

    def add(name: str, title: str, caption: str, figure: Figure) -> None:
        file = page.with_name(f"{page.stem}_{name}.png")
        figure.savefig(file)
        sections.append(f"## {title}\n\n![{title}]({file.name})\n\n*{caption}*")

    chosen = study.pictures
    if chosen.quality is not None:
        x, y = (study.measures[name].title for name in chosen.quality)
        points = {}
        for arm in study.arms:
            across, up = (_by_seed(arm, name, results) for name in chosen.quality)
            points[arm] = [(100 * across[seed], 100 * up[seed]) for seed in across.keys() & up.keys()]
        if any(points.values()):
            figure = points_figure(points, f"{x}, per cent", f"{y}, per cent")
            title = f"{y[:1].upper()}{y[1:]} over {x}"
            add("quality", title, "A circle for each seed and a dot for each arm's mean.", figure)
    found = {arm: [r["kernel_widths"] for r in results if r["arm"] == arm] for arm in study.arms}
    widths = {arm: [mean(block) for block in zip(*each, strict=True)] for arm, each in found.items()}
    if any(widths.values()):
        caption = (
            "Root mean square standard deviation of the Gaussian kernels on some validation images, by "
            "block; mean over the seeds. Grey: one patch, as before the training."
        )
        figure = lines_figure(widths, "block", "kernel width, in patches", level=1.0)
        add("kernels", "How far patches look", caption, figure)
    seed = study.seeds[0]
    steps = {step.name: step for step in study.steps(next(iter(study.arms)), seed)}
    arms = {r["arm"]: directory / r["arm"] / f"seed_{seed}" for r in results if r["seed"] == seed}
    if arms and chosen.features in steps:
        caption = (
            f"Validation images of `{chosen.features}`, and the first three principal components of each "
            f"arm's patch features as red, green and blue; seed {seed}. Colours of different arms do not "
            "correspond."
        )
        add("features", "Patch features", caption, features_figure(arms, steps[chosen.features], folders))
    if arms and chosen.predictions in steps:
        step = steps[chosen.predictions]
        caption = f"Images of `{step.weights}`, their annotation, and each arm's prediction; seed {seed}."
        figure = predictions_figure(arms, step, steps[step.weights], folders)
        add("predictions", "Predictions", caption, figure)
    return sections


def _commands(study: Study, results: Results) -> str:
    """Show the steps of the first arm of each recipe, and what each says it measured."""
    lines = [
        "## Commands",
        "",
        "Of the first arm and seed of each recipe; the options of the other arms are listed above. A name in "
        "braces stands for the folder of that name or, after `--weights`, for the last checkpoint of that "
        "step.",
    ]
    for arm in dict.fromkeys(map(study.baseline_of, study.arms)):
        if (result := next((each for each in results if each["arm"] == arm), None)) is not None:
            lines += ["", f"**{arm}**", ""]
            for step, typed in result["commands"].items():
                said = result["measured"].get(step)
                lines.append(f"- {step}: `{typed}`" + (f" ({said})" if said else ""))
    return "\n".join(lines)


def _by_seed(arm: str, measure: str, results: Results) -> dict[int, float]:
    own = {result["seed"]: result["measures"].get(measure) for result in results if result["arm"] == arm}
    return {seed: value for seed, value in own.items() if value is not None}


def _measured(study: Study, results: Results) -> dict[str, str]:
    """Return the measures that some arm has, by title."""
    return {
        measure.title: name
        for name, measure in study.measures.items()
        if any(result["measures"].get(name) is not None for result in results)
    }


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
