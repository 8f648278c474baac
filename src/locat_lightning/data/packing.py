"""Images of a folder written to shards in WebDataset's format, byte by byte as they are."""

import io
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import file_digest
from pathlib import Path

import numpy as np

from locat.runs import replaced
from locat_lightning.data.shards import INDEX, Index, Meaning, Names, Sample, samples_of
from locat_lightning.errors import InputError, in_a_line

BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class SplitFiles:
    """The files of a split: images beneath a folder, and their labels or the files of their masks."""

    folder: Path
    images: Sequence[str]
    labels: Sequence[int]  # -1 where unknown
    masks: Sequence[str]  # [] if there are none
    meaning: Meaning

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """Return the path of image `index` in the folder."""
        return self.images[index][len(str(self.folder)) + 1 :].replace(os.sep, "/")


class Plan:
    """Which image of a split goes into which shard, under which key: the same each time.

    Args:
        files: of the split.
        shard_size: bytes from which on a shard is full.
        order: positions of the images, in the order in which they are packed.
    """

    def __init__(self, files: SplitFiles, shard_size: int, order: Sequence[int]) -> None:
        self.files, self.order = files, order
        self.keys = _keys([files.name(index) for index in range(len(files))])
        ends, self.starts = 0, [0]
        for place, index in enumerate(order):
            if ends >= shard_size:
                self.starts.append(place)
                ends = 0
            members = [files.images[index], *(files.masks[index : index + 1])]
            # Header and content, in whole blocks; the label is one of each.
            ends += sum(BLOCK * (1 + -(-os.stat(path).st_size // BLOCK)) for path in members)  # noqa: PTH116
            ends += 2 * BLOCK * (files.labels[index] >= 0)

    def __len__(self) -> int:
        return len(self.starts)

    def shard(self, number: int) -> list[int]:
        """Return the positions of the images in a shard, in their order."""
        bounds = [*self.starts, len(self.order)]
        return list(self.order[bounds[number] : bounds[number + 1]])

    def names(self, positions: Sequence[int]) -> list[str]:
        """Return the names that images have in the index."""
        return [self.files.name(index) for index in positions]

    def labels(self, positions: Sequence[int]) -> list[int]:
        """Return the labels of images."""
        return [self.files.labels[index] for index in positions]

    def differs(self, index: Index) -> str:
        """Say how the shards of an index differ from these, "" if they do not."""
        names, own = list(index.names), self.names(self.order)
        if sorted(names) != sorted(own):
            return "of other images"
        if names != own:
            return "in another order (--seed)"
        if index.starts[:-1].tolist() != self.starts:
            return "of another --shard_size, or of images that have changed"
        masked = len(index.masks) > 0
        if index.labels.tolist() != self.labels(self.order) or masked != (len(self.files.masks) > 0):
            return "with other labels or masks"
        return "" if index.meaning == self.files.meaning else "with other classes"


def pack(
    files: SplitFiles,
    to: Path,
    *,
    shard_size: int,
    seed: int | None,
    workers: int,
    said: Callable[[int, int], None],
) -> Index:
    """Write the files of a split as shards into a folder; go on where this was interrupted before.

    A shard that is there already is taken if it holds these images and its SHA-256 is the one that was noted
    when it was written; one that is missing or damaged is written again.

    Args:
        files: of the split.
        to: folder of the shards.
        shard_size: bytes from which on a shard is full.
        seed: of the order; None keeps that of the files.
        workers: threads that read and write.
        said: is told how many of how many images are in shards.

    Returns:
        The index, which is in the folder, too.

    Raises:
        InputError: the folder holds shards of other images, labels or classes, or of another size.
    """
    order = np.arange(len(files)) if seed is None else np.random.default_rng(seed).permutation(len(files))
    plan = Plan(files, shard_size, order.tolist())
    to.mkdir(parents=True, exist_ok=True)
    packed = None
    if (to / INDEX).exists():
        packed = Index.load((to / INDEX).read_bytes(), to / INDEX)
        if wrong := plan.differs(packed):
            raise InputError(f"{to} holds shards {wrong}: pack to another folder")
    parts, done = list[Index](), 0
    with ThreadPoolExecutor(workers) as threads:
        try:
            for part in threads.map(lambda number: _pack_shard(plan, number, to, packed), range(len(plan))):
                parts.append(part)
                said(done := done + len(part), len(files))
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise
    index = Index.joined(parts)
    if packed is None or index.shards != packed.shards:
        index.save(to / INDEX)
    for number in range(len(plan)):
        _note(to, number).unlink(missing_ok=True)
    return index


def index_tars(folder: Path, meaning: Meaning, workers: int, said: Callable[[int, int], None]) -> Index:
    """Write the index of the tar files in a folder, which others have written in WebDataset's format."""
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise InputError(f"no .tar file in {folder}")
    parts = list[Index]()
    with ThreadPoolExecutor(workers) as threads:
        found = threads.map(lambda file: Index.of_shard(file, list(samples_of(file)), meaning), tars)
        for file, part in zip(tars, found, strict=True):
            if not len(part):
                raise InputError(f"{file} holds no image")
            parts.append(part)
            said(len(parts), len(tars))
    index = Index.joined(parts)
    if len(index.masks) not in (0, len(index)):
        raise InputError(f"{folder}: {len(index) - len(index.masks)} of {len(index)} images have no mask")
    if (unknown := int((index.labels < 0).sum())) not in (0, len(index)):
        raise InputError(f"{folder}: {unknown} of {len(index)} images have no label")
    names = list(index.names)
    times = Counter(names)
    if len(times) < len(names):  # some tools count anew in each shard
        shards = [
            index.shards[number].name.removesuffix(".tar") for number in index.shard_of(range(len(names)))
        ]
        names = [
            f"{shard}/{name}" if times[name] > 1 else name for shard, name in zip(shards, names, strict=True)
        ]
        index = replace(index, names=Names.of(names))
    try:
        index.check()
    except ValueError as error:
        raise InputError(f"{folder}: {in_a_line(error)}") from error
    index.save(folder / INDEX)
    return index


def _pack_shard(plan: Plan, number: int, to: Path, packed: Index | None = None) -> Index:
    file, note = to / f"{number:06}.tar", _note(to, number)
    chosen = plan.shard(number)
    with suppress(OSError, InputError):
        found = Index.load(note.read_bytes(), note) if packed is None else packed.of(number)
        same = list(found.names) == plan.names(chosen) and found.labels.tolist() == plan.labels(chosen)
        with file.open("rb") as opened:
            if same and file_digest(opened, "sha256").hexdigest() == found.shards[0].sha256:
                return replace(found, meaning=plan.files.meaning)
    with replaced(file) as part, tarfile.open(part, "w") as tar:
        samples = [_write_sample(tar, plan, index) for index in chosen]
    found = Index.of_shard(file, samples, plan.files.meaning)
    found.save(note)
    return found


def _write_sample(tar: tarfile.TarFile, plan: Plan, index: int) -> Sample:
    files, key = plan.files, plan.keys[index]
    path, label = files.images[index], files.labels[index]
    image, mask = _copy(tar, key, path), None
    if files.masks:
        mask = _copy(tar, f"{key}.mask", files.masks[index])
    if label >= 0:
        _write(tar, f"{key}.cls", str(label).encode())
    return Sample(files.name(index), image, label, mask)


def _copy(tar: tarfile.TarFile, key: str, path: str) -> tuple[int, int]:
    with open(path, "rb") as opened:  # noqa: PTH123 - a Path for each of a million files takes seconds
        return _write(tar, key + path[path.rindex(".") :], opened.read())


def _write(tar: tarfile.TarFile, name: str, content: bytes) -> tuple[int, int]:
    """Add a member, and return where its content begins and how long it is."""
    member = tarfile.TarInfo(name)  # without times and owners: the same images make the same shards
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
    return tar.offset - BLOCK * -(-len(content) // BLOCK), len(content)


def _note(to: Path, number: int) -> Path:
    """Return the file that says what a shard holds, until all are packed."""
    return to / f"{number:06}.note"


def _keys(names: Sequence[str]) -> list[str]:
    """Return the key of each file in a shard: its path without ending, without a dot, and no other's."""
    taken, keys = set[str](), list[str]()
    for name in names:
        folder, slash, file = name.rpartition("/")
        key = f"{folder}{slash}{file[: file.rindex('.')].replace('.', '%2E')}"
        while key in taken:
            key += "_"
        taken.add(key)
        keys.append(key)
    return keys
