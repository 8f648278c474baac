"""Images with a class for every pixel: a folder of masks, a known data set, or scenes of digits."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from locat_lightning.data import scenes
from locat_lightning.data.bands import Bands
from locat_lightning.data.base import SPLITS, check_side, check_span
from locat_lightning.data.class_lists import KNOWN, Classes, named_classes, read_classes
from locat_lightning.data.dataset import Images, Source
from locat_lightning.data.files import Files, listed, unlabelled_files
from locat_lightning.data.loading import ImageLoader
from locat_lightning.data.mask_files import LAYOUTS, Layout, MaskValues, Pairs
from locat_lightning.data.mask_transforms import joint_augmentation, joint_evaluation, square_augmentation
from locat_lightning.data.packing import SplitFiles
from locat_lightning.data.shards import Meaning
from locat_lightning.data.streams import OF_CLASSES, MaskedShards, StreamableModule
from locat_lightning.errors import InputError
from locat_lightning.labels import IGNORE

Dataset = Literal[
    "folder", "digits", "ade20k", "pascal_context", "coco_stuff", "pascal_voc", "pascal_voc_aug", "cityscapes"
]
LOOKED_AT = 500  # masks of a split, before training


class MaskBatch(NamedTuple):
    """Images and the classes of their pixels.

    Attributes:
        images: [B, 3, H, W], float32, normalised.
        masks: [B, H', W'], uint8, 255 where there is no class. In training H' = H and W' = W; otherwise they
            are the image's own size before it was resized, and without annotations all is 255.
        indices: [B], int64, the images' positions in the data set.
    """

    images: Tensor
    masks: Tensor
    indices: Tensor


class MaskedImages(Images):
    """The images of a source and their masks, transformed together."""

    def transformed(self, image: Image.Image | Bands, label: np.ndarray) -> tuple[Tensor, Tensor]:
        pixels = image.pixels if isinstance(image, Bands) else pil_to_tensor(image)
        return self.transform(pixels, torch.from_numpy(label))  # type: ignore[no-any-return]


def collate_masks(items: Sequence[tuple[Tensor, Tensor, int]]) -> MaskBatch:
    """Make a batch of items of `MaskedImages`; raise an `InputError` if they differ in size."""
    images, masks, indices = zip(*items, strict=True)
    for kind, parts in (("images", images), ("masks", masks)):
        sizes = list(dict.fromkeys(f"{part.shape[-1]} x {part.shape[-2]}" for part in parts))
        if len(sizes) > 1:
            two = " and ".join(sizes[:2])
            raise InputError(f"{kind} of {two} pixels cannot be in one batch: set --data.eval_batch_size 1")
    return MaskBatch(torch.stack(images), torch.stack(masks), torch.tensor(indices))


@dataclass(frozen=True)
class Unannotated(Source[np.ndarray]):
    """The images of another source; their masks have no class anywhere."""

    source: Source[Any]

    def __len__(self) -> int:
        return len(self.source)

    def path(self, index: int) -> str:
        return self.source.path(index)

    def read(self, index: int) -> tuple[Image.Image, np.ndarray]:
        image, _ = self.source.read(index)
        return image, np.full((image.height, image.width), IGNORE, np.uint8)

    def following(self, items: Iterable[int]) -> AbstractContextManager[Callable[[int], None]]:
        return self.source.following(items)


class SegmentationData(StreamableModule[Source[np.ndarray]]):
    """Images with a class for every pixel, in batches for training, evaluation and prediction.

    Training crops them at random. Evaluation takes whole images, and masks of the annotation's own size. The
    data sets known by name are laid out as mmsegmentation's guide prepares them.

    `setup` finds the mistakes that file names and the first mask of a split show. Others are found when an
    image is read: a mask of another size, in colours, or with a value that is not a class.

    Args:
        root: folder of the data set; for `predict`, also any folder of images.
        dataset: `folder`; `ade20k` (150 classes); `pascal_context` (59); `coco_stuff` (164k images, 171);
            `cityscapes` (19); `pascal_voc` (21; 2012, 1,464 images to train on) or `pascal_voc_aug` (the same
            with 10,582); or `digits` (scenes of scikit-learn's handwritten digits, 64 x 64 pixels, which need
            no root).
        images: folder of the images in root, for `folder`; `{split}` stands for train, and for one of val,
            validation, test.
        masks: folder of the masks in root, for `folder`. A mask has its image's name with another ending.
        splits: text file in root with the images of a split, for `folder`: a name without ending per line;
            null takes all images.
        image_suffix: ending of the images' names, for `folder`, if it is more than `.jpg` or the like.
        mask_suffix: ending of the masks' names, for `folder`.
        classes: names of the classes in the order of their labels, for `folder`; or a file with a class per
            line, `name` or `name,red,green,blue`, relative to the working directory or root.
        ignore_index: value of pixels without a class in the masks, for `folder`, besides 255.
        reduce_zero_label: whether 0 in the masks means no class, and 1 the first class, for `folder`.
        crop_size: height and width of the training crops in pixels.
        scale: longer and shorter side in pixels within which images are resized.
        ratio: smallest and largest random factor of scale in training.
        cat_max_ratio: share of a crop's annotated pixels that no class should reach; 1 takes any crop.
        hflip: probability of a horizontal flip.
        distortion: whether brightness, contrast, saturation and hue are changed at random; with `channels`,
            gain and offset of each channel.
        batch_size: images per training batch in each process.
        eval_batch_size: images per evaluation batch in each process; more than 1 needs images of one size.
        kwargs: those of `StreamableModule` and `ImageModule`.
    """

    def __init__(
        self,
        *,
        root: str = "data",
        dataset: Dataset = "folder",
        images: str = "images/{split}",
        masks: str = "annotations/{split}",
        splits: str | None = None,
        image_suffix: str = "",
        mask_suffix: str = ".png",
        classes: list[str] | str | None = None,
        ignore_index: NonNegativeInt = IGNORE,
        reduce_zero_label: bool = False,
        crop_size: PositiveInt = 512,
        scale: tuple[PositiveInt, PositiveInt] = (2048, 512),
        ratio: tuple[float, float] = (0.5, 2.0),
        cat_max_ratio: float = 0.75,
        hflip: ClosedUnitInterval = 0.5,
        distortion: bool = True,
        batch_size: PositiveInt = 32,
        eval_batch_size: PositiveInt = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, **kwargs)
        check_span("ratio", ratio)
        check_side("crop_size", crop_size)
        check_side("scale", max(scale))
        if not 0 < cat_max_ratio <= 1:
            raise InputError(f"data.cat_max_ratio ({cat_max_ratio}) must be above 0 and at most 1")
        if ignore_index > IGNORE:
            raise InputError(f"data.ignore_index ({ignore_index}) must be from 0 to {IGNORE}")
        if "{split}" not in (splits or images):
            raise InputError(
                f"data.images ({images!r}) or data.splits ({splits!r}) must contain {{split}}, or train and "
                "val are equal"
            )
        if self.channels is not None and dataset != "folder":
            raise InputError(f"data.channels: {dataset} has RGB images, only a folder others: leave it out")
        self.root = Path(root).expanduser().absolute()
        self.dataset = dataset
        own = Layout(images, masks, mask_suffix, splits, image_suffix, reader=self.reader)
        self.layout = LAYOUTS.get(dataset) or own
        self.given_classes = classes
        known = dataset != "folder"
        self.ignore_index = IGNORE if known else ignore_index
        self.reduce_zero_label = dataset in ("ade20k", "pascal_context") if known else reduce_zero_label
        self.crop_size, self.scale = crop_size, scale
        self.eval_batch_size = eval_batch_size
        # Other channels than RGB have been normalised where they were read.
        normalisation = self.normalisation if self.channels is None else None
        self.augmentation = partial(
            joint_augmentation,
            crop_size=crop_size,
            scale=scale,
            ratio=ratio,
            cat_max_ratio=cat_max_ratio,
            hflip=hflip,
            distortion=distortion,
            normalisation=normalisation,
        )
        self.evaluation = partial(joint_evaluation, scale=scale, normalisation=normalisation)

    @cached_property
    def classes(self) -> Classes:
        """Names and colours of the classes in the order of their labels; none if root has images alone."""
        given = self.given_classes
        if self.stream is not None and (meaning := self.shards(OF_CLASSES).index.meaning).classes:
            return named_classes(meaning.classes, np.array(meaning.colours) if meaning.colours else None)
        if self.dataset == "digits":
            return named_classes(scenes.CLASS_NAMES, scenes.COLOURS)
        if self.dataset in LAYOUTS:
            return read_classes(KNOWN / f"{self.dataset.removesuffix('_aug')}.csv")
        if given is None and self._is_unlabelled():
            return Classes([], np.zeros((0, 3), np.uint8))
        if given is None:
            raise InputError(
                f"the classes of {self.root} are not given: set --data.classes to their names in the order "
                "of their labels, or to a file with a name a line"
            )
        if isinstance(given, str):
            file = Path(given).expanduser()
            return read_classes(file if file.is_file() else self.root / file)
        return named_classes(given)

    @property
    def class_names(self) -> list[str]:
        return self.classes.names

    @property
    def colours(self) -> np.ndarray:
        """The classes' colours, RGB, uint8 [C, 3]; distinct ones where none are given."""
        return self.classes.colours

    def train_dataloader(self) -> ImageLoader:
        images = MaskedImages(self.source("train"), self.augmentation, self.seed)
        return self._shuffled(images, collate=collate_masks)

    def eval_dataloader(self, split: str) -> ImageLoader:
        images = MaskedImages(self.source(split), self.evaluation, self.seed)
        return self._in_order(images, collate=collate_masks, batch_size=self.eval_batch_size)

    def square_dataloader(
        self, split: str, side: int, *, places: Sequence[int] | None = None, augmented: int = 0
    ) -> ImageLoader:
        """Return the images of a split in order, resized to squares (pixels), as dense retrieval takes them.

        The masks of `train` are resized as well; those of other splits keep the annotation's own size. If
        `places` are given, only those images are read. If `augmented` is 1 or more, it is the number of a
        pass in which images and masks are augmented (`square_augmentation`), each pass differently.
        """
        training = split == "train"
        square = partial(self.evaluation, scale=(side, side), keep_ratio=False, with_mask=training)
        if augmented:
            normalisation = self.normalisation if self.channels is None else None
            square = partial(square_augmentation, side=side, normalisation=normalisation)
        images = MaskedImages(self.source(split), square, self.seed)
        items = [
            augmented * len(images) + place for place in (range(len(images)) if places is None else places)
        ]
        size = self.batch_size if training else self.eval_batch_size
        return self._in_order(images, items, collate=collate_masks, batch_size=size)

    def _find(self, split: str) -> Source[np.ndarray]:
        if self.stream is not None:
            return self._find_shards(split)
        if split == "predict":
            if self._is_unlabelled():
                return Unannotated(unlabelled_files(self.root, self.reader))
            if self.dataset == "digits":
                return Unannotated(self.source("val"))
            images = list(self.layout.images_of(self.root, "val").values())
            return Unannotated(Files(images, [-1] * len(images), self.reader))
        if self.dataset == "digits":
            training = split == "train"
            return scenes.Scenes(training, 1000 if training else 200)
        pairs = self.pairs(split)
        most = LOOKED_AT if self.dataset == "folder" else 1
        unseen = [self.class_names[label] for label in pairs.check_annotated(most)]
        if unseen and split == "train" and self.dataset == "folder":
            looked_at = "" if len(pairs) <= most else f" of {most} that were looked at"
            rank_zero_info(f"no training mask{looked_at} has any of the classes {listed(unseen)}")
        return pairs

    def files(self) -> dict[str, SplitFiles]:
        """Find the image and mask files of each split in root."""
        if self.dataset == "digits":
            raise InputError("data.dataset is digits: only folders of image files can be packed")
        found, seen = dict[str, SplitFiles](), set[str | None]()
        for split in SPLITS:
            if (name := self.layout.name(self.root, split)) in seen or (name is None and found):
                continue
            seen.add(name)
            pairs, folder = self.pairs(split), self.layout.image_folder(self.root, split)
            values = {key: getattr(pairs.values, key) for key in ("ignore_index", "reduce_zero_label")}
            values["labels"] = [*pairs.values.labels]
            meaning = Meaning(self.class_names, self.colours.tolist(), values)
            found[split] = SplitFiles(folder, pairs.images, [-1] * len(pairs), pairs.masks, meaning)
        return found

    def pairs(self, split: str) -> Pairs:
        """Find the image and mask files of a split in root."""
        layout = self.layout.of(self.root, split)
        values = MaskValues(self.num_classes, self.ignore_index, self.reduce_zero_label, layout.labels)
        return Pairs(*layout.pairs(self.root, split), values, self.reader)

    def _find_shards(self, split: str) -> Source[np.ndarray]:
        shards = self.shards_of(split)
        if split == "predict":
            return Unannotated(shards)
        if not len(shards.index.masks):
            raise InputError(f"the images in {shards.store.url} have no masks: pack them with their masks")
        own = {"ignore_index": self.ignore_index, "reduce_zero_label": self.reduce_zero_label}
        said = shards.index.meaning.masks or self.shards(OF_CLASSES).index.meaning.masks
        masked = MaskedShards(shards, MaskValues(self.num_classes, **(said or own)), self.reader)
        masked.check_annotated(1)
        return masked

    def _is_unlabelled(self) -> bool:
        """Return whether the root is a folder that holds no splits."""
        known = any(self.layout.name(self.root, split) for split in SPLITS)
        return self.dataset != "digits" and self.root.is_dir() and not known
