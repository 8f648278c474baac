"""Mean and standard deviation of each channel of a data set, exactly, in one pass over its files."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from torch.utils.data import DataLoader, Dataset

from locat.runs import replaced
from locat_lightning.data.bands import read_bands
from locat_lightning.data.decoding import reason
from locat_lightning.data.workers import end_with_the_run
from locat_lightning.errors import InputError


class Moments(NamedTuple):
    """What is known of the finite values of each of C channels, float64 [C].

    Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm" (1979), for their union.
    """

    number: np.ndarray
    mean: np.ndarray
    squares: np.ndarray  # sum of squared differences from the mean
    least: np.ndarray
    most: np.ndarray

    @property
    def std(self) -> np.ndarray:
        """Standard deviation of all values."""
        deviation: np.ndarray = np.sqrt(self.squares / np.maximum(self.number, 1))
        return deviation

    def with_others(self, other: "Moments") -> "Moments":
        """Return the moments of both sets of values together."""
        number = self.number + other.number
        share = other.number / np.maximum(number, 1)
        apart = other.mean - self.mean
        return Moments(
            number,
            self.mean + apart * share,
            self.squares + other.squares + apart**2 * self.number * share,
            np.minimum(self.least, other.least),
            np.maximum(self.most, other.most),
        )


def moments_of(values: np.ndarray) -> Moments:
    """Return the moments of an image [H, W, C]."""
    exact = values.reshape(-1, values.shape[-1]).astype(np.float64)
    finite = np.isfinite(exact)
    number = finite.sum(0).astype(np.float64)
    mean = np.where(finite, exact, 0).sum(0) / np.maximum(number, 1)
    squares = (np.where(finite, exact - mean, 0) ** 2).sum(0)
    least, most = (np.where(finite, exact, end) for end in (np.inf, -np.inf))
    return Moments(number, mean, squares, least.min(0), most.max(0))


@dataclass(frozen=True)
class _MomentsOfFiles(Dataset):
    paths: Sequence[str]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Moments | str:
        try:
            return moments_of(read_bands(self.paths[index]))
        except Exception as error:
            # Decoders raise anything; raised on, a worker's traceback would come along.
            return reason(error)


def moments_of_files(paths: Sequence[str], workers: int = 0) -> Moments:
    """Return the moments of all files, which do not depend on the number of workers.

    Raises:
        InputError: a file cannot be read, or has another number of channels than the first one.
    """
    loader: Any = DataLoader(
        _MomentsOfFiles(paths), batch_size=None, num_workers=workers, worker_init_fn=end_with_the_run
    )

    def checked() -> Iterator[Moments]:
        channels = 0
        for path, found in zip(paths, loader, strict=True):
            if isinstance(found, str):
                raise InputError(f"cannot read {path}: {found}")
            found = Moments(*(np.asarray(each) for each in found))
            channels = channels or len(found.mean)
            if len(found.mean) != channels:
                raise InputError(
                    f"{path} has {len(found.mean)} channels, but {paths[0]} has {channels}: remove it"
                )
            yield found

    together: Moments = reduce(Moments.with_others, checked())
    return together


def write_statistics(file: Path, found: Moments, images: int) -> None:
    """Write what `read_statistics` reads, and how the values are spread."""
    columns = {"mean": found.mean, "std": found.std, "least": found.least, "most": found.most}
    record = {"channels": len(found.mean), "images": images}
    record |= {name: each.tolist() for name, each in columns.items()}
    with replaced(file) as new:
        new.write_text(yaml.safe_dump(record, sort_keys=False, default_flow_style=None), encoding="utf-8")


def read_statistics(file: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel from a file that `locat stats` wrote."""
    try:
        record = yaml.safe_load(Path(file).expanduser().read_text(encoding="utf-8"))
        mean, std = (tuple(float(value) for value in record[name]) for name in ("mean", "std"))
    except OSError as error:
        raise InputError(f"data.stats: cannot read {file}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"data.stats: {file} is not a file that locat stats wrote") from error
    return mean, std
