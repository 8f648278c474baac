"""What an evaluation found of each image, as a few lines of JSON: without names, and compressed."""

from base64 import b64decode, b64encode
from collections.abc import Collection, Mapping, Sequence
from typing import Any
from zlib import compress, decompress

import numpy as np
import torch
from torch import Tensor

from locat_lightning.evaluation.per_image import Areas, PerImage, Scores, fingerprint
from locat_lightning.evaluation.shots import FIGURES

HITS, NUMBERS, COUNTS = "bits", "<f4", "<u4"  # how values are written: 0 or 1, any number, pixels


def packed(results: PerImage, figures: Collection[str]) -> dict[str, Any] | None:
    """Return what `unpacked` reads, by values that JSON has; None if it holds none of the figures.

    Of scores only those of the figures are kept; for figures of groups of classes they are hits, labels, and
    how many training images each label has. Areas of classes are kept whole, as all their figures follow from
    them. Results under several conditions are not kept.
    """
    record: dict[str, Any] = {"images": len(results.indices), "fingerprint": fingerprint(results)}
    if isinstance(results, Areas) and figures:
        return record | {"classes": list(results.classes)} | _written(results.areas.numpy(), COUNTS)
    if not isinstance(results, Scores):
        return None
    of_groups = results.shots is not None and any(name in figures for name in FIGURES)
    kept = [name for name in results.scores if name in figures or (of_groups and name == "top1")]
    if not kept:
        return None
    if of_groups and results.shots is not None:
        groups = torch.stack([results.labels, results.shots]).numpy()
        record["groups"] = _written(groups, COUNTS)
    scores = torch.stack([results.scores[name].float() for name in kept]).numpy()
    form = HITS if np.isin(scores, (0, 1)).all() else NUMBERS
    return record | {"figures": kept} | _written(scores, form)


def unpacked(record: Mapping[str, Any]) -> PerImage:
    """Return the results that `packed` wrote, without names of images."""
    images = record["images"]
    indices, names = torch.arange(images), [""] * images
    if "classes" in record:
        classes = record["classes"]
        return Areas(indices, names, classes, _read(record, (images, 3, len(classes))).long())
    scores = _read(record, (len(record["figures"]), images))
    labels, shots = torch.zeros(images).long(), None
    if "groups" in record:
        labels, shots = _read(record["groups"], (2, images)).long()
    return Scores(indices, names, labels, dict(zip(record["figures"], scores, strict=True)), shots)


def _written(values: np.ndarray, form: str) -> dict[str, str]:
    flat = np.packbits(values.astype(bool)) if form == HITS else values.astype(form)
    return {"form": form, "values": b64encode(compress(flat.tobytes(), 9)).decode()}


def _read(record: Mapping[str, Any], shape: Sequence[int]) -> Tensor:
    contents = decompress(b64decode(record["values"]))
    if record["form"] == HITS:
        flat = np.unpackbits(np.frombuffer(contents, np.uint8), count=int(np.prod(shape)))
    else:
        flat = np.frombuffer(contents, record["form"])
    return torch.from_numpy(flat.astype(np.float64)).reshape(*shape)
