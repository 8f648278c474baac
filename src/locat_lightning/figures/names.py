"""Class names as text in figures."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

LENGTH = 22  # characters of a name; the rest is cut
BASE = "DejaVu Sans"  # matplotlib brings it along
UNKNOWN = "□"


class Names:
    """Class names by label, cut to `LENGTH`; the label's number where there is no name.

    Attributes:
        style: keyword arguments for each matplotlib text that holds such a name: fonts that together have
            all its characters, and no mathematics between dollar signs.
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        families, missing = _fonts(frozenset("".join(class_names)))
        boxes = str.maketrans(dict.fromkeys(missing, UNKNOWN))
        shown = (name.translate(boxes) for name in class_names)
        self._names = [name if len(name) <= LENGTH else f"{name[: LENGTH - 1]}…" for name in shown]
        self.style: dict[str, Any] = {"fontfamily": list(families), "parse_math": False}

    def __getitem__(self, label: int) -> str:
        return self._names[label] if label < len(self._names) else str(label)


@cache
def _fonts(characters: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Find font families that together have these characters, and the characters that none has."""
    families, missing = [BASE], characters - _characters(BASE)
    upright = {font.name for font in fontManager.ttflist if (font.style, font.weight) == ("normal", 400)}
    for family in sorted(upright - {"Last Resort High-Efficiency"}):  # which has a box for every character
        if not missing:
            break
        if found := missing & _characters(family):
            families.append(family)
            missing -= found
    return tuple(families), missing


@cache
def _characters(family: str) -> frozenset[str]:
    try:
        return frozenset(map(chr, get_font(findfont(FontProperties(family=family))).get_charmap()))
    except (OSError, RuntimeError):  # a font that matplotlib lists but cannot read, such as one of bitmaps
        return frozenset()
