"""Depth data: both layouts, what training and evaluation see, and mistakes in the files."""

import numpy as np
import pytest
import torch
from PIL import Image

from locat_lightning.data.depth import DepthData, depth_augmentation, read_depth, write_depth
from locat_lightning.errors import InputError

PLAIN = {"normalisation": {"mean": (0, 0, 0), "std": (1, 1, 1)}}


def data(root, **options):
    return DepthData(root=str(root), **({"num_workers": 0, "batch_size": 2, "crop_size": (24, 32)} | options))


def listed(root, name, lines):
    (root / f"nyu_{name}.txt").write_text("\n".join(lines) + "\n")


def test_folders(nyu):
    found = data(nyu)
    train = list(found.train_dataloader())
    assert [tuple(batch.images.shape) for batch in train] == [(2, 3, 24, 32)] * 2
    assert [tuple(batch.depths.shape) for batch in train] == [(2, 24, 32)] * 2
    val = list(found.val_dataloader())
    assert [tuple(batch.images.shape) for batch in val] == [(1, 3, 32, 40)] * 3
    assert [batch.indices.item() for batch in val] == [0, 1, 2]
    depths = val[0].depths[0]
    assert depths.dtype == torch.float32
    assert (depths[:3] == 0).all()
    assert depths[3:, 0].mean() == pytest.approx(1, abs=0.1)
    assert depths[3:, -1].mean() == pytest.approx(8, abs=0.1)
    assert found.source("val").path(2).endswith("test/room_1/rgb_00001.jpg")  # by name, room_0's come first
    assert found.source("test").images == found.source("val").images


@pytest.mark.parametrize("below", ["/train/", "/"])
def test_lists(nyu, below):
    own = [f"{below}room_{n % 2}/{{}}_0000{n}" for n in (3, 0)]
    lines = [f"{name.format('rgb')}.jpg {name.format('sync_depth')}.png 518.8579" for name in own]
    listed(nyu, "train", [*lines, f"{below}room_0/rgb_00002.jpg None 518.8579"])
    listed(nyu, "test", ["/test/room_0/rgb_00002.jpg /test/room_0/sync_depth_00002.png"])
    source = data(nyu).source("train")
    names = [(image[-20:], depth[-27:]) for image, depth in zip(source.images, source.depths, strict=True)]
    assert names == [
        ("room_1/rgb_00003.jpg", "room_1/sync_depth_00003.png"),
        ("room_0/rgb_00000.jpg", "room_0/sync_depth_00000.png"),
    ]
    assert len(data(nyu).source("val")) == 1


def test_image_and_depths_are_augmented_together():
    """The depth is that which the colour says, wherever the crop is and however it is mirrored."""
    y, x = torch.meshgrid(torch.arange(30), torch.arange(50), indexing="ij")
    image, depths = torch.stack([x * 5, y * 5, y]).byte(), (x + 100 * y).float()
    corners, mirrored = set(), 0
    for seed in range(40):
        torch.manual_seed(seed)
        options = {"crop_size": (20, 60), "hflip": 0.5, "colour": 0}
        pixels, found = depth_augmentation(image, depths, **options, **PLAIN)
        assert (pixels.shape, found.shape) == ((3, 20, 60), (20, 60))
        assert (found[:, 50:] == 0).all()  # padded: not measured
        assert (pixels[:, :, 50:] == 0).all()
        expected = pixels[0] * 51 + 100 * pixels[1] * 51
        torch.testing.assert_close(found[:, :50], expected[:, :50], atol=0.1, rtol=0)
        corners.add(found[0, 0].item() // 100)
        mirrored += bool(found[0, 0] > found[0, 49])
    assert len(corners) > 5
    assert 10 < mirrored < 30


def test_colours_change_within_their_limits():
    image, depths = torch.full((3, 8, 8), 100, dtype=torch.uint8), torch.ones(8, 8)
    found = []
    for seed in range(50):
        torch.manual_seed(seed)
        options = {"crop_size": (8, 8), "hflip": 0, "colour": 1}
        found.append(depth_augmentation(image, depths, **options, **PLAIN)[0][:, 0, 0])
    found, value = torch.stack(found), 100 / 255
    assert (found >= value**1.1 * 0.75 * 0.9).all()
    assert (found <= value**0.9 * 1.25 * 1.1).all()
    assert found.std(0).min() > 0.03


def test_depths_are_written_as_they_are_read(tmp_path):
    depths = np.array([[0, 0.5], [9.9994, 70]])
    write_depth(tmp_path / "a" / "b.png", depths, 1000)
    found = read_depth(str(tmp_path / "a" / "b.png"), 1000)
    np.testing.assert_allclose(found, [[0, 0.5], [9.999, 65.535]], rtol=1e-6)
    assert read_depth(str(tmp_path / "a" / "b.png"), 256).max() == pytest.approx(65535 / 256)


def test_any_folder_of_images_can_be_predicted(nyu, tmp_path):
    (tmp_path / "mine").mkdir()
    Image.new("RGB", (20, 10)).save(tmp_path / "mine" / "a.png")
    [batch] = data(tmp_path / "mine").predict_dataloader()
    assert batch.depths.tolist() == torch.zeros(1, 10, 20).tolist()
    assert len(data(nyu).predict_paths) == 3


def without_depths(root):
    (root / "test/room_0/sync_depth_00002.png").unlink()


def of_8_bits(root):
    Image.new("L", (40, 32)).save(root / "test/room_0/sync_depth_00002.png")


def of_another_size(root):
    Image.fromarray(np.ones((40, 32), np.uint16)).save(root / "test/room_0/sync_depth_00002.png")


def broken(root):
    (root / "test/room_0/sync_depth_00002.png").write_bytes(b"")


def empty(root):
    listed(root, "test", [""])


def missing(root):
    listed(root, "test", ["/room_7/rgb_00000.jpg /room_0/sync_depth_00002.png"])


def short(root):
    listed(root, "test", ["/room_0/rgb_00000.jpg"])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_depths, r"rgb_00002\.jpg has no depths: sync_depth_00002\.png is missing"),
        (of_8_bits, r"sync_depth_00002\.png are not a PNG of 16 bits"),
        (of_another_size, r"sync_depth_00002\.png have 32 x 40 pixels, but their image .* 40 x 32"),
        (broken, r"its depths .*sync_depth_00002\.png: not an image"),
        (empty, "it has no line"),
        (missing, r"1 files of .*nyu_test\.txt are not in .*: /room_7/rgb_00000\.jpg"),
        (short, r"a line of .*nyu_test\.txt is '/room_0/rgb_00000\.jpg'"),
    ],
)
def test_mistakes(nyu, spoil, message):
    spoil(nyu)
    with pytest.raises(InputError, match=message) as error:
        list(data(nyu).val_dataloader())
    assert "\n" not in str(error.value)


def test_roots_that_are_not_of_nyu(tmp_path):
    with pytest.raises(InputError, match=r"no nyu_train\.txt and no folder train in"):
        data(tmp_path).source("train")
    with pytest.raises(InputError, match="no such folder"):
        data(tmp_path / "nowhere").source("train")
