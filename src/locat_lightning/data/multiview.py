"""Images for self-supervision: several views of each, and labels if there are any."""

from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np
from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from locat_lightning.data.base import SPLITS
from locat_lightning.data.dataset import Failure, Images, Source
from locat_lightning.data.decoding import reason
from locat_lightning.data.files import Files, class_folders, is_data, labelled_files, unlabelled_files
from locat_lightning.data.labelled import LabelledData
from locat_lightning.data.loading import ImageLoader
from locat_lightning.data.streams import NoShardsError
from locat_lightning.data.views import MultiCrop, ViewBatch, Views, ViewTransform
from locat_lightning.errors import InputError

MULTI_CROP = MultiCrop()


class ViewImages(Images):
    """The images of a source, each cut into views, which follow from (seed, epoch, index) alone.

    Mixed sizes follow from the images of the batch.
    """

    transform: ViewTransform

    def __getitem__(self, item: int) -> tuple[list[Views], int, int] | Failure:
        return self._cut(item, self.transform)

    def __getitems__(self, items: list[int]) -> list[tuple[list[Views], int, int] | Failure]:
        """Cut the images of a batch: a DataLoader asks for them together."""
        transform = self.transform.of_batch(np.random.default_rng([self.seed, *items]))
        return [self._cut(item, transform) for item in items]

    def _cut(self, item: int, transform: ViewTransform) -> tuple[list[Views], int, int] | Failure:
        epoch, index = divmod(item, len(self))
        try:
            with self.source.open(index) as (image, label):
                decoded = transform.decode(image, np.random.default_rng([self.seed, epoch, index]))
        except InputError as error:
            return Failure(self.source.path(index), str(error), mistake=True)
        except Exception as error:  # decoders raise anything; raised on, it would not name the image
            return Failure(self.source.path(index), reason(error))
        return transform.cut(decoded), label, index


class MultiViewData(LabelledData):
    """Images with or without labels, in several views each for training.

    In a folder, every image beneath `train/` is trained on, or beneath the root if there is no `train/`. They
    have labels if `train/` holds nothing but a folder per class; `val/`, which probes measure on, is then as
    in `ImageData`. Training needs neither, and has no validation.

    Args:
        views: makes the views of an image; the images in evaluation have the size of its first view.
        batch_size: images per training batch in each process.
        kwargs: those of `LabelledData`, `StreamableModule` and `ImageModule`.
    """

    def __init__(
        self, *, views: ViewTransform = MULTI_CROP, batch_size: PositiveInt = 64, **kwargs: Any
    ) -> None:
        super().__init__(batch_size=batch_size, img_size=views.size, **kwargs)
        imagenet = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
        if self.channels is None and self.normalisation != imagenet:
            raise InputError("data.mean, data.std: views of RGB images have ImageNet's: leave both out")
        self.views = views
        if self.hparams["views"] is views:  # not given by a config: checkpoints hold plain values alone
            path = f"{type(views).__module__}.{type(views).__qualname__}"
            self.save_hyperparameters({"views": {"class_path": path, "init_args": asdict(views)}})

    val_dataloader = LightningDataModule.val_dataloader  # none

    @cached_property
    def class_names(self) -> list[str]:
        without = self.stream is None and self.dataset == "folder" and not self._labelled
        return [] if without else super().class_names

    def train_dataloader(self) -> ImageLoader:
        images = ViewImages(self.source("train"), self.views, self.seed)
        return self._shuffled(images, collate=self.views.collate)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if isinstance(batch, ViewBatch):
            extra = None if batch.undistorted is None else batch.undistorted.coloured()
            return batch._replace(views=[views.coloured() for views in batch.views], undistorted=extra)
        return batch

    def _find(self, split: str) -> Source:
        if self.stream is not None:
            try:
                return super()._find(split)
            except NoShardsError:
                if split == "val":
                    return self.source("train")
                raise
        if self.dataset == "folder":
            self._check_root("the folder of the images")
            if split in self._labelled:
                return self._labelled[split]
            if split == "train":
                folder = self.root / "train"
                return unlabelled_files(folder if folder.is_dir() else self.root, self.reader)
            if split == "val":
                return self.source("train")
        return super()._find(split)

    @cached_property
    def _labelled(self) -> dict[str, Files]:
        """The images of `train`, and of `val` if it exists, if they have labels; else {}."""
        folder = self.root / "train"
        names = [each.name for each in folder.iterdir() if is_data(each.name)] if folder.is_dir() else []
        if not names or any(name.lower().endswith(self.reader.endings) for name in names):
            return {}
        try:
            names = list(class_folders(folder))
            own = names, "train"
            found = {"train": labelled_files(folder, *own, complete=True, reader=self.reader)}
            if any((self.root / name).is_dir() for name in SPLITS["val"]):
                held_out = self._split_folder("val")
                found["val"] = labelled_files(held_out, *own, complete=False, reader=self.reader)
        except InputError as error:
            rank_zero_info(f"training without labels: {error}")
            return {}
        return found
