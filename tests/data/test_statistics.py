"""Statistics of channels, against numpy."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from numpy.testing import assert_allclose, assert_array_equal

from locat.command import main
from locat_lightning.data import ImageData
from locat_lightning.data.statistics import moments_of_files
from locat_lightning.errors import InputError

NUMBERS = [((4, 6), 0), ((9, 3), 1), ((5, 5), 2), ((2, 8), 3)]  # sizes of images, and their seeds


@pytest.fixture
def images(tmp_path):
    """Images of different sizes in a folder, far from 0, one value not finite; and all their pixels."""
    pixels = []
    for (height, width), seed in NUMBERS:
        bands = np.random.default_rng(seed).normal([1e5, -3, 0], [1, 2, 1e4], (height, width, 3))
        bands = bands.astype(np.float32)
        if seed == 2:
            bands[0, 0, 1] = np.nan
        folder = tmp_path / "images" / "train" / str(seed % 2)
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{seed}.npy", bands)
        pixels.append(bands.reshape(-1, 3).astype(np.float64))
    return tmp_path / "images", np.concatenate(pixels)


def test_they_are_those_of_all_pixels_by_any_number_of_workers(images):
    root, pixels = images
    paths = sorted(map(str, root.rglob("*.npy")))
    found, shared = moments_of_files(paths), moments_of_files(paths, workers=2)
    assert_allclose(found.mean, np.nanmean(pixels, 0), rtol=1e-12)
    assert_allclose(found.std, np.nanstd(pixels, 0), rtol=1e-9)
    assert_array_equal(found.number, np.isfinite(pixels).sum(0))
    assert_array_equal(found.least, np.nanmin(pixels, 0))
    assert_array_equal(found.most, np.nanmax(pixels, 0))
    assert_array_equal(np.stack(found), np.stack(shared))


def test_the_command_writes_what_data_stats_reads(images, workplace, capsys):
    root, pixels = images
    (root / "val").mkdir()
    np.save(root / "val" / "other.npy", np.zeros((2, 2, 7)))  # not of the training images
    main(["stats", "--data.root", str(root), "--data.num_workers", "0"])
    assert "4 images of 3 channels" in capsys.readouterr().out
    record = yaml.safe_load(Path("stats.yaml").read_text())
    assert (record["channels"], record["images"]) == (3, 4)
    data = ImageData(stats="stats.yaml")
    assert data.model_channels == (3, (0, 1, 2))
    assert_array_equal(data.hparams["mean"], record["mean"])
    assert_allclose(data.hparams["std"], np.nanstd(pixels, 0), rtol=1e-9)
    assert data.hparams["stats"] is None
    with pytest.raises(SystemExit, match="2"):
        main(["stats", "--data.root", str(root)])
    assert "stats.yaml exists" in capsys.readouterr().err


def test_mistakes_are_said_in_a_line(images, tmp_path):
    root, _ = images
    paths = sorted(map(str, root.rglob("*.npy")))
    np.save(tmp_path / "two.npy", np.zeros((2, 2, 2)))
    (tmp_path / "broken.npy").write_bytes(b"no array")
    with pytest.raises(InputError, match=r"two\.npy has 2 channels, but .* has 3: remove it"):
        moments_of_files([*paths, str(tmp_path / "two.npy")])
    with pytest.raises(InputError, match=r"cannot read .*broken\.npy"):
        moments_of_files([*paths, str(tmp_path / "broken.npy")])
    (tmp_path / "other.yaml").write_text("mean: [1]")
    with pytest.raises(InputError, match=r"other\.yaml is not a file that locat stats wrote"):
        ImageData(stats=str(tmp_path / "other.yaml"))
    with pytest.raises(InputError, match="cannot read absent"):
        ImageData(stats="absent")
