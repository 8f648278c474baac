"""The report of a study: a page of tables, words and pictures from the results that there are."""

import json
from collections.abc import Callable, Mapping, Sequence
from math import isnan
from pathlib import Path
from statistics import mean
from typing import Any

from PIL import Image

from locat_lightning.commands.study.charts import Point, colours_of, draw_lines, draw_points
from locat_lightning.commands.study.pictures import draw_features, draw_predictions
from locat_lightning.commands.study.plan import MEASURES, Study
from locat_lightning.commands.study.results import write_atomically
from locat_lightning.commands.study.statistics import Difference, mean_and_deviation, paired_difference

NOTHING = "–"  # noqa: RUF001 - what a table has where there is nothing
Results = Sequence[Mapping[str, Any]]


def write_report(
    page: Path,
    study: Study,
    results: Results,
    directory: Path,
    folders: Mapping[str, str],
    command: str,
) -> None:
    """Write a page, its pictures and `.json` beside it, of the results that there are.

    Args:
        page: the Markdown file.
        study: what was planned.
        results: of the arms and seeds that are finished, as `result.json` has them.
        directory: of the study's runs.
        folders: where images and masks are.
        command: that writes it.
    """
    with_commands = [
        {
            **result,
            "commands": {step.name: step.typed() for step in study.steps(result["arm"], result["seed"])},
        }
        for result in results
    ]
    write_atomically(page.with_suffix(".json"), {"command": command, "results": with_commands})
    pictures = _pictures(page, study, results, directory, folders)
    parts = [_head(study, results, command, page.with_suffix(".json").name)]
    if results:
        parts += [_quality(study, results), *_differences(study, results), _cost(study, results), *pictures]
        parts.append(_commands(study, results, directory))
    part = page.with_suffix(".part")
    part.write_text("\n\n".join(parts) + "\n")
    part.replace(page)


def differences_to(base: str, arm: str, measure: str, results: Results) -> Difference | None:
    """Of one measure the mean of an arm's differences to another, seed by seed; None without a pair."""
    of_base, of_arm = (_by_seed(name, measure, results) for name in (base, arm))
    pairs = sorted(of_base.keys() & of_arm.keys())
    return paired_difference([of_arm[seed] - of_base[seed] for seed in pairs]) if pairs else None


def _head(study: Study, results: Results, command: str, raw: str) -> str:
    finished = {(result["arm"], result["seed"]) for result in results}
    missing = [
        f"{arm} (seed {seed})" for seed in study.seeds for arm in study.arms if (arm, seed) not in finished
    ]
    machines = dict.fromkeys(result["machine"] for result in results)
    versions = dict.fromkeys(
        ", ".join(f"{name} {number}" for name, number in result["versions"].items()) for result in results
    )
    hours = sum(sum(result["seconds"].values()) for result in results) / 3600
    lines = [
        "# Results",
        "",
        f"Written by `{command}`; the numbers are what they are. All of them, and the commands of "
        f"each run, are in [{raw}]({raw}); how each was measured is [below](#commands).",
        "",
        f"- **Preset** `{study.preset}`: {len(study.arms)} arms, seeds {', '.join(map(str, study.seeds))}."
        " Arms of one recipe have the same size, data, data order, augmentations, number of steps and seeds.",
        f"- **Machine** {'; '.join(machines) or NOTHING}; {hours:.1f} hours of finished steps.",
        f"- **Versions** {'; '.join(versions) or NOTHING}.",
        *(f"- **{arm}**: {_options(study, arm)}." for arm in study.arms),
        "- Every figure is of the last checkpoint, and none was chosen by the images that it is measured on,"
        " but for the linear classifier's learning rate.",
    ]
    if study.images_per_class is not None:
        lines.append(f"- {study.images_per_class:,} training images of each class, chosen once for all arms.")
    if missing:
        lines += ["", f"**Not finished.** Missing: {', '.join(missing)}. The same command goes on."]
    return "\n".join(lines)


def _options(study: Study, arm: str) -> str:
    """The recipe of an arm, and what is its own."""
    own = [
        f"`{name.removeprefix('model.backbone_args.')}: {json.dumps(v)}`"
        for name, v in study.arms[arm].items()
    ]
    return f"{study.recipe_of[arm]}, {', '.join(own) or 'the recipe unchanged'}"


def _quality(study: Study, results: Results) -> str:
    shown = _shown(results)

    def cell(arm: str, measure: str) -> str:
        values = list(_by_seed(arm, measure, results).values())
        if not values:
            return NOTHING
        average, deviation = mean_and_deviation(values)
        return f"{100 * average:.2f}" + ("" if isnan(deviation) else f" ± {100 * deviation:.2f}")

    rows = [[arm, _seeds(arm, results), *(cell(arm, name) for name in shown)] for arm in study.arms]
    table = _table(["arm", "seeds", *(MEASURES[name].title for name in shown)], rows)
    return (
        "## Quality\n\nPer cent: mean ± standard deviation over the seeds. Top-1 is of the trained "
        f"classifier, all else of the frozen backbone.\n\n{table}"
    )


def _differences(study: Study, results: Results) -> list[str]:
    shown = _shown(results)
    rows, words = [], []
    for arm in study.arms:
        base = study.base_of(arm)
        found = {name: differences_to(base, arm, name, results) for name in shown}
        if arm != base and any(found.values()):
            rows.append([f"{arm} − {base}", *(_interval(found[name]) for name in shown)])
            words.append(f"- **{arm}** beside {base}: {in_words(found)}.")
    if not rows:
        return []
    table = _table(["", *(MEASURES[name].title for name in shown)], rows)
    return [
        "## Difference by seed\n\nPercentage points: mean of the differences between runs of one seed, with "
        "its 95 % interval (Student's t over the seeds, which are all measured on the same images). With so "
        "few seeds the intervals are wide. Nothing is corrected for how many there are: one in twenty "
        f"excludes 0 by chance.\n\n{table}\n\n" + "\n".join(words)
    ]


def in_words(found: Mapping[str, Difference | None]) -> str:
    """Where an arm is better, where worse, and where nothing is shown.

    Args:
        found: differences to the arm that it is compared with, by measure.
    """
    verdicts: dict[str, list[str]] = {}
    for name, difference in found.items():
        if difference is not None:
            verdicts.setdefault(_verdict(difference), []).append(MEASURES[name].title)
    return "; ".join(f"{verdict} in {', '.join(titles)}" for verdict, titles in sorted(verdicts.items()))


def _verdict(difference: Difference) -> str:
    if difference.low > 0:
        return "better"
    if difference.high < 0:
        return "worse"
    if difference.pairs == 1:
        return "no interval with one seed"
    return "no difference shown (the interval includes 0)"


def _interval(difference: Difference | None) -> str:
    if difference is None:
        return NOTHING
    average = f"{100 * difference.mean:+.2f}"
    if difference.pairs == 1:
        return average
    return f"{average} [{100 * difference.low:+.2f}, {100 * difference.high:+.2f}]"


def _cost(study: Study, results: Results) -> str:
    def least(arm: str, key: str) -> float | None:
        return min((r[key] for r in results if r["arm"] == arm and r[key] is not None), default=None)

    def cell(value: float | None, form: Callable[[float], str]) -> str:
        return NOTHING if value is None else form(value)

    on_gpu = any(result["peak_gpu_memory_bytes"] for result in results)
    rows = []
    for arm in study.arms:
        step, of_base = (least(each, "seconds_per_step") for each in (arm, study.base_of(arm)))
        row = [
            arm,
            cell(least(arm, "parameters"), lambda n: f"{n:,.0f}"),
            cell(least(arm, "multiply_adds"), lambda n: f"{n / 1e6:,.1f} M"),
            cell(least(arm, "activation_bytes"), lambda n: f"{n / 2**20:,.2f} MiB"),
            cell(step, lambda s: f"{1000 * s:,.0f} ms"),
            cell(step / of_base if step and of_base else None, lambda ratio: f"{ratio:.2f}×"),
            cell(least(arm, "data_wait"), lambda share: f"{share:.0%}"),
        ]
        rows.append(
            row + [cell(least(arm, "peak_gpu_memory_bytes"), lambda n: f"{n / 2**30:.2f} GiB")] * on_gpu
        )
    head = [
        "arm",
        "parameters",
        "multiply-adds",
        "memory",
        "training step",
        "of its recipe's first arm",
        "waits for data",
    ]
    table = _table(head + ["peak GPU memory"] * on_gpu, rows)
    return (
        "## Cost\n\nOf the backbone without its head. Multiply-adds are those of one image forward, and "
        "memory what autograd keeps of one image for the backward pass, in float32. The training step, "
        "waiting for data included, is the fastest that was logged, and all is the least of the seeds: other "
        f"work on the machine only adds to it.\n\n{table}"
    )


def _pictures(
    page: Path, study: Study, results: Results, directory: Path, folders: Mapping[str, str]
) -> list[str]:
    """Draw what can be drawn beside the page, and give the sections that show it."""
    drawn: list[str] = []

    def add(name: str, title: str, caption: str, image: Image.Image | None) -> None:
        if image is not None:
            file = page.with_name(f"{page.stem}_{name}.png")
            image.save(file, optimize=True)
            drawn.append(f"## {title}\n\n![{title}]({file.name})\n\n*{caption}*")

    page.parent.mkdir(parents=True, exist_ok=True)
    colours = colours_of(study.arms)
    # Arms without a classifier of their own, as DINO's, share the axis of the linear one.
    score = "linear" if any(r["measures"].get("top1") is None for r in results) else "top1"
    points = {
        arm: found
        for arm in study.arms
        if (
            found := [
                Point(100 * r["measures"][score], 100 * r["measures"]["masks"])
                for r in results
                if r["arm"] == arm and None not in (r["measures"].get(score), r["measures"].get("masks"))
            ]
        )
    }
    if points:
        titles = [f"{MEASURES[name].title}, per cent" for name in (score, "masks")]
        caption = "A small circle for each seed, and a dot for each arm's mean."
        add(
            "quality",
            "Patch features beside class scores",
            caption,
            draw_points(points, *titles, colours=colours),
        )
    widths = {
        arm: [mean(block) for block in zip(*found, strict=True)]
        for arm in study.arms
        if (found := [r["kernel_widths"] for r in results if r["arm"] == arm and r["kernel_widths"]])
    }
    if widths:
        chart = draw_lines(widths, "block", "kernel width, in patches", colours=colours, level=1.0)
        caption = (
            "Root mean square standard deviation of the Gaussian kernels of some validation images, by "
            "block; mean over the seeds. Grey: one patch, where all began."
        )
        add("kernels", "How far patches look", caption, chart)
    seed = study.seeds[0]
    arms = [arm for arm in study.arms if any(r["arm"] == arm and r["seed"] == seed for r in results)]
    if arms and "masks" in study.probes:
        at = {arm: directory / arm / f"seed_{seed}" for arm in arms}
        caption = (
            f"Validation images of the probe, and the first three principal components of each arm's patch "
            f"features as red, green and blue; seed {seed}. Colours of different arms do not correspond."
        )
        add("features", "Patch features", caption, draw_features(at, Path(folders["masks"])))
        caption = f"The same images, their annotation, and what each arm's probe predicts; seed {seed}."
        title = "Predictions of the segmentation probe"
        add("predictions", title, caption, draw_predictions(at, Path(folders["masks"])))
    return drawn


def _commands(study: Study, results: Results, directory: Path) -> str:
    """The steps of the first arm of each recipe, and in words what each measured."""
    lines = [
        "## Commands",
        "",
        "Of each recipe's first arm and seed; the others differ in what is said of them above. `{images}` "
        "and `{masks}` are the two folders; as `--weights`, `{train}` and `{masks}` are that step's last "
        "checkpoint.",
    ]
    for arm in dict.fromkeys(study.base_of(arm) for arm in study.arms):
        seed = next((r["seed"] for r in results if r["arm"] == arm), None)
        if seed is None:
            continue
        lines += ["", f"**{arm}**", ""]
        for step in study.steps(arm, seed):
            metrics = json.loads((directory / arm / f"seed_{seed}" / f"{step.name}.json").read_text())[
                "metrics"
            ]
            said = metrics.get("protocol") or metrics.get("measured")
            lines.append(f"- {step.name}: `{step.typed()}`" + (f" ({said})" if said else ""))
    return "\n".join(lines)


def _by_seed(arm: str, measure: str, results: Results) -> dict[int, float]:
    return {
        result["seed"]: result["measures"][measure]
        for result in results
        if result["arm"] == arm and result["measures"].get(measure) is not None
    }


def _shown(results: Results) -> list[str]:
    """The measures that some arm has."""
    return [name for name in MEASURES if any(r["measures"].get(name) is not None for r in results)]


def _seeds(arm: str, results: Results) -> str:
    return str(sum(result["arm"] == arm for result in results))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
