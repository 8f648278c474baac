"""Class names in figures: in any script that a font has, without interpretation or warnings."""

import pytest
from matplotlib.figure import Figure

from locat_lightning.figures import names as module
from locat_lightning.figures.names import LENGTH, Names


@pytest.mark.parametrize("name", ["ñandú", "собака", "γάτα", "חתול", "ذئب", "a$b$c", "_tree", "a^2"])
def test_a_name_is_drawn_as_it_is(name):
    names = Names([name])
    figure = Figure()
    text = figure.text(0, 0, names[0], **names.style)
    figure.draw_without_rendering()
    assert text.get_text() == name


def test_a_character_that_no_font_has_is_a_box():
    names = Names(["\U0010fffd cat", "dog"])
    assert (names[0], names[1]) == ("□ cat", "dog")


def test_another_font_brings_what_the_first_has_not(monkeypatch):
    fonts = {module.BASE: frozenset("ab"), "STIXGeneral": frozenset("xy")}
    monkeypatch.setattr(module, "_characters", lambda family: fonts.get(family, frozenset()))
    module._fonts.cache_clear()
    names = Names(["ax", "bz"])
    module._fonts.cache_clear()
    assert names.style["fontfamily"] == [module.BASE, "STIXGeneral"]
    assert (names[0], names[1]) == ("ax", "b□")


def test_long_names_are_cut_and_labels_without_a_name_are_numbers():
    names = Names(["n" * 200, "m" * LENGTH])
    assert names[0] == "n" * (LENGTH - 1) + "…"
    assert names[1] == "m" * LENGTH
    assert names[7] == "7"
