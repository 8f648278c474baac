import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from locat_lightning.data.decoding import read_image
from locat_lightning.data.mask_files import LAYOUTS, Layout, MaskValues, Pairs
from locat_lightning.data.segmentation import Unannotated
from locat_lightning.errors import InputError

VALUES = MaskValues(3)


def write(path, value=0, size=(6, 4), mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)
    return str(path)


def pair(folder, value=0, size=(6, 4), mode="L", values=VALUES):
    """One pair, the mask made as told."""
    image = write(folder / "images" / "a.png", (1, 2, 3), mode="RGB")
    return Pairs([image], [write(folder / "masks" / "a.png", value, size, mode)], values)


def tree(root, names, layout=("images/train", "annotations/train")):
    for name in names:
        write(root / layout[0] / f"{name}.jpg", (0, 0, 0), mode="RGB")
        write(root / layout[1] / f"{name}.png")


def error_of(call):
    with pytest.raises(InputError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (MaskValues(3), {0: 0, 1: 1, 2: 2, 255: 255}),
        (MaskValues(3, ignore_index=7), {0: 0, 2: 2, 7: 255, 255: 255}),
        (MaskValues(3, ignore_index=1), {0: 0, 1: 255, 2: 2}),
        (MaskValues(3, reduce_zero_label=True), {0: 255, 1: 0, 2: 1, 3: 2, 255: 255}),
        (MaskValues(3, 9, reduce_zero_label=True), {0: 255, 1: 0, 3: 2, 9: 255}),
        (MaskValues(255), {0: 0, 254: 254, 255: 255}),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_values_become_classes(values, expected, dtype):
    found = values.classes(np.array([list(expected)], dtype), "a.png")
    assert found.dtype == np.uint8
    assert found.tolist() == [list(expected.values())]


@pytest.mark.parametrize(
    ("values", "value", "message"),
    [
        (MaskValues(3), 3, "value 3 in mask a.png is not a class (classes: 0 to 2, no class: 255): correct"),
        (
            MaskValues(3, 11),
            12,
            "value 12 in mask a.png is not a class (classes: 0 to 2, no class: 11 and 255)",
        ),
        (
            MaskValues(3, 255, True),
            4,
            "value 4 in mask a.png is not a class (classes: 1 to 3, no class: 0 and 255)",
        ),
        (MaskValues(3), 256, "value 256 in mask a.png is not a class"),
        (MaskValues(3), -1, "value -1 in mask a.png is not a class"),
        (
            MaskValues(2, labels=(7, 11)),
            256,
            "value 256 in mask a.png is not a class (classes: 7, 11, no class: any other from 0 to 255)",
        ),
    ],
)
def test_values_that_are_no_class(values, value, message):
    array = np.array([[0, value]], np.uint8 if 0 <= value < 256 else np.int32)
    assert error_of(lambda: values.classes(array, "a.png")).startswith(message)


def test_a_pair_is_read(tmp_path):
    pairs = pair(tmp_path, 2)
    image, mask = pairs.read(0)
    assert len(pairs) == 1
    assert pairs.path(0) == str(tmp_path / "images" / "a.png")
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (6, 4), (1, 2, 3))
    assert (mask.shape, mask.dtype, set(mask.ravel())) == ((4, 6), np.uint8, {2})
    with pairs.open(0) as (_, same):
        assert np.array_equal(same, mask)


def test_a_palette_s_indices_are_the_classes(tmp_path):
    pairs = pair(tmp_path)
    mask = Image.fromarray(np.array([[0, 1, 2, 255, 0, 0]] * 4, np.uint8))
    mask.putpalette([9, 9, 9, 200, 0, 0] * 128)
    mask.save(pairs.masks[0])
    with Image.open(pairs.masks[0]) as saved:
        assert saved.mode == "P"
    assert pairs.mask(0).tolist() == [[0, 1, 2, 255, 0, 0]] * 4


def test_a_mask_of_two_levels(tmp_path):
    assert set(pair(tmp_path, 1, mode="1").mask(0).ravel()) == {1}


@pytest.mark.parametrize(("mode", "value"), [("RGB", (1, 2, 3)), ("RGBA", (1, 2, 3, 4)), ("LA", (1, 255))])
def test_a_coloured_mask(tmp_path, mode, value):
    pairs = pair(tmp_path, value, mode=mode)
    assert error_of(lambda: pairs.read(0)) == (
        f"mask {pairs.masks[0]} is a picture ({mode}), not one class a pixel: write the index of each"
        " colour's class to a PNG of 8-bit grey levels (mode L) or with a palette (mode P)"
    )


def test_a_mask_of_another_size(tmp_path):
    pairs = pair(tmp_path, size=(4, 6))
    assert error_of(lambda: pairs.read(0)) == (
        f"mask {pairs.masks[0]} has 4 x 6 pixels, but its image {pairs.images[0]} 6 x 4: make them one size"
    )


def test_an_unreadable_mask_is_named(tmp_path):
    pairs = pair(tmp_path)
    Path(pairs.masks[0]).write_bytes(b"nothing")
    with pytest.raises(OSError, match=f"its mask {pairs.masks[0]}: not an image, or of an unknown format"):
        pairs.read(0)


@pytest.mark.parametrize("size", [(6, 4), (5, 5)])
@pytest.mark.parametrize("tagged", ["image", "both", "mask is upright"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_is_turned_with_its_image(tmp_path, orientation, tagged, size):
    if tagged == "mask is upright" and (size == (5, 5) or orientation < 5):
        return  # nobody can tell
    values = np.random.default_rng(0).integers(3, size=size, dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image, mask = tmp_path / "a.png", tmp_path / "mask.png"
    Image.fromarray(values * 100).convert("RGB").save(image, exif=exif)
    if tagged == "mask is upright":
        values = np.asarray(read_image(image))[..., 0] // 100
    Image.fromarray(values).save(mask, **({"exif": exif} if tagged == "both" else {}))
    shown, classes = Pairs([str(image)], [str(mask)], VALUES).read(0)
    assert np.array_equal(np.asarray(shown)[..., 0], classes * 100)


def test_classes_that_no_mask_has(tmp_path):
    files = [write(tmp_path / f"{i}.png", value) for i, value in enumerate((0, 255, 2, 1))]
    assert Pairs(files, files, MaskValues(4)).check_annotated(500) == [3]
    assert Pairs(files[:3], files[:3], MaskValues(4)).check_annotated(500) == [1, 3]
    assert Pairs(files, files, MaskValues(4)).check_annotated(1) == [1, 2, 3]  # reads the first
    assert Pairs(files[1:], files[1:], MaskValues(4)).check_annotated(1) == [0, 1, 3]  # and more for a class


def test_masks_of_0_and_255_are_not_two_classes(tmp_path):
    files = [write(tmp_path / f"{i}.png", value) for i, value in enumerate((0, 255))]
    message = error_of(lambda: Pairs(files, files, MaskValues(2)).check_annotated(500))
    assert message.endswith("of its split are 0 and 255, but 255 means no class: write 1 for class 1")
    assert Pairs(files, files, MaskValues(1)).check_annotated(500) == []  # one class, and what has none


def test_some_pixel_must_have_a_class(tmp_path):
    files = [write(tmp_path / f"{i}.png", value) for i, value in enumerate((255, 9, 255, 1))]
    Path(files[2]).write_bytes(b"nothing")
    Pairs(files, files, MaskValues(3, 9)).check_annotated(1)
    message = error_of(lambda: Pairs(files[:3], files[:3], MaskValues(3, 9)).check_annotated(1))
    assert message.startswith(
        f"no pixel has a class in {files[0]} and the other masks of its split (3 in all):"
    )


def test_without_annotations_a_mask_tells_the_size(tmp_path):
    image, mask = Unannotated(pair(tmp_path, 2)).read(0)
    assert image.size == (6, 4)
    assert mask.shape == (4, 6)
    assert (mask == 255).all()


def names(paths, root):
    return [[os.path.relpath(path, root) for path in part] for part in paths]


def test_images_and_masks_are_matched_by_name(tmp_path):
    tree(tmp_path, ["b", "deep/a"])
    write(tmp_path / "annotations/train/.b.png")
    (tmp_path / "images/train/notes.txt").touch()
    assert names(Layout().pairs(tmp_path, "train"), tmp_path) == [
        ["images/train/b.jpg", "images/train/deep/a.jpg"],
        ["annotations/train/b.png", "annotations/train/deep/a.png"],
    ]


@pytest.mark.parametrize("name", ["val", "validation", "test"])
def test_names_of_the_validation(tmp_path, name):
    tree(tmp_path, ["a"], (f"images/{name}", f"annotations/{name}"))
    layout = Layout()
    assert layout.name(tmp_path, "val") == layout.name(tmp_path, "test") == name
    assert layout.name(tmp_path, "train") is None
    assert len(layout.pairs(tmp_path, "val")[0]) == 1


def test_a_folder_of_both_and_names_with_an_ending(tmp_path):
    for name in "ab":
        write(tmp_path / "train" / f"{name}.png", (0, 0, 0), mode="RGB")
        write(tmp_path / "train" / f"{name}_mask.png")
    layout = Layout("{split}", "{split}", "_mask.png")
    assert names(layout.pairs(tmp_path, "train"), tmp_path) == [
        ["train/a.png", "train/b.png"],
        ["train/a_mask.png", "train/b_mask.png"],
    ]


def cityscapes(root):
    for split, name in (("train", "bonn/bonn_1"), ("train", "ulm/ulm_2"), ("val", "köln/köln_3")):
        write(root / f"leftImg8bit/{split}/{name}_leftImg8bit.png", (0, 0, 0), mode="RGB")
        write(root / f"gtFine/{split}/{name}_gtFine_labelIds.png")
        write(root / f"gtFine/{split}/{name}_gtFine_color.png", (0, 0, 0), mode="RGB")
    return Layout(
        "leftImg8bit/{split}", "gtFine/{split}", "_gtFine_labelIds.png", image_suffix="_leftImg8bit.png"
    )


def test_names_of_which_both_have_an_ending(tmp_path):
    layout = cityscapes(tmp_path)
    write(tmp_path / "leftImg8bit/train/bonn/preview.png", (0, 0, 0), mode="RGB")
    assert names(layout.pairs(tmp_path, "train"), tmp_path) == [
        ["leftImg8bit/train/bonn/bonn_1_leftImg8bit.png", "leftImg8bit/train/ulm/ulm_2_leftImg8bit.png"],
        ["gtFine/train/bonn/bonn_1_gtFine_labelIds.png", "gtFine/train/ulm/ulm_2_gtFine_labelIds.png"],
    ]
    listed = replace(layout, images="leftImg8bit/train", masks="gtFine/train", splits="{split}.txt")
    (tmp_path / "train.txt").write_text("ulm/ulm_2\n")
    assert len(listed.pairs(tmp_path, "train")[0]) == 1
    (tmp_path / "gtFine/val/köln/köln_3_gtFine_labelIds.png").unlink()
    assert error_of(lambda: layout.pairs(tmp_path, "val")).endswith(
        ": köln/köln_3_leftImg8bit.png; the mask of a_leftImg8bit.png is a_gtFine_labelIds.png"
        " (--data.image_suffix, --data.mask_suffix)"
    )
    assert error_of(lambda: replace(layout, image_suffix=".tif").pairs(tmp_path, "val")) == (
        f"no images of val in {tmp_path}/leftImg8bit/val: files ending in .tif count"
    )


def test_a_file_lists_the_images_of_a_split(tmp_path):
    tree(tmp_path, "abcd", ("pictures", "labels"))
    (tmp_path / "train.txt").write_text("c\na\n\n")
    layout = Layout("pictures", "labels", splits="{split}.txt")
    assert names(layout.pairs(tmp_path, "train"), tmp_path) == [
        ["pictures/c.jpg", "pictures/a.jpg"],
        ["labels/c.png", "labels/a.png"],
    ]
    (tmp_path / "train.txt").write_text("a\nx\ny\n")
    assert error_of(lambda: layout.pairs(tmp_path, "train")) == (
        f"2 of 3 names in {tmp_path}/train.txt have no image in {tmp_path}/pictures: x, y; a line"
        " is an image's name without ending"
    )
    (tmp_path / "train.txt").write_text("a\nb\n")
    (tmp_path / "labels/b.png").unlink()
    assert f"1 of 2 images in {tmp_path}/pictures have no mask in {tmp_path}/labels: b.jpg;" in error_of(
        lambda: layout.pairs(tmp_path, "train")
    )


@pytest.mark.parametrize("root", ["", "home"])
def test_the_layout_of_ade20k(tmp_path, root):
    home = tmp_path / "ADEChallengeData2016"
    for split in ("training", "validation"):
        tree(home, [f"ADE_{split}_1"], (f"images/{split}", f"annotations/{split}"))
    found = {
        split: names(LAYOUTS["ade20k"].pairs(home if root else tmp_path, split), home)
        for split in ("train", "val", "test")
    }
    assert found["train"] == [
        ["images/training/ADE_training_1.jpg"],
        ["annotations/training/ADE_training_1.png"],
    ]
    assert found["val"] == found["test"]
    assert found["val"][0] == ["images/validation/ADE_validation_1.jpg"]


@pytest.mark.parametrize("root", ["", "VOCdevkit", "VOCdevkit/VOC2010"])
def test_the_layout_of_pascal_context(tmp_path, root):
    home = tmp_path / "VOCdevkit/VOC2010"
    tree(home, ["2008_1", "2008_2"], ("JPEGImages", "SegmentationClassContext"))
    write(home / "JPEGImages/2008_3.jpg", (0, 0, 0), mode="RGB")
    lists = home / "ImageSets/SegmentationContext"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2008_2\n")
    (lists / "val.txt").write_text("2008_1\n")
    found = {
        split: names(LAYOUTS["pascal_context"].pairs(tmp_path / root, split), home)
        for split in ("train", "val")
    }
    assert found == {
        "train": [["JPEGImages/2008_2.jpg"], ["SegmentationClassContext/2008_2.png"]],
        "val": [["JPEGImages/2008_1.jpg"], ["SegmentationClassContext/2008_1.png"]],
    }


@pytest.mark.parametrize("root", ["", "coco_stuff164k"])
def test_the_layout_of_coco_stuff(tmp_path, root):
    home = tmp_path / "coco_stuff164k"
    for split in ("train2017", "val2017"):
        write(home / "images" / split / "0001.jpg", (0, 0, 0), mode="RGB")
        write(home / "annotations" / split / "0001_labelTrainIds.png")
        write(home / "annotations" / split / "0001.png")
    assert names(LAYOUTS["coco_stuff"].pairs(tmp_path / root, "train"), home) == [
        ["images/train2017/0001.jpg"],
        ["annotations/train2017/0001_labelTrainIds.png"],
    ]
    assert len(LAYOUTS["coco_stuff"].pairs(tmp_path / root, "test")[0]) == 1


def voc(root, aug=("2007_1", "2008_2")):
    """VOC 2012: its own masks of 2007_1 and 2007_9, the augmented set's; those of one image differ."""
    home = root / "VOCdevkit/VOC2012"
    tree(home, ["2007_1", "2007_9"], ("JPEGImages", "SegmentationClass"))
    if aug:
        tree(home, aug, ("JPEGImages", "SegmentationClassAug"))
    lists = home / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    for name, listed in {"train": ["2007_1"], "val": ["2007_9"], "trainaug": list(aug)}.items():
        (lists / f"{name}.txt").write_text("".join(f"{each}\n" for each in listed))
    return home


@pytest.mark.parametrize("root", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_the_layout_of_pascal_voc(tmp_path, root):
    home = voc(tmp_path)
    of = {name: LAYOUTS[name] for name in ("pascal_voc", "pascal_voc_aug")}
    found = {
        (name, split): names(layout.pairs(tmp_path / root, split), home)
        for name, layout in of.items()
        for split in ("train", "val", "test")
    }
    assert found["pascal_voc", "train"] == [["JPEGImages/2007_1.jpg"], ["SegmentationClass/2007_1.png"]]
    # VOC's own masks have its boundaries: they come before those of the augmented set.
    assert found["pascal_voc_aug", "train"] == [
        ["JPEGImages/2007_1.jpg", "JPEGImages/2008_2.jpg"],
        ["SegmentationClass/2007_1.png", "SegmentationClassAug/2008_2.png"],
    ]
    for name in of:
        val = [["JPEGImages/2007_9.jpg"], ["SegmentationClass/2007_9.png"]]
        assert found[name, "val"] == found[name, "test"] == val


def test_pascal_voc_without_its_augmented_set(tmp_path):
    home = voc(tmp_path, aug=())
    assert len(LAYOUTS["pascal_voc_aug"].pairs(tmp_path, "val")[0]) == 1
    (home / "ImageSets/Segmentation/trainaug.txt").write_text("2007_1\n2007_9\n2008_2\n")
    write(home / "JPEGImages/2008_2.jpg", (0, 0, 0), mode="RGB")
    assert error_of(lambda: LAYOUTS["pascal_voc_aug"].pairs(tmp_path, "train")) == (
        f"1 of 3 images in {home}/JPEGImages have no mask in {home}/SegmentationClassAug: 2008_2.jpg;"
        " the mask of a.jpg is a.png"
    )
    (home / "ImageSets/Segmentation/trainaug.txt").unlink()
    assert error_of(lambda: LAYOUTS["pascal_voc_aug"].pairs(tmp_path, "train")).startswith(
        f"no ImageSets/Segmentation/trainaug.txt in {home}: "
    )


def test_a_mask_of_pascal_voc_may_have_nothing_but_background_and_boundary(tmp_path):
    files = [write(tmp_path / "a.png", 0)]
    mask = Image.fromarray(np.array([[0, 255]], np.uint8))
    mask.save(files[0])
    assert Pairs(files, files, MaskValues(21)).check_annotated(1) == list(range(1, 21))


# id → train id, written out of the table in cityscapesscripts/helpers/labels.py.
TRAIN_IDS = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12}
TRAIN_IDS |= {26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18}


@pytest.mark.parametrize("root", ["", "cityscapes"])
def test_the_layout_of_cityscapes(tmp_path, root):
    home = tmp_path / "cityscapes"
    cityscapes(home)
    layout = LAYOUTS["cityscapes"]
    of_ids = layout.of(tmp_path / root, "train")
    assert [names(of_ids.pairs(tmp_path / root, split), home)[1] for split in ("train", "val", "test")] == [
        ["gtFine/train/bonn/bonn_1_gtFine_labelIds.png", "gtFine/train/ulm/ulm_2_gtFine_labelIds.png"],
        *[["gtFine/val/köln/köln_3_gtFine_labelIds.png"]] * 2,
    ]
    for name in ("bonn/bonn_1", "ulm/ulm_2"):
        write(home / f"gtFine/train/{name}_gtFine_labelTrainIds.png")
    assert layout.of(tmp_path / root, "train") == layout
    assert names(layout.pairs(tmp_path / root, "train"), home)[1][0].endswith(
        "bonn_1_gtFine_labelTrainIds.png"
    )
    assert layout.of(tmp_path / root, "val") == of_ids


def test_the_ids_of_cityscapes_become_train_ids():
    ids = np.arange(256, dtype=np.uint8)
    found = MaskValues(19, labels=LAYOUTS["cityscapes"].otherwise.labels).classes(ids[None], "a.png")[0]
    assert found.tolist() == [TRAIN_IDS.get(value, 255) for value in range(256)]
    assert MaskValues(19).classes(np.array([[0, 18, 255]]), "a.png").tolist() == [[0, 18, 255]]


def test_images_without_masks_and_the_reverse(tmp_path):
    tree(tmp_path, "abcdefg")
    for name in "bcdf":
        (tmp_path / f"annotations/train/{name}.png").unlink()
    found = error_of(lambda: Layout().pairs(tmp_path, "train"))
    assert found == (
        f"4 of 7 images in {tmp_path}/images/train have no mask in {tmp_path}/annotations/train: b.jpg,"
        " c.jpg, d.jpg and 1 more; the mask of a.jpg is a.png (--data.image_suffix, --data.mask_suffix)"
    )
    for name in "bcdfg":
        (tmp_path / f"images/train/{name}.jpg").unlink()
    assert error_of(lambda: Layout().pairs(tmp_path, "train")).startswith(
        f"1 of 3 masks in {tmp_path}/annotations/train have no image in {tmp_path}/images/train: g.png; "
    )


def test_two_images_for_one_mask(tmp_path):
    tree(tmp_path, "a")
    write(tmp_path / "images/train/a.png", (0, 0, 0), mode="RGB")
    assert error_of(lambda: Layout().pairs(tmp_path, "train")) == (
        f"{tmp_path}/images/train/a.jpg and {tmp_path}/images/train/a.png have the same name, and so the same"
        " mask: rename one"
    )


def test_folders_that_are_not_there(tmp_path):
    layout = Layout()
    none = tmp_path / "none"
    assert error_of(lambda: layout.pairs(none, "train")) == (
        f"no such folder: {none}; set --data.root to the folder of the data set"
    )
    assert error_of(lambda: layout.pairs(tmp_path, "val")) == (
        f"no images/val or images/validation or images/test in {tmp_path}: set --data.root to the folder"
        " that holds it"
    )
    write(tmp_path / "images/train/a.jpg", (0, 0, 0), mode="RGB")
    assert error_of(lambda: layout.pairs(tmp_path, "train")).startswith(
        f"no such folder: {tmp_path}/annotations/train, which"
    )
    (tmp_path / "images/train/a.jpg").unlink()
    (tmp_path / "annotations/train").mkdir(parents=True)
    assert error_of(lambda: layout.pairs(tmp_path, "train")).startswith(
        f"no images of train in {tmp_path}/images/train: files ending in .jpg"
    )
