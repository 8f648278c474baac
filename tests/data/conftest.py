"""What the tests of the data modules share."""

import jsonargparse
import numpy as np
import pytest
from PIL import Image

from locat_lightning.data import ImageData
from locat_lightning.data.packing import pack


@pytest.fixture
def parsed():
    """Make a data module of options as the commands do: `parsed(ImageData, "--data.batch_size=3")`."""

    def parse(kind, *options):
        parser = jsonargparse.ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(kind, "data")
        return parser.instantiate_classes(parser.parse_args([f"--data={kind.__name__}", *options])).data

    return parse


@pytest.fixture
def images(tmp_path):
    """A folder of small images: 84 of three classes to train on, 10 of two to validate on."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 28), ("val", 5)):
        for name in ("ant", "bee", "cat")[: 3 if split == "train" else 2]:
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for number in range(count):
                image = Image.fromarray(rng.integers(256, size=(8, 8, 3), dtype=np.uint8))
                image.save(tmp_path / "images" / split / name / f"{number}.{('jpg', 'png')[number % 2]}")
    return tmp_path / "images"


def pack_all(data, to, shard_size=28_000, workers=2):
    """Pack the folder of a data module as the command does."""
    for split, files in data.files().items():
        seed = 0 if split in ("train", "") else None
        options = {"shard_size": shard_size, "seed": seed, "workers": workers}
        pack(files, to / split, **options, said=lambda done, of: None)
    return to


@pytest.fixture
def shards(images, tmp_path):
    """The folder `images` as shards, of which seven are to train on."""
    return pack_all(ImageData(root=str(images)), tmp_path / "shards")
