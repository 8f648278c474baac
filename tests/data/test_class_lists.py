import re

import numpy as np
import pytest

from locat_lightning.data.class_lists import KNOWN, distinct_colours, named_classes, read_classes
from locat_lightning.errors import InputError


@pytest.mark.parametrize(
    ("dataset", "count", "first", "last"),
    [
        ("ade20k", 150, ("wall", (120, 120, 120)), ("flag", (92, 0, 255))),
        ("pascal_context", 59, ("aeroplane", (180, 120, 120)), ("wood", (31, 0, 255))),
        ("coco_stuff", 171, ("person", (0, 192, 64)), ("wood", (64, 64, 0))),
        ("pascal_voc", 21, ("background", (0, 0, 0)), ("tvmonitor", (0, 64, 128))),
        ("cityscapes", 19, ("road", (128, 64, 128)), ("bicycle", (119, 11, 32))),
    ],
)
def test_the_classes_of_known_data_sets(dataset, count, first, last):
    names, colours = read_classes(KNOWN / f"{dataset}.csv")
    assert len(names) == len(set(names)) == count
    assert (colours.shape, colours.dtype) == ((count, 3), np.uint8)
    assert (names[0], tuple(colours[0])) == first
    assert (names[-1], tuple(colours[-1])) == last
    assert all(name == name.strip() for name in names)


@pytest.mark.parametrize("header", ["", "name,red,green,blue\n"])
def test_a_file_with_colours(tmp_path, header):
    file = tmp_path / "classes.csv"
    file.write_text(f'{header}sky,1,2,3\n\n"car, parked", 4, 5 ,255\n')
    names, colours = read_classes(file)
    assert names == ["sky", "car, parked"]
    assert colours.tolist() == [[1, 2, 3], [4, 5, 255]]


def test_a_file_of_names_gets_distinct_colours(tmp_path):
    file = tmp_path / "classes.txt"
    file.write_text("sky\nsign symbol\n")
    names, colours = read_classes(file)
    assert names == ["sky", "sign symbol"]
    assert colours.tolist() == [[128, 0, 0], [0, 128, 0]]


def test_the_colours_of_pascal_voc_are_those_of_its_palette():
    names, colours = read_classes(KNOWN / "pascal_voc.csv")
    assert np.array_equal(colours[1:], distinct_colours(20))
    assert names[15] == "person"


def test_distinct_colours_are_distinct():
    colours = distinct_colours(255)
    assert colours.shape == (255, 3)
    assert len({(0, 0, 0), *map(tuple, colours)}) == 256


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a,1,2,3\nb\n", "line 2: expected .* not 'b'"),
        ("a,1,2\n", "line 1: "),
        ("a,1,2,256\n", "line 1: "),
        ("a,1,2,-3\n", "line 1: "),
        ("a\nb\na\n", "every class needs a name of its own; got 'a'"),
        ("", "must be from 1 to 255 classes, not 0"),
    ],
)
def test_mistakes_in_a_file(tmp_path, text, line):
    file = tmp_path / "classes.csv"
    file.write_text(text)
    with pytest.raises(InputError, match=f"^{re.escape(str(file))}.*{line}"):
        read_classes(file)


def test_no_such_file(tmp_path):
    with pytest.raises(InputError, match=r"cannot read classes from .*none\.csv: No such file"):
        read_classes(tmp_path / "none.csv")


def test_too_many_names():
    with pytest.raises(InputError, match="from 1 to 255 classes, not 256"):
        named_classes([str(number) for number in range(256)])
