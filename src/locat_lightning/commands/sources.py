"""What `--weights` and `--ckpt_path` name: a file, a run, an exported folder."""

import json
from pathlib import Path
from typing import Any

from locat_lightning.backbones.weights import check_source
from locat_lightning.errors import InputError


def check_weights(weights: str) -> None:
    """Check that there is such a source of weights (see `check_source`), and that it is not a directory."""
    if (path := Path(weights)).is_dir() and not exported_config(weights):
        best = path / "checkpoints" / "best.ckpt"
        raise InputError(f"--weights: {weights} is a directory{suggest_file(best)}")
    check_source(local_dir(weights))


def suggest_file(path: Path) -> str:
    """Return the end of a message about a directory where a file is expected."""
    return f": give a file, such as {path}" if path.is_file() else ", not a file"


def exported_config(weights: str) -> dict[str, Any]:
    """Return `config.json` of a folder that `locat export` wrote (`DIR` or `local-dir:DIR`), {} of others."""
    file = Path(weights.removeprefix("local-dir:")) / "config.json"
    return dict(json.loads(file.read_text())) if file.is_file() else {}


def local_dir(weights: str) -> str:
    """Return weights with timm's prefix if they are a folder."""
    return f"local-dir:{weights}" if Path(weights).is_dir() else weights


def record_of_run(checkpoint: Path) -> Path | None:
    """Return where the run of a checkpoint recorded its config; None if the file is not of a run."""
    record = checkpoint.parent.parent / "config.yaml"
    return record if checkpoint.is_file() and record.is_file() else None
