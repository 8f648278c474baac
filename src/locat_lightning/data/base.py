"""What the data modules share: where the splits are found once, and loaders for every process."""

from abc import abstractmethod
from collections.abc import Sequence
from math import inf
from typing import Any, Generic, TypeVar

import torch.distributed as dist
from lightning.fabric.utilities.data import suggested_max_num_workers
from lightning.pytorch import LightningDataModule
from lightning.pytorch.accelerators import CUDAAccelerator

from locat_lightning.data.dataset import Images
from locat_lightning.data.loading import ImageLoader, ResumableLoader, UnreadableImages
from locat_lightning.data.sampling import EvaluationOrder, TrainOrder
from locat_lightning.errors import InputError

# Where each split is looked for, in this order.
SPLITS = {
    "train": ("train",),
    "val": ("val", "validation", "test"),
    "test": ("test", "val", "validation"),
}
STAGES = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}


Found = TypeVar("Found")


class ImageModule(LightningDataModule, Generic[Found]):
    """Images in splits, each found once, in batches for every process.

    Args:
        batch_size: images per training batch in each process.
        num_workers: processes that read images, for each process that trains; 0 reads in that process itself,
            null takes the available processors but one (16 at most).
        mean: of each channel (RGB, 0 to 1), subtracted.
        std: of each channel (RGB, 0 to 1), divided by.
        seed: of the order and the augmentation of training.
        max_unreadable: images that may turn out unreadable, in each process, before the run stops.

    Raises:
        InputError: an argument is out of its range.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        num_workers: int | None,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
        max_unreadable: int,
    ) -> None:
        super().__init__()
        check_least(1, batch_size=batch_size)
        check_least(0, num_workers=num_workers or 0, max_unreadable=max_unreadable)
        if not all(0 < deviation < inf for deviation in std):
            raise InputError(f"data.std {tuple(std)} must be three numbers above 0")
        if not all(-inf < value < inf for value in mean):
            raise InputError(f"data.mean {tuple(mean)} must be three finite numbers")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.normalisation = {"mean": tuple(mean), "std": tuple(std)}
        self.seed = seed
        self.unreadable = UnreadableImages(max_unreadable)
        # A rank without an image to evaluate is no mistake: the images are shared out, not padded.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self._sources: dict[str, Found] = {}

    def source(self, split: str) -> Found:
        """Finds the images of `train`, `val`, `test` or `predict`, once.

        Raises:
            InputError: they are not as they should be.
        """
        if split not in self._sources:
            self._sources[split] = self._find(split)
        return self._sources[split]

    def setup(self, stage: str | None = None) -> None:
        """Finds and checks the images of a stage, once.

        Args:
            stage: `fit`, `validate`, `test` or `predict`; all but the last if None.

        Raises:
            InputError: the images are not as they should be.
        """
        for split in STAGES[stage] if stage else SPLITS:
            self.source(split)

    @abstractmethod
    def _find(self, split: str) -> Found:
        """Finds and checks the images of a split."""

    @abstractmethod
    def eval_dataloader(self, split: str) -> ImageLoader:
        """The images of any split (also `train`) in order, not augmented, each in one process once."""

    def val_dataloader(self) -> ImageLoader:
        """The images of `val`, each in one process once."""
        return self.eval_dataloader("val")

    def test_dataloader(self) -> ImageLoader:
        """The images of `test` (of `val`, if there is none), each in one process once."""
        return self.eval_dataloader("test")

    def predict_dataloader(self) -> ImageLoader:
        """The images of `predict_paths`, each in one process once."""
        return self.eval_dataloader("predict")

    def _shuffled(self, images: Images, **options: Any) -> ResumableLoader:
        """Batches of these images in random order, the same number for every process."""
        order = TrainOrder(images, *self._processes(), seed=self.seed)
        return ResumableLoader(
            images,
            trainer=self.trainer,
            sampler=order,
            drop_last=len(order) > self.batch_size,
            **self._loader_options(training=True),
            **options,
        )

    def _in_order(self, images: Images, **options: Any) -> ImageLoader:
        """Batches of these images in order, each in one process once."""
        processes, rank = self._processes()
        if self.trainer is not None and len(images) < processes:
            # Lightning leaves a process without images out of what all have to do together.
            raise InputError(
                f"{len(images)} images for {processes} processes: use --trainer.devices {len(images)}"
            )
        order = EvaluationOrder(images, processes, rank, shuffle=False)
        return ImageLoader(images, sampler=order, **(self._loader_options(training=False) | options))

    def _processes(self) -> tuple[int, int]:
        """How many processes share the images, and which this one is."""
        if self.trainer:
            return self.trainer.world_size, self.trainer.global_rank
        distributed = dist.is_available() and dist.is_initialized()
        return (dist.get_world_size(), dist.get_rank()) if distributed else (1, 0)

    def _loader_options(self, training: bool) -> dict[str, Any]:
        trainer = self.trainer
        workers = self.num_workers
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


def check_least(smallest: int, **arguments: int) -> None:
    """Checks that arguments are at least so large.

    Raises:
        InputError: one is smaller.
    """
    for name, value in arguments.items():
        if value < smallest:
            raise InputError(f"data.{name} ({value}) must be at least {smallest}")


def check_share(**arguments: float) -> None:
    """Checks that arguments are from 0 to 1.

    Raises:
        InputError: one is not.
    """
    for name, value in arguments.items():
        if not 0 <= value <= 1:
            raise InputError(f"data.{name} ({value}) must be from 0 to 1")


def check_span(most: float = inf, **arguments: Sequence[float]) -> None:
    """Checks that arguments are two numbers, 0 < low <= high <= most.

    Raises:
        InputError: one is not.
    """
    for name, (low, high) in arguments.items():
        if not 0 < low <= high <= most:
            limit = f" <= {most:g}" if most < inf else ""
            raise InputError(f"data.{name} ({low}, {high}) must be two numbers, 0 < low <= high{limit}")
