"""Dense retrieval with the backbone's patch features during training."""

from typing import Any

import torch
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from torch import nn

from locat_lightning.callbacks.probe import Probe
from locat_lightning.data.segmentation import SegmentationData
from locat_lightning.evaluation.retrieval import Retrieval, Search, segment_by_retrieval


class RetrievalProbe(Probe[SegmentationData]):
    """Log the mIoU of dense retrieval (Hummingbird) during training, as `retrieval/miou`.

    Every patch of a validation image takes the classes of the training patches most like it (see
    `evaluation.retrieval`). When and where it measures is as in `KnnProbe`.

    Args:
        data: images and masks to measure on; null takes the run's own, if they have masks.
        every_n_epochs: epochs from one measurement to the next; 0 for never.
        images: training images in the memory, chosen at random once; null takes all.
        image_size: height and width to which the images are resized, in pixels.
        memory_size: patches in the memory; null keeps all of the images'.
        neighbours: patches of the memory that vote.
        temperature: temperature of the votes.
        search: `auto` takes faiss on the CPU where it is installed; `torch`; `faiss`.
        seed: seed of the choice of images and patches.
        name: what precedes the slash in the logged names; several probes need several names.
    """

    title = "Dense retrieval"
    figure = "mIoU"
    metrics = ("miou", "pixel_accuracy", "mean_accuracy")

    def __init__(
        self,
        data: SegmentationData | None = None,
        *,
        every_n_epochs: NonNegativeInt = 10,
        images: PositiveInt | None = 1000,
        image_size: PositiveInt = 224,
        memory_size: PositiveInt | None = 100_000,
        neighbours: PositiveInt = 30,
        temperature: PositiveFloat = 0.02,
        search: Search = "auto",
        seed: int = 0,
        name: str = "retrieval",
    ) -> None:
        super().__init__(data, every_n_epochs, images, seed, name)
        self.settings = Retrieval(memory_size, neighbours, temperature, search, seed)
        self.image_size = image_size
        kept = "all patches" if memory_size is None else f"at most {memory_size:,} patches"
        of = "all training images" if images is None else f"at most {images:,} training images"
        self.protocol = f"{image_size} × {image_size} pixels, {kept} of {of}, {neighbours} neighbours"

    def obstacle(self, data: Any) -> str:
        if not isinstance(data, SegmentationData):
            return f"{type(data).__name__} has no masks: set {self.name}.data to some that have"
        self.choose(len(data.source("train")))
        return ""

    def measure(self, data: SegmentationData, backbone: nn.Module, device: torch.device) -> dict[str, float]:
        train, val = (
            self.share(data, data.square_dataloader(split, self.image_size), training=split == "train")
            for split in ("train", "val")
        )
        options: dict[str, Any] = {"num_classes": data.num_classes, "autocast_dtype": self._autocast_dtype}
        found = segment_by_retrieval(
            backbone, train, val, device, self.settings, places=self._bank, progress=False, **options
        )
        return {metric: float(getattr(found, metric)) for metric in self.metrics}
