"""What every data module here shares: splits that are found once, and loaders for every process."""

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from math import inf
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch.distributed as dist
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.fabric.utilities.data import suggested_max_num_workers
from lightning.pytorch import LightningDataModule
from lightning.pytorch.accelerators import CUDAAccelerator
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from locat_lightning.data.bands import BandReader, Channels
from locat_lightning.data.dataset import Images
from locat_lightning.data.decoding import MOST_PIXELS, RGB, Reader
from locat_lightning.data.loading import ImageLoader, ResumableLoader, UnreadableImages
from locat_lightning.data.sampling import EvaluationOrder, TrainOrder
from locat_lightning.data.statistics import read_statistics
from locat_lightning.errors import InputError, check_finite

# The names under which each split is looked for, in this order.
SPLITS = {"train": ("train",), "val": ("val", "validation", "test"), "test": ("test", "val", "validation")}
STAGES = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}

Found = TypeVar("Found")


class ImageModule(LightningDataModule, Generic[Found]):
    """Images in splits, each found once, in batches for every process.

    Args:
        batch_size: images per training batch in each process.
        num_workers: processes that read images, for each training process; 0 reads in the training process,
            null uses all available processors but one (at most 16).
        channels: indices of the channels to take from files of any number of channels (multi-band TIFF,
            `.npy`, DICOM, PNG), or their number to take all; null for RGB, unless `stats` is given.
        fill_channels: whether a model gets all channels of the files, those that are not taken being 0.
        stats: file of `locat stats`, in place of mean and std.
        show: indices of three channels that pictures show as red, green and blue, among those taken; null
            shows principal components.
        mean: channel means, subtracted from the pixels: of RGB, from 0 to 1; else of all channels of a file.
        std: channel standard deviations of the same, by which the pixels are divided.
        seed: seed for shuffling and augmentation.
        max_unreadable: unreadable images to tolerate, in each process, before the run stops. They are skipped
            and listed at the end of the epoch.
    """

    refuses_channels: ClassVar[bool] = False  # whether a subclass takes RGB images alone
    channels: Channels | None
    reader: Reader

    def __init__(
        self,
        *,
        batch_size: PositiveInt = 128,
        num_workers: NonNegativeInt | None = None,
        channels: PositiveInt | list[NonNegativeInt] | None = None,
        fill_channels: bool = False,
        stats: str | None = None,
        show: tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt] | None = None,
        mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, ...] = IMAGENET_DEFAULT_STD,
        seed: NonNegativeInt = 0,
        max_unreadable: NonNegativeInt = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()  # of the subclass as well
        if stats is not None:  # checkpoints hold the numbers, and need no file
            mean, std = read_statistics(stats)
            channels = len(mean) if channels is None else channels
            self.save_hyperparameters({"channels": channels, "stats": None, "mean": mean, "std": std})
        if channels is not None and self.refuses_channels:
            raise InputError(f"data.channels: {type(self).__name__} reads RGB images alone: leave it out")
        self.channels, self.reader = None, RGB
        if channels is not None:
            self.channels = chosen_channels(channels, len(mean))
            self.reader = BandReader(tuple(mean), tuple(std), self.channels.taken, fill_channels)
        self.fills = fill_channels
        check_statistics(self.channels, mean, std)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.normalisation: dict[str, Any] = {"mean": tuple(mean), "std": tuple(std)}
        if self.model_channels is not None:
            number = len(self.model_channels.taken)
            if max(show or (0,)) >= number:
                raise InputError(
                    f"data.show {tuple(show or ())}: indices of {number} channels end before that"
                )
            self.normalisation |= {"show": show}
        self.seed = seed
        self.unreadable = UnreadableImages(max_unreadable)
        # Evaluation shares the images out without padding, so that a rank may have none.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self._sources: dict[str, Found] = {}

    @property
    def model_channels(self) -> Channels | None:
        """The channels of the images that a model gets; None for RGB."""
        if self.channels is None or not self.fills:
            return self.channels
        return Channels(self.channels.of_files, tuple(range(self.channels.of_files)))

    @property
    def class_shares(self) -> np.ndarray | None:
        """The share of the draws that each class has in training [C]; None for each image once an epoch."""
        return None

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
        own = {"batch_size": self.batch_size, "seed": self.seed, "shares": self.class_shares}
        order = TrainOrder(images, *self._processes(), **own)
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


def chosen_channels(channels: int | Sequence[int], of_files: int) -> Channels:
    """Return what `data.channels` chooses of the channels that the statistics are of."""
    taken = tuple(range(channels)) if isinstance(channels, int) else tuple(map(int, channels))
    if isinstance(channels, int) and channels != of_files:
        raise InputError(
            f"data.channels ({channels}): data.mean and data.std are of {of_files}: measure them with locat "
            "stats, and give them by --data.stats"
        )
    if not taken or max(taken) >= of_files or len(set(taken)) < len(taken):
        raise InputError(f"data.channels {list(taken)}: give indices from 0 to {of_files - 1}, each once")
    return Channels(of_files, taken)


def check_statistics(channels: Channels | None, mean: Sequence[float], std: Sequence[float]) -> None:
    """Check mean and standard deviation of all channels of the files, or of RGB."""
    number = 3 if channels is None else channels.of_files
    if not len(mean) == len(std) == number:
        remedy = " (data.channels says how many channels the files have)" if channels is None else ""
        raise InputError(
            f"data.mean and data.std are {len(mean)} and {len(std)} numbers, not {number}{remedy}"
        )
    if constant := [i for i in (channels.taken if channels else ()) if not 0 < std[i] < inf]:
        raise InputError(f"channel {constant[0]} has one value everywhere: leave it out of data.channels")
    if channels is None and not all(0 < deviation < inf for deviation in std):
        raise InputError(f"data.std {tuple(std)} must be three numbers above 0")
    check_finite("data", {"mean": mean})


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
