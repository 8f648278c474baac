"""Tables of images: what is written is read again, and a fingerprint says which images they are of."""

from types import SimpleNamespace

import pytest
import torch

from locat_lightning.errors import InputError
from locat_lightning.evaluation.intervals import Figures
from locat_lightning.evaluation.per_image import (
    Areas,
    ConditionAreas,
    Scores,
    fingerprint,
    names_of,
    read_table,
    write_table,
)

ODD = "val/new\nline, \udcff.png"  # a name that is not UTF-8


def scores(names=("val/a.png", ODD, "val/c.png"), labels=(1, 0, 1)):
    hits = {"top1": torch.tensor([True, False, True]), "error": torch.tensor([0.25, 1.5, 2e-7])}
    return Scores(torch.tensor([0, 4, 7]), list(names), torch.tensor(labels), hits)


def areas(annotated=30, classes=("sky, blue", "road", "car")):
    table = torch.zeros(3, 3, 3, dtype=torch.int64)
    table[0, :, 1] = torch.tensor([20, annotated, 25])
    table[2, :, 0] = torch.tensor([0, 0, 2**40])
    return Areas(torch.tensor([2, 3, 9]), ["val/a.png", ODD, "val/c.png"], classes, table)


def condition_areas():
    own = areas()
    fewer = own.areas.clone()
    fewer[0, :, 2] = torch.tensor([0, 0, 7])  # a class that is predicted under one condition alone
    return ConditionAreas(own.indices, own.names, own.classes, {"miou": own.areas, "miou_blur_n2": fewer})


@pytest.mark.parametrize("results", [scores(), areas(), condition_areas()])
def test_what_is_written_is_read_again(results, tmp_path):
    write_table(tmp_path / "images.csv", results)
    found = read_table(tmp_path / "images.csv")
    assert type(found) is type(results)
    assert found.indices.tolist() == results.indices.tolist()
    assert list(found.names) == list(results.names)
    assert fingerprint(found) == fingerprint(results)
    own, again = (Figures(each, "val").values for each in (results, found))
    assert again == pytest.approx({name: value for name, value in own.items() if name in again})
    assert own.keys() - again.keys() <= {"iou_car"}  # which is nowhere


def test_an_image_without_annotation_is_still_one_of_them(tmp_path):
    write_table(tmp_path / "images.csv", areas())
    assert read_table(tmp_path / "images.csv").areas[1].sum() == 0
    assert len(read_table(tmp_path / "images.csv").areas) == 3


def test_areas_under_conditions_are_those_of_the_same_images(tmp_path):
    results, file = condition_areas(), tmp_path / "images.csv"
    assert fingerprint(results) == fingerprint(areas())
    assert Figures(results, "robustness").values == {
        name: Figures(each, "").values["miou"] for name, each in results.under_each().items()
    }
    write_table(file, results)
    lines = file.read_text(errors="surrogateescape").splitlines(keepends=True)
    file.write_text("".join(lines[:-1]), errors="surrogateescape")
    with pytest.raises(InputError, match="the conditions are not of the same images"):
        read_table(file)


def test_a_fingerprint_is_of_names_and_annotations_alone():
    known = {fingerprint(scores()), fingerprint(areas())}
    assert all(len(each) == 16 for each in known)
    known |= {fingerprint(scores(names="abc")), fingerprint(scores(labels=(1, 1, 1)))}
    known |= {fingerprint(areas(annotated=31)), fingerprint(areas(classes=("sky", "lane", "car")))}
    assert len(known) == 6
    own = scores()
    other = Scores(own.indices, own.names, own.labels, {"top1": torch.zeros(3)})
    assert fingerprint(other) == fingerprint(own)
    assert fingerprint(scores(names=["", "", ""])) == ""


def source(*paths):
    return SimpleNamespace(source=lambda split: SimpleNamespace(path=paths.__getitem__))


def test_names_do_not_say_where_the_data_set_is():
    here = source("/data/x/val/ant/0.png", "/data/x/val/bee/1.png", "/data/x/val/bee/2.png")
    there = source("/elsewhere/val/ant/0.png", "/elsewhere/val/bee/1.png", "/elsewhere/val/bee/2.png")
    assert (
        names_of(here, "val", [0, 2]) == names_of(there, "val", [0, 2]) == ["val/ant/0.png", "val/bee/2.png"]
    )
    assert names_of(source("torch/cifar10/val/0"), "val", [0]) == ["val/0"]
    assert names_of(SimpleNamespace(source=lambda split: object()), "val", [0]) == [""]
    assert names_of(SimpleNamespace(), "val", [3]) == ["3"]
    assert names_of(here, "val", []) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "index,path,label,top1\n",
        "index,path,label\n0,a,1\n",
        "index,path,label,top1\n0,a,1\n",
        "index,path,label,top1\n0,a,1,nan\n",
        "index,path,label,top1\nx,a,1,1\n",
        "index,path,class,right,annotated,predicted\n0,a,sky,1,2\n",
        "index,path,class,right,annotated,predicted\n0,a,sky,1,-2,3\n",
        "index,path,class,right,annotated,predicted\n0,a,sky,1,2,99999999999999999999\n",
        "index,path,class,right,annotated,predicted\n",
    ],
)
def test_another_file_is_no_table(text, tmp_path):
    (tmp_path / "images.csv").write_text(text)
    with pytest.raises(InputError, match=r"images.csv is not the table of an evaluation: \S"):
        read_table(tmp_path / "images.csv")
