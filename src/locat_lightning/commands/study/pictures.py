"""Patch features and predictions of several arms, side by side on the same images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms.functional import to_pil_image

from locat_lightning.backbones.create import load_backbone
from locat_lightning.callbacks.maps import legend, overlay
from locat_lightning.callbacks.pictures import (
    PAPER,
    Column,
    patch_features,
    pca_colours,
    resized,
    spaced_items,
    table,
)
from locat_lightning.commands.study.plan import TRAIN
from locat_lightning.commands.study.results import checkpoint_of, newest_run
from locat_lightning.data import SegmentationData
from locat_lightning.labels import IGNORE

IMAGES, SIDE = 4, 120  # rows, and the shorter side of a tile in pixels


def draw_features(arms: Mapping[str, Path], masks: Path) -> Image.Image:
    """The input, and for each arm the first three principal components of its patch features as colours.

    Args:
        arms: directory of the runs of each arm.
        masks: folder of the images of its probe.
    """
    data = _data(next(iter(arms.values())), masks)
    images = torch.stack([image for image, *_ in spaced_items(data.val_dataloader(), IMAGES)])
    mean, std = (torch.tensor(data.normalisation[name]).view(3, 1, 1) for name in ("mean", "std"))
    tiles = resized(images * std + mean, SIDE)
    columns = [Column("input", "", [to_pil_image(tile) for tile in tiles])]
    for arm, directory in arms.items():
        backbone = load_backbone(str(checkpoint_of(directory, TRAIN)), any_size=True)
        features = patch_features(backbone, images)
        assert features is not None  # the probe has read them
        colours = F.interpolate(pca_colours(features), tiles.shape[-2:], mode="nearest-exact")
        columns.append(Column(arm, "PCA, last block", [to_pil_image(tile) for tile in colours]))
    return table(columns, SIDE)


def draw_predictions(arms: Mapping[str, Path], masks: Path) -> Image.Image | None:
    """The input, its annotation, and for each arm the prediction of its probe; None without predictions.

    Args:
        arms: directory of the runs of each arm.
        masks: folder of the images of its probe.
    """
    data = _data(next(iter(arms.values())), masks)
    source = data.source("val")
    items = spaced_items(data.val_dataloader(), IMAGES)
    read = [source.read(index) for *_, index in items]
    names = [Path(source.path(index)).stem for *_, index in items]
    maps: dict[str, list[np.ndarray]] = {"annotation": [mask for _, mask in read]}
    for arm, directory in arms.items():
        run = newest_run(directory, "predictions_predict") / "predictions"
        found = [next(run.rglob(f"{name}.png"), None) for name in names]
        maps[arm] = [np.asarray(Image.open(file)) for file in found if file is not None]
    if not all(len(each) == len(read) for each in maps.values()):
        return None
    columns = [Column("input", "", [_tile(image) for image, _ in read])]
    columns += [
        Column(
            title,
            "",
            [_tile(overlay(image, each, data.colours)) for (image, _), each in zip(read, of, strict=True)],
        )
        for title, of in maps.items()
    ]
    drawn = table(columns, SIDE)
    shown = sorted(
        {int(label) for of in maps.values() for each in of for label in np.unique(each)} - {IGNORE}
    )
    key = legend(shown, data.class_names, data.colours, drawn.width, SIDE)
    whole = Image.new("RGB", (drawn.width, drawn.height + key.height), PAPER)
    whole.paste(drawn, (0, 0))
    whole.paste(key, (0, drawn.height))
    return whole


def _data(directory: Path, masks: Path) -> SegmentationData:
    """The images of an arm's probe, where they are now."""
    record = yaml.safe_load((newest_run(directory, "masks") / "config.yaml").read_text())
    own: dict[str, Any] = record["data"]["init_args"] | {"root": str(masks), "num_workers": 0}
    return SegmentationData(**own)


def _tile(image: Image.Image) -> Image.Image:
    shorter = min(image.size)
    return image.resize((round(image.width * SIDE / shorter), round(image.height * SIDE / shorter)))
