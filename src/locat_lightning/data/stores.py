"""Where shards are: a folder, which is read in place, or any store of fsspec's, by way of a bounded cache."""

import errno
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import file_digest
from pathlib import Path
from random import SystemRandom
from threading import Condition, Thread, get_ident
from typing import Any, TypeVar

from filelock import FileLock

from locat_lightning.data.shards import INDEX, Shard
from locat_lightning.errors import InputError, in_a_line

Read = TypeVar("Read")

PAUSES = (0.5, 1.0, 2.0, 4.0)  # seconds between the attempts to read from a store, about
ABANDONED = 600  # seconds after which a part of a shard that nothing is added to is deleted
REMEDY = "restore it, or pack the images again"
SILENCE = 60  # seconds that a web server may be silent
UNITS = {"": 1} | {f"{unit}B": 1000**power for power, unit in enumerate(("", "K", "M", "G", "T"))}
UNITS |= {f"{unit}iB": 1024**power for power, unit in enumerate("KMGT", 1)}
# Files of the cache: a shard, or a part of one and the size that it will have. The user's own are left alone.
CACHED = re.compile(r"[0-9a-f]{64}\.(?:tar|(?P<size>\d+)\.\d+\.\d+\.part)")


def is_remote(url: str) -> bool:
    """Return whether a URL is not a folder of this machine: anything that fsspec has to open."""
    return "://" in url or "::" in url or url.startswith("data:")


def in_bytes(option: str, size: int | str) -> int:
    """Return a size in bytes, given as a number or as text with a unit: `64MB`, `1.5GiB`."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    units = {unit.lower(): factor for unit, factor in UNITS.items()}
    if found is None or (unit := found[2].lower()) not in units or not (bytes_ := float(found[1])):
        raise InputError(f"{option} ({size}) must be a number of bytes, or a size such as 64MB or 50GB")
    return int(bytes_ * units[unit])


def readable(size: int) -> str:
    """Return a size in bytes as a person writes it, rounded up: `1.3GB`."""
    power = min(4, max(0, (len(str(size)) - 1) // 3))
    tenths = -(-size * 10 // 1000**power)
    return f"{tenths // 10 if power == 0 else tenths / 10:g}{' KMGT'[power].strip()}B"


def default_cache() -> Path:
    """Return the folder of the cache where none is given."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "locat" / "shards"


@dataclass(frozen=True)
class Store:
    """The files beneath a URL.

    Shards of a remote store are copied into a cache that all processes of a machine share: each once, under a
    lock, whole or not at all, and checked by its SHA-256, which is its name there. What was read longest ago
    is deleted where the cache would grow beyond its bound; a process that is reading it is not disturbed.

    Args:
        url: a folder, or any URL that fsspec opens (`http://…`, `s3://…`).
        cache: the folder of the cache.
        bound: its size in bytes.
    """

    url: str
    cache: Path
    bound: int
    _kept: dict[str, float] = field(default_factory=dict, repr=False, compare=False)
    # When a shard was given up, and why.
    _given_up: list[tuple[float, str]] = field(default_factory=list, repr=False, compare=False)

    @cached_property
    def is_local(self) -> bool:
        """Whether the shards are read in place."""
        return not is_remote(self.url)

    def read(self, name: str) -> bytes:
        """Read a whole file.

        Raises:
            FileNotFoundError: there is none.
            PermissionError: this user may not read it.
            InputError: the store cannot be read.
        """
        if self.is_local:
            return (Path(self.url) / name).read_bytes()
        return self._patiently(name, lambda system, path: bytes(system.cat_file(path)))

    def read_part(self, shard: Shard, start: int, size: int) -> bytes:
        """Read bytes of a shard: `InputError` if it is missing, corrupt, or cannot be fetched.

        Who asks again within a minute, as for the other images of a batch, gets the same answer.
        """
        # Text, not a Path, for each of a million images.
        file = f"{self.url}/{shard.name}" if self.is_local else f"{self.cache}/{shard.sha256}.tar"
        again = self.is_local
        while True:
            try:
                with open(file, "rb", buffering=0) as opened:  # noqa: PTH123
                    opened.seek(start)
                    content = opened.read(size)
            except FileNotFoundError as error:
                if self.is_local:
                    raise InputError(f"shard {file} is missing: {REMEDY}") from error
                if self._given_up and time.monotonic() < self._given_up[-1][0] + SILENCE:
                    raise InputError(self._given_up[-1][1]) from error
                try:
                    self.fetched(shard)  # again if another process made room meanwhile
                except InputError as reason:
                    self._given_up.append((time.monotonic(), str(reason)))
                    raise
                continue
            if not self.is_local and time.monotonic() > self._kept.get(shard.name, 0):
                self.keep([shard])
                self._kept[shard.name] = time.monotonic() + 1  # of a second, not of every image
            if len(content) == size:
                return content
            if again:
                raise InputError(f"shard {file} is cut off: {REMEDY}")
            Path(file).unlink(missing_ok=True)  # a damaged copy
            again = True

    def fetched(self, shard: Shard) -> Path:
        """Return the file of a shard on this machine; fetch it if it is not there yet."""
        if self.is_local:
            return Path(self.url) / shard.name
        file = self.cache / f"{shard.sha256}.tar"
        if not file.exists():
            try:
                self.cache.mkdir(parents=True, exist_ok=True)
                with FileLock(self.cache / f"{shard.sha256}.lock"):
                    if not file.exists():
                        self._fetch(shard, file)
            except OSError as error:
                raise InputError(
                    f"data.cache: {error.filename or self.cache}: {error.strerror or in_a_line(error)}: make "
                    "room there, or name another folder"
                ) from error
        return file

    def check_files(self, shards: Sequence[Shard]) -> None:
        """Check that the shards of a folder are there, of the size that they had: `InputError` if not."""
        for shard in shards if self.is_local else ():
            file = Path(self.url) / shard.name
            if not file.is_file():
                raise InputError(f"shard {file} is missing: {REMEDY}")
            if (size := file.stat().st_size) != shard.size:
                raise InputError(f"shard {file} has {size} bytes, not {shard.size} as in {INDEX}: {REMEDY}")

    def keep(self, shards: Sequence[Shard]) -> None:
        """Mark these shards as used now, so that they are evicted last."""
        for shard in shards:
            now = time.time_ns()  # without a time, the kernel's is some milliseconds coarse: two may be equal
            with suppress(FileNotFoundError, PermissionError):  # of another user's file
                os.utime(f"{self.cache}/{shard.sha256}.tar", ns=(now, now))

    def _fetch(self, shard: Shard, file: Path) -> None:
        for left in self.cache.glob(f"{shard.sha256}.*.part"):  # by a process that was killed
            left.unlink(missing_ok=True)
        # Its name says how large the file will be, for those who make room meanwhile.
        part = file.with_suffix(f".{shard.size}.{os.getpid()}.{get_ident()}.part")
        self._make_room(shard.size, part)
        try:
            for attempt in ("first", "second"):
                self._patiently(shard.name, lambda system, path: system.get_file(path, str(part)))
                with part.open("rb") as opened:
                    digest = file_digest(opened, "sha256").hexdigest()
                if digest == shard.sha256:
                    part.replace(file)
                    return
                if attempt == "second":
                    raise InputError(
                        f"shard {self.url}/{shard.name} is corrupt, fetched twice: its SHA-256 is {digest}, "
                        f"not {shard.sha256} as in {INDEX}: {REMEDY}"
                    )
        except (FileNotFoundError, PermissionError) as error:
            wrong = "is missing" if isinstance(error, FileNotFoundError) else "cannot be read (access denied)"
            raise InputError(f"shard {self.url}/{shard.name} {wrong}: {REMEDY}") from error
        finally:
            part.unlink(missing_ok=True)

    def _make_room(self, size: int, part: Path) -> None:
        """Delete what was read longest ago until so many bytes fit, and reserve them by a part."""
        with FileLock(self.cache / "room.lock"):
            files, total = list[tuple[float, int, Path]](), size
            for entry in os.scandir(self.cache):
                if (own := CACHED.fullmatch(entry.name)) is None:
                    continue
                with suppress(FileNotFoundError):
                    found, path = entry.stat(), Path(entry.path)
                    if own["size"] is None:
                        files.append((found.st_mtime, found.st_size, path))
                        total += found.st_size
                    elif found.st_mtime < time.time() - ABANDONED:
                        path.unlink()
                    else:
                        total += int(own["size"])
            for _, freed, path in sorted(files):
                if total <= self.bound:
                    break
                path.unlink(missing_ok=True)  # not its lock, which may be held
                total -= freed
            part.touch()

    def _patiently(self, name: str, act: Callable[[Any, str], Read]) -> Read:
        """Have a file system of fsspec's do something with a file; try again after a while if it fails."""
        for pause in (*PAUSES, None):
            try:
                system, root = self._system()
                return act(system, f"{root.rstrip('/')}/{name}")
            except (FileNotFoundError, InputError):
                raise
            except Exception as error:  # every store has errors of its own
                status = getattr(error, "status", None)
                if isinstance(error, PermissionError) or status in (401, 403):
                    raise PermissionError(errno.EACCES, "access denied", f"{self.url}/{name}") from error
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
                if pause is None:
                    raise InputError(
                        f"cannot read {self.url}/{name}, tried {len(PAUSES) + 1} times: {in_a_line(error)}"
                    ) from error
            time.sleep(pause * SystemRandom().uniform(0.5, 1.5))  # not all processes at once
        raise AssertionError("the last attempt returns or raises")

    def _system(self) -> tuple[Any, str]:
        """Return the file system of this process and thread, and the URL as it takes it."""
        import fsspec

        options: dict[str, Any] = {}
        if self.url.startswith(("http://", "https://")):
            import aiohttp

            # By default five minutes are all that a file may take.
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
            options = {"client_kwargs": {"timeout": timeout}}
        try:
            return fsspec.core.url_to_fs(self.url, **options)  # type: ignore[no-any-return]
        except ImportError as error:
            s3 = "s3fs (pip install 'locat-lightning[stream]')" if self.url.startswith("s3") else ""
            raise InputError(
                f"data.stream {self.url}: {s3 and 'it needs '}{s3 or in_a_line(error)}"
            ) from error
        except ValueError as error:
            raise InputError(f"data.stream {self.url}: {in_a_line(error)}") from error


class Ahead:
    """Fetches the shards of a remote store in a thread, before they are read.

    Args:
        store: where they are.
        shards: in the order in which they are read first.
        ends: the position after each shard's last image, in the order in which images are read.
        most: shards that may be there at once, those that are being read among them.
    """

    def __init__(self, store: Store, shards: Sequence[Shard], ends: Sequence[int], most: int) -> None:
        self._store, self._shards, self._ends, self._most = store, shards, ends, most
        self._done = 0  # shards that nobody reads any more
        self._moved = Condition()
        Thread(target=self._run, daemon=True).start()

    def reached(self, position: int) -> None:
        """Note that the images before a position have been read."""
        with self._moved:
            while self._done < len(self._ends) and self._ends[self._done] <= position:
                self._done += 1
            self._moved.notify()

    def close(self) -> None:
        """End the thread, after the shard that it is at."""
        with self._moved:
            self._most = 0
            self._moved.notify()

    def _run(self) -> None:
        for number, shard in enumerate(self._shards):
            with self._moved:
                while self._most and number >= self._done + self._most:
                    self._moved.wait()
                if not self._most:
                    return
                first = self._done
            self._store.keep(self._shards[first:number])
            with suppress(Exception):  # the process that reads the shard finds the same, and says so
                self._store.fetched(shard)
