"""Images with a mask each: their layout in folders, the values of the masks, and mistakes in both."""

import os
from abc import abstractmethod
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO
from unicodedata import normalize

import numpy as np
from PIL import ExifTags, Image, ImageOps

from locat_lightning.data.base import SPLITS
from locat_lightning.data.dataset import Source
from locat_lightning.data.decoding import FORMATS, RGB, Reader, orientation, reason, to_rgb
from locat_lightning.data.files import counted, files_beneath, listed
from locat_lightning.errors import InputError
from locat_lightning.labels import IGNORE


@dataclass(frozen=True)
class Layout:
    """Where the images and masks of a data set lie beneath its folder: the options of `SegmentationData`.

    Attributes:
        more_masks: folder of masks that are not in `masks`.
        names: names of each split, in the order in which they are looked for.
        home: path of the data set's folder, as far as root may be above it.
        labels: values of the classes in the masks, where they are not 0, 1, …; any other means no class.
        otherwise: layout of a folder in which no mask of a split has this suffix.
        reader: of the images.
    """

    images: str = "images/{split}"
    masks: str = "annotations/{split}"
    mask_suffix: str = ".png"
    splits: str | None = None
    image_suffix: str = ""
    more_masks: str = ""
    names: dict[str, tuple[str, ...]] = field(default_factory=lambda: SPLITS)
    home: str = ""
    labels: tuple[int, ...] = ()
    otherwise: "Layout | None" = None
    reader: Reader = RGB

    def of(self, root: Path, split: str) -> "Layout":
        """Return this layout; or `otherwise`, if no mask of a split has this suffix."""
        name = self.name(root, split)
        if self.otherwise is None or name is None:
            return self
        folder = self._existing(root, self.masks, name)
        return self if files_beneath(folder, (self.mask_suffix.lower(),)) else self.otherwise

    def folder(self, root: Path) -> Path:
        """Return the data set's folder: root, or one beneath it."""
        parts = Path(self.home).parts
        candidates = [root.joinpath(*parts[start:]) for start in range(len(parts), -1, -1)]
        top = Path(self.masks).parts[0]
        return next((folder for folder in candidates if (folder / top).is_dir()), root)

    def name(self, root: Path, split: str) -> str | None:
        """Return the first name of a split that exists; None if there is none."""
        pattern, folder = self.splits or self.images, self.folder(root)
        found = (name for name in self.names[split] if (folder / pattern.replace("{split}", name)).exists())
        return next(found, None)

    def images_of(self, root: Path, split: str) -> dict[str, str]:
        """Return the path of each image of a split by its name without ending."""
        if not root.is_dir():
            raise InputError(f"no such folder: {root}; set --data.root to the folder of the data set")
        if (name := self.name(root, split)) is None:
            pattern = self.splits or self.images
            wanted = " or ".join(pattern.replace("{split}", name) for name in self.names[split])
            raise InputError(
                f"no {wanted} in {self.folder(root)}: set --data.root to the folder that holds it"
            )
        folder = self.image_folder(root, split)
        images: dict[str, str] = {}
        suffix = self.image_suffix.lower()
        for path in files_beneath(folder, (suffix,) if suffix else self.reader.endings):
            if self.images == self.masks and path.lower().endswith(self.mask_suffix.lower()):
                continue
            stem = _stem(path, folder, len(suffix) or len(path) - path.rindex("."))
            if stem in images:
                raise InputError(
                    f"{images[stem]} and {path} have the same name, and so the same mask: rename one"
                )
            images[stem] = path
        if self.splits:
            file = self.folder(root) / self.splits.replace("{split}", name)
            lines = normalize("NFC", file.read_text(encoding="utf-8")).splitlines()
            stems = [line.strip() for line in lines if line.strip()]
            if missing := [stem for stem in stems if stem not in images]:
                raise InputError(
                    f"{len(missing)} of {len(stems)} names in {file} have no image in {folder}:"
                    f" {listed(missing, 3)}; a line is an image's name without ending"
                )
            images = {stem: images[stem] for stem in stems}
        if not images:
            wanted = f"files ending in {self.image_suffix} count" if suffix else counted(self.reader)
            raise InputError(f"no images of {name} in {folder}: {wanted}")
        return images

    def image_folder(self, root: Path, split: str) -> Path:
        """Return the folder that holds the images of a split, which exists."""
        return self._existing(root, self.images, self.name(root, split))

    def pairs(self, root: Path, split: str) -> tuple[list[str], list[str]]:
        """Return the paths of the images of a split, and those of their masks."""
        images, name = self.images_of(root, split), self.name(root, split)
        image_folder, mask_folder = (self._existing(root, each, name) for each in (self.images, self.masks))
        more = self.folder(root) / self.more_masks if self.more_masks else mask_folder
        masks = {  # where both folders have one, that of the second
            _stem(path, folder, len(self.mask_suffix)): path
            for folder in dict.fromkeys((more, mask_folder))
            if folder.is_dir()
            for path in files_beneath(folder, (self.mask_suffix.lower(),))
        }
        options = "" if self.home else " (--data.image_suffix, --data.mask_suffix)"
        rule = f"the mask of a{self.image_suffix or '.jpg'} is a{self.mask_suffix}{options}"
        for kind, files, folder, partner, partners, place in (
            ("images", images, image_folder, "mask", masks, more),
            ("masks", {} if self.splits else masks, mask_folder, "image", images, image_folder),
        ):
            alone = [os.path.relpath(path, folder) for stem, path in files.items() if stem not in partners]
            if alone:
                raise InputError(
                    f"{len(alone)} of {len(files)} {kind} in {folder} have no {partner} in {place}:"
                    f" {listed(alone, 3)}; {rule}"
                )
        return list(images.values()), [masks[stem] for stem in images]

    def _existing(self, root: Path, pattern: str, name: str | None) -> Path:
        folder = self.folder(root) / pattern.replace("{split}", name or "")
        if not folder.is_dir():
            raise InputError(f"no such folder: {folder}, which should hold images or masks of {name}")
        return folder


def _stem(path: str, folder: Path, ending: int) -> str:
    """Return the path of a file in a folder without so many characters at its end, as Unicode composes it."""
    return normalize("NFC", path[len(str(folder)) + 1 : -ending])


PASCAL_VOC = Layout(
    images="JPEGImages",
    masks="SegmentationClass",
    splits="ImageSets/Segmentation/{split}.txt",
    names={"train": ("train",), "val": ("val",), "test": ("val",)},
    home="VOCdevkit/VOC2012",
)
# The ids of the 19 classes, in the order of their train ids (cityscapesscripts/helpers/labels.py).
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
CITYSCAPES = Layout(
    images="leftImg8bit/{split}",
    masks="gtFine/{split}",
    mask_suffix="_gtFine_labelIds.png",
    image_suffix="_leftImg8bit.png",
    names={"train": ("train",), "val": ("val",), "test": ("val",)},
    home="cityscapes",
    labels=CITYSCAPES_IDS,
)
# As mmsegmentation's guide to preparing data sets leaves them (docs/en/user_guides/2_dataset_prepare.md).
LAYOUTS = {
    "pascal_voc": PASCAL_VOC,
    "pascal_voc_aug": replace(
        PASCAL_VOC, more_masks="SegmentationClassAug", names=PASCAL_VOC.names | {"train": ("trainaug",)}
    ),
    "cityscapes": replace(
        CITYSCAPES, mask_suffix="_gtFine_labelTrainIds.png", labels=(), otherwise=CITYSCAPES
    ),
    "ade20k": Layout(
        names={"train": ("training",), "val": ("validation",), "test": ("validation",)},
        home="ADEChallengeData2016",
    ),
    "pascal_context": Layout(
        images="JPEGImages",
        masks="SegmentationClassContext",
        splits="ImageSets/SegmentationContext/{split}.txt",
        home="VOCdevkit/VOC2010",
    ),
    "coco_stuff": Layout(
        mask_suffix="_labelTrainIds.png",
        names={"train": ("train2017",), "val": ("val2017",), "test": ("val2017",)},
        home="coco_stuff164k",
    ),
}


@dataclass(frozen=True)
class MaskValues:
    """What the values in mask files mean: the options of `SegmentationData`."""

    num_classes: int
    ignore_index: int = IGNORE
    reduce_zero_label: bool = False
    labels: tuple[int, ...] = ()  # the value of each class, if any other, up to 255, means no class

    def classes(self, values: np.ndarray, file: str) -> np.ndarray:
        """Turn the values of a file, integers [H, W], into classes, uint8 [H, W]."""
        first = int(self.reduce_zero_label)
        last = first + self.num_classes - 1
        void = sorted({self.ignore_index, IGNORE, *range(first)})
        table = np.full(256, -1)
        table[first : last + 1] = np.arange(self.num_classes)
        table[void] = IGNORE
        if self.labels:
            table[:] = IGNORE
            table[list(self.labels)] = np.arange(self.num_classes)

        low, high = int(values.min()), int(values.max())
        if low >= 0 and high < 256:
            unknown = np.flatnonzero((np.bincount(values.ravel(), minlength=256) > 0) & (table < 0)).tolist()
        else:
            unknown = [low if low < 0 else high]
        if unknown:
            known, none = f"{first} to {last}", " and ".join(map(str, void))
            advice = "correct the mask or classes, ignore_index, reduce_zero_label"
            if self.labels:
                known, none = ", ".join(map(str, self.labels)), f"any other from 0 to {IGNORE}"
                advice = "correct the mask"
            raise InputError(
                f"value {unknown[0]} in mask {file} is not a class (classes: {known}, no class: {none}):"
                f" {advice}"
            )
        classes: np.ndarray = table.astype(np.uint8)[values]
        return classes


class MaskedFiles(Source[np.ndarray]):
    """Images and masks that are files each.

    Each is turned upright as its own EXIF tag says. A mask without one that is as large as its image before
    that is turned was drawn on it, and is turned along.
    """

    values: MaskValues
    reader: Reader

    @abstractmethod
    def image_file(self, index: int) -> str | IO[bytes]:
        """Return the file of image `index`, or its path."""

    @abstractmethod
    def mask_file(self, index: int) -> str | IO[bytes]:
        """Return the file of mask `index`, or its path."""

    @abstractmethod
    def mask_path(self, index: int) -> str:
        """Return the name by which a person finds mask `index`."""

    def read(self, index: int) -> tuple[Image.Image, np.ndarray]:
        if self.reader != RGB:  # as it is stored, like its mask
            with self.reader(self.image_file(index), self.path(index)) as image:
                mask = self.mask(index)
        else:
            with Image.open(self.image_file(index), formats=FORMATS) as stored:
                size, turned = stored.size, orientation(stored)
                (image := to_rgb(stored)).load()
            mask = self.mask(index, size, turned)
        if image.size != mask.shape[::-1]:
            raise InputError(
                f"mask {self.mask_path(index)} has {mask.shape[1]} x {mask.shape[0]} pixels, but its image"
                f" {self.path(index)} {image.width} x {image.height}: make them one size"
            )
        return image, mask

    def mask(self, index: int, size: tuple[int, int] | None = None, turned: int = 1) -> np.ndarray:
        """Read mask `index`, uint8 [H, W], beside an image stored in this size and orientation.

        Raises:
            OSError: the file cannot be read.
            InputError: it holds no classes.
        """
        return self.values.classes(self._values(index, size, turned), self.mask_path(index))

    def _values(self, index: int, size: tuple[int, int] | None = None, turned: int = 1) -> np.ndarray:
        file = self.mask_path(index)
        try:
            with Image.open(self.mask_file(index), formats=FORMATS) as image:
                image.load()
                if orientation(image) == 1 and image.size == size:
                    image.getexif()[ExifTags.Base.Orientation] = turned
                if orientation(image) != 1:
                    ImageOps.exif_transpose(image, in_place=True)
                values = np.asarray(image)
        except InputError:  # of a shard
            raise
        except Exception as error:  # decoders raise anything
            raise OSError(f"its mask {file}: {reason(error)}") from error
        if values.ndim != 2 or values.dtype.kind == "f":
            raise InputError(
                f"mask {file} is a picture ({image.mode}), not one class a pixel: write the index of each"
                " colour's class to a PNG of 8-bit grey levels (mode L) or with a palette (mode P)"
            )
        return values.astype(np.uint8) if values.dtype == bool else values

    def check_annotated(self, most: int) -> list[int]:
        """Check that some pixel has a class, by reading masks until all classes have been seen.

        At most so many masks are read, evenly spaced, and then others until a pixel has a class.

        Returns:
            The classes that no mask has that was read.
        """
        found: set[int] = set()  # values in the files
        seen = np.zeros(256, bool)
        every = -(-len(self) // most)
        for index in sorted(range(len(self)), key=lambda each: each % every != 0):
            if seen[: self.values.num_classes].all() or (index % every and seen[:IGNORE].any()):
                break
            with suppress(OSError):  # counted as unreadable when its turn comes
                values = self._values(index)
                seen[np.unique(self.values.classes(values, self.mask_path(index)))] = True
                found |= set(np.unique(values).tolist())
        if not seen[:IGNORE].any():
            raise InputError(
                f"no pixel has a class in {self.mask_path(0)} and the other masks of its split ({len(self)} "
                "in all): correct the masks or ignore_index, reduce_zero_label"
            )
        if most > 1 and found == {0, IGNORE} and self.values.num_classes > 1:
            raise InputError(
                f"the values in {self.mask_path(0)} and the other masks of its split are 0 and {IGNORE}, but"
                f" {IGNORE} means no class: write 1 for class 1"
            )
        return np.flatnonzero(~seen[: self.values.num_classes]).tolist()


@dataclass(frozen=True)
class Pairs(MaskedFiles):
    """Image files in folders, and their mask files."""

    images: list[str]
    masks: list[str]
    values: MaskValues
    reader: Reader = RGB

    def __len__(self) -> int:
        return len(self.images)

    def path(self, index: int) -> str:
        return self.images[index]

    image_file = path

    def mask_path(self, index: int) -> str:
        return self.masks[index]

    mask_file = mask_path
