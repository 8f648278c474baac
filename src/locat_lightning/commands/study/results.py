"""What came of an arm and a seed: its steps run once each, and `result.json` when all are done."""

import contextlib
import csv
import gc
import json
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from math import sqrt
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml

from locat import command
from locat_lightning.backbones.create import load_backbone
from locat_lightning.commands.study.plan import MEASURES, TRAIN, Step, Study
from locat_lightning.errors import InputError
from locat_lightning.evaluation.cost import activation_bytes, count_parameters, multiply_adds

RESULT = "result.json"
PACKAGES = ("locat-lightning", "torch", "lightning", "timm", "torchvision")
MISTAKE = 2  # exit code of a command that was given something wrong


def measure_arm(study: Study, arm: str, seed: int, directory: Path, folders: Mapping[str, str]) -> bool:
    """Take the steps of an arm and a seed that have not been taken, and note what came of all.

    Args:
        study: whose arm it is.
        arm: its name.
        seed: of its runs.
        directory: of its runs; finished, it has a `result.json` of all steps.
        folders: that stand for `{images}` and `{masks}`.

    Returns:
        Whether there was something left to do.

    Raises:
        InputError: a command refused what it was given.
    """
    file, steps = directory / RESULT, study.steps(arm, seed)
    done = _read(file)["seconds"] if file.is_file() else {}
    if all(step.name in done for step in steps):
        return False
    for number, step in enumerate(steps, start=1):
        print(f"  {step.name} ({number} of {len(steps)})", flush=True)
        _take(step, directory, folders)
    with said_in(directory / f"{TRAIN}.log"):
        cost = _cost(directory)
    taken = {step.name: _read(directory / f"{step.name}.json") for step in steps}
    result = {
        "arm": arm,
        "seed": seed,
        "preset": study.preset,
        "recipe": study.recipe_of[arm],
        "measures": {
            name: taken[each.step]["metrics"].get(each.metric)
            for name, each in MEASURES.items()
            if each.step in taken
        },
        **cost,
        "peak_gpu_memory_bytes": taken[TRAIN]["peak_gpu_memory_bytes"],
        "kernel_widths": _kernel_widths(directory),
        "seconds": {name: step["seconds"] for name, step in taken.items()},
        "machine": machine(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    }
    write_atomically(file, result)
    return True


def read_results(study: Study, directory: Path) -> list[dict[str, Any]]:
    """The results that there are of a study, by seed and arm.

    Args:
        study: see `measure_arm`.
        directory: of all its arms.
    """
    files = [directory / arm / f"seed_{seed}" / RESULT for seed in study.seeds for arm in study.arms]
    return [_read(file) for file in files if file.is_file()]


def newest_run(directory: Path, name: str) -> Path:
    """The run of a name that was begun last; one that is not there, if there is none."""
    runs = [path for path in (directory / name).glob("version_*") if path.name.split("_")[1].isdigit()]
    return max(runs, key=lambda run: int(run.name.split("_")[1]), default=directory / name / "version_0")


def checkpoint_of(directory: Path, name: str) -> Path:
    """The last checkpoint of the newest run of a name."""
    return newest_run(directory, name) / "checkpoints" / "last.ckpt"


def write_atomically(file: Path, value: Any) -> None:
    """Write JSON that is there whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    part.replace(file)


def _read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text()))


def machine() -> str:
    """The GPU, or the CPU with its threads, by name."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names: list[str] = []
    if (file := Path("/proc/cpuinfo")).is_file():
        names = [
            line.partition(":")[2].strip() for line in file.read_text().splitlines() if "model name" in line
        ]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


@contextlib.contextmanager
def said_in(log: Path) -> Iterator[None]:
    """Have all that is said go to a file."""
    with (
        log.open("a", buffering=1) as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        yield


def _take(step: Step, directory: Path, folders: Mapping[str, str]) -> None:
    """Run a step's command unless that has been done, and note its metrics."""
    if (note := directory / f"{step.name}.json").is_file():
        return
    directory.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    own = [f"--runs={directory}", f"--name={step.name}"]
    weights = [f"--weights={checkpoint_of(directory, step.of)}"] if step.of else []
    with said_in(directory / f"{step.name}.log"):
        resumed = step.command == "fit" and checkpoint_of(directory, step.name).is_file()
        # Its checkpoint says where a resumed probe's backbone is.
        if not (
            resumed and _goes_on([*step.arguments(**folders), *own, "--ckpt_path=last"], step, directory)
        ):
            shutil.rmtree(directory / step.name, ignore_errors=True)
            _run([*step.arguments(**folders), *own, *weights], directory / f"{step.name}.log")
    metrics = _metrics(directory, step)
    write_atomically(
        note,
        {
            "metrics": metrics,
            "seconds": time.monotonic() - begun,
            "peak_gpu_memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        },
    )
    gc.collect()  # the loaders' workers among it


def _goes_on(arguments: list[str], step: Step, directory: Path) -> bool:
    """Whether a run that was cut off could be finished; it is begun anew if not."""
    try:
        _run(arguments, directory / f"{step.name}.log")
    except InputError:
        return False
    return (newest_run(directory, step.name) / "metrics.json").is_file()


def _run(arguments: list[str], log: Path) -> None:
    try:
        command.main(arguments)
    except SystemExit as end:
        if end.code != MISTAKE:  # told to stop
            raise
        *_, last = log.read_text().strip().splitlines() or [""]
        raise InputError(f"locat {arguments[0]}: {last.removeprefix('locat: error: ')} (see {log})") from end


def _metrics(directory: Path, step: Step) -> dict[str, Any]:
    file = newest_run(directory, step.name) / "metrics.json"
    return _read(file) if file.is_file() else {}  # predictions have none


def _cost(directory: Path) -> dict[str, Any]:
    """Of the trained backbone without its head: what a training step takes, and what an image."""
    run = newest_run(directory, TRAIN)
    batch = yaml.safe_load((run / "config.yaml").read_text())["data"]["init_args"]["batch_size"]
    rows = _logged(run)
    speeds = [float(row["train/images_per_s"]) for row in rows if row.get("train/images_per_s")]
    waits = [float(row["train/data_wait"]) for row in rows if row.get("train/data_wait")]
    backbone: Any = load_backbone(str(checkpoint_of(directory, TRAIN)))
    image = torch.zeros(1, 3, *backbone.patch_embed.img_size)
    return {
        "seconds_per_step": batch / max(speeds) if speeds else None,
        "data_wait": median(waits) if waits else None,
        "parameters": count_parameters(backbone)[0],
        "multiply_adds": multiply_adds(backbone, image),
        "activation_bytes": activation_bytes(backbone, image),
    }


def _kernel_widths(directory: Path) -> list[float]:
    """Standard deviation of the kernels of each block, in patches, after the training; [] without GAug."""
    variances: dict[str, float] = {}
    for row in _logged(newest_run(directory, TRAIN)):
        variances |= {
            name: float(row[name]) for name in row if name.startswith("gaug_variance/") and row[name]
        }
    return [sqrt(variances[name]) for name in sorted(variances)]


def _logged(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))
