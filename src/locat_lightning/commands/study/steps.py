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
from statistics import median
from typing import Any

import torch
import yaml

from locat.runs import write_json
from locat_lightning.backbones.channels import channels_of
from locat_lightning.backbones.create import load_backbone
from locat_lightning.callbacks.record import versions
from locat_lightning.commands.study.plan import COMMANDS, TRAIN, Step, Study
from locat_lightning.errors import InputError
from locat_lightning.evaluation.cost import activation_bytes, count_parameters, multiply_adds

Results = Sequence[Mapping[str, Any]]  # of some arms and seeds, as `read_results` returns them

MISTAKE = 2  # exit code of a command that refuses its options


def run_step(step: Step, directory: Path, folders: Mapping[str, str]) -> bool:
    """Run a step unless it is finished, resuming it where possible; return whether it had to run.

    Its record, `NAME.json`, is in the directory of the runs of its arm and seed.
    """
    file, log, run = directory / f"{step.name}.json", directory / f"{step.name}.log", directory / step.run
    command = shlex.join(step.arguments({name: Path(folder).name for name, folder in folders.items()}))
    if file.is_file():
        if (before := json.loads(file.read_text())["command"]) != command:
            raise InputError(f"{file} is the result of other options ({before}): use another --to")
        return False
    directory.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    arguments = [*step.arguments(folders), f"--runs={directory}", f"--name={step.name}"]
    weights = [f"--weights={checkpoint_of(directory, step.weights)}"] if step.weights else []
    with output_to(log):
        if not (step.command == "fit" and _resumed(arguments, run, log)):
            shutil.rmtree(run.parent, ignore_errors=True)
            _run([*arguments, *weights], log)
        record = {
            "command": command,
            "metrics": _metrics(run),
            "seconds": time.monotonic() - begun,
            "machine": _machine(),
            "versions": versions(),
            "cost": _cost(directory) if step.name == TRAIN else {},
        }
    write_json(file, record)
    gc.collect()  # ends the workers of the data loaders
    return True


def read_results(study: Study, directory: Path) -> list[dict[str, Any]]:
    """Read the results of the arms and seeds in a study's directory whose steps are all finished."""
    results = []
    for arm, seed in study.runs():
        steps = study.steps(arm, seed)
        files = {step.name: directory / arm / f"seed_{seed}" / f"{step.name}.json" for step in steps}
        if not all(file.is_file() for file in files.values()):
            continue
        records = {name: json.loads(file.read_text()) for name, file in files.items()}
        metrics = {name: record["metrics"] for name, record in records.items()}
        said = {name: each.get("measured") or each.get("protocol") for name, each in metrics.items()}
        result = {
            "arm": arm,
            "seed": seed,
            "recipe": study.arms[arm].recipe,
            "measures": {
                k: metrics.get(each.step, {}).get(each.metric) for k, each in study.measures.items()
            },
            "seconds": {name: record["seconds"] for name, record in records.items()},
            "commands": {step.name: step.typed() for step in steps},
            "measured": {name: words for name, words in said.items() if words},
            "machine": records[TRAIN]["machine"],
            "versions": records[TRAIN]["versions"],
        }
        results.append(result | records[TRAIN]["cost"])
    return results


def by_seed(arm: str, measure: str, results: Results) -> dict[int, float]:
    """Return what was measured of an arm, by seed."""
    own = {result["seed"]: result["measures"].get(measure) for result in results if result["arm"] == arm}
    return {seed: value for seed, value in own.items() if value is not None}


def checkpoint_of(directory: Path, step: str) -> Path:
    """Return the last checkpoint of a step that trains."""
    return directory / step / "version_0" / "checkpoints" / "last.ckpt"


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
