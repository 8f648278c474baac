"""What a file may say that the user did not type."""

from inspect import signature
from typing import Any, get_type_hints

import pytest

from locat_lightning.callbacks.probes import KnnProbe, LinearProbe
from locat_lightning.callbacks.retrieval_probe import RetrievalProbe
from locat_lightning.commands.sources import CLASSES
from locat_lightning.data.base import ImageModule
from locat_lightning.data.views import ViewTransform
from locat_lightning.errors import InputError
from locat_lightning.records import plain
from locat_lightning.tasks.base import Task
from tests.methods.runs import subclasses

VIEWS = {"class_path": "locat_lightning.data.views.MultiCrop", "init_args": {"global_size": 32}}
DATA = {"class_path": "locat_lightning.data.MultiViewData", "init_args": {"views": VIEWS, "scale": None}}


@pytest.mark.parametrize(
    "value",
    [None, True, 3, 0.5, "os.system", [1, [2]], {"a": {"b": [None]}}, {"data": DATA, "knn": {"data": DATA}}],
)
def test_data_are_read_as_they_are(value):
    assert plain(value, "file", classes=CLASSES) == value


def test_a_tuple_is_a_list():
    assert plain((1, (2,)), "file") == [1, [2]]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"a": [{"class_path": "os.system"}]}, "file: a names os.system"),
        ({"a": {1: 2}}, "file: a names what is no option"),
        ({"a": {"b": b"x"}}, "file: a.b is a bytes"),
        ({"data": "os.system"}, "file: data is os.system"),
        ({"data": DATA | {"class_path": "theirs.MultiViewData"}}, "file: data is theirs.MultiViewData"),
        (
            {"data": DATA | {"class_path": "locat_lightning_evil.MultiViewData"}},
            "file: data is locat_lightning_e",
        ),
        ({"model": DATA}, "file: model is locat_lightning.data.MultiViewData"),
        ({"data": {**DATA, "init_args": {"views": "os.system"}}}, "file: data.init_args.views is os.system"),
        (
            {"data": {**DATA, "init_args": {"views": DATA}}},
            "file: data.init_args.views is locat_lightning",
        ),
        (
            {"data": {**DATA, "init_args": {"scale": VIEWS}}},
            "file: data.init_args.scale names locat_light",
        ),
    ],
)
def test_code_is_refused(value, said):
    with pytest.raises(InputError) as refused:
        plain(value, "file", classes=CLASSES)
    assert str(refused.value).startswith(said)


def test_every_option_that_takes_a_class_is_known():
    """What a record gives for these options is imported by jsonargparse, so it must be looked at before."""
    own = [each for base in (Task, ImageModule, ViewTransform) for each in subclasses(base)]
    own = [each for each in own if each.__module__.startswith("locat_lightning.")]
    taken = set()
    for each in (*own, KnnProbe, LinearProbe, RetrievalProbe):
        for option, type_ in get_type_hints(each.__init__).items():
            if option in signature(each.__init__).parameters and type_ is not Any:
                parts = str(type_)
                if any(base in parts for base in ("locat_lightning", "Callable", "type[")):
                    taken.add(option)
    assert taken == {"data", "views"}
    assert taken < CLASSES.keys()
