"""Images with a class for every pixel, for semantic segmentation: from a folder, or digits that need none."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.transforms.v2.functional import to_image
from torchvision.tv_tensors import Mask

from locat_lightning.data import scenes
from locat_lightning.data.base import (
    SPLITS,
    ImageModule,
    check_least,
    check_share,
    check_span,
)
from locat_lightning.data.class_lists import Classes, known_classes, named_classes, read_classes
from locat_lightning.data.dataset import Images, Source
from locat_lightning.data.loading import ImageLoader
from locat_lightning.data.mask_files import LAYOUTS, Layout, MaskValues, Pairs, Unannotated
from locat_lightning.data.mask_transforms import VOID, joint_augmentation, joint_evaluation, joint_square
from locat_lightning.data.sources import Files, unlabelled_files
from locat_lightning.errors import InputError

__all__ = ["MaskBatch", "SegmentationData"]

SCENES = {"train": 1000, "val": 200, "test": 200}


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

    def transformed(self, image: Image.Image, label: np.ndarray) -> tuple[Tensor, Tensor]:
        """Transforms an image and its mask."""
        made: tuple[Tensor, Tensor] = self.transform(to_image(image), Mask(label))
        return made


def collate_masks(items: Sequence[tuple[Tensor, Tensor, int]]) -> MaskBatch:
    """Make a batch of items of `MaskedImages`.

    Raises:
        InputError: they differ in size.
    """
    images, masks, indices = zip(*items, strict=True)
    for kind, parts in (("images", images), ("masks", masks)):
        sizes = list(dict.fromkeys(f"{part.shape[-1]} x {part.shape[-2]}" for part in parts))
        if len(sizes) > 1:
            raise InputError(
                f"{kind} of {sizes[0]} and {sizes[1]} pixels cannot be in one batch: set "
                "--data.eval_batch_size 1"
            )
    return MaskBatch(torch.stack(images), torch.stack(masks), torch.tensor(indices))


class SegmentationData(ImageModule[Source[np.ndarray]]):
    """Images with a class for every pixel, in batches for training, evaluation and prediction.

    Training crops them at random. Evaluation takes whole images, and masks of the annotation's own size.

    What a person has to put right is found by `setup` where names of files and the first mask of a split tell
    it, otherwise when the image is read: an image or a mask alone, a mask of another size or with colours or
    a value that is no class, a split without any annotated pixel.

    The data sets known by name lie as mmsegmentation's guide prepares them. Root is their folder or holds it:

        ade20k          ADEChallengeData2016/{images,annotations}/{training,validation}
        pascal_context  VOCdevkit/VOC2010/{JPEGImages,SegmentationClassContext}, with
                        ImageSets/SegmentationContext/{train,val}.txt
        coco_stuff      coco_stuff164k/{images,annotations}/{train2017,val2017}

    Args:
        root: the folder of the data set; for `predict` also any folder of images.
        dataset: `folder`; `ade20k` (150 classes); `pascal_context` (59); `coco_stuff` (164k images, 171); or
            `digits` (scenes of scikit-learn's handwritten digits, 64 x 64 pixels, which need no root).
        images: of `folder`: the images' folder in root, where `{split}` stands for train, and for one of val,
            validation, test.
        masks: of `folder`: the masks' folder in root.
        splits: of `folder`: a text file in root with the images of a split, a name without ending a line;
            null takes all images.
        image_suffix: of `folder`: how the images' names end, where that is more than `.jpg` or the like.
        mask_suffix: of `folder`: how the masks' names end that begin as the images'.
        classes: of `folder`: their names in the order of their labels; or a file with a class a line, `name`
            or `name,red,green,blue`, found from here or from root.
        ignore_index: of `folder`: a value in the masks for pixels without a class; 255 always is one.
        reduce_zero_label: of `folder`: whether 0 in the masks means no class, and 1 the first class.
        crop_size: height and width of the crops in training, in pixels.
        scale: longer and shorter side, in pixels, within which images are resized.
        ratio: smallest and largest factor of scale in training.
        cat_max_ratio: share of a crop's annotated pixels that no class should reach; 1 takes any crop.
        hflip: probability of a horizontal flip.
        distortion: whether brightness, contrast, saturation and hue are changed at random.
        batch_size: images per batch in each process in training.
        eval_batch_size: the same in evaluation; more than 1 needs images that are of one size.
        num_workers: processes that read images, for each process that trains; 0 reads in that process itself,
            null takes the available processors but one (16 at most).
        mean: of each channel (RGB, 0 to 1), subtracted.
        std: of each channel (RGB, 0 to 1), divided by.
        seed: of the order and the augmentation of training.
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
        images: str = "images/{split}",
        masks: str = "annotations/{split}",
        splits: str | None = None,
        image_suffix: str = "",
        mask_suffix: str = ".png",
        classes: list[str] | str | None = None,
        ignore_index: int = VOID,
        reduce_zero_label: bool = False,
        crop_size: int = 512,
        scale: tuple[int, int] = (2048, 512),
        ratio: tuple[float, float] = (0.5, 2.0),
        cat_max_ratio: float = 0.75,
        hflip: float = 0.5,
        distortion: bool = True,
        batch_size: int = 32,
        eval_batch_size: int = 1,
        num_workers: int | None = None,
        mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, float, float] = IMAGENET_DEFAULT_STD,
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
        if dataset not in ("folder", "digits", *LAYOUTS):
            raise InputError(f"unknown data set {dataset!r}: use folder, digits, {', '.join(LAYOUTS)}")
        check_least(1, crop_size=crop_size, eval_batch_size=eval_batch_size)
        check_least(0, seed=seed)
        check_share(hflip=hflip)
        check_span(ratio=ratio)
        if min(scale) < 1:
            raise InputError(f"data.scale {tuple(scale)} must be two numbers of pixels, at least 1")
        if not 0 < cat_max_ratio <= 1:
            raise InputError(f"data.cat_max_ratio ({cat_max_ratio}) must be above 0 and at most 1")
        if not 0 <= ignore_index <= VOID:
            raise InputError(f"data.ignore_index ({ignore_index}) must be from 0 to {VOID}")
        if "{split}" not in (splits or images):
            raise InputError(
                f"data.images ({images!r}) or data.splits ({splits!r}) must contain {{split}}, or train and "
                "val are one"
            )
        self.root = Path(root).expanduser().absolute()
        self.dataset = dataset
        self.layout = LAYOUTS.get(dataset) or Layout(images, masks, mask_suffix, splits, image_suffix)
        self.given_classes = classes
        self.ignore_index = ignore_index if dataset == "folder" else VOID
        self.reduce_zero_label = (
            reduce_zero_label if dataset == "folder" else dataset in ("ade20k", "pascal_context")
        )
        self.scale = tuple(scale)
        self.crop_size = crop_size
        self.eval_batch_size = eval_batch_size
        self.augmentation = joint_augmentation(
            crop_size, scale, ratio, cat_max_ratio, hflip, distortion, mean, std
        )
        self.evaluation = joint_evaluation(scale, mean, std)

    @cached_property
    def classes(self) -> Classes:
        """Names and colours of the classes in the order of their labels.

        Raises:
            InputError: they are not given, or cannot be read.
        """
        if self.dataset == "digits":
            return named_classes(scenes.CLASS_NAMES, scenes.COLOURS)
        if self.dataset in LAYOUTS:
            return known_classes(self.dataset)
        given = self.given_classes
        if given is None:
            if self._is_unlabelled():
                return Classes([], np.zeros((0, 3), np.uint8))
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
        """The classes in the order of their labels; none if root is a folder of images to predict only."""
        return self.classes.names

    @property
    def num_classes(self) -> int:
        """How many classes there are; 0 if root is a folder of images to predict only."""
        return len(self.class_names)

    @property
    def colours(self) -> np.ndarray:
        """The classes' colours, RGB, uint8 [C, 3]; distinct ones where none are given."""
        return self.classes.colours

    @property
    def predict_paths(self) -> list[str]:
        """The path of each image that `predict` reads: what the indices of its batches count."""
        source = self.source("predict")
        return [source.path(index) for index in range(len(source))]

    def train_dataloader(self) -> ImageLoader:
        """Augmented crops in random order, the same number for every process."""
        images = MaskedImages(self.source("train"), self.augmentation, self.seed)
        return self._shuffled(images, collate=collate_masks)

    def eval_dataloader(self, split: str) -> ImageLoader:
        """The images of any split (also `train`) in order, not augmented, each in one process once."""
        images = MaskedImages(self.source(split), self.evaluation, self.seed)
        return self._in_order(images, collate=collate_masks, batch_size=self.eval_batch_size)

    def square_dataloader(self, split: str, side: int) -> ImageLoader:
        """The images of a split in order, resized to squares, as dense retrieval takes them.

        Args:
            split: the masks of `train` are resized as well; those of others keep the annotation's own size.
            side: height and width in pixels.
        """
        training = split == "train"
        square = joint_square(side, training, **self.normalisation)
        images = MaskedImages(self.source(split), square, self.seed)
        size = self.batch_size if training else self.eval_batch_size
        return self._in_order(images, collate=collate_masks, batch_size=size)

    def _find(self, split: str) -> Source[np.ndarray]:
        if split == "predict":
            if self._is_unlabelled():
                return Unannotated(unlabelled_files(self.root))
            if self.dataset == "digits":
                return Unannotated(self.source("val"))
            images = list(self.layout.images_of(self.root, "val").values())
            return Unannotated(Files(images, [-1] * len(images)))
        if self.dataset == "digits":
            return scenes.Scenes(split == "train", SCENES[split])
        paths = self.layout.pairs(self.root, split)
        pairs = Pairs(*paths, MaskValues(self.num_classes, self.ignore_index, self.reduce_zero_label))
        pairs.check_annotated()
        return pairs

    def _is_unlabelled(self) -> bool:
        """Whether the root is a folder that holds no splits."""
        return self.dataset != "digits" and (
            self.root.is_dir() and not any(self.layout.name(self.root, split) for split in SPLITS)
        )
