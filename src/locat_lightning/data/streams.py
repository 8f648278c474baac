"""Images in shards as a source: read by position like those of a folder, from a folder or from any store."""

import io
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import numpy as np
from jsonargparse.typing import PositiveInt
from PIL import Image

from locat_lightning.data.base import SPLITS, Found, ImageModule
from locat_lightning.data.dataset import Images, Source
from locat_lightning.data.decoding import RGB, Reader
from locat_lightning.data.loading import ResumableLoader
from locat_lightning.data.mask_files import MaskedFiles, MaskValues
from locat_lightning.data.packing import SplitFiles
from locat_lightning.data.sampling import laned_order
from locat_lightning.data.shards import INDEX, Index
from locat_lightning.data.stores import Ahead, Store, default_cache, in_bytes, is_remote, readable
from locat_lightning.errors import InputError

# The folders in which the shards of each split are looked for, in this order; "" is the stream's own.
FOLDERS = {split: (*names, "") if split == "train" else names for split, names in SPLITS.items()}
FOLDERS["predict"] = (*SPLITS["test"], "")
OF_CLASSES = (*FOLDERS["train"], *FOLDERS["val"])  # the first of them says what labels and masks mean


@dataclass(frozen=True, eq=False)
class Shards(Source[int]):
    """The images of shards, and their labels.

    Args:
        index: where each image lies.
        store: where the shards are.
        lanes: shards that an epoch of training reads at once, see `laned_order`.
        reader: opens the images.
    """

    index: Index
    store: Store
    lanes: int
    reader: Reader = RGB

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def _starts(self) -> list[int]:
        starts: list[int] = self.index.starts.tolist()
        return starts

    @property
    def labels(self) -> Sequence[int]:
        """The label of each image."""
        return self.index.labels  # type: ignore[return-value]

    def path(self, index: int) -> str:
        return f"{self.store.url}/{self.index.names[index]}"

    @contextmanager
    def open(self, index: int) -> Iterator[tuple[Image.Image, int]]:
        with self.reader(self.file(index), self.path(index)) as image:
            yield image, int(self.index.labels[index])

    def file(self, index: int, *, mask: bool = False) -> IO[bytes]:
        """Read the file of image `index`, or of its mask, as it was before it was packed."""
        start, size = (self.index.masks if mask else self.index.images)[index].tolist()
        shard = self.index.shards[bisect_right(self._starts, index) - 1]
        file = io.BytesIO(self.store.read_part(shard, start, size))
        file.name = self.path(index)
        return file

    def shuffled(self, seed: int, epoch: int, copies: np.ndarray | None = None) -> np.ndarray:
        return laned_order(self.index.starts, self.lanes, seed, epoch, copies)

    @contextmanager
    def following(self, items: Iterable[int]) -> Iterator[Callable[[int], None]]:
        if self.store.is_local:
            yield lambda read: None
            return
        order = self.index.shard_of(np.fromiter(items, np.int64) % len(self))
        shards, first = np.unique(order, return_index=True)
        last = len(order) - np.unique(order[::-1], return_index=True)[1]  # the position after it
        by_use = first.argsort()
        shards, first, last = shards[by_use], first[by_use], last[by_use]
        # Of each shard when it is begun: those begun before it that have not ended.
        at_once = np.arange(1, len(shards) + 1) - np.searchsorted(np.sort(last), first, side="right")
        largest = max(shard.size for shard in self.index.shards)
        # The next of each while these are read, but no more than the cache holds.
        most = max(1, min(2 * int(at_once.max(initial=1)), self.store.bound // largest))
        ahead = Ahead(self.store, [self.index.shards[shard] for shard in shards], last.tolist(), most)
        try:
            yield ahead.reached
        finally:
            ahead.close()

    @cached_property
    def digest(self) -> str:
        """Of the shards and their order, by which the same ones are known in another store."""
        return sha256("".join(shard.sha256 for shard in self.index.shards).encode()).hexdigest()[:16]

    def check_cache(self, at_once: int) -> None:
        """Check that the cache has room for so many shards and as many to come: `InputError` if not."""
        sizes = sorted((shard.size for shard in self.index.shards), reverse=True)
        if not self.store.is_local and (least := sum(sizes[: 2 * at_once])) > self.store.bound:
            lower = ", or lower data.shards_at_once" if at_once > 1 else ""
            raise InputError(
                f"data.cache_size ({readable(self.store.bound)}) is too small for the shards of "
                f"{self.store.url} that are needed at the same time: set it to at least "
                f"{readable(least)}{lower}"
            )


@dataclass(frozen=True)
class MaskedShards(MaskedFiles):
    """The images of shards and their masks."""

    shards: Shards
    values: MaskValues
    reader: Reader = RGB

    def __len__(self) -> int:
        return len(self.shards)

    @property
    def digest(self) -> str:
        """That of the shards."""
        return self.shards.digest

    def path(self, index: int) -> str:
        return self.shards.path(index)

    def mask_path(self, index: int) -> str:
        return f"of {self.path(index)}"

    def image_file(self, index: int) -> IO[bytes]:
        return self.shards.file(index)

    def mask_file(self, index: int) -> IO[bytes]:
        return self.shards.file(index, mask=True)

    def shuffled(self, seed: int, epoch: int, copies: np.ndarray | None = None) -> np.ndarray:
        return self.shards.shuffled(seed, epoch, copies)

    def following(self, items: Iterable[int]) -> AbstractContextManager[Callable[[int], None]]:
        return self.shards.following(items)


class NoShardsError(InputError):
    """A stream lacks a split."""


class StreamableModule(ImageModule[Found]):
    """Images of a folder, or of shards that `locat pack` has made of one.

    Args:
        stream: folder or URL of shards (`http://…`, `s3://…`, whatever fsspec opens), with `train/`, `val/`
            and so on; it is read instead of root and dataset.
        cache: folder on this machine for the shards of a remote stream; null takes `locat/shards` in the
            user's cache.
        cache_size: bytes that the cache may have, as a number or as text: `500MB`, `50GB`.
        shards_at_once: shards that an epoch of training mixes. Twice as many have room in the cache.
        kwargs: those of `ImageModule`.
    """

    def __init__(
        self,
        *,
        stream: str | None = None,
        cache: str | None = None,
        cache_size: int | str = "50GB",
        shards_at_once: PositiveInt = 16,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if stream is not None and not is_remote(folder := stream.removeprefix("file://")):
            stream = str(Path(folder).expanduser().absolute())
        self.stream = stream and stream.rstrip("/")
        self.cache = default_cache() if cache is None else Path(cache).expanduser().absolute()
        self.cache_size = in_bytes("data.cache_size", cache_size)
        self.shards_at_once = shards_at_once
        self._shards: dict[str, Shards] = {}  # by the name of their folder

    @property
    def typed_again(self) -> dict[str, str]:
        """Options that a user types again to resume: no record decides what is fetched."""
        if self.stream is None or not is_remote(self.stream):
            return {}
        own = {} if self.cache == default_cache() else {"--data.cache": str(self.cache)}
        return {"--data.stream": self.stream} | own

    def shards(self, names: Sequence[str]) -> Shards:
        """Find the shards of the stream in the first folder of these names that has an index.

        Raises:
            NoShardsError: there are none.
            InputError: they cannot be read, or their index is something else.
        """
        denied = ""
        for name in names:
            if name in self._shards:
                return self._shards[name]
            store = Store(f"{self.stream}/{name}".rstrip("/"), self.cache, self.cache_size)
            try:
                index = Index.load(store.read(INDEX), f"{store.url}/{INDEX}")
            except (FileNotFoundError, NotADirectoryError):
                continue
            except PermissionError:  # as some stores answer that list no files
                denied = " (access denied)"
                continue
            found = self._shards[name] = Shards(index, store, self.shards_at_once, self.reader)
            store.check_files(index.shards)
            found.check_cache(1)
            return found
        wanted = " or ".join(f"{name}/{INDEX}".lstrip("/") for name in names)
        raise NoShardsError(
            f"no {wanted} in {self.stream}{denied}: set --data.stream to shards that locat pack has made"
        )

    def shards_of(self, split: str) -> Shards:
        """Find the shards of a split: `InputError` also if their classes are not those of training."""
        found = self.shards(FOLDERS[split])
        if split == "predict":
            return found
        first = self.shards(OF_CLASSES)
        own, classes = found.index.meaning.classes, first.index.meaning.classes
        if own and classes and own != classes:
            one = next((name for name in own if name not in classes), "their number or order differs")
            raise InputError(
                f"the classes in {found.store.url} are not those in {first.store.url}: {one}; pack both from "
                "one folder"
            )
        return found

    @abstractmethod
    def files(self) -> dict[str, SplitFiles]:
        """Find the files of each split in root by the name of the folder that its shards get."""

    def _shuffled(self, images: Images, **options: Any) -> ResumableLoader:
        if self.stream is not None:
            self.shards(FOLDERS["train"]).check_cache(self.shards_at_once)
        return super()._shuffled(images, **options)
