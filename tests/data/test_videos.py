"""Videos in DAVIS's layout: which frames there are, how they are resized, and mistakes in the files."""

import numpy as np
import pytest
import torch
from PIL import Image

from locat_lightning.data.videos import VideoData, palette_of, tracking_size
from locat_lightning.errors import InputError


def data(root, **options):
    return VideoData(root=str(root), **({"num_workers": 0, "short_side": 64} | options))


@pytest.mark.parametrize(
    ("size", "patch", "expected"),
    [
        ((480, 854), 16, (480, 832)),
        ((480, 854), 8, (480, 832)),
        ((1080, 1920), 16, (480, 832)),
        ((854, 480), 16, (832, 480)),
        ((480, 910), 16, (480, 896)),
        ((480, 480), 16, (480, 448)),
        ((480, 854), 14, (476, 826)),
        ((1152, 480), 16, (1152, 480)),
    ],
)
def test_sizes_are_those_of_dino(size, patch, expected):
    assert tracking_size(size, 480, patch) == expected


def test_frames_come_in_order_with_the_objects_at_their_own_size(davis):
    source = data(davis, mean=(0, 0, 0), std=(1, 1, 1))
    batches = list(source.eval_dataloader("val"))
    assert [int(batch.indices) for batch in batches] == list(range(11))
    assert [tuple(batch.images.shape[2:]) for batch in batches] == [(64, 64)] * 11
    assert [tuple(batch.masks.shape[1:]) for batch in batches] == [(64, 96)] * 5 + [(80, 64)] * 6
    assert batches[5].masks.unique().tolist() == [0, 1, 2, 255]
    found = source.source("val")
    assert found.path(6).endswith("JPEGImages/480p/cars/00001.jpg")
    assert [(video.name, video.is_annotated) for video in found.videos] == [("boat", True), ("cars", True)]
    image = torch.from_numpy(np.array(Image.open(found.path(1)))).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.interpolate(image, (64, 64), mode="bilinear")[0]  # not antialiased
    torch.testing.assert_close(batches[1].images[0] * 255, expected, atol=1e-3, rtol=0)
    assert [int(batch.indices) for batch in source.frames_dataloader("val", [1], 8)] == list(range(5, 11))


def test_workers_change_nothing(davis):
    here, there = (list(data(davis, num_workers=number).eval_dataloader("val")) for number in (0, 1))
    assert all(torch.equal(a.images, b.images) for a, b in zip(here, there, strict=True))


def test_frames_without_annotation_have_no_object(davis):
    (davis / "Annotations/480p/boat/00002.png").unlink()
    source = data(davis)
    image, objects = source.source("val").read(2)
    assert (image.size, objects.shape, np.unique(objects).tolist()) == ((96, 64), (64, 96), [255])
    assert not source.source("val").videos[0].is_annotated


def test_a_palette_has_256_colours(davis, tmp_path):
    own = palette_of(str(davis / "Annotations/480p/cars/00000.png"))
    assert own[:9] == [0, 0, 0, 200, 0, 0, 0, 200, 0]
    Image.new("L", (4, 4)).save(tmp_path / "grey.png")
    assert palette_of(str(tmp_path / "grey.png"))[:6] == [0, 0, 0, 128, 0, 0]
    small = Image.new("P", (4, 4))
    small.putpalette([1, 2, 3])
    small.save(tmp_path / "small.png")
    colours = palette_of(str(tmp_path / "small.png"))
    assert colours[:6] == [1, 2, 3, 128, 0, 0]
    assert len(own) == len(colours) == 768


def without_list(root):
    (root / "ImageSets/2017/val.txt").unlink()


def empty_list(root):
    (root / "ImageSets/2017/val.txt").write_text("\n")


def unknown_video(root):
    (root / "ImageSets/2017/val.txt").write_text("boat\nplane\n")


def absolute(root):
    (root / "ImageSets/2017/val.txt").write_text(f"{root}/JPEGImages/480p/boat\n")


def above(root):
    (root / "ImageSets/2017/val.txt").write_text("boat\n../480p/boat\n")


def the_folder_above(root):
    (root / "ImageSets/2017/val.txt").write_text("..\n")


def frames_of_one_name(root):
    (root / "JPEGImages/480p/boat/more").mkdir()
    Image.new("RGB", (96, 64)).save(root / "JPEGImages/480p/boat/more/00001.jpg")


def annotations_of_one_name(root):
    (root / "Annotations/480p/boat/more").mkdir()
    Image.new("L", (96, 64)).save(root / "Annotations/480p/boat/more/00001.png")


def first_not_annotated(root):
    (root / "Annotations/480p/boat/00000.png").unlink()


def without_frame(root):
    (root / "JPEGImages/480p/boat/00002.jpg").unlink()


def coloured(root):
    Image.new("RGB", (96, 64)).save(root / "Annotations/480p/boat/00000.png")


def of_another_size(root):
    Image.new("L", (64, 96)).save(root / "Annotations/480p/boat/00001.png")


def broken(root):
    (root / "Annotations/480p/boat/00001.png").write_bytes(b"no image")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_list, r"no such file: .*val\.txt; set --data\.root to the folder of DAVIS"),
        (empty_list, "no videos in"),
        (unknown_video, "no such folder: .*plane, which should hold the video plane"),
        (absolute, r"'/.*/480p/boat' in .*val\.txt is a path: it should be the name of a video's folder"),
        (above, r"'\.\./480p/boat' in .*val\.txt is a path"),
        (the_folder_above, r"'\.\.' in .*val\.txt is a path"),
        (frames_of_one_name, r"boat/00001\.jpg and .*boat/more/00001\.jpg of one video have the same name"),
        (annotations_of_one_name, r"boat/00001\.png and .*boat/more/00001\.png of one video have the same"),
        (first_not_annotated, "the first frame of .*boat has no annotation"),
        (without_frame, r"annotations in .* without a frame in .*: 00002"),
        (coloured, r"00000\.png is a picture"),
        (of_another_size, r"00001\.png has 64 x 96 pixels, but the first of its video 96 x 64"),
        (broken, r"its annotation .*00001\.png: not an image"),
    ],
)
def test_mistakes(davis, spoil, message):
    spoil(davis)
    with pytest.raises(InputError, match=message) as error:
        list(data(davis).eval_dataloader("val"))
    assert "\n" not in str(error.value)


def test_splits_have_davis_names(davis):
    with pytest.raises(InputError, match=r"test-dev\.txt"):
        data(davis).source("test")
    with pytest.raises(InputError, match="no split 'all'"):
        data(davis).source("all")
