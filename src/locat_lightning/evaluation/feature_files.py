"""Features in files of common formats, written row by row; an interrupted file can be continued.

Until `TO` is whole, `TO.part/` holds the rows computed so far (a header's room, then the rows as they are in
memory), for each row its image's position and label, and a record of what is computed.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import numpy as np

from locat.runs import lock, unlock, write_csv, write_json
from locat_lightning.errors import InputError

Dtype = Literal["float16", "float32"]

FORMATS = (".npy", ".parquet", ".safetensors")
ROOM = 8192  # bytes before the rows: more than any header takes, and not more than numpy reads
GROUP = 2**24  # bytes of features in a row group of a parquet file
PATIENCE = 5  # seconds of work that a power failure may cost


class Row(NamedTuple):
    """What is known of an image, beside its features."""

    path: str
    label: int  # -1 where unknown
    class_name: str  # "" where unknown


HEADER = ("path", "label", "class")


class FeatureFile:
    """Features of a set of images in their order, in a file that appears when it is whole.

    A context manager: what has been added is kept when it is left, and the next one with the same `record`
    begins where it ended. Only one process at a time writes a file.

    Args:
        file: `.npy` or `.safetensors` (tensor `features`), with path, label and class of each row in a CSV
            file of the same name; or `.parquet`, with columns for them.
        shape: of an image's features.
        dtype: of the numbers in the file.
        record: what decides the features, as plain JSON.
        notes: further words for the file's own metadata.
        overwrite: replace a file that is there, or rows of another record.

    Attributes:
        rows: the number of rows so far.
        start: the position of the first image that is not in the file that was begun earlier.

    Raises:
        InputError: the file is there already, is being written, or has rows of another record.
    """

    def __init__(
        self,
        file: Path,
        *,
        shape: tuple[int, ...],
        dtype: Dtype,
        record: dict[str, Any],
        notes: dict[str, str] | None = None,
        overwrite: bool = False,
    ) -> None:
        check_target(file, overwrite=overwrite)
        self.file, self.part = file, Path(f"{file}.part")
        self.shape, self.dtype = shape, np.dtype(dtype).newbyteorder("<")
        self.record = record | {"shape": list(shape), "dtype": dtype}
        self.notes, self.overwrite = notes or {}, overwrite
        self.rows = self.start = 0
        self._known: list[np.ndarray] = []  # positions and labels of rows that are not saved yet
        self._saved = monotonic()

    def __enter__(self) -> Self:
        self.part.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = lock(self.part)
        except BlockingIOError as error:
            raise InputError(f"{self.file} is being written by another process") from error
        try:
            self._begin()
        except BaseException:
            unlock(self.part, self._lock, [self.part])
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with ExitStack() as stack:  # all of it is done, also on a full disk
                stack.callback(unlock, self.part, self._lock)
                stack.callback(self._index.close)
                stack.callback(self._features.close)
                if self.part.is_dir():
                    self.save()
        except OSError as again:
            if not isinstance(error, OSError):
                error = again
                raise
        finally:
            if isinstance(error, OSError) and error.filename is None:  # of an open file the system names none
                error.filename = str(self.file)

    def _begin(self) -> None:
        record = self.part / "record.json"
        if record.is_file():
            before = json.loads(record.read_text())
            if other := sorted(key for key in self.record if before.get(key) != self.record[key]):
                if not self.overwrite:
                    raise InputError(
                        f"{self.part} holds features of another command ({', '.join(other)} differ): finish "
                        "that one, or add --overwrite to begin anew"
                    )
                record.unlink()
        if not record.is_file():
            for name in ("features", "index"):
                (self.part / name).unlink(missing_ok=True)
            write_json(record, self.record)
        for name in ("features", "index"):
            (self.part / name).touch()
        self._features, self._index = (self.part / "features").open("r+b"), (self.part / "index").open("r+b")
        size, known = (os.fstat(each.fileno()).st_size for each in (self._features, self._index))
        self.rows = max(0, min((size - ROOM) // self._row_bytes, known // 16))
        self._features.truncate(ROOM + self.rows * self._row_bytes)
        self._index.truncate(16 * self.rows)
        self._features.seek(ROOM + self.rows * self._row_bytes)
        self._index.seek(16 * self.rows)
        self.start = int(self._positions()[-1, 0]) + 1 if self.rows else 0

    @property
    def _row_bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def add(self, positions: np.ndarray, labels: np.ndarray, features: np.ndarray) -> None:
        """Add rows: positions [B], ascending, and labels [B]; features [B, *shape] of the file's type."""
        if features.shape[1:] != self.shape or features.dtype != self.dtype:
            raise ValueError(f"features {features.dtype}{features.shape} are not {self.dtype}{self.shape}")
        self._features.write(np.ascontiguousarray(features).data)
        self._known.append(np.stack([positions, labels], 1).astype("<i8"))
        self.rows += len(features)
        if monotonic() - self._saved > PATIENCE:
            self.save()

    def save(self) -> None:
        """Bring all rows to the disk, so that they are kept whatever happens."""
        _flush(self._features)
        for known in self._known:
            self._index.write(known.data)
        self._known = []
        _flush(self._index)
        self._saved = monotonic()

    def finish(self, row_of: Callable[[int, int], Row]) -> list[Path]:
        """Put the file, and the table beside it, in place; `row_of` describes an image by position and label.

        Returns:
            The files.
        """
        if not self.rows:
            raise InputError("no features to write: none of the images can be read")
        self.save()
        table = (row_of(int(position), int(label)) for position, label in self._positions())
        if self.file.suffix == ".parquet":
            whole = self.part / "parquet"
            self._write_parquet(whole, table)
            whole.replace(self.file)
            written = [self.file]
        else:
            self._features.seek(0)
            self._features.write(self._header())
            _flush(self._features)
            beside = self.file.with_suffix(".csv")
            write_csv(beside, HEADER, table)
            (self.part / "features").replace(self.file)
            written = [self.file, beside]
        shutil.rmtree(self.part)
        return written

    def _positions(self) -> np.ndarray:
        return np.memmap(self.part / "index", "<i8", "r", shape=(self.rows, 2))

    def _header(self) -> bytes:
        shape = (self.rows, *self.shape)
        if self.file.suffix == ".npy":
            words = {"descr": self.dtype.str, "fortran_order": False, "shape": shape}
            text = repr(words).encode().ljust(ROOM - 11) + b"\n"
            return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text
        tensor = {
            "dtype": f"F{8 * self.dtype.itemsize}",
            "shape": shape,
            "data_offsets": [0, self.rows * self._row_bytes],
        }
        text = json.dumps({"__metadata__": self._metadata(), "features": tensor}).encode().ljust(ROOM - 8)
        return struct.pack("<Q", len(text)) + text

    def _metadata(self) -> dict[str, str]:
        return self.notes | {key: str(self.record[key]) for key in ("shape", "dtype")}

    def _write_parquet(self, file: Path, table: Iterator[Row]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        width, number = int(np.prod(self.shape)), pa.from_numpy_dtype(self.dtype)
        fields = [
            pa.field("path", pa.string()),
            pa.field("label", pa.int64()),
            pa.field("class", pa.string()),
        ]
        schema = pa.schema([*fields, pa.field("features", pa.list_(number, width))], self._metadata())
        rows = max(1, GROUP // self._row_bytes)
        with (self.part / "features").open("rb") as stored, pq.ParquetWriter(file, schema) as writer:
            stored.seek(ROOM)
            for start in range(0, self.rows, rows):
                count = min(rows, self.rows - start)
                values = np.frombuffer(stored.read(count * self._row_bytes), self.dtype)
                paths, labels, classes = zip(*islice(table, count), strict=True)
                columns = [
                    pa.array([_utf8(path) for path in paths], pa.string()),
                    pa.array(labels, pa.int64()),
                    pa.array(classes, pa.string()),
                    pa.FixedSizeListArray.from_arrays(pa.array(values, number), width),
                ]
                writer.write_table(pa.table(columns, schema=schema))


def check_target(file: Path, *, overwrite: bool) -> None:
    """Check the name of a file of features, that it is free, and that the package for its format is there."""
    if file.suffix not in FORMATS:
        raise InputError(f"--to: {file} must end in one of {', '.join(FORMATS)}")
    for each in (file,) if file.suffix == ".parquet" else (file, file.with_suffix(".csv")):
        if each.is_dir():
            raise InputError(f"--to: {each} is a folder: give the name of a file")
        unfinished = each != file and Path(f"{file}.part").is_dir()  # in the midst of `finish`
        if each.exists() and not (overwrite or unfinished):
            raise InputError(f"--to: {each} exists: give another name, or add --overwrite")
    if file.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise InputError("--to: parquet needs pyarrow: pip install 'locat-lightning[parquet]', or write .npy")


def _utf8(path: str) -> str:
    """Return a path without the bytes that are no UTF-8, which parquet does not hold."""
    return os.fsencode(path).decode("utf-8", "replace")


def _flush(opened: Any) -> None:
    opened.flush()
    os.fsync(opened.fileno())
