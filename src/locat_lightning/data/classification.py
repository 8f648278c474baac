"""Labelled images for classification: from a folder, from timm's data sets, or the digits that need none."""

from collections.abc import Callable
from functools import cached_property
from math import inf
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_dataset, create_transform
from torch.utils.data import IterableDataset

from locat_lightning.data import digits
from locat_lightning.data.augmentation import train_transform
from locat_lightning.data.base import (
    SPLITS,
    ImageModule,
    check_least,
    check_share,
    check_span,
)
from locat_lightning.data.dataset import Images, Source
from locat_lightning.data.decoding import to_rgb
from locat_lightning.data.loading import ImageLoader
from locat_lightning.data.sources import (
    Stream,
    TimmSource,
    _class_folders,
    _folders,
    labelled_files,
    unlabelled_files,
)
from locat_lightning.errors import InputError

ROOT = "data"  # where none is given

TIMM_KINDS = ("torch", "hfds", "hfids", "tfds", "wds")


class ImageData(ImageModule["Source | Stream"]):
    """Images with a label each, in batches for training, evaluation and prediction.

    What a person has to put right (a folder without images, a class that training lacks) is found by `setup`,
    before anything is trained.

    Args:
        root: the folder of the images: `train/` and one of `val/`, `validation/`, `test/`, each with a folder
            per class; without training, no `train/`. For `predict` also any folder of images without these.
        dataset: `folder`; `digits` (scikit-learn's handwritten digits, which need no root); or a name of
            timm's: `torch/cifar10`, `hfds/timm/mini-imagenet`, `wds/…`.
        download: whether a timm data set may be downloaded to root.
        classes: the number of classes of a timm data set that does not know it.
        img_size: height and width of the images in pixels, after the transforms.
        batch_size: images per batch in each process.
        num_workers: processes that read images, for each process that trains; 0 reads in that process itself,
            null takes the available processors but one (16 at most).
        mean: of each channel (RGB, 0 to 1), subtracted.
        std: of each channel (RGB, 0 to 1), divided by.
        scale: smallest and largest share of the image's area in a random crop.
        ratio: smallest and largest width-to-height ratio of a random crop.
        hflip: probability of a horizontal flip.
        color_jitter: strength of the jitter of brightness, contrast and saturation; timm leaves it out where
            auto_augment does the same, which is every policy but `3a`.
        auto_augment: timm's name of a policy (`rand-m9-mstd0.5-inc1`, `3a`, `augmix-…`); null for none.
        random_erasing: probability of replacing a rectangle by noise.
        interpolation: of the random crop: `random` (bilinear or bicubic), `bilinear`, `bicubic`.
        eval_interpolation: of the resizing in evaluation.
        crop_pct: share of the resized image's shorter side that the central crop in evaluation keeps.
        seed: of the order and the augmentation of training.
        max_unreadable: images that may turn out unreadable, in each process, before the run stops. They are
            skipped and listed at the end of the epoch.

    Raises:
        InputError: an argument is out of its range, or timm does not know the policy.
    """

    def __init__(
        self,
        *,
        root: str = ROOT,
        dataset: str = "folder",
        download: bool = False,
        classes: int | None = None,
        img_size: int = 224,
        batch_size: int = 128,
        num_workers: int | None = None,
        mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, float, float] = IMAGENET_DEFAULT_STD,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        hflip: float = 0.5,
        color_jitter: float = 0.4,
        auto_augment: str | None = "rand-m9-mstd0.5-inc1",
        random_erasing: float = 0.25,
        interpolation: str = "random",
        eval_interpolation: str = "bicubic",
        crop_pct: float = 0.875,
        seed: int = 0,
        max_unreadable: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            num_workers=num_workers,
            mean=mean,
            std=std,
            seed=seed,
            max_unreadable=max_unreadable,
        )
        self.save_hyperparameters()
        check_least(1, img_size=img_size, classes=1 if classes is None else classes)
        check_share(hflip=hflip, random_erasing=random_erasing)
        check_span(1, scale=scale)
        check_span(ratio=ratio)
        if not 0 < crop_pct <= 1:
            raise InputError(f"data.crop_pct ({crop_pct}) must be above 0 and at most 1")
        if not 0 <= color_jitter < inf:
            raise InputError(f"data.color_jitter ({color_jitter}) must be at least 0")
        resamplings = [each.name.lower() for each in Image.Resampling]
        if eval_interpolation not in resamplings:
            raise InputError(
                f"data.eval_interpolation ({eval_interpolation!r}) must be of {', '.join(resamplings)}"
            )
        self.root = Path(root).expanduser().absolute()
        self.dataset = dataset
        self.download = download
        self.classes = classes
        self.img_size = img_size
        self.augmentation = {
            "scale": tuple(scale),
            "ratio": tuple(ratio),
            "hflip": hflip,
            "color_jitter": color_jitter,
            "auto_augment": auto_augment,
            "interpolation": interpolation,
            "re_prob": random_erasing,
            "re_mode": "pixel",
        }
        self.resizing = {"interpolation": eval_interpolation, "crop_pct": crop_pct}
        self.train_transform()  # so that a mistake in it is found before any image is looked for

    @cached_property
    def class_names(self) -> list[str]:
        """The classes in the order of their labels; none if the root has images to predict only.

        Raises:
            InputError: the classes cannot be found.
        """
        if self.dataset == "folder":
            return [] if self._is_unlabelled() else _class_folders(self._class_folder())
        if self.dataset == "digits":
            return digits.CLASS_NAMES
        source = self.source("train")
        assert isinstance(source, TimmSource | Stream)
        known = source.class_names or [str(label) for label in range(self.classes or 0)]
        if not known:
            raise InputError(
                f"data set {self.dataset!r} does not know its classes: give their number by --data.classes"
            )
        return known

    @property
    def num_classes(self) -> int:
        """How many classes there are; 0 if the root has images to predict only."""
        return len(self.class_names)

    @property
    def predict_paths(self) -> list[str]:
        """The path of each image that `predict` reads: what the indices of its batches count.

        Raises:
            InputError: the images are a stream, which has no paths.
        """
        source = self.source("predict")
        if isinstance(source, Stream):
            raise InputError(f"data set {self.dataset!r} is a stream without paths, which predict needs")
        return [source.path(index) for index in range(len(source))]

    def prepare_data(self) -> None:
        """Downloads what may be downloaded; Lightning calls it once a machine."""
        if self.download and self.dataset not in ("folder", "digits"):
            for split in ("train", "val"):
                self._timm_source(split, download=True)

    def setup(self, stage: str | None = None) -> None:
        """Finds and checks the images of a stage and their classes, once (see `ImageModule`)."""
        super().setup(stage)
        _ = self.predict_paths if stage == "predict" else self.class_names

    def train_transform(self) -> Callable[[Image.Image], Any]:
        """Makes the augmentation: RGB image to tensor [3, img_size, img_size].

        Raises:
            InputError: timm does not know the policy.
        """
        try:
            return train_transform(self.img_size, **self.normalisation, **self.augmentation)  # type: ignore[no-any-return]
        except (AssertionError, KeyError, ValueError) as error:
            policy, interpolation = self.augmentation["auto_augment"], self.augmentation["interpolation"]
            raise InputError(
                f"timm cannot make an augmentation of data.auto_augment {policy!r} and data.interpolation"
                f" {interpolation!r}: {_in_a_line(error)}"
            ) from error

    def eval_transform(self) -> Callable[[Image.Image], Any]:
        """Makes the transform of evaluation: resize, central crop, normalise."""
        return create_transform(self.img_size, **self.normalisation, **self.resizing)  # type: ignore[no-any-return]

    def train_dataloader(self) -> ImageLoader:
        """Augmented images in random order, the same number for every process."""
        source, transform = self.source("train"), self.train_transform()
        if isinstance(source, Stream):
            return ImageLoader(Stream(source.dataset, transform), **self._loader_options(training=True))
        return self._shuffled(Images(source, transform, self.seed))

    def eval_dataloader(self, split: str) -> ImageLoader:
        """The images of any split (also `train`) in order, not augmented, each in one process once."""
        return self._loader(self.source(split))

    def _find(self, split: str) -> "Source | Stream":
        if split == "predict":
            if self.dataset == "folder" and not self.root.is_dir():
                raise InputError(f"{self._without_root()} a folder of images")
            if self.dataset == "folder" and self._is_unlabelled():
                return unlabelled_files(self.root)
            return self.source("test")
        if self.dataset == "folder":
            folder = self._split_folder(split)
            if split == "test" != folder.name:
                rank_zero_info(f"no test/ in {self.root}: taking {folder.name}/")
            names = self.class_names or _class_folders(folder)
            return labelled_files(folder, names, self._class_folder().name, complete=split == "train")
        if self.dataset == "digits":
            return digits.Digits(train=split == "train")
        return self._timm_source(split, download=False)

    def _is_unlabelled(self) -> bool:
        """Whether the root is a folder that holds no splits: none of their names has folders of classes."""
        return self.root.is_dir() and not any(
            _folders(self.root / name) for name in ("train", *SPLITS["val"]) if (self.root / name).is_dir()
        )

    def _class_folder(self) -> Path:
        """The folder whose folders are the classes: `train`, or that of `val` where nothing is trained."""
        train = self.root / "train"
        return train if train.is_dir() else self._split_folder("val")

    def _split_folder(self, split: str) -> Path:
        """Finds the folder of a split."""
        if not self.root.is_dir():
            raise InputError(f"{self._without_root()} the folder that holds train/ and val/")
        for name in SPLITS[split]:
            if (self.root / name).is_dir():
                return self.root / name
        wanted = " or ".join(f"{name}/" for name in SPLITS[split])
        raise InputError(f"no {wanted} in {self.root}: it should hold a folder per class, with its images")

    def _without_root(self) -> str:
        """What is wrong with a root that is no folder, up to what it should be."""
        if self.hparams["root"] == ROOT and not self.root.exists():
            return f"data.root is not given, and there is no folder {self.root}: set --data.root to"
        what = "not a folder" if self.root.exists() else "no such folder"
        return f"{what}: {self.root}; set --data.root to"

    def _timm_source(self, split: str, download: bool) -> "TimmSource | Stream":
        """Has timm make a data set, of the first name of the split that it knows."""
        kind = self.dataset.partition("/")[0].lower()
        if kind not in TIMM_KINDS:
            known = ", ".join(f"{kind}/…" for kind in TIMM_KINDS)
            raise InputError(
                f"unknown data set {self.dataset!r}: use folder, digits, or a name of timm's ({known})"
            )
        failed: Exception | None = None
        for name in SPLITS[split]:
            try:
                made = create_dataset(
                    self.dataset,
                    root=str(self.root),
                    split=name,
                    is_training=split == "train",
                    download=download,
                    batch_size=self.batch_size,
                    seed=self.seed,
                )
            except ImportError as error:
                raise InputError(
                    f"data set {self.dataset!r} needs a package that is missing: pip install {error.name}"
                ) from error
            except Exception as error:  # each kind of data set has its own way to say what is wrong
                failed = failed or error
            else:
                is_stream = isinstance(made, IterableDataset)
                return Stream(made, to_rgb) if is_stream else TimmSource(made, f"{self.dataset}/{name}")
        assert failed is not None
        hint = " (--data.download true allows it)" if kind == "torch" and not self.download else ""
        raise InputError(
            f"data set {self.dataset!r}, {split}, in {self.root}: {_in_a_line(failed)}{hint}"
        ) from failed

    def _loader(self, source: "Source | Stream") -> ImageLoader:
        transform = self.eval_transform()
        if isinstance(source, Stream):
            return ImageLoader(Stream(source.dataset, transform), **self._loader_options(training=False))
        return self._in_order(Images(source, transform, self.seed))


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
