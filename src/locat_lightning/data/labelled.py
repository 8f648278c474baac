"""Images with a label each: of a folder, of shards, of timm's data sets, or scikit-learn's digits."""

import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import PositiveInt
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from timm.data import create_transform

from locat_lightning.data import digits
from locat_lightning.data.balance import Subset
from locat_lightning.data.band_transforms import BandEvaluation
from locat_lightning.data.base import SPLITS, check_side
from locat_lightning.data.dataset import Images, Source
from locat_lightning.data.files import class_folders, is_data, labelled_files, subfolders, unlabelled_files
from locat_lightning.data.loading import ImageLoader, UnreadableImages
from locat_lightning.data.packing import SplitFiles
from locat_lightning.data.shards import Meaning
from locat_lightning.data.streams import OF_CLASSES, StreamableModule
from locat_lightning.data.timm_sources import TimmSource, is_fetched, known_class_names, timm_source
from locat_lightning.errors import InputError

ROOT = "data"  # where none is given
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]


class LabelledData(StreamableModule[Source]):
    """Images with a label each, in batches for evaluation and prediction; subclasses add the training.

    Args:
        root: folder of the images: `train/` and one of `val/`, `validation/`, `test/`, each with a folder per
            class; without training, no `train/`. For `predict`, also any folder of images without these.
        dataset: `folder`; `digits` (scikit-learn's handwritten digits, which need no root); or a data set by
            timm's name: `torch/cifar10`, `hfds/timm/mini-imagenet`.
        download: whether a timm data set may be downloaded to root.
        classes: number of classes, for a timm data set or shards of other tools that do not know it.
        img_size: height and width of the images in pixels, after the transforms.
        eval_interpolation: how images are resized in evaluation.
        crop_pct: share of the resized image's shorter side that the central crop in evaluation keeps.
        kwargs: those of `StreamableModule` and `ImageModule`.
    """

    def __init__(
        self,
        *,
        root: str = ROOT,
        dataset: str = "folder",
        download: bool = False,
        classes: PositiveInt | None = None,
        img_size: PositiveInt = 224,
        eval_interpolation: Interpolation = "bicubic",
        crop_pct: float = 0.875,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 0 < crop_pct <= 1:
            raise InputError(f"data.crop_pct ({crop_pct}) must be above 0 and at most 1")
        check_side("img_size and crop_pct", img_size / crop_pct)
        if self.channels is not None and dataset != "folder":
            raise InputError(f"data.channels: {dataset} has RGB images, only a folder others: leave it out")
        self.root = Path(root).expanduser().absolute()
        self.dataset = dataset
        self.download = download
        self.classes = classes
        self.img_size = img_size
        self.resizing = {"interpolation": eval_interpolation, "crop_pct": crop_pct}

    @cached_property
    def class_names(self) -> list[str]:
        if self.stream is not None:
            index = self.shards(OF_CLASSES).index
            most = int(index.labels.max()) + 1
            if self.classes is not None and self.classes < most:
                raise InputError(f"data.classes ({self.classes}): a label in {self.stream} is {most - 1}")
            return index.meaning.classes or [str(label) for label in range(most and (self.classes or most))]
        if self.dataset == "folder":
            return [] if self._is_unlabelled() else list(class_folders(self._class_folder()))
        if self.dataset == "digits":
            return digits.CLASS_NAMES
        source = self.source("train")
        source = source.source if isinstance(source, Subset) else source
        assert isinstance(source, TimmSource)
        known = known_class_names(source) or [str(label) for label in range(self.classes or 0)]
        if not known:
            raise InputError(
                f"data set {self.dataset!r} does not know its classes: set --data.classes to their number"
            )
        return known

    @property
    def typed_again(self) -> dict[str, str]:
        own = {"--data.dataset": self.dataset} if is_fetched(self.dataset) else {}
        return own | super().typed_again

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What decides `eval_transform`, as plain JSON."""
        numbers = {key: list(self.normalisation[key]) for key in ("mean", "std")}
        taken = {} if self.channels is None else {"channels": list(self.channels.taken)}
        return {"img_size": self.img_size, **self.resizing, **numbers, **taken}

    def prepare_data(self) -> None:
        if self.download and self.stream is None and self.dataset not in ("folder", "digits"):
            for split in ("train", "val"):
                self._timm_source(split, download=True)

    def eval_transform(self) -> Callable[[Image.Image], Any]:
        """Make the transform of evaluation: resize, central crop, normalise."""
        if self.channels is not None:
            return BandEvaluation(self.img_size, **self.resizing)  # type: ignore[arg-type,return-value]
        return create_transform(self.img_size, **self.normalisation, **self.resizing)  # type: ignore[no-any-return]

    def eval_dataloader(self, split: str) -> ImageLoader:
        return self._loader(split, self.eval_transform(), training=False)

    def loader_of(self, split: str, places: Sequence[int], *, pin_memory: bool = False) -> ImageLoader:
        """Return the images at these positions of a split, in their order, not augmented, in one process.

        Images that cannot be read are skipped and listed, however many.
        """
        images = Images(self.source(split), self.eval_transform(), self.seed)
        options = self._loader_options(training=False) | {"unreadable": UnreadableImages(limit=None)}
        return ImageLoader(images, sampler=places, **(options | {"pin_memory": pin_memory}))

    def _loader(self, split: str, transform: Callable[[Image.Image], Any], *, training: bool) -> ImageLoader:
        images = Images(self.source(split), transform, self.seed)
        return self._shuffled(images) if training else self._in_order(images)

    def _find(self, split: str) -> Source:
        if self.stream is not None:
            shards, classes = self.shards_of(split), len(self.class_names)
            if split != "predict" and classes and (most := int(shards.index.labels.max())) >= classes:
                raise InputError(
                    f"a label in {shards.store.url} is {most}, but there are {classes} classes: pack train "
                    "and val from one folder, or set data.classes"
                )
            return shards
        if split == "predict":
            if self.dataset == "folder":
                self._check_root("a folder of images")
                if self._is_unlabelled():
                    return unlabelled_files(self.root, self.reader)
            return self.source("test")
        if self.dataset == "folder":
            folder = self._split_folder(split)
            if split == "test" != folder.name:
                rank_zero_info(f"no test/ in {self.root}: using {folder.name}/")
            names = self.class_names or list(class_folders(folder))
            by, complete = self._class_folder().name, split == "train"
            return labelled_files(folder, names, by, complete, self.reader)
        if self.dataset == "digits":
            return digits.Digits(train=split == "train")
        return self._timm_source(split, download=False)

    def files(self) -> dict[str, SplitFiles]:
        """Find the image files of each split in root by the name of its folder, "" if there are no splits."""
        if self.dataset != "folder":
            raise InputError(f"data.dataset is {self.dataset}: only folders of image files can be packed")
        self._check_root("the folder of the images")
        folders = {
            name: self.root / name for name in ("train", *SPLITS["val"]) if (self.root / name).is_dir()
        }
        classified = [name for name, folder in folders.items() if subfolders(folder)]
        names = list(class_folders(folders[classified[0]])) if classified else []
        found = dict[str, SplitFiles]()
        for split, folder in (folders or {"": self.root}).items():
            if split in classified:
                files = labelled_files(folder, names, classified[0], split == "train", self.reader)
                for name in sorted(each.name for each in os.scandir(folder) if is_data(each.name)):
                    if name.lower().endswith(self.reader.endings):
                        raise InputError(
                            f"{folder / name} is beside folders of classes, in none: move it into one, or "
                            f"pack {folder} as images without labels: --data.root {folder}"
                        )
            else:
                files = unlabelled_files(folder, self.reader)
            meaning = Meaning(names if split in classified else [])
            found[split] = SplitFiles(folder, files.paths, files.labels, [], meaning)
        return found

    def _is_unlabelled(self) -> bool:
        """Return whether the root is a folder that holds no splits, that is, none with folders of classes."""
        splits = [self.root / name for name in ("train", *SPLITS["val"])]
        return self.root.is_dir() and not any(subfolders(split) for split in splits if split.is_dir())

    def _class_folder(self) -> Path:
        """Return the folder whose folders are the classes: `train`, or that of `val` without one."""
        train = self.root / "train"
        return train if train.is_dir() else self._split_folder("val")

    def _split_folder(self, split: str) -> Path:
        self._check_root("the folder that holds train/ and val/")
        for name in SPLITS[split]:
            if (self.root / name).is_dir():
                return self.root / name
        wanted = " or ".join(f"{name}/" for name in SPLITS[split])
        raise InputError(f"no {wanted} in {self.root}: it should hold a folder per class, with its images")

    def _check_root(self, wanted: str) -> None:
        if self.root.is_dir():
            return
        if self.hparams["root"] == ROOT and not self.root.exists():
            wrong = f"data.root is not given, and there is no folder {self.root}:"
        else:
            wrong = f"{'not a folder' if self.root.exists() else 'no such folder'}: {self.root};"
        raise InputError(f"{wrong} set --data.root to {wanted}")

    def _timm_source(self, split: str, *, download: bool) -> TimmSource:
        return timm_source(self.dataset, self.root, split, download=download)
