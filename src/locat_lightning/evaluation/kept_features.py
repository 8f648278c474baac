"""Features kept in a folder, where the next measurement of the same model on the same images finds them."""

import json
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from locat_lightning.backbones.weights import digest_of
from locat_lightning.errors import InputError, in_a_line
from locat_lightning.evaluation.features import Features
from locat_lightning.evaluation.gather import first_process, parts


def kept_features(
    folder: Path,
    decisive: Mapping[str, Any],
    extract: Callable[[], Features],
    device: torch.device,
    *,
    images: int,
    classes: int,
) -> Features:
    """Return the features that `folder` has for what decides them, or extract and keep them.

    Those of only some of the images, because others cannot be read, are not kept. With `torch.distributed`
    initialised, they are read where all processes have the file, and the first one writes it.

    Args:
        folder: of files named by a digest of `decisive`; made where it does not exist.
        decisive: all that decides the features, as plain JSON.
        extract: computes them.
        device: that of the processes' group.
        images: number of images in the data set.
        classes: number of classes.

    Raises:
        InputError: the file holds something else.
    """
    text = json.dumps(decisive, sort_keys=True)
    file = folder / f"{sha256(text.encode()).hexdigest()[:32]}.safetensors"
    is_here = [bool(each) for each in parts(torch.tensor([file.is_file()]), device)]
    if all(is_here):
        found = _read(file, images, classes)
        rank_zero_info(f"features of {images:,} images: {file}")
        return found
    found = extract()
    if len(found.labels) == images and first_process():
        folder.mkdir(parents=True, exist_ok=True)
        # Several commands may write the same file at once: each has a part of its own.
        with TemporaryDirectory(prefix=".part-", dir=folder) as own:
            part = Path(own) / file.name
            save_file(found._asdict(), part, {"decisive": text})
            part.chmod(folder.stat().st_mode & 0o666)  # for whoever may read the folder
            part.replace(file)
    return found


def digest_of_model(backbone: nn.Module) -> str:
    """Return a digest of what a model computes: its weights, and the plain settings of all its modules."""
    settings = [
        (name, type(module).__module__, type(module).__qualname__, sorted(_plain(module).items()))
        for name, module in backbone.named_modules()
    ]
    tensors = dict(backbone.named_buffers()) | backbone.state_dict()
    return sha256(f"{settings} {digest_of(tensors)}".encode()).hexdigest()


def _plain(module: nn.Module) -> dict[str, Any]:
    known = {key: value for key, value in vars(module).items() if key != "training"}
    return {key: v for key, v in known.items() if isinstance(v, bool | int | float | str | tuple | None)}


def _read(file: Path, images: int, classes: int) -> Features:
    try:
        found = Features(**load_file(file))
        features, labels, indices = found
        whole = features.ndim == 2 and features.dtype == torch.float32 and len(features) == len(labels)
        fits = whole and labels.dtype == torch.int64 and torch.equal(indices, torch.arange(images))
        if not (fits and labels.shape == indices.shape and -1 <= labels.min() <= labels.max() < classes):
            raise ValueError("its tensors are of another kind or number")
    except (SafetensorError, TypeError, ValueError, OSError) as error:
        raise InputError(
            f"{file} does not hold the features of these images ({in_a_line(error)}): remove it"
        ) from error
    return found
