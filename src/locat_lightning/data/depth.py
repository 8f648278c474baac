"""Images with a depth for every pixel, in the layout of NYUv2 as BTS and DINOv2 read it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jsonargparse.typing import ClosedUnitInterval, PositiveFloat, PositiveInt
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import adjust_gamma, normalize

from locat.runs import replaced
from locat_lightning.data.base import SPLITS, ImageModule, check_side
from locat_lightning.data.dataset import Source
from locat_lightning.data.decoding import FORMATS, RGB, read_image, reason
from locat_lightning.data.files import counted, files_beneath, listed, unlabelled_files
from locat_lightning.data.loading import ImageLoader
from locat_lightning.data.mask_transforms import to_float
from locat_lightning.data.segmentation import MaskedImages, collate_masks
from locat_lightning.errors import InputError

# How the files are called, besides the number that an image and its depths have in common.
IMAGE, DEPTH = "rgb_", "sync_depth_"


class DepthBatch(NamedTuple):
    """Images and the depths of their pixels.

    Attributes:
        images: [B, 3, H, W], float32, normalised.
        depths: [B, H, W], float32, in metres; 0 where not measured.
        indices: [B], int64, the images' positions in the data set.
    """

    images: Tensor
    depths: Tensor
    indices: Tensor


def collate_depths(items: Sequence[tuple[Tensor, Tensor, int]]) -> DepthBatch:
    """Make a batch of items; raise an `InputError` if they differ in size."""
    return DepthBatch(*collate_masks(items))


@dataclass(frozen=True)
class DepthPairs(Source[np.ndarray]):
    """Image files, and the files of their depths; without those, all depths are 0."""

    images: list[str]
    depths: list[str]
    scale: float

    def __len__(self) -> int:
        return len(self.images)

    def path(self, index: int) -> str:
        return self.images[index]

    def read(self, index: int) -> tuple[Image.Image, np.ndarray]:
        image = read_image(self.images[index])
        if not self.depths:
            return image, np.zeros((image.height, image.width), np.float32)
        depths = read_depth(self.depths[index], self.scale)
        if image.size != depths.shape[::-1]:
            raise InputError(
                f"depths {self.depths[index]} have {depths.shape[1]} x {depths.shape[0]} pixels, but their "
                f"image {self.images[index]} {image.width} x {image.height}: make them one size"
            )
        return image, depths


def read_depth(file: str, scale: float) -> np.ndarray:
    """Read depths in metres, float32 [H, W], of a file in units of 1 / scale; `OSError` if it is broken."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            values = np.asarray(image)
    except Exception as error:  # decoders raise anything
        raise OSError(f"its depths {file}: {reason(error)}") from error
    if values.ndim != 2 or values.dtype.kind not in "iu" or values.dtype.itemsize < 2:
        raise InputError(
            f"depths {file} are not a PNG of 16 bits: write millimetres (or see data.depth_scale)"
        )
    return np.asarray(values / scale, np.float32)


def write_depth(file: Path, depths: np.ndarray, scale: float) -> None:
    """Write depths [H, W] in metres as a PNG of 16 bits, in units of 1 / scale."""
    file.parent.mkdir(parents=True, exist_ok=True)
    values = (depths * scale).round().clip(0, np.iinfo(np.uint16).max).astype(np.uint16)
    with replaced(file) as part:
        Image.fromarray(values).save(part, format="PNG")


class DepthData(ImageModule[DepthPairs]):
    """Images with a depth for every pixel, in batches for training, evaluation and prediction.

    Where root holds `nyu_train.txt` and `nyu_test.txt`, these list the images: a line has the path of an
    image and that of its depths, below root or its folder `train` or `test`, and more which is not read.
    Otherwise all `rgb_*.jpg` (or other images) beneath the folders `train` and `test` count, each with its
    `sync_depth_*.png` beside it. Validation is on the test images.

    Training crops, mirrors and recolours at random. Evaluation takes whole images as they are.

    Args:
        root: folder of the data set; for `predict`, also any folder of images.
        depth_scale: values in the files that make a metre; of NYUv2 they are millimetres.
        crop_size: height and width of the training crops in pixels.
        hflip: probability of a horizontal flip.
        colour: probability that gamma (0.9 to 1.1), brightness (0.75 to 1.25) and the three channels (0.9 to
            1.1) of an image change.
        batch_size: images per training batch in each process.
        eval_batch_size: images per evaluation batch in each process; more than 1 needs images of one size.
        kwargs: those of `ImageModule`.
    """

    refuses_channels = True

    def __init__(
        self,
        *,
        root: str = "data",
        depth_scale: PositiveFloat = 1000.0,
        crop_size: tuple[PositiveInt, PositiveInt] = (416, 544),
        hflip: ClosedUnitInterval = 0.5,
        colour: ClosedUnitInterval = 0.5,
        batch_size: PositiveInt = 16,
        eval_batch_size: PositiveInt = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, **kwargs)
        check_side("crop_size", max(crop_size))
        self.root = Path(root).expanduser().absolute()
        self.depth_scale, self.crop_size = depth_scale, crop_size
        self.eval_batch_size = eval_batch_size
        self.augmentation = partial(
            depth_augmentation,
            crop_size=crop_size,
            hflip=hflip,
            colour=colour,
            normalisation=self.normalisation,
        )

    @property
    def class_names(self) -> list[str]:
        return []

    def train_dataloader(self) -> ImageLoader:
        images = MaskedImages(self.source("train"), self.augmentation, self.seed)
        return self._shuffled(images, collate=collate_depths)

    def eval_dataloader(self, split: str) -> ImageLoader:
        whole = partial(depth_evaluation, normalisation=self.normalisation)
        images = MaskedImages(self.source(split), whole, self.seed)
        return self._in_order(images, collate=collate_depths, batch_size=self.eval_batch_size)

    def _find(self, split: str) -> DepthPairs:
        if not self.root.is_dir():
            raise InputError(f"no such folder: {self.root}; set --data.root to the folder of the data set")
        if split == "predict":
            known = any((self.root / each).exists() for each in ("nyu_test.txt", "test"))
            if not known:
                return DepthPairs(unlabelled_files(self.root).paths, [], self.depth_scale)
            return DepthPairs(self.source("val").images, [], self.depth_scale)
        names = [name for name in ("train", "test") if name in SPLITS[split]]
        for name in names:
            for found, find in ((f"nyu_{name}.txt", self._listed), (name, self._beneath)):
                if (self.root / found).exists():
                    return DepthPairs(*find(self.root / found, name), self.depth_scale)
        raise InputError(
            f"no nyu_{names[0]}.txt and no folder {names[0]} in {self.root}: set --data.root to the folder "
            "of NYUv2"
        )

    def _listed(self, file: Path, name: str) -> tuple[list[str], list[str]]:
        """Return the paths that a list names, without pairs that lack depths (`None` in BTS's lists)."""
        lines = [line.split() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        if short := [" ".join(line) for line in lines if len(line) < 2]:
            raise InputError(f"a line of {file} is {short[0]!r}: it should have an image and its depths")
        pairs = [line[:2] for line in lines if line[1] != "None"]
        folders = [folder for folder in (self.root, self.root / name) if folder.is_dir()]
        found = [[self._first(path, folders) for path in pair] for pair in pairs]
        missing = [
            path
            for pair, there in zip(pairs, found, strict=True)
            for path, f in zip(pair, there, strict=True)
            if not f
        ]
        if missing or not pairs:
            raise InputError(
                f"{len(missing)} files of {file} are not in {' or '.join(map(str, folders))}: "
                f"{listed(missing, 3) or 'it has no line'}"
            )
        images, depths = zip(*found, strict=True)
        return list(images), list(depths)

    @staticmethod
    def _first(path: str, folders: Sequence[Path]) -> str:
        # A Path for each of a million files takes seconds.
        candidates = (os.path.join(folder, path.lstrip("/")) for folder in folders)  # noqa: PTH118
        return next((each for each in candidates if os.path.exists(each)), "")  # noqa: PTH110

    @staticmethod
    def _beneath(folder: Path, name: str) -> tuple[list[str], list[str]]:
        """Return the images beneath a folder, each with the depths beside it."""
        images, depths = list[str](), list[str]()
        known = set(files_beneath(folder, (".png",)))
        for path in files_beneath(folder):
            place, file = os.path.split(path)
            if not file.startswith(IMAGE):
                continue
            number = os.path.splitext(file)[0].removeprefix(IMAGE)  # noqa: PTH122
            own = os.path.join(place, f"{DEPTH}{number}.png")  # noqa: PTH118
            if own not in known:
                raise InputError(f"{path} has no depths: {DEPTH}{number}.png is missing beside it")
            images.append(path)
            depths.append(own)
        if not images:
            raise InputError(f"no images {IMAGE}… beneath {folder}: {counted(RGB)}")
        return images, depths


def depth_augmentation(
    image: Tensor,
    depths: Tensor,
    *,
    crop_size: Sequence[int],
    hflip: float,
    colour: float,
    normalisation: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Crop, mirror, recolour and normalise at random: see `DepthData`.

    The image, uint8 [3, H, W], becomes float32 [3, h, w] of the crop's size, its depths [h, w]. Smaller
    images are padded on the right and below: 0 in the image, 0 (not measured) in the depths.
    """
    high, wide = (min(a, b) for a, b in zip(crop_size, depths.shape, strict=True))
    top, left = (int(torch.randint(a - b + 1, ())) for a, b in zip(depths.shape, (high, wide), strict=True))
    image = to_float(image[:, top : top + high, left : left + wide])
    depths = depths[top : top + high, left : left + wide]
    if torch.rand(1) < hflip:
        image, depths = image.flip(-1), depths.flip(-1)
    if torch.rand(1) < colour:
        image = adjust_gamma(image, torch.empty(()).uniform_(0.9, 1.1).item())
        image = image * torch.empty(()).uniform_(0.75, 1.25) * torch.empty(3, 1, 1).uniform_(0.9, 1.1)
        image = image.clamp(0, 1)
    image = normalize(image, **normalisation)
    padding = (0, crop_size[1] - wide, 0, crop_size[0] - high)
    return torch.nn.functional.pad(image, padding), torch.nn.functional.pad(depths, padding)


def depth_evaluation(
    image: Tensor, depths: Tensor, *, normalisation: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Normalise an image; its depths stay as they are."""
    return normalize(to_float(image), **normalisation, inplace=True), depths
