"""Run the steps of a study, each once, and record what each measured and cost."""

import csv
import gc
import json
import platform
import re
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from math import sqrt
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import yaml

from locat.runs import write_json
from locat_lightning.backbones.channels import channels_of
from locat_lightning.backbones.create import load_backbone
from locat_lightning.callbacks.record import versions
from locat_lightning.commands.study.plan import COMMANDS, TRAIN, Measure, Step, Study, epoch_of
from locat_lightning.errors import InputError
from locat_lightning.evaluation.cost import activation_bytes, count_parameters, multiply_adds
from locat_lightning.evaluation.layers import by_layer
from locat_lightning.evaluation.packed import packed
from locat_lightning.evaluation.per_image import TABLE, read_table

Results = Sequence[Mapping[str, Any]]  # of some arms and seeds, as `read_results` returns them

LEARNING = ("train/loss", "train/top1", "val/")  # what is kept of a training by epoch
IMAGES = "images"  # in a result, by measure and epoch what was found of each image
LAYERS = "layers"  # in a result, by epoch what was found of each layer
MISTAKE = 2  # exit code of a command that refuses its options


def run_step(step: Step, directory: Path, folders: Mapping[str, str], record: Path) -> bool:
    """Run a step unless it is finished, resuming it where possible; return whether it had to run.

    Args:
        step: what to run.
        directory: of the runs of its arm and seed.
        folders: by name, for the placeholders in the options.
        record: JSON with the steps of the arm and seed that are finished, to which this one is added.
    """
    log, run, known = directory / f"{step.name}.log", directory / step.run, finished_steps(record)
    command = shlex.join(step.arguments({name: Path(folder).name for name, folder in folders.items()}))
    if step.name in known:
        if (before := known[step.name]["command"]) != command:
            raise InputError(f"{record} has the result of other options ({before}): use another --to")
        return False
    directory.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    arguments = [*step.arguments(folders), f"--runs={directory}", f"--name={step.name}"]
    weights = [f"--weights={checkpoint_of(directory, step.weights, step.epoch)}"] if step.weights else []
    with output_to(log):
        if not (step.command == "fit" and _resumed(arguments, run, log)):
            shutil.rmtree(run.parent, ignore_errors=True)
            _run([*arguments, *weights], log)
        metrics, found = _metrics(run), run / TABLE
        names = {each.rpartition("/")[2] for each in step.figures}
        known[step.name] = {
            "command": command,
            "metrics": {key: value for key, value in metrics.items() if isinstance(value, int | float)},
            "measured": metrics.get("measured") or metrics.get("protocol"),
            "seconds": time.monotonic() - begun,
            "machine": _machine(),
            "versions": versions(),
            "cost": _cost(directory) if step.name == TRAIN else {},
            "curves": _curves(run) if step.name == TRAIN else {},
            "images": packed(read_table(found), names) if names and found.is_file() else None,
        }
    write_json(record, known)
    gc.collect()  # ends the workers of the data loaders
    return True


def finished_steps(record: Path) -> dict[str, dict[str, Any]]:
    """Return what is recorded of the finished steps of an arm and a seed, by name."""
    return dict(json.loads(record.read_text())) if record.is_file() else {}


def steps_to_run(steps: Sequence[Step], directory: Path, record: Path) -> list[Step]:
    """Return the steps of an arm and a seed without those whose checkpoint is gone and that no measure reads.

    Where a measure needs such a step, what trained the checkpoint and what follows is removed from the record
    instead, to be run again: what is measured of an arm and a seed is of one training.
    """
    known = finished_steps(record)
    read, left_out = {TRAIN}, set[str]()
    for step in reversed(steps):
        if step.figures or step.name in read:
            read |= {step.name, step.weights}
    gone = [
        step
        for step in steps
        if step.name not in known
        and step.weights in known
        and not checkpoint_of(directory, step.weights, step.epoch).is_file()
    ]
    lost = {step.weights for step in gone if step.name in read}
    for step in steps:  # in order: what a step takes comes before it
        if step.weights in lost:
            lost.add(step.name)
        elif step in gone or step.weights in left_out:
            left_out.add(step.name)
    if lost & known.keys():
        write_json(record, {name: each for name, each in known.items() if name not in lost})
    return [step for step in steps if step.name not in left_out]


def record_of(records: Path, arm: str, seed: int) -> Path:
    """Return the file with what is finished of an arm and a seed."""
    return records / arm / f"seed_{seed}.json"


def read_results(study: Study, records: Path) -> list[dict[str, Any]]:
    """Read the results of the arms and seeds in a study's records of which all measures are known.

    Steps that no measure reads may be missing, as those of a probe that was added; `missing` says which.
    """
    results = []
    for arm, seed in study.runs():
        steps, known = study.steps(arm, seed), finished_steps(record_of(records, arm, seed))
        if not all(step.name in known for step in steps if step.figures or step.name == TRAIN):
            continue
        missing = [step.name for step in steps if step.name not in known]
        steps = [step for step in steps if step.name in known]
        last = int(known[TRAIN]["metrics"].get("epochs", 0))
        found = {name: _found(each, last, study.epochs, known) for name, each in study.measures.items()}
        said = {step.name: known[step.name]["measured"] for step in steps}
        result = {
            "arm": arm,
            "seed": seed,
            "recipe": study.arms[arm].recipe,
            "measures": {name: each.get(last, (None, None))[0] for name, each in found.items()},
            "curves": {
                name: {epoch: value for epoch, (value, _) in each.items()} for name, each in found.items()
            },
            LAYERS: {
                epoch: layers
                for epoch, step in _by_epoch(study.pictures.layers, last, study.epochs, known).items()
                if (layers := by_layer(step["metrics"]))
            },
            "missing": missing,
            IMAGES: {
                name: {epoch: images for epoch, (_, images) in each.items() if images}
                for name, each in found.items()
            },
            "seconds": {step.name: known[step.name]["seconds"] for step in steps},
            "commands": {step.name: step.typed() for step in steps},
            "measured": {name: words for name, words in said.items() if words},
            "machine": known[TRAIN]["machine"],
            "versions": known[TRAIN]["versions"],
        }
        results.append(result | known[TRAIN]["cost"])
    return results


def _found(
    measure: Measure, last: int, epochs: Sequence[int], known: Mapping[str, Mapping[str, Any]]
) -> dict[int, tuple[float, dict[str, Any] | None]]:
    """Return what was measured by epoch, and of each image (see `packed`); after the last epoch last."""
    return {
        epoch: (step["metrics"][measure.metric], step["images"])
        for epoch, step in _by_epoch(measure.step, last, epochs, known).items()
        if measure.metric in step["metrics"]
    }


def _by_epoch(
    step: str | None, last: int, epochs: Sequence[int], known: Mapping[str, Mapping[str, Any]]
) -> dict[int, Mapping[str, Any]]:
    """Return what is known of a step by the epoch that it measured; {} of none."""
    names = {} if step is None else {epoch: epoch_of(step, epoch) for epoch in epochs} | {last: step}
    return {epoch: known[name] for epoch, name in names.items() if name in known}


def by_seed(arm: str, measure: str, results: Results, epoch: int | None = None) -> dict[int, float]:
    """Return what was measured of an arm, by seed; after an epoch, or else after the last one."""
    own = {
        result["seed"]: result["measures"].get(measure)
        if epoch is None
        else result["curves"].get(measure, {}).get(epoch)
        for result in results
        if result["arm"] == arm
    }
    return {seed: value for seed, value in own.items() if value is not None}


def checkpoint_of(directory: Path, step: str, epoch: int = 0) -> Path:
    """Return the checkpoint of a step that trains: the last, or the one that was kept after an epoch."""
    name = f"epoch_{epoch}.ckpt" if epoch else "last.ckpt"
    return directory / step / "version_0" / "checkpoints" / name


@contextmanager
def output_to(log: Path) -> Iterator[None]:
    """Append standard output and standard error to a file."""
    with log.open("a", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        yield


def _resumed(arguments: list[str], run: Path, log: Path) -> bool:
    """Finish an interrupted training if its checkpoint allows it."""
    if not (run / "checkpoints" / "last.ckpt").is_file():
        return False
    try:
        _run([*arguments, "--ckpt_path=last"], log)
    except InputError:
        return False
    return (run / "metrics.json").is_file()


def _run(arguments: list[str], log: Path) -> None:
    try:
        COMMANDS[arguments[0]](arguments)
    except SystemExit as end:
        if end.code != MISTAKE:  # stopped by a signal
            raise
        *_, last = log.read_text().strip().splitlines() or [""]
        raise InputError(f"locat {arguments[0]}: {last.removeprefix('locat: error: ')} (see {log})") from end


def _metrics(run: Path) -> dict[str, Any]:
    """Return the last value of all that a run logged, and the contents of its `metrics.json`."""
    logged = {name: float(value) for row in _rows(run) for name, value in row.items() if value}
    file = run / "metrics.json"
    return logged | (json.loads(file.read_text()) if file.is_file() else {})


def _curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Return how a training went: by name, epochs counted from 1 with the mean of what was logged in each."""
    curves: dict[str, dict[int, list[float]]] = {}
    for row in _rows(run):
        for name, value in row.items():
            if value and row.get("epoch") and name.startswith(LEARNING):
                curves.setdefault(name, {}).setdefault(int(row["epoch"]) + 1, []).append(float(value))
    return {name: [(epoch, mean(each)) for epoch, each in of.items()] for name, of in curves.items()}


def _cost(directory: Path) -> dict[str, Any]:
    """Return the cost of a training step, and of the trained backbone without its head for an image."""
    checkpoint = checkpoint_of(directory, TRAIN)
    run = checkpoint.parents[1]
    batch = yaml.safe_load((run / "config.yaml").read_text())["data"]["init_args"]["batch_size"]
    rows = _rows(run)
    speeds, waits = (
        [float(row[name]) for row in rows if row.get(name)]
        for name in ("train/images_per_s", "train/data_wait")
    )
    variances = {name: value for name, value in _metrics(run).items() if name.startswith("gaug_variance/")}
    backbone: Any = load_backbone(str(checkpoint))
    image = torch.zeros(1, channels_of(backbone), *backbone.patch_embed.img_size)
    return {
        "seconds_per_step": batch / max(speeds) if speeds else None,
        "data_wait": median(waits) if waits else None,
        "peak_gpu_memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "parameters": count_parameters(backbone)[0],
        "multiply_adds": multiply_adds(backbone, image),
        "activation_bytes": activation_bytes(backbone, image),
        # Standard deviation of each block's kernels in patches.
        "kernel_widths": [sqrt(variances[name]) for name in sorted(variances)],
    }


def _rows(run: Path) -> list[dict[str, str]]:
    file = run / "metrics.csv"
    return list(csv.DictReader(file.read_text().splitlines())) if file.is_file() else []


def _machine() -> str:
    """Return the name of the GPU, or of the CPU with the number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpus = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)", cpus.read_text(), re.MULTILINE) if cpus.is_file() else []
    threads = torch.get_num_threads()
    return f"{names[0] if names else platform.machine()}, {threads} thread{'s' * (threads > 1)}"
