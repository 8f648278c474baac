"""Measure again what README and docs show, and write it there: `make figures`.

Takes a `--runs` directory with the quickstart's two runs, the two segmentations of its digits and the
pre-trainings on them (and on CIFAR-10, if there are any), and the tables that the other scripts print.
Without one it only puts the results of `make gpu` into the pages, between `<!-- gpu -->` and `<!-- /gpu -->`.
Labels beside the figures say what to replace: the first column of a table, the path of a run; in the text, a
figure is replaced wherever it stands as it was. The results of a study are left alone: `locat study` writes
their page.
"""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from gpu import RESULTS, markdown
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import (
    EventAccumulator,
)

from locat.runs import list_runs

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *(path for path in (ROOT / "docs").glob("*.md") if path.name != "results.md")]
TABLES = {"backbones.py": "backbones-cpu.md", "segmentation.py": "segmentation-cpu.md", "rows.py": None}
PICTURES = {"quickstart_locatvit": "pictures.png", "segment_locatvit": "segmentation.png"}
METHODS = "dino", "ibot", "dinov2", "selfpatch", "mae", "simmim", "distill"
CURVES = {
    "loss": "train/loss",
    "k-NN top-1": "knn/top1",
    "cosine of patches": "signs/patch_cosine",
    "rank of patches": "signs/patch_rank",
    "rank of [CLS]": "signs/effective_rank",
}
RATIO = "time, LocAtViT / plain"  # a column of `gpu_training.steps`
KNN = "k-NN top-1 (knn/top1)"
LINE = rf"{re.escape(KNN)} [\d.]+ before -> [\d.]+"


def tables(text: str) -> list[str]:
    """Return the Markdown tables of a text."""
    return re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)


def labels(table: str) -> list[str]:
    """Return the cells of a table's first column, and of its head."""
    lines = [[cell.strip() for cell in line.split("|")] for line in table.splitlines()]
    return lines[0] + [line[1] for line in lines[2:]]


def replace_tables(text: str, measured: str) -> str:
    """Replace each table of a text by that of the same labels in what was measured."""
    new = {tuple(labels(table)): table for table in tables(measured)}
    for table in tables(text):
        text = text.replace(table, new.get(tuple(labels(table)), table))
    return text


def replaced_figures(old: str, new: str) -> dict[str, str]:
    """Return what stands in place of the lines of runs, and of each figure in them, by what it was."""
    found = {}
    lines = {line.partition(" ")[0]: line for line in new.splitlines()}
    for before in old.splitlines():
        after = lines[before.partition(" ")[0]]
        found[before] = after
        for was, now in zip(*(re.findall(r"\d\.\d+", line) for line in (before, after)), strict=True):
            if len(was) > 4:  # else it may be another figure elsewhere
                found.setdefault(was, now)
    return found


def replace_figures(text: str, new: dict[str, str]) -> str:
    """Replace lines and figures of a text, all at once."""
    known = "|".join(re.escape(each) for each in sorted(new, key=len, reverse=True))
    return re.sub(rf"(?<![\d.])(?:{known})(?!\d)", lambda match: new[match[0]], text)


def knn_of(run: Path) -> list[tuple[int, str]]:
    """Return the k-NN accuracies of a run, with their steps."""
    with (run / "metrics.csv").open(newline="") as file:
        return [(int(row["step"]), row["knn/top1"]) for row in csv.DictReader(file) if row.get("knn/top1")]


def draw_curves(runs: Path, images: str, path: Path) -> None:
    """Draw what pre-trainings log by step: a row for each method of which there is a run on these images."""
    present = [name for name in METHODS if (runs / f"{name}_{images}").is_dir()]
    figure = Figure(figsize=(11, 1.9 * len(present)), layout="constrained", dpi=100)
    for axes, name in zip(figure.subplots(len(present), len(CURVES), squeeze=False), present, strict=True):
        with (runs / f"{name}_{images}" / "version_0" / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        for axis, (title, column) in zip(axes, CURVES.items(), strict=True):
            points = [(int(row["step"]), float(row[column])) for row in rows if row.get(column)]
            axis.plot(*zip(*points, strict=True), linewidth=1)
            axis.set_title(title if name == present[0] else "")
            axis.grid(alpha=0.3)
        axes[0].set_ylabel(name)
    figure.supxlabel("optimizer step", fontsize="medium")
    figure.savefig(path)


def last_picture(run: Path) -> bytes:
    """Return the newest `pictures/validation` of a run, as PNG."""
    log = EventAccumulator(str(run), {"images": 0})
    log.Reload()
    picture: bytes = log.Images("pictures/validation")[-1].encoded_image_string
    return picture


def with_gpu(text: str, words: str) -> str:
    """Return a page with these words on what was measured on a GPU."""
    return re.sub(r"(?<=<!-- gpu -->).*?(?=<!-- /gpu -->)", lambda _: words, text, flags=re.DOTALL)


def gpu_pages(results: list[dict[str, Any]]) -> dict[str, str]:
    """Return what each page says of the results of `make gpu`: README in a line, docs in tables."""
    lines = [line for result in results if (line := steps_in_a_line(result))]
    tables = "\n".join(map(markdown, results))
    return {
        "README.md": "; ".join(lines) or "nothing has been measured yet, `make gpu` does it",
        "docs/scaling.md": "\n" + (tables or "Nothing has been measured yet.\n"),
    }


def steps_in_a_line(result: dict[str, Any]) -> str:
    """Say how much longer than a plain ViT's the training steps of a card take."""
    rows = result["groups"].get("step", {"rows": []})["rows"]
    ratios = [f"{row[RATIO]:.2f}x ({row['row']})" for row in rows if row.get(RATIO)]
    return f"{result['machine']['card']}, training step, {', '.join(ratios)}" if ratios else ""


def main() -> None:
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("gpu-*.json"))]
    for name, words in gpu_pages(found).items():
        (ROOT / name).write_text(with_gpu((ROOT / name).read_text(), words))
    if len(sys.argv) == 1:
        return
    runs = Path(sys.argv[1])
    measured = ""
    for script, result in TABLES.items():
        command = [sys.executable, str(ROOT / "benchmarks" / script)]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        if result is not None:
            (ROOT / "benchmarks" / "results" / result).write_text(printed)
        measured += printed + "\n"
    knn = knn_of(runs / "dino_digits" / "version_0")
    readme = PAGES[0].read_text()
    old = re.findall(r"^\w+/version_0 .*$", readme, flags=re.MULTILINE) + re.findall(LINE, readme)
    new = [list_runs(runs), f"{KNN} {float(knn[0][1]):.4g} before -> {float(knn[-1][1]):.4g}"]
    figures = replaced_figures("\n".join(old), "\n".join(new))
    for page in PAGES:
        page.write_text(replace_figures(replace_tables(page.read_text(), measured), figures))
    for name, picture in PICTURES.items():
        (ROOT / "docs" / picture).write_bytes(last_picture(runs / name / "version_0"))
    for images in ("digits", "cifar10"):
        if (runs / f"dino_{images}").is_dir():
            draw_curves(runs, images, ROOT / "docs" / f"curves_{images}.png")


if __name__ == "__main__":
    main()
