"""What `--weights` and `--ckpt_path` name: a file, a run, an exported folder; and what a run recorded.

Whoever wrote a record chooses what is trained or measured, but neither which code runs nor where files go.
"""

from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

import yaml

from locat.runs import is_record
from locat_lightning.backbones.weights import check_source, exported_config
from locat_lightning.callbacks.record import flat_options
from locat_lightning.data.base import ImageModule
from locat_lightning.data.stores import is_remote
from locat_lightning.data.timm_sources import is_fetched
from locat_lightning.data.views import ViewTransform
from locat_lightning.errors import InputError, in_a_line
from locat_lightning.records import plain, refused
from locat_lightning.tasks.base import Task

# Options whose value is a class, and the base of those that a record may choose.
CLASSES: dict[str, type] = {"model": Task, "data": ImageModule, "views": ViewTransform}
# Options of the trainer and of the checkpoints that are code, or say where files are written.
NOT_DATA = {"callbacks", "logger", "plugins", "profiler", "default_root_dir", "model_registry"}
NOT_DATA |= {"dirpath"}
UNUSED = (None, True, False)  # their values if they are not used


def check_weights(weights: str, option: str = "--weights") -> None:
    """Check that there is such a source of weights (see `check_source`), and that it is not a directory."""
    if (path := Path(weights)).is_dir() and not exported_config(weights):
        best = path / "checkpoints" / "best.ckpt"
        raise InputError(f"{option}: {weights} is a directory{suggest_file(best)}")
    check_source(weights, option)


def suggest_file(path: Path) -> str:
    """Return the end of a message about a directory where a file is expected."""
    return f": give a file, such as {path}" if path.is_file() else ", not a file"


def record_of_run(checkpoint: Path) -> Path | None:
    """Return where the run of a checkpoint recorded its config; None if the file is not of a run."""
    if len(checkpoint.parents) < 4:  # relative to its own run, whose name is not in the path
        checkpoint = checkpoint.absolute()
    record = checkpoint.parent.parent / "config.yaml"
    of_a_run = checkpoint.suffix == ".ckpt" and checkpoint.parent.name == "checkpoints"
    return record if of_a_run and checkpoint.is_file() and is_record(record) else None


def load_record(file: Path) -> dict[str, Any]:
    """Return the options that a run recorded, as they are; `InputError` if it is no such record."""
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not the record of a run: {in_a_line(error)}") from error
    for key in ("model", "data"):
        group = config.get(key) if isinstance(config, dict) else None
        spec = group if isinstance(group, dict) else {}
        if not isinstance(spec.get("class_path"), str) or not isinstance(
            spec.setdefault("init_args", {}), dict
        ):
            raise InputError(f"{file} is not the record of a run: {key} is {group!r:.80}")
    return dict(config)


def read_record(file: Path, groups: Iterable[str], typed: Container[str]) -> dict[str, Any]:
    """Return some groups of the options that a run recorded, and from its place its `name` and its `runs`.

    Options of trainer and checkpoints that are not data are named in `left_out`.

    Raises:
        InputError: the file is no such record, or chooses what a record must not (see `records`), or a data
            set that would be fetched, where its option is not among those `typed`.
    """
    config = load_record(file)
    chosen, left_out = {key: config[key] for key in groups if key in config}, []
    for group in chosen.keys() & {"trainer", "checkpoint"}:
        own = chosen[group] if isinstance(chosen[group], dict) else {}
        chosen[group] = {k: v for k, v in own.items() if k not in NOT_DATA and _is_data(k, v)}
        left_out += [f"{group}.{k}" for k in own.keys() - chosen[group].keys() if own[k] not in UNUSED]
    known: dict[str, Any] = plain(chosen, file, classes=CLASSES)
    data = known["data"]["init_args"]
    # Done already, or to be done, in a place that the record would choose.
    for option in ("download", "cache"):
        data.pop(option, None)
    if "--data.stream" not in typed and ("--data.root" in typed or "--data.dataset" in typed):
        data.pop("stream", None)  # other images are read
    for place, value in flat_options(known):
        fetched = place.endswith(".dataset") and is_fetched(str(value))
        fetched |= place.endswith(".stream") and is_remote(str(value).removeprefix("file://"))
        if fetched and f"--{place}" not in typed:
            raise InputError(
                f"{file} names a data set that is fetched: if you want it, add --{place} {value}"
                + (" (and --data.cache, if it had one)" if place.endswith(".stream") else "")
            )
        if place.endswith(".cache") and value is not None:
            raise refused(file, f"{place} is {value}")
    return known | {"name": file.parent.parent.name, "runs": str(file.parents[2]), "left_out": left_out}


def _is_data(option: str, value: Any) -> bool:
    """Check that an option of trainer or checkpoints is no path of Python's, nor leads out of the run."""
    if option == "filename":
        return not Path(str(value)).is_absolute() and ".." not in str(value)
    parts = value if isinstance(value, list) else [value]  # no name of Lightning's has a dot
    return all(isinstance(part, int | float) or part is None or "." not in str(part) for part in parts)
