import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from locat_lightning.data import ImageData, MultiViewData, SegmentationData, packing
from locat_lightning.data.shards import INDEX, Index, Meaning
from locat_lightning.errors import InputError
from tests.data.conftest import pack_all


def unpacked(folder, to):
    """The files that `tar xf` makes of all shards of a folder, by their paths."""
    for file in sorted(folder.glob("*.tar")):
        with tarfile.open(file) as tar:
            tar.extractall(to, filter="data")
    return {path.relative_to(to).as_posix(): path.read_bytes() for path in to.rglob("*") if path.is_file()}


def test_unpacked_shards_are_the_folder_byte_by_byte(images, shards, tmp_path):
    for split in ("train", "val"):
        found = unpacked(shards / split, tmp_path / "out" / split)
        originals = {
            path.relative_to(images / split).as_posix(): path.read_bytes()
            for path in (images / split).rglob("*.*")
        }
        labels = {name: content for name, content in found.items() if name.endswith(".cls")}
        assert originals == {name: content for name, content in found.items() if name not in labels}
        classes = {"ant": b"0", "bee": b"1", "cat": b"2"}
        assert labels == {f"{Path(name).with_suffix('')}.cls": classes[name[:3]] for name in originals}
    assert len(list((shards / "train").glob("*.tar"))) == 7
    assert sorted(path.name for path in (shards / "val").iterdir()) == ["000000.tar", INDEX]


def test_shards_of_training_are_mixtures_and_others_keep_the_order(shards, images):
    indices = {split: Index.load((shards / split / INDEX).read_bytes(), split) for split in ("train", "val")}
    for number in range(6):
        assert len(set(indices["train"].labels[indices["train"].shard_of(range(84)) == number])) > 1
    expected = [path[len(str(images)) + 5 :] for path in ImageData(root=str(images)).source("val").paths]
    assert list(indices["val"].names) == expected


def test_images_and_masks_share_a_sample(scenes, tmp_path):
    root = scenes("folder")
    to = pack_all(SegmentationData(root=str(root), classes=["a", "b", "c"]), tmp_path / "shards")
    found = unpacked(to / "val", tmp_path / "out")
    assert len(found) == 6
    for number in range(3):
        image, mask = root / f"images/val/val_{number}.jpg", root / f"annotations/val/val_{number}.png"
        assert found[f"val_{number}.jpg"] == image.read_bytes()
        assert found[f"val_{number}.mask.png"] == mask.read_bytes()


def test_names_that_share_a_key_stay_samples_of_their_own(tmp_path):
    """WebDataset's key ends at the first dot of the name."""
    names = ["a.b.png", "a.c.png", "a.jpg", "a.png", "ä/a%2Eb.png", "a_.png", "a%2Eb.png"]
    for value, name in enumerate(names):
        (tmp_path / "images" / name).parent.mkdir(exist_ok=True, parents=True)
        Image.new("L", (4, 4), value * 9).save(tmp_path / "images" / name)
    to = pack_all(MultiViewData(root=str(tmp_path / "images")), tmp_path / "shards")
    keys = [
        name.rpartition("/")[0] + name.rpartition("/")[2].partition(".")[0]
        for name in unpacked(to, tmp_path / "out")
    ]
    assert len(set(keys)) == len(keys) == 7
    source = MultiViewData(stream=str(to)).source("train")
    found = {source.path(i).removeprefix(f"{to}/"): source.read(i)[0].getpixel((0, 0))[0] for i in range(7)}
    assert found == {name: pytest.approx(value * 9, abs=2) for value, name in enumerate(names)}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("workers", [1, 3])
def test_a_pack_that_was_killed_goes_on(workers, images, shards, tmp_path, monkeypatch):
    write, written = packing._write_sample, []

    def dies(tar, plan, index):
        written.append(index)
        if len(written) == 50:
            raise KeyboardInterrupt
        return write(tar, plan, index)

    again = tmp_path / "again"
    monkeypatch.setattr(packing, "_write_sample", dies)
    with pytest.raises(KeyboardInterrupt):
        pack_all(ImageData(root=str(images)), again, workers=workers)
    tars = sorted((again / "train").glob("*.tar"))
    assert 3 <= len(tars) < 7
    assert not (again / "train" / INDEX).exists()
    broken = bytearray(tars[1].read_bytes())
    broken[600] ^= 1  # its size and its names are right
    tars[1].write_bytes(broken)
    kept = {tar: tar.stat().st_mtime_ns for tar in tars if tar != tars[1]}
    monkeypatch.setattr(packing, "_write_sample", write)
    pack_all(ImageData(root=str(images)), again, workers=workers)
    assert {tar: tar.stat().st_mtime_ns for tar in kept} == kept
    for split in ("train", "val"):
        assert contents(again / split) == contents(shards / split)


def test_what_is_packed_is_not_packed_again(images, shards, monkeypatch):
    monkeypatch.setattr(packing, "_write_sample", lambda *_: pytest.fail("packed again"))
    pack_all(ImageData(root=str(images)), shards)
    (images / "train" / "ant" / "0.jpg").unlink()
    with pytest.raises(InputError, match=r"shards/train holds shards of other images: pack to another"):
        pack_all(ImageData(root=str(images)), shards)


def test_a_pack_repairs_shards_that_are_damaged_or_missing(images, shards):
    whole, tars = contents(shards / "train"), sorted((shards / "train").glob("*.tar"))
    tars[1].write_bytes(tars[1].read_bytes()[:-1] + b"x")
    tars[3].unlink()
    kept = tars[0].stat().st_mtime_ns
    pack_all(ImageData(root=str(images)), shards)
    assert contents(shards / "train") == whole
    assert tars[0].stat().st_mtime_ns == kept


def test_shards_that_differ_say_in_what(images, tmp_path):
    files, to = ImageData(root=str(images)).files()["val"], tmp_path / "to"

    def again(**changed):
        size = changed.pop("shard_size", 28_000)
        options = {"shard_size": size, "seed": changed.pop("seed", None), "workers": 1}
        packing.pack(replace(files, **changed), to, said=lambda done, of: None, **options)

    again()
    for change, said in (
        ({"seed": 1}, "in another order"),
        ({"shard_size": 2000}, "of another --shard_size"),
        ({"labels": [0] * len(files)}, "with other labels"),
        ({"meaning": Meaning(["x", "y", "z"])}, "with other classes"),
    ):
        with pytest.raises(InputError, match=f"to holds shards {said}"):
            again(**change)


def test_a_shard_of_other_images_is_not_taken(images, tmp_path):
    files = ImageData(root=str(images)).files()["train"]
    plan = packing.Plan(files, 28_000, list(range(84)))
    (tmp_path / "to").mkdir()
    first = packing._pack_shard(plan, 0, tmp_path / "to")
    other = packing._pack_shard(packing.Plan(files, 28_000, list(range(83, -1, -1))), 0, tmp_path / "to")
    assert set(first.names).isdisjoint(other.names)


def test_folders_without_labels_are_packed(images, tmp_path):
    to = pack_all(ImageData(root=str(images / "train" / "ant")), tmp_path / "flat")
    data = MultiViewData(stream=str(to))
    data.setup("fit")
    assert (data.class_names, len(data.source("train")), data.source("val")) == ([], 28, data.source("train"))
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    (mixed / "train").symlink_to(images / "train" / "bee")
    (mixed / "val").symlink_to(images / "val")
    data = MultiViewData(stream=str(pack_all(ImageData(root=str(mixed)), tmp_path / "to")))
    assert (data.class_names, len(data.source("train")), len(data.source("val"))) == ([], 28, 10)
    assert np.unique(data.source("train").labels).tolist() == [-1]


def test_an_image_beside_the_folders_of_classes_is_named(images, tmp_path):
    Image.new("L", (4, 4)).save(images / "train" / "loose.PNG")
    with pytest.raises(InputError, match=r"train/loose\.PNG is beside folders of classes, in none: move it"):
        ImageData(root=str(images)).files()
    assert len(ImageData(root=str(images / "train")).files()[""]) == 85


@pytest.mark.parametrize("options", [{"dataset": "digits"}, {"dataset": "torch/cifar10"}])
def test_only_files_can_be_packed(options):
    with pytest.raises(InputError, match="only folders of image files can be packed"):
        ImageData(**options).files()
