"""Checkpoints in parts: a file for each process of a sharded run, and one that says how they fit together.

`last.ckpt` is a checkpoint as any other, but that it numbers the tensors that are sharded;
`last.parts/N/R.pt` holds the rows that process R had of them. It is replaced when all parts of the next are
written, so that there is always a whole one. Reading executes nothing in them.
"""

import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from locat.runs import replaced
from locat_lightning.errors import InputError

PARTS = "parts"  # a checkpoint's key of where its parts are: {"folder": N, "processes": P}
NUMBER = "tensor in parts"  # key of what stands for a sharded tensor, beside its "shape"
# What other contents than ours raise.
UNLIKE = (TypeError, LookupError, AttributeError, ValueError, RuntimeError, OverflowError)


def folder_of(checkpoint: Path) -> Path:
    """Return the folder of a checkpoint's parts, which need not exist."""
    return checkpoint.with_suffix(".parts")


def new_folder(checkpoint: Path) -> int:
    """Return the number of a folder that no parts of a checkpoint are in yet."""
    return 1 + max((int(each.name) for each in _folders(checkpoint)), default=-1)


def _folders(checkpoint: Path) -> list[Path]:
    return [each for each in folder_of(checkpoint).glob("*") if each.name.isdecimal()]


def split(value: Any, own_rows: Callable[[Tensor], Tensor | None], rows: dict[int, Tensor]) -> Any:
    """Return a checkpoint with numbers for its sharded tensors, and add the rows of this process to `rows`.

    `own_rows` returns them; None of a tensor that is not sharded.
    """
    if isinstance(value, Tensor) and (own := own_rows(value)) is not None:
        rows[len(rows)] = own.detach().cpu().clone()  # a view would be saved with all of its storage
        return {NUMBER: len(rows) - 1, "shape": list(value.shape)}
    if isinstance(value, dict):
        return {key: split(each, own_rows, rows) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(split(each, own_rows, rows) for each in value)
    return value


def write_part(checkpoint: Path, folder: int, rank: int, rows: dict[int, Tensor]) -> None:
    """Write the rows of a process."""
    with replaced(folder_of(checkpoint) / str(folder) / f"{rank}.pt") as part:
        part.parent.mkdir(parents=True, exist_ok=True)
        torch.save(rows, contents := BytesIO())  # torch's own file would not say why it failed
        part.write_bytes(contents.getbuffer())


def remove_parts(checkpoint: Path, keep: Any = None) -> None:
    """Remove the parts of a checkpoint but for those of the folder that it names."""
    for each in _folders(checkpoint):
        if each.name != str(keep):
            shutil.rmtree(each, ignore_errors=True)
    if keep is None:
        shutil.rmtree(folder_of(checkpoint), ignore_errors=True)


def assemble(contents: dict[str, Any], checkpoint: Path, read: Callable[[Path], Any]) -> dict[str, Any]:
    """Return a checkpoint whole: each sharded tensor with the rows of all processes.

    Args:
        contents: of the checkpoint, as `split` made them; others are returned as they are.
        checkpoint: its path.
        read: reads a file of weights.

    Raises:
        InputError: a part is missing, or does not fit.
    """
    if PARTS not in contents:
        return contents
    where = contents.pop(PARTS)
    try:
        own, processes = folder_of(checkpoint) / str(int(where["folder"])), int(where["processes"])
    except UNLIKE as error:
        raise InputError(f"{checkpoint} does not say where its parts are: take another checkpoint") from error
    for rank in range(processes):
        if not (file := own / f"{rank}.pt").is_file():
            raise InputError(
                f"{checkpoint} is in parts, and {file} is missing: copy {folder_of(checkpoint)} along with it"
            )
    parts = [read(own / f"{rank}.pt") for rank in range(processes)]
    try:
        return dict(_join(contents, parts))
    except UNLIKE as error:
        raise InputError(f"{checkpoint}: the parts in {own} do not fit: take another checkpoint") from error


def _join(value: Any, parts: list[Any]) -> Any:
    if isinstance(value, dict) and NUMBER in value:
        whole = torch.cat([part.pop(value[NUMBER]) for part in parts])
        if list(whole.shape) != value["shape"]:
            raise ValueError("a part lacks rows")
        return whole
    if isinstance(value, dict):
        return {key: _join(each, parts) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_join(each, parts) for each in value)
    return value
