"""Videos with objects that are annotated in the first frame, in the layout of DAVIS 2017."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse.typing import PositiveInt
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import normalize, resize

from locat_lightning.data.base import ImageModule
from locat_lightning.data.class_lists import distinct_colours
from locat_lightning.data.dataset import Source
from locat_lightning.data.decoding import FORMATS, read_image, reason
from locat_lightning.data.files import files_beneath, listed
from locat_lightning.data.loading import ImageLoader
from locat_lightning.data.mask_transforms import to_float
from locat_lightning.data.segmentation import MaskedImages, collate_masks
from locat_lightning.errors import InputError
from locat_lightning.labels import IGNORE

# DAVIS's lists of videos, by split.
LISTS = {"train": "train", "val": "val", "test": "test-dev"}


@dataclass(frozen=True)
class Video:
    """The frames of a video in their order, and the files of their annotations as far as there are any."""

    name: str
    frames: list[str]
    masks: list[str | None]  # the first is there

    @property
    def is_annotated(self) -> bool:
        """Whether all frames between the first and the last are annotated, so that tracking can be scored."""
        return len(self.frames) > 2 and None not in self.masks[:-1]


@dataclass(frozen=True)
class Frames(Source[np.ndarray]):
    """The frames of videos, one video after the other, and the objects in them.

    The label of a frame is uint8 [H, W]: 0 is the background, 255 what is not annotated, which is all where a
    frame has no annotation.
    """

    videos: list[Video]

    def __len__(self) -> int:
        return len(self.places)

    @cached_property
    def places(self) -> list[tuple[int, int]]:
        """The video and the number in it of each frame."""
        return [(v, frame) for v, video in enumerate(self.videos) for frame in range(len(video.frames))]

    def path(self, index: int) -> str:
        video, frame = self.places[index]
        return self.videos[video].frames[frame]

    def read(self, index: int) -> tuple[Image.Image, np.ndarray]:
        video, frame = self.places[index]
        masks = self.videos[video].masks
        objects = read_objects(str(masks[frame] or masks[0]))
        if frame and masks[frame] is not None and objects.shape != (first := read_size(str(masks[0]))):
            raise InputError(
                f"annotation {masks[frame]} has {objects.shape[1]} x {objects.shape[0]} pixels, but the"
                f" first of its video {first[1]} x {first[0]}: make them one size"
            )
        if masks[frame] is None:
            objects = np.full_like(objects, IGNORE)
        return read_image(self.path(index)), objects


class VideoData(ImageModule[Frames]):
    """Videos for tracking: each frame resized, in order, with the objects at the annotation's own size.

    The layout is that of DAVIS 2017: `JPEGImages/480p/VIDEO/00000.jpg`, `Annotations/480p/VIDEO/00000.png`
    with an object's number in each of its pixels, and `ImageSets/2017/val.txt` with a video's name per line.
    Only the first frame has to be annotated.

    Args:
        root: folder of the data set, which holds JPEGImages.
        resolution: folder of the images and annotations of one resolution.
        year: folder of the lists of videos.
        short_side: shorter side of the resized frames, in pixels. The longer one is in proportion, and at
            most 63 pixels shorter, so that it is a multiple of 64.
        kwargs: those of `ImageModule`.
    """

    refuses_channels = True

    def __init__(
        self,
        *,
        root: str = "data",
        resolution: str = "480p",
        year: str = "2017",
        short_side: PositiveInt = 480,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.root = Path(root).expanduser().absolute()
        self.resolution, self.year, self.short_side = resolution, year, short_side

    @property
    def class_names(self) -> list[str]:
        return []

    def train_dataloader(self) -> ImageLoader:
        return self.eval_dataloader("train")

    def eval_dataloader(self, split: str) -> ImageLoader:
        return self.frames_dataloader(split, range(len(self.source(split).videos)), 1)

    def frames_dataloader(self, split: str, videos: Sequence[int], patch: int) -> ImageLoader:
        """Return the frames of some videos in order, each a `MaskBatch` with sides that a patch divides."""
        frames, chosen = self.source(split), set(videos)
        resized = partial(
            resized_frame, short_side=self.short_side, patch=patch, normalisation=self.normalisation
        )
        items = [place for place, (video, _) in enumerate(frames.places) if video in chosen]
        options = self._loader_options(training=False) | {"batch_size": 1}
        images = MaskedImages(frames, resized, self.seed)
        return ImageLoader(images, sampler=items, collate=collate_masks, **options)

    def _find(self, split: str) -> Frames:
        if split not in LISTS:
            raise InputError(f"DAVIS has no split {split!r}: take one of {', '.join(LISTS)}")
        file = self.root / "ImageSets" / self.year / f"{LISTS[split]}.txt"
        if not file.is_file():
            raise InputError(f"no such file: {file}; set --data.root to the folder of DAVIS, with JPEGImages")
        names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not names:
            raise InputError(f"no videos in {file}: it should have a name a line")
        # The list may be another's, and the name of a video is also that of a folder of masks.
        if paths := [name for name in names if name in (".", "..") or "/" in name or "\\" in name]:
            raise InputError(f"{paths[0]!r} in {file} is a path: it should be the name of a video's folder")
        return Frames([self._video(name) for name in names])

    def _video(self, name: str) -> Video:
        images, annotations = (
            self.root / each / self.resolution / name for each in ("JPEGImages", "Annotations")
        )
        for folder in (images, annotations):
            if not folder.is_dir():
                raise InputError(f"no such folder: {folder}, which should hold the video {name}")
        frames, masks = _by_stem(files_beneath(images)), _by_stem(files_beneath(annotations, (".png",)))
        if unknown := sorted(masks.keys() - frames.keys()):
            raise InputError(
                f"annotations in {annotations} without a frame in {images}: {listed(unknown, 3)}"
            )
        if not frames or next(iter(frames)) not in masks:
            raise InputError(
                f"the first frame of {images} has no annotation in {annotations}: it says what to track, and "
                "has the frame's name with .png"
            )
        return Video(name, list(frames.values()), [masks.get(stem) for stem in frames])


def _by_stem(files: Sequence[str]) -> dict[str, str]:
    """Return files by their names without ending: `InputError` if two have one name."""
    found: dict[str, str] = {}
    for file in files:
        if (other := found.setdefault(Path(file).stem, file)) != file:
            raise InputError(f"{other} and {file} of one video have the same name: rename one")
    return found


def read_objects(file: str) -> np.ndarray:
    """Read the number of the object in each pixel, uint8 [H, W]; `OSError` if the file cannot be read."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            objects = np.asarray(image)
    except Exception as error:  # decoders raise anything
        raise OSError(f"its annotation {file}: {reason(error)}") from error
    if objects.ndim != 2 or objects.dtype not in (np.uint8, bool):
        raise InputError(
            f"annotation {file} is a picture, not the number of an object for each pixel: write it as a PNG "
            "of 8-bit grey levels (mode L) or with a palette (mode P)"
        )
    return objects.astype(np.uint8)


def read_size(file: str) -> tuple[int, int]:
    """Read the height and width of an image, without its pixels."""
    with Image.open(file, formats=FORMATS) as image:
        return image.height, image.width


def palette_of(file: str) -> list[int]:
    """Return 256 colours, RGB after RGB: an annotation's palette, and distinct ones where it has none."""
    with Image.open(file, formats=FORMATS) as image:
        own = image.getpalette() or []
    return own + [0, 0, 0, *distinct_colours(255).ravel().tolist()][len(own) :]


def resized_frame(
    image: Tensor, objects: Tensor, *, short_side: int, patch: int, normalisation: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Resize and normalise a frame, uint8 [3, H, W], by `tracking_size`; the objects stay as they are."""
    height, width = tracking_size(image.shape[-2:], short_side, patch)
    # Without antialiasing, as OpenCV resizes in the original.
    pixels = resize(to_float(image), [height, width], antialias=False)
    return normalize(pixels, **normalisation, inplace=True), objects


def tracking_size(size: Sequence[int], short_side: int, patch: int) -> tuple[int, int]:
    """Return the size (height, width) of a resized frame: both sides are multiples of a patch.

    The longer side is in proportion to the shorter and rounded down to a multiple of 64. Patches that divide
    neither cut off a few pixels more.

    Source: `read_frame` in `eval_video_segmentation.py` of github.com/facebookresearch/dino.
    """
    height, width = size
    long_side = int(short_side * max(size) / min(size) // 64 * 64)
    sides = (long_side, short_side) if height > width else (short_side, long_side)
    high, wide = (max(patch, side // patch * patch) for side in sides)
    return high, wide
