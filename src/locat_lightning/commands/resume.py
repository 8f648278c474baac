"""Going on with a run: what shapes its training stays as it was, or changes because somebody said so.

The schedules follow from the options of the whole run. Another batch size, number of epochs or learning rate
in the middle of one bends them, so none of these changes silently.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from locat_lightning.data.base import ImageModule
from locat_lightning.errors import InputError

OPTION = "allow_changes"
IMAGES = "the number of training images"
LISTED = 3  # differences in a message
RECORD = "run"  # a checkpoint's key of what `of_trainer` gives

# What of a trainer shapes the training, by attribute, and the option that says it.
TRAINER = {
    "max_epochs": "max_epochs",
    "max_steps": "max_steps",
    "accumulate_grad_batches": "accumulate_grad_batches",
    "world_size": "devices",
    "precision": "precision",
    "gradient_clip_val": "gradient_clip_val",
    "gradient_clip_algorithm": "gradient_clip_algorithm",
    "limit_train_batches": "limit_train_batches",
}
# Where the images are and how they are read: the same images make the same batches.
IGNORED = {"data.root", "data.download", "data.num_workers", "data.max_unreadable"}
# The data or the weights say these where no option does; arguments of a backbone go with its name.
FILLED_IN = {"model.num_classes", "model.class_names", "model.backbone"}
NOT_SET = "not set"


class Change(NamedTuple):
    """An option that is not what it was.

    Attributes:
        option: dotted, as on the command line.
        before: in the checkpoint's run.
        now: in the run that goes on.
    """

    option: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.option} was {_text(self.before)} and is {_text(self.now)} now"


def of_trainer(trainer: Trainer, seed: Any) -> dict[str, Any]:
    """What of a run shapes its training besides model and data, for each of its checkpoints to keep.

    Args:
        trainer: of the run.
        seed: the option seed_everything.
    """
    return {"seed_everything": seed} | {
        f"trainer.{option}": getattr(trainer, name) for name, option in TRAINER.items()
    }


def of_data(data: Any) -> dict[str, Any]:
    """What of the images themselves shapes a training, for each checkpoint to keep: how many there are.

    Args:
        data: of the run, set up.
    """
    return {IMAGES: len(data.source("train"))} if isinstance(data, ImageModule) else {}


def of_checkpoint(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What shaped the training that a checkpoint is of, as `changes` compares it, as far as it says so."""
    names = {"model": "hyper_parameters", "data": "datamodule_hyper_parameters"}
    found: dict[str, Any] = {name: checkpoint[key] for name, key in names.items() if key in checkpoint}
    return found | dict(checkpoint.get(RECORD, {}))


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """The options that are not what they were, in order; what only one side records at the top is left out.

    Args:
        before: nested options: `model`, `data`, and what `of_trainer` gives.
        now: the same of the run that goes on.
    """
    both = before.keys() & now.keys()
    old = dict(_flat({key: value for key, value in before.items() if key in both}))
    new = dict(_flat({key: value for key, value in now.items() if key in both}))
    found = []
    for option in sorted(old.keys() | new.keys()):
        was, is_now = old.get(option, NOT_SET), new.get(option, NOT_SET)
        filled_in = option in FILLED_IN or (
            option.startswith("model.backbone_args.") and new.get("model.backbone") is None
        )
        follows = filled_in and is_now in (None, NOT_SET)
        if was != is_now and option not in IGNORED and not follows:
            found.append(Change(option, was, is_now))
    return found


def check(before: Mapping[str, Any], now: Mapping[str, Any], *, allowed: bool, checkpoint: Path) -> None:
    """Say what changes in a run that goes on, if it is allowed to.

    Args:
        before: see `changes`.
        now: see `changes`.
        allowed: whether options may differ.
        checkpoint: from which the run goes on, for the message.

    Raises:
        InputError: options differ and may not.
    """
    found = changes(before, now)
    if found and not allowed:
        differing = "; ".join(map(str, found[:LISTED]))
        if len(found) > LISTED:
            differing += f"; and {len(found) - LISTED} more"
        if any(change.option == IMAGES for change in found):
            remedy = "give what was"
        else:
            as_it_was = f"locat fit --ckpt_path {checkpoint}"
            remedy = f"leave the options out ({as_it_was} goes on with what the run had)"
        raise InputError(
            f"going on from {checkpoint}, {differing}: {remedy}, or permit the change with --{OPTION} true"
        )
    for change in found:
        rank_zero_info(f"going on with a change: {change}")


def _flat(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values by dotted name; the class of model and data under their own name, and none for no arguments."""
    for key, value in options.items():
        if key in ("_class_path", "class_path"):
            yield prefix.removesuffix("."), str(value).rpartition(".")[2]
        elif key == "_instantiator":  # Lightning's own
            continue
        elif key == "init_args":  # of a class among the options, as data.views
            yield from _flat(value, prefix)
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif key.endswith("_args") and value is None:  # the same as no arguments
            continue
        else:
            yield prefix + key, list(value) if isinstance(value, tuple) else value


def _text(value: Any) -> str:
    """A value as one types it."""
    return "null" if value is None else str(value)
