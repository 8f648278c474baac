"""Run the steps of a study, each once, and record what each measured and cost."""

import contextlib
import csv
import gc
import json
import platform
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from math import sqrt
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml

from locat_lightning.backbones.create import load_backbone
from locat_lightning.commands.study.plan import COMMANDS, TRAIN, Step, Study
from locat_lightning.errors import InputError
from locat_lightning.evaluation.cost import activation_bytes, count_parameters, multiply_adds

Results = Sequence[Mapping[str, Any]]  # of some arms and seeds, as `read_results` returns them

PACKAGES = ("locat-lightning", "torch", "lightning", "timm", "torchvision")
MISTAKE = 2  # exit code of a command that refuses its options


def run_step(step: Step, directory: Path, folders: Mapping[str, str]) -> bool:
    """Run a step unless it is finished, resuming it where possible, and record the outcome in `NAME.json`.

    Args:
        step: to run.
        directory: of the runs of its arm and seed.
        folders: that it reads, by name.

    Returns:
        Whether it had to run.

    Raises:
        InputError: the command refused its options, or the step was finished with others.
    """
    file, log, run = directory / f"{step.name}.json", directory / f"{step.name}.log", directory / step.run
    command = shlex.join(step.arguments({name: Path(folder).name for name, folder in folders.items()}))
    if file.is_file():
        if (before := _read(file)["command"]) != command:
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
            "peak_gpu_memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            "machine": _machine(),
            "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
            "cost": _cost(directory) if step.name == TRAIN else {},
        }
    write_json(file, record)
    gc.collect()  # ends the workers of the data loaders
    return True


def read_results(study: Study, directory: Path) -> list[dict[str, Any]]:
    """Read the results of the arms and seeds in a study's directory whose steps are all finished."""
    results = []
    for arm, seed in study.runs():
        own, steps = directory / arm / f"seed_{seed}", study.steps(arm, seed)
        files = {step.name: own / f"{step.name}.json" for step in steps}
        if not all(file.is_file() for file in files.values()):
            continue
        records = {name: _read(file) for name, file in files.items()}
        metrics = {name: record["metrics"] for name, record in records.items()}
        said = {name: each.get("protocol") or each.get("measured") for name, each in metrics.items()}
        train = records[TRAIN]
        results.append(
            {
                "arm": arm,
                "seed": seed,
                "recipe": study.arms[arm].recipe,
                "measures": {
                    name: metrics.get(of.step, {}).get(of.metric) for name, of in study.measures.items()
                },
                **train["cost"],
                **{key: train[key] for key in ("peak_gpu_memory_bytes", "machine", "versions")},
                "seconds": {name: record["seconds"] for name, record in records.items()},
                "commands": {step.name: step.typed() for step in steps},
                "measured": {name: words for name, words in said.items() if words},
            }
        )
    return results


def checkpoint_of(directory: Path, step: str) -> Path:
    """Return the last checkpoint of a step that trains."""
    return directory / step / "version_0" / "checkpoints" / "last.ckpt"


def write_whole(file: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(text)
    part.replace(file)


def write_json(file: Path, value: Any) -> None:
    """Write JSON so that it is there whole or not at all."""
    write_whole(file, json.dumps(value, indent=1) + "\n")


@contextlib.contextmanager
def output_to(log: Path) -> Iterator[None]:
    """Append standard output and standard error to a file."""
    with (
        log.open("a", buffering=1) as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
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
    return logged | (_read(file) if file.is_file() else {})


def _cost(directory: Path) -> dict[str, Any]:
    """Return the cost of a training step, and of the trained backbone without its head for an image."""
    checkpoint = checkpoint_of(directory, TRAIN)
    run = checkpoint.parents[1]
    batch = yaml.safe_load((run / "config.yaml").read_text())["data"]["init_args"]["batch_size"]
    rows = _rows(run)
    speeds = [float(row["train/images_per_s"]) for row in rows if row.get("train/images_per_s")]
    waits = [float(row["train/data_wait"]) for row in rows if row.get("train/data_wait")]
    metrics = _metrics(run)
    backbone: Any = load_backbone(str(checkpoint))
    image = torch.zeros(1, 3, *backbone.patch_embed.img_size)
    return {
        "seconds_per_step": batch / max(speeds) if speeds else None,
        "data_wait": median(waits) if waits else None,
        "parameters": count_parameters(backbone)[0],
        "multiply_adds": multiply_adds(backbone, image),
        "activation_bytes": activation_bytes(backbone, image),
        # Standard deviation of each block's kernels in patches.
        "kernel_widths": [
            sqrt(metrics[name]) for name in sorted(metrics) if name.startswith("gaug_variance/")
        ],
    }


def _rows(run: Path) -> list[dict[str, str]]:
    file = run / "metrics.csv"
    return list(csv.DictReader(file.read_text().splitlines())) if file.is_file() else []


def _read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text()))


def _machine() -> str:
    """Return the name of the GPU, or of the CPU with the number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    threads = torch.get_num_threads()
    return f"{names[0] if names else platform.machine()}, {threads} thread{'s' * (threads > 1)}"
