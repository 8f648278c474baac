import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load, save

from locat_lightning.data import ImageData, SegmentationData
from locat_lightning.data.packing import index_tars
from locat_lightning.data.shards import INDEX, KEY, Index, Meaning
from locat_lightning.errors import InputError


def test_an_index_is_read_as_it_was_written(shards):
    file = shards / "train" / INDEX
    found = Index.load(file.read_bytes(), file)
    found.save(file.with_name("again"))
    again = Index.load(file.with_name("again").read_bytes(), file)
    assert (again.shards, list(again.names), again.meaning) == (
        found.shards,
        list(found.names),
        found.meaning,
    )
    for kind in ("images", "labels", "masks"):
        assert np.array_equal(getattr(again, kind), getattr(found, kind))
    assert found.meaning == Meaning(["ant", "bee", "cat"])
    counts = [shard.images for shard in found.shards]
    expected = [number for number, count in enumerate(counts) for _ in range(count)]
    assert found.shard_of(np.arange(len(found))).tolist() == expected


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda about, arrays: about.update(version=2), "its version is 2"),
        (lambda about, arrays: about["shards"][0].__setitem__(0, "../../x.tar"), "it has a shard"),
        (lambda about, arrays: about["shards"][0].__setitem__(2, "../evil"), "it has a shard"),
        (lambda about, arrays: about["shards"].pop(), "its shards hold"),
        (lambda about, arrays: about.update(classes=["ant"]), "a label is not one of its 1 classes"),
        (lambda about, arrays: about.update(classes=[{"class_path": "os.system"}]), "run's file may hold"),
        (lambda about, arrays: about.update(masks={"values": "x"}), "its masks are"),
        (lambda about, arrays: about.update(colours=[[1, 2]]), "its colours"),
        (lambda about, arrays: about.pop("shards"), "'shards'"),
        (lambda about, arrays: arrays["images"].__setitem__((3, 1), 10**12), "lies outside of its shard"),
        (lambda about, arrays: arrays["images"].__setitem__((3, 0), -1), "lies outside of its shard"),
        (lambda about, arrays: arrays["ends"].__setitem__(2, 10**6), "its names do not fit"),
        (lambda about, arrays: arrays["names"].__setitem__(slice(6), list(b"../../")), "out of its folder"),
        (lambda about, arrays: arrays.update(labels=arrays["labels"][:5]), "its arrays are of 5 images"),
        (
            lambda about, arrays: arrays.update(labels=arrays["labels"][:, None]),
            "its arrays are of 84 images",
        ),
        (lambda about, arrays: arrays.update(images=arrays["images"] * 1.0), "of the types int32, float64"),
        (lambda about, arrays: arrays["images"].__setitem__((3, slice(2)), 2**62), "outside of its shard"),
        (lambda about, arrays: about["shards"][0].__setitem__(1, 2**70), "it has a shard"),
        (lambda about, arrays: about["shards"][0].__setitem__(3, 2**70), "it has a shard"),
        (lambda about, arrays: about.update(classes="abc"), "a class has no name"),
        (lambda about, arrays: about.update(classes=["a", "", "c"]), "a class has no name"),
        (lambda about, arrays: arrays["ends"].__setitem__(0, 0), "its names do not fit"),
        (
            lambda about, arrays: (about.update(classes=[]), arrays["labels"].__setitem__(0, 2**30)),
            "not one of its 1000000 classes",
        ),
    ],
)
def test_an_index_that_no_shards_can_have_is_refused(change, said, shards):
    content = (shards / "train" / INDEX).read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    about, arrays = json.loads(header["__metadata__"][KEY]), {k: v.copy() for k, v in load(content).items()}
    change(about, arrays)
    with pytest.raises(InputError) as error:
        Index.load(save(arrays, {KEY: json.dumps(about)}), "the index")
    assert said in str(error.value)


@pytest.mark.parametrize("content", [b"", b"rubbish", save({"names": np.zeros(3)})])
def test_a_file_that_is_no_index_is_refused(content):
    with pytest.raises(InputError, match="the index is not an index of shards"):
        Index.load(content, "the index")


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_tar(file, members):
    file.parent.mkdir(exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def of_tars(folder):
    return index_tars(folder, Meaning(), 1, lambda done, of: None)


def test_shards_that_others_have_written_get_an_index(tmp_path):
    grey = [np.full((4, 6, 3), number * 20, np.uint8) for number in range(5)]
    long = (
        "a folder with a name of more than one hundred characters, which the header has no room for "
        + "x" * 30
    )
    write_tar(
        tmp_path / "train" / "b.tar",
        {
            "./1.json": b"{}",
            "./1.png": png(grey[0]),
            "./1.cls": b"2",
            f"{long}/2.cls": b"0\n",
            f"{long}/2.png": png(grey[1]),
        },
    )
    nines = {"x/9.png": png(grey[2]), "x/9.cls": b"3", "y/9.png": png(grey[3]), "y/9.cls": b"1"}
    write_tar(tmp_path / "train" / "a.tar", nines | {"y/9.txt": b"?"})
    of_tars(tmp_path / "train")
    data = ImageData(stream=str(tmp_path), classes=4)
    source = data.source("train")
    assert [source.path(i)[len(str(tmp_path)) + 1 :] for i in range(4)] == [
        *("train/x/9.png", "train/y/9.png", "train/1.png", f"train/{long}/2.png")
    ]
    assert [source.read(i)[1] for i in range(4)] == [3, 1, 2, 0]
    assert [np.asarray(source.read(i)[0])[0, 0, 0] for i in range(4)] == [40, 60, 0, 20]
    assert data.class_names == ["0", "1", "2", "3"]
    with pytest.raises(InputError, match=r"data\.classes \(2\): a label in .* is 3"):
        _ = ImageData(stream=str(tmp_path), classes=2).class_names


def test_images_of_one_name_in_several_shards_are_told_apart(tmp_path):
    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", {"1.jpg": b"a", f"own{number}.jpg": b"b"})
    assert list(of_tars(tmp_path).names) == ["0/1.jpg", "own0.jpg", "1/1.jpg", "own1.jpg"]


@pytest.mark.parametrize(
    ("tars", "said"),
    [
        ([{"1.jpg": b"a", "1.cls": b"0"}, {"2.jpg": b"b"}], "1 of 2 images have no label"),
        ([{"1.jpg": b"a", "1.cls": b"7"}], "a label is not one of its 2 classes"),
        ([{"x/../../1.jpg": b"a", "x/../../1.cls": b"0"}], "a name leads out of its folder"),
    ],
)
def test_shards_of_others_whose_index_could_not_be_read_get_none(tars, said, tmp_path):
    for number, members in enumerate(tars):
        write_tar(tmp_path / f"{number}.tar", members)
    with pytest.raises(InputError, match=f"{tmp_path}: {said}"):
        index_tars(tmp_path, Meaning(["a", "b"]), 1, lambda done, of: None)
    assert not (tmp_path / INDEX).exists()


def test_files_of_channels_are_images_of_samples_that_have_no_other(tmp_path):
    members = ["1.npy", "1.cls", "1.mask.png", "2.npy", "2.jpg", "2.cls", "2.mask.png"]
    write_tar(tmp_path / "0.tar", dict.fromkeys(members, b"0"))
    found = of_tars(tmp_path)
    assert list(found.names) == ["1.npy", "2.jpg"]
    assert len(found.masks) == 2


@pytest.mark.parametrize("ending", ["png", "mask.png", "seg.png"])
def test_the_masks_of_others_are_found(ending, tmp_path):
    image = io.BytesIO()
    Image.new("RGB", (6, 4)).save(image, "JPEG")
    mask = png(np.array([[0, 1, 1, 1, 255, 0]] * 4, np.uint8))
    for split in ("train", "val"):
        write_tar(tmp_path / split / "0.tar", {"7.jpg": image.getvalue(), f"7.{ending}": mask})
        of_tars(tmp_path / split)
    data = SegmentationData(stream=str(tmp_path), classes=["ground", "thing"])
    data.setup("fit")
    assert data.source("train").read(0)[1].tolist() == [[0, 1, 1, 1, 255, 0]] * 4


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"1.cls": b"two", "1.png": b""}, "invalid literal"),
        ({"1.png": b"", "1.cls": b"9" * 5000}, "the label in 1.cls is 9999"),
        ({"1.png": b"a", "1.jpg": b"b"}, "1.jpg is a second image of 1"),
        ({"1.txt": b"a"}, "holds no image"),
        ({"1.jpg": b"a", "1.png": b"b", "2.jpg": b"c"}, "1 of 2 images have no mask"),
        (None, "is not a shard of WebDataset's"),
    ],
)
def test_shards_of_others_that_cannot_be_indexed_are_named(members, said, tmp_path):
    if members is None:
        (tmp_path / "0.tar").write_bytes(b"no tar" * 300)
    else:
        write_tar(tmp_path / "0.tar", members)
    with pytest.raises(InputError, match=f"0.tar.*{said}"):
        of_tars(tmp_path)
    with pytest.raises(InputError, match=r"no \.tar file in"):
        of_tars(tmp_path / "nowhere")
