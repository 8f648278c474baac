"""Resume a run: what shapes its training stays as it was, or changes because the user says so.

The schedules follow from the options of the whole run. Another batch size, number of epochs or learning rate
in the middle of a run bends them, so none of these changes silently.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from locat_lightning.data.base import ImageModule
from locat_lightning.errors import InputError

OPTION = "allow_changes"
IMAGES = "the number of training images"
LISTED = 3  # differences in a message
RECORD = "run"  # a checkpoint's key of what `of_trainer` and `of_data` return

# What of a trainer shapes the training, by attribute, and its option.
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
# The data or the weights decide these where no option does; arguments of a backbone go with its name.
FILLED_IN = {"model.num_classes", "model.class_names", "model.backbone"}
NOT_SET = "not set"


class Change(NamedTuple):
    """An option that is not what it was.

    Attributes:
        option: dotted, as on the command line.
        before: its value in the run of the checkpoint.
        now: its value in the run that resumes.
    """

    option: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.option} was {_text(self.before)} and is {_text(self.now)} now"


class ResumeGuard(Callback):
    """Keeps in each checkpoint what shapes the training, and checks the images when a run resumes.

    The number of images is known only when the data are set up; all options are checked before that.

    Args:
        seed: the option seed_everything.
        allowed: whether a resumed run may change.
    """

    def __init__(self, seed: Any, *, allowed: bool) -> None:
        self._seed = seed
        self._allowed = allowed

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep what `of_trainer` and `of_data` return."""
        checkpoint[RECORD] = of_trainer(trainer, self._seed)
        checkpoint[RECORD] |= of_data(trainer.datamodule)  # type: ignore[attr-defined]

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Check that the images are still as many."""
        check(
            checkpoint.get(RECORD, {}),
            of_data(trainer.datamodule),  # type: ignore[attr-defined]
            allowed=self._allowed,
            checkpoint=Path(str(trainer.ckpt_path)),
        )


def of_trainer(trainer: Trainer, seed: Any) -> dict[str, Any]:
    """Return what shapes a training besides model and data.

    Args:
        trainer: of the run.
        seed: the option seed_everything.
    """
    if isinstance(seed, int) and not isinstance(seed, bool):
        seed = int(seed)  # jsonargparse's own kinds of int do not load with weights_only
    return {"seed_everything": seed} | {
        f"trainer.{option}": getattr(trainer, name) for name, option in TRAINER.items()
    }


def of_data(data: Any) -> dict[str, Any]:
    """Return what of the images themselves shapes a training: how many there are.

    Args:
        data: of the run, set up.
    """
    return {IMAGES: len(data.source("train"))} if isinstance(data, ImageModule) else {}


def of_checkpoint(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return what shaped the training of a checkpoint, as far as it says so, for `changes` to compare."""
    names = {"model": "hyper_parameters", "data": "datamodule_hyper_parameters"}
    found: dict[str, Any] = {name: checkpoint[key] for name, key in names.items() if key in checkpoint}
    return found | dict(checkpoint.get(RECORD, {}))


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Return the options that are not what they were, in order, of the groups that both sides have.

    Args:
        before: nested options: `model`, `data`, and what `of_trainer` returns.
        now: the same of the run that resumes.
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
    """Refuse changes in a run that resumes, or say what they are if they are allowed.

    Args:
        before: see `changes`.
        now: see `changes`.
        allowed: whether options may differ.
        checkpoint: from which the run resumes, for the message.

    Raises:
        InputError: options differ and are not allowed to.
    """
    found = changes(before, now)
    if found and not allowed:
        differing = "; ".join(map(str, found[:LISTED]))
        if len(found) > LISTED:
            differing += f"; and {len(found) - LISTED} more"
        if any(change.option == IMAGES for change in found):
            remedy = "restore the images"
        else:
            remedy = f"leave the options out (locat fit --ckpt_path {checkpoint} takes those of the run)"
        raise InputError(
            f"resuming from {checkpoint}, {differing}: {remedy}, or allow the change with --{OPTION} true"
        )
    for change in found:
        rank_zero_info(f"resuming with a change: {change}")


def _flat(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield values by dotted name; the class of model and data under their own name."""
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
    """Return a value as it is typed."""
    return "null" if value is None else str(value)
