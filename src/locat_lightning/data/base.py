"""What every data module here shares: splits that are found once, and loaders for every process."""

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from math import inf
from typing import Any, Generic, TypeVar

import torch.distributed as dist
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.fabric.utilities.data import suggested_max_num_workers
from lightning.pytorch import LightningDataModule
from lightning.pytorch.accelerators import CUDAAccelerator
from PIL.Image import MAX_IMAGE_PIXELS
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from locat_lightning.data.dataset import Images
from locat_lightning.data.loading import ImageLoader, ResumableLoader, UnreadableImages
from locat_lightning.data.sampling import EvaluationOrder, TrainOrder
from locat_lightning.errors import InputError, check_finite

# The names under which each split is looked for, in this order.
SPLITS = {"train": ("train",), "val": ("val", "validation", "test"), "test": ("test", "val", "validation")}
STAGES = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}

MOST_PIXELS = MAX_IMAGE_PIXELS or inf  # Pillow's limit

Found = TypeVar("Found")


class ImageModule(LightningDataModule, Generic[Found]):
    """Images in splits, each found once, in batches for every process.

    Args:
        batch_size: images per training batch in each process.
        num_workers: processes that read images, for each training process; 0 reads in the training process,
            null uses all available processors but one (at most 16).
        mean: channel means (RGB, 0 to 1), subtracted from the pixels.
        std: channel standard deviations (RGB, 0 to 1), by which the pixels are divided.
        seed: seed for shuffling and augmentation.
        max_unreadable: unreadable images to tolerate, in each process, before the run stops. They are skipped
            and listed at the end of the epoch.
    """

    def __init__(
        self,
        *,
        batch_size: PositiveInt = 128,
        num_workers: NonNegativeInt | None = None,
        mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, float, float] = IMAGENET_DEFAULT_STD,
        seed: NonNegativeInt = 0,
        max_unreadable: NonNegativeInt = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()  # of the subclass as well
        if not all(0 < deviation < inf for deviation in std):
            raise InputError(f"data.std {tuple(std)} must be three numbers above 0")
        check_finite("data", {"mean": mean})
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.normalisation = {"mean": tuple(mean), "std": tuple(std)}
        self.seed = seed
        self.unreadable = UnreadableImages(max_unreadable)
        # Evaluation shares the images out without padding, so that a rank may have none.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self._sources: dict[str, Found] = {}

    @property
    @abstractmethod
    def class_names(self) -> list[str]:
        """The classes in the order of their labels; [] if the images have none."""

    @property
    def num_classes(self) -> int:
        """The number of classes; 0 if the images have none."""
        return len(self.class_names)

    @cached_property
    def predict_paths(self) -> list[str]:
        """The path of each image to predict, which the indices of a batch count."""
        source: Any = self.source("predict")
        return [source.path(index) for index in range(len(source))]

    def source(self, split: str) -> Found:
        """Find the images of `train`, `val`, `test` or `predict`, once."""
        if split not in self._sources:
            self._sources[split] = self._find(split)
        return self._sources[split]

    def setup(self, stage: str | None = None) -> None:
        for split in STAGES[stage] if stage else SPLITS:
            self.source(split)
        if stage != "predict":
            _ = self.class_names  # a mistake in them is found now

    @abstractmethod
    def _find(self, split: str) -> Found:
        """Find and check the images of a split."""

    @abstractmethod
    def eval_dataloader(self, split: str) -> ImageLoader:
        """Return the images of any split (also `train`) in order, not augmented, each in one process once."""

    def val_dataloader(self) -> ImageLoader:
        return self.eval_dataloader("val")

    def test_dataloader(self) -> ImageLoader:
        return self.eval_dataloader("test")

    def predict_dataloader(self) -> ImageLoader:
        loader = self.eval_dataloader("predict")
        loader.unreadable = UnreadableImages(limit=None)  # skipped and listed, however many
        return loader

    def _shuffled(self, images: Images, **options: Any) -> ResumableLoader:
        """Return batches of these images in random order, the same number for every process."""
        order = TrainOrder(images, *self._processes(), batch_size=self.batch_size, seed=self.seed)
        return ResumableLoader(
            images,
            trainer=self.trainer,
            sampler=order,
            **self._loader_options(training=True),
            **options,
        )

    def _in_order(self, images: Images, items: Sequence[int] | None = None, **options: Any) -> ImageLoader:
        """Return batches of these images, or some items of them, in order, each in one process once."""
        processes, rank = self._processes()
        if self.trainer is not None and len(images) < processes:
            # All processes have to evaluate together, but Lightning skips one that has no images.
            count = len(images)
            raise InputError(f"{count} images for {processes} processes: use --trainer.devices {count}")
        order = EvaluationOrder(images, processes, rank, items)
        return ImageLoader(images, sampler=order, **(self._loader_options(training=False) | options))

    def _processes(self) -> tuple[int, int]:
        """Return how many processes share the images, and which this one is."""
        if self.trainer:
            return self.trainer.world_size, self.trainer.global_rank
        distributed = dist.is_available() and dist.is_initialized()
        return (dist.get_world_size(), dist.get_rank()) if distributed else (1, 0)

    def _loader_options(self, training: bool) -> dict[str, Any]:
        trainer, workers = self.trainer, self.num_workers
        if workers is None:
            workers = min(16, suggested_max_num_workers(trainer.num_devices if trainer else 1))
        return {
            "batch_size": self.batch_size,
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": trainer is not None and isinstance(trainer.accelerator, CUDAAccelerator),
            "training": training,
            "unreadable": self.unreadable,
        }


def check_span(name: str, span: Sequence[float], most: float = inf) -> None:
    """Raise an `InputError` unless an option is two numbers, 0 < low <= high <= most."""
    low, high = span
    if not 0 < low <= high <= most:
        limit = f" <= {most:g}" if most < inf else ""
        raise InputError(f"data.{name} ({low}, {high}) must be two numbers, 0 < low <= high{limit}")


def check_side(name: str, side: float) -> None:
    """Raise an `InputError` if squares of this side (pixels) are larger than the images that are read."""
    if side**2 > MOST_PIXELS:
        raise InputError(f"data.{name}: squares of {side:,.0f} pixels a side have more than {MOST_PIXELS:,}")
