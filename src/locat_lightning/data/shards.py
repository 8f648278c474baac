"""Shards of images as WebDataset has them, tar files, and the index beside them: where each image lies.

A sample is an image (`KEY.jpg`), and perhaps its label (`KEY.cls`, a number) or its mask (`KEY.mask.png`);
members of one key follow each other. The index makes every image readable by its position, without the tar's
headers.
"""

import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from hashlib import file_digest
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torchvision.datasets.folder import IMG_EXTENSIONS

from locat.runs import replaced
from locat_lightning.errors import InputError, in_a_line
from locat_lightning.records import plain

INDEX = "index.safetensors"
VERSION = 1  # of the index
KEY = "locat_shards"  # of the index's own entry in the header of the file
LABELS = 1_000_000  # that shards may have whose classes have no names
BANDS = (".npy", ".dcm")  # images of channels, in a sample without another image
MASKS = (".mask", ".seg")  # what the end of a mask's key may be, before the ending of the file


class Shard(NamedTuple):
    """A tar file: its name, its bytes, their SHA-256, and how many images it has."""

    name: str
    size: int
    sha256: str
    images: int


class Sample(NamedTuple):
    """An image in a shard: where its bytes and those of its mask begin, how many they are, and its label."""

    name: str
    image: tuple[int, int]
    label: int = -1
    mask: tuple[int, int] | None = None


@dataclass(frozen=True)
class Meaning:
    """What labels and masks mean, as far as the index says so.

    Attributes:
        classes: names of the classes in the order of their labels.
        colours: theirs in a segmentation, RGB from 0 to 255.
        masks: options of `MaskValues`, where there are masks.
    """

    classes: list[str] = field(default_factory=list)
    colours: list[list[int]] = field(default_factory=list)
    masks: dict[str, Any] = field(default_factory=dict)


class Names(Sequence[str]):
    """Many names in one array of bytes: a list of them would take ten times the memory."""

    def __init__(self, text: np.ndarray, ends: np.ndarray) -> None:
        self.text, self.ends = text, ends  # uint8; int64 [N], where each ends

    @classmethod
    def of(cls, names: Sequence[str]) -> Self:
        """Put names together."""
        encoded = [os.fsencode(name) for name in names]
        ends = np.cumsum([len(each) for each in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, place: Any) -> Any:
        start = int(self.ends[place - 1]) if place else 0
        return os.fsdecode(self.text[start : int(self.ends[place])].tobytes())


@dataclass(frozen=True, eq=False)
class Index:
    """Where N images lie in shards, in the order of the shards and within each in that of their members.

    Attributes:
        shards: the tar files.
        names: [N], of the images: paths in the folder that was packed.
        images: int64 [N, 2], where the bytes of an image begin in its shard, and how many they are.
        labels: int32 [N]; -1 where unknown.
        masks: int64 [N, 2] like `images`; [0, 2] if there are none.
        meaning: what labels and masks mean.
    """

    shards: list[Shard]
    names: Names
    images: np.ndarray
    labels: np.ndarray
    masks: np.ndarray
    meaning: Meaning

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def starts(self) -> np.ndarray:
        """The position of each shard's first image, and after the last N: int64 [shards + 1]."""
        return np.cumsum([0, *(shard.images for shard in self.shards)], dtype=np.int64)

    def shard_of(self, places: Any) -> Any:
        """Return the numbers of the shards that hold the images at these positions."""
        return np.searchsorted(self.starts, places, side="right") - 1

    def of(self, number: int) -> Self:
        """Return the index of one of the shards alone."""
        own = slice(*self.starts[number : number + 2].tolist())
        arrays = {kind: getattr(self, kind)[own] for kind in ("images", "labels", "masks")}
        names = Names.of([self.names[place] for place in range(own.start, own.stop)])
        return replace(self, shards=[self.shards[number]], names=names, **arrays)

    @classmethod
    def of_shard(cls, file: Path, samples: Sequence[Sample], meaning: Meaning) -> Self:
        """Make the index of one tar file whose samples are known."""
        with file.open("rb") as opened:
            digest = file_digest(opened, "sha256").hexdigest()
        shard = Shard(file.name, file.stat().st_size, digest, len(samples))
        masks = [sample.mask for sample in samples if sample.mask is not None]
        if len(masks) not in (0, len(samples)):
            raise InputError(f"{file}: {len(samples) - len(masks)} of {len(samples)} images have no mask")
        return cls(
            [shard],
            Names.of([sample.name for sample in samples]),
            np.array([sample.image for sample in samples], np.int64).reshape(-1, 2),
            np.array([sample.label for sample in samples], np.int32),
            np.array(masks, np.int64).reshape(-1, 2),
            meaning,
        )

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Put the indices of several shards together."""
        lengths = np.cumsum([0, *(len(part.names.text) for part in parts[:-1])])
        ends = [part.names.ends + before for part, before in zip(parts, lengths, strict=True)]
        names = Names(np.concatenate([part.names.text for part in parts]), np.concatenate(ends))
        images, labels, masks = (
            np.concatenate([getattr(part, kind) for part in parts]) for kind in ("images", "labels", "masks")
        )
        shards = [shard for part in parts for shard in part.shards]
        return cls(shards, names, images, labels, masks, parts[0].meaning)

    def save(self, file: Path) -> None:
        """Write the index as safetensors, whole or not at all."""
        about = {"version": VERSION, "shards": [[*shard] for shard in self.shards], **asdict(self.meaning)}
        arrays = {
            "names": self.names.text,
            "ends": self.names.ends,
            "images": self.images,
            "labels": self.labels,
            "masks": self.masks,
        }
        with replaced(file) as part:
            part.write_bytes(save(arrays, {KEY: json.dumps(about)}))

    @classmethod
    def load(cls, content: bytes, file: object) -> Self:
        """Read an index: `InputError` if it is something else, or says what no shards can have.

        `file` is its name, for the message.
        """
        try:
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            about = plain(json.loads(header["__metadata__"][KEY]), file)
            arrays = load(content)
            meaning = Meaning(**{key: about[key] for key in ("classes", "colours", "masks")})
            shards = [Shard(*each) for each in about["shards"]]
            names = Names(arrays["names"], arrays["ends"])
            found = cls(shards, names, arrays["images"], arrays["labels"], arrays["masks"], meaning)
            found.check(about["version"])
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise InputError(f"{file} is not an index of shards: {in_a_line(error)}") from error
        return found

    def check(self, version: int = VERSION) -> None:
        """Raise a `ValueError` if the index cannot be one of shards: it may come from anybody."""
        if version != VERSION:
            raise ValueError(f"its version is {version}, not {VERSION}")
        number, meaning = len(self.labels), self.meaning
        arrays = self.labels, self.images, self.names.ends, self.masks, self.names.text
        shapes = [each.shape for each in arrays[:-1]]
        fitting = [[(number,), (number, 2), (number,), (rows, 2)] for rows in (0, number)]
        if shapes not in fitting or not number:
            raise ValueError(f"its arrays are of {number} images and of shapes {shapes}")
        types = [str(each.dtype) for each in arrays]
        if types != ["int32", "int64", "int64", "int64", "uint8"]:
            raise ValueError(f"its arrays are of the types {', '.join(types)}")
        for shard in self.shards:
            # The names are of files: one on the disk, and one in the cache.
            sound = re.fullmatch(r"[^/\\]+\.tar", shard.name) and re.fullmatch("[0-9a-f]{64}", shard.sha256)
            counts = type(shard.size) is type(shard.images) is int
            if not sound or not counts or not 0 < shard.size < 2**62 or not 0 < shard.images <= number:
                raise ValueError(f"it has a shard {[*shard]}")
        if self.starts[-1] != number:
            raise ValueError(f"its shards hold {self.starts[-1]} images, but it has {number}")
        sizes = np.repeat([shard.size for shard in self.shards], np.diff(self.starts))
        for spans in (self.images, self.masks):
            if len(spans) and ((spans < 0).any() or (spans[:, 0] > sizes - spans[:, 1]).any()):
                raise ValueError("an image lies outside of its shard")
        if (np.diff(self.names.ends, prepend=0) < 1).any() or self.names.ends[-1] != len(self.names.text):
            raise ValueError("its names do not fit together")
        if b".." in self.names.text.tobytes() and any(".." in name.split("/") for name in self.names):
            raise ValueError("a name leads out of its folder")  # predictions are written by it
        if type(meaning.classes) is not list or not all(
            isinstance(name, str) and name for name in meaning.classes
        ):
            raise ValueError("a class has no name")
        if self.labels.min() < -1 or self.labels.max() >= (len(meaning.classes) or LABELS):
            raise ValueError(f"a label is not one of its {len(meaning.classes) or LABELS} classes")
        colours, masks = np.array(meaning.colours), meaning.masks
        if len(colours) and (colours.shape != (len(meaning.classes), 3) or not _is_byte(colours)):
            raise ValueError("its colours are not those of its classes")
        values = [masks.get("ignore_index", 0), *masks.get("labels", [])]
        known = masks.keys() <= {"ignore_index", "reduce_zero_label", "labels"}
        if not known or not _is_byte(np.array(values)):
            raise ValueError(f"its masks are {masks}")


def _is_byte(values: np.ndarray) -> bool:
    return values.dtype.kind in "iu" and bool(((values >= 0) & (values < 256)).all())


def samples_of(file: Path) -> Iterator[Sample]:
    """Find the samples of a tar file that others have written, in their order; `InputError` names a bad one.

    Members that are neither images nor labels are passed over.
    """
    try:
        with tarfile.open(file, "r:") as tar:
            key, parts = "", dict[str, Any]()
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, name = member.name.removeprefix("./").rpartition("/")
                stem, _, ending = name.partition(".")
                if (found := f"{folder}/{stem}".lstrip("/")) != key:
                    yield from _sample(parts)
                    key, parts = found, {}
                span = member.offset_data, member.size
                kind = _kind(f".{ending.lower()}", parts)
                if kind == "bands":
                    parts.setdefault(kind, {"name": member.name.removeprefix("./"), "image": span})
                elif kind == "label":
                    opened = tar.extractfile(member)
                    parts[kind] = int(opened.read(20)) if opened else -1
                    if not -1 <= parts[kind] < LABELS:
                        raise ValueError(f"the label in {member.name} is {parts[kind]}")
                elif kind in parts:
                    raise ValueError(f"{member.name} is a second {kind} of {key}")
                elif kind:
                    parts |= {kind: span} | (
                        {"name": member.name.removeprefix("./")} if kind == "image" else {}
                    )
            yield from _sample(parts)
    except (tarfile.TarError, ValueError, OSError) as error:
        raise InputError(f"{file} is not a shard of WebDataset's: {in_a_line(error)}") from error


def _kind(ending: str, parts: dict[str, Any]) -> str:
    """Return what a member of a sample is by its ending: `image`, `bands`, `mask`, `label`, or nothing."""
    if ending in (".cls", *BANDS):
        return "label" if ending == ".cls" else "bands"
    if not ending.endswith(IMG_EXTENSIONS):
        return ""
    beside = "image" in parts and ending == ".png"  # the mask of a JPEG
    return "mask" if ending.startswith(tuple(f"{each}." for each in MASKS)) or beside else "image"


def _sample(parts: dict[str, Any]) -> Iterator[Sample]:
    if "image" in (parts := parts.get("bands", {}) | parts):
        yield Sample(parts["name"], parts["image"], parts.get("label", -1), parts.get("mask"))
