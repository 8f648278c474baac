"""The classes that labels mean, in weights and in data."""

from collections.abc import Mapping, Sequence
from typing import Any

from locat_lightning.errors import InputError

DATA_CLASSES = "data_classes"  # a checkpoint's key of the classes of the data, where class_names differ


def classes_of(checkpoint: Mapping[str, Any]) -> list[str]:
    """Return the classes of the data that a checkpoint's model was trained on; [] if it does not say."""
    options = checkpoint.get("hyper_parameters")
    named = options.get("class_names") if isinstance(options, Mapping) else None
    return [str(name) for name in checkpoint.get(DATA_CLASSES) or named or []]


def check_same_classes(learnt: Sequence[str], given: Sequence[str]) -> None:
    """Check that labels mean the same classes in the weights as in the data, where both are known."""
    if not learnt or not given or list(learnt) == list(given):
        return
    lists = [
        f"only {side} have {', '.join(alone[:10])}{', …' if len(alone) > 10 else ''}"
        for side, these, those in (("the weights", learnt, given), ("the data", given, learnt))
        if (alone := sorted(set(these) - set(those)))
    ]
    raise InputError(
        f"the weights were trained on other classes than the data have: {'; '.join(lists) or 'another order'}"
        ": check data.root, or use other weights"
    )
