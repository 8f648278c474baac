"""Images for self-distillation: some global and some local views of each, and labels where there are any."""

import os
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torchvision.datasets.folder import IMG_EXTENSIONS

from locat_lightning.data.base import SPLITS
from locat_lightning.data.classification import ImageData
from locat_lightning.data.dataset import Failure, Images, Source
from locat_lightning.data.decoding import reason
from locat_lightning.data.loading import ImageLoader
from locat_lightning.data.sources import Files, Stream, labelled_files, unlabelled_files
from locat_lightning.data.views import MultiCrop, ViewBatch, Views, ViewTransform
from locat_lightning.errors import InputError

__all__ = ["MultiViewData"]

MULTI_CROP = MultiCrop()


class ViewImages(Images):
    """The images of a source, each cut into views.

    The views follow from (seed, epoch, index) alone. Images are decoded no larger than the views need.

    Args:
        source: where the images come from.
        transform: cuts the views.
        seed: of the views.
    """

    transform: ViewTransform

    def __getitem__(self, item: int) -> tuple[list[Views], int, int] | Failure:
        epoch, index = divmod(item, len(self))
        try:
            with self.source.open(index) as (image, label):
                decoded = self.transform.decode(image, np.random.default_rng([self.seed, epoch, index]))
        except (
            Exception
        ) as error:  # decoders raise anything; a worker that raises would hide which image it was
            return Failure(self.source.path(index), reason(error))
        return self.transform.cut(decoded), label, index


class MultiViewData(ImageData):
    """Images with or without labels, in several views each for training.

    In a folder, every image beneath `train/` is trained on, or beneath the root where there is no `train/`.
    They have labels where `train/` holds nothing but a folder per class, and `val/`, which is for measuring,
    is as in `ImageData`. Training needs neither, and validates nothing: probes read the images that they
    measure themselves (`eval_dataloader`).

    Args:
        root: the folder of the images.
        dataset: `folder`; `digits` (scikit-learn's handwritten digits, which need no root); or a name of
            timm's: `torch/cifar10`, `hfds/timm/mini-imagenet`, ….
        download: whether a timm data set may be downloaded to root.
        classes: the number of classes of a timm data set that does not know it.
        views: how views are made of an image; their `size` is that of the images in evaluation.
        batch_size: images per batch in each process.
        num_workers: processes that read images, for each process that trains; 0 reads in that process itself,
            null takes the available processors but one (16 at most).
        eval_interpolation: of the resizing in evaluation.
        crop_pct: share of the resized image's shorter side that the central crop in evaluation keeps.
        seed: of the order and the views.
        max_unreadable: images that may turn out unreadable, in each process, before the run stops. They are
            skipped and listed at the end of the epoch.

    Raises:
        InputError: an argument is out of its range.
    """

    def __init__(
        self,
        *,
        root: str = "data",
        dataset: str = "folder",
        download: bool = False,
        classes: int | None = None,
        views: ViewTransform = MULTI_CROP,
        batch_size: int = 64,
        num_workers: int | None = None,
        eval_interpolation: str = "bicubic",
        crop_pct: float = 0.875,
        seed: int = 0,
        max_unreadable: int = 0,
    ) -> None:
        super().__init__(
            root=root,
            dataset=dataset,
            download=download,
            classes=classes,
            img_size=views.size,
            batch_size=batch_size,
            num_workers=num_workers,
            eval_interpolation=eval_interpolation,
            crop_pct=crop_pct,
            seed=seed,
            max_unreadable=max_unreadable,
        )
        self.views = views
        if self.hparams["views"] is views:  # not given by a config: checkpoints hold plain values alone
            path = f"{type(views).__module__}.{type(views).__qualname__}"
            self.save_hyperparameters({"views": {"class_path": path, "init_args": asdict(views)}})

    val_dataloader = LightningDataModule.val_dataloader  # none

    @cached_property
    def class_names(self) -> list[str]:
        """The classes in the order of their labels; none if the images have no labels."""
        if self.dataset == "folder" and not self._labelled:
            return []
        return super().class_names

    def train_dataloader(self) -> ImageLoader:
        """The views of the images in random order, the same number of images for every process."""
        source = self.source("train")
        assert not isinstance(source, Stream)
        images = ViewImages(source, self.views, self.seed)
        return self._shuffled(images, collate=self.views.collate)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Finishes the colours of the views, on the device."""
        if isinstance(batch, ViewBatch):
            return batch._replace(views=[views.coloured() for views in batch.views])
        return batch

    def _find(self, split: str) -> Source | Stream:
        if self.dataset == "folder":
            if not self.root.is_dir():
                raise InputError(f"{self._without_root()} the folder of the images")
            if split in self._labelled:
                return self._labelled[split]
            if split == "train":
                folder = self.root / "train"
                return unlabelled_files(folder if folder.is_dir() else self.root)
            if split == "val":
                return self.source("train")
        source = super()._find(split)
        if isinstance(source, Stream):
            raise InputError(
                f"data set {self.dataset!r} is a stream, where no image has a position that could fix its "
                "views: use a folder, torch/… or hfds/…"
            )
        return source

    @cached_property
    def _labelled(self) -> dict[str, Files]:
        """The images of `train`, and of `val` where it is there, if those have labels; else nothing."""
        folder = self.root / "train"
        entries = [entry for entry in os.scandir(folder) if entry.name[0] != "."] if folder.is_dir() else []
        names = sorted(entry.name for entry in entries if entry.is_dir())
        if not names or any(entry.name.lower().endswith(IMG_EXTENSIONS) for entry in entries):
            return {}
        try:
            found = {"train": labelled_files(folder, names, "train", complete=True)}
            if any((self.root / name).is_dir() for name in SPLITS["val"]):
                found["val"] = labelled_files(self._split_folder("val"), names, "train", complete=False)
        except InputError as error:
            rank_zero_info(f"the images are taken without labels: {error}")
            return {}
        return found
