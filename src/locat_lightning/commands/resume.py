"""Resume a run: what shapes its training stays as it was, or changes because the user says so.

The schedules follow from the options of the whole run. Another batch size, number of epochs or learning rate
in the middle of a run bends them, so none of these changes silently.
"""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from locat_lightning.callbacks.checkpoints import SEEN
from locat_lightning.callbacks.record import flat_options
from locat_lightning.data.base import ImageModule
from locat_lightning.errors import InputError
from locat_lightning.records import check_like

OPTION = "allow_changes"
IMAGES = "the number of training images"
SHARDS = "the digest of the training shards"
LISTED = 3  # differences in a message
AVERAGES = {"exp_avg", "exp_avg_sq", "momentum_buffer"}  # states of an optimizer in its parameter's shape
OF_THE_MACHINE = {"fused", "foreach", "capturable"}  # options of an optimizer that change with the device
RECORD = "run"  # a checkpoint's key of what `of_trainer` and `of_data` return

# Attributes of a trainer that shape the training, named as its options.
TRAINER = (
    *("max_epochs", "max_steps", "accumulate_grad_batches", "precision", "limit_train_batches"),
    *("gradient_clip_val", "gradient_clip_algorithm"),
)
# Where the images are and how they are read: the same images make the same batches.
IGNORED = {"data.root", "data.download", "data.num_workers", "data.max_unreadable", "data.show"}
IGNORED |= {"data.stream", "data.cache", "data.cache_size"}
# The data or the weights decide these where no option does; arguments of a backbone go with its name.
FILLED_IN = {"model.num_classes", "model.class_names", "model.backbone"}
FILLED_IN |= {"model.backbone_args", "model.backbone_args.in_chans"}
NOT_SET = "not set"


class Change(NamedTuple):
    """An option, dotted as on the command line, that is not what it was in the run of the checkpoint."""

    option: str
    before: Any
    now: Any

    def __str__(self) -> str:
        before, now = ("null" if value is None else value for value in (self.before, self.now))
        return f"{self.option} was {before} and is {now} now"


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
        checkpoint[RECORD] = of_trainer(trainer, self._seed) | of_data(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for optimizer in trainer.optimizers:  # they get their states next
            optimizer.register_load_state_dict_pre_hook(partial(check_optimizer, file=trainer.ckpt_path))

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        before, path = checkpoint.get(RECORD, {}), Path(str(trainer.ckpt_path))
        check(before, of_data(trainer), allowed=self._allowed, checkpoint=path)


def of_trainer(trainer: Trainer, seed: Any) -> dict[str, Any]:
    """Return what shapes a training besides model and data; `seed` is the option seed_everything."""
    if isinstance(seed, int) and not isinstance(seed, bool):
        seed = int(seed)  # jsonargparse's own kinds of int do not load with weights_only
    record = {"seed_everything": seed, "trainer.devices": trainer.world_size}
    return record | {f"trainer.{option}": getattr(trainer, option) for option in TRAINER}


def of_data(trainer: Trainer) -> dict[str, Any]:
    """Return what of the images shapes a training, once the data are set up: their number, their shards."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, ImageModule):
        return {}
    source = data.source("train")
    return {IMAGES: len(source), SHARDS: getattr(source, "digest", "none")}


def check_states(checkpoint: Mapping[str, Any], trainer: Trainer, file: Path) -> None:
    """Check that a checkpoint has the structure of one that the trainer would write: `InputError` if not."""
    states, callbacks = checkpoint.get("callbacks"), trainer.callbacks  # type: ignore[attr-defined]
    known = states.keys() if isinstance(states, Mapping) else ()
    own = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": "",
        "loops": {"fit_loop": trainer.fit_loop.state_dict()},
        "callbacks": {each.state_key: each.state_dict() for each in callbacks if each.state_key in known},
    }
    own |= {SEEN: 0} if SEEN in checkpoint else {}
    for key in own.keys() | ({RECORD, "hyper_parameters", "datamodule_hyper_parameters"} & checkpoint.keys()):
        check_like(checkpoint.get(key), own.get(key, {}), file, key)
    optimizers = checkpoint.get("optimizer_states")
    number = len(optimizers) if isinstance(optimizers, list) else 1
    check_like(optimizers, [{"state": {}, "param_groups": None}] * number, file, "optimizer_states")
    if not isinstance(checkpoint.get("state_dict"), Mapping):  # `Task.load_state_dict` compares the weights
        raise InputError(f"{file} holds no weights of a run (state_dict): take another checkpoint")
    counted = checkpoint["loops"]["fit_loop"]["epoch_loop.automatic_optimization.optim_progress"]
    steps = counted["optimizer"]["step"]["total"]["completed"]
    if steps != checkpoint["global_step"] or not re.match(
        r"\d+\.\d", checkpoint["pytorch-lightning_version"]
    ):
        raise InputError(
            f"{file} contradicts itself, so that no run can resume from it: take another checkpoint"
        )


def check_optimizer(optimizer: Optimizer, found: dict[str, Any], *, file: object) -> None:
    """Check that the state of an optimizer in a checkpoint fits its parameters: `InputError` if not."""
    own = optimizer.state_dict()["param_groups"]
    groups = [{k: None if k in OF_THE_MACHINE else value for k, value in group.items()} for group in own]
    check_like(found["param_groups"], groups, file, "optimizer_states.param_groups")
    fits = all(
        group["params"] == each["params"] and group.get("amsgrad") == each.get("amsgrad")
        for group, each in zip(found["param_groups"], own, strict=True)
    )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for position, state in found["state"].items():
        fits = fits and isinstance(state, Mapping) and position in range(len(parameters))
        fits = fits and all(_fits(name, value, parameters[position]) for name, value in state.items())
    if type(optimizer).__module__.startswith("torch.optim."):  # those of timm may treat matrices otherwise
        fits = fits and len({frozenset(state) for state in found["state"].values()}) <= 1
    if not fits:
        raise InputError(
            f"{file}: optimizer_states do not fit the parameters of the optimizer: take another checkpoint"
        )


def _fits(name: str, value: Any, parameter: Tensor) -> bool:
    if name == "step":
        return (isinstance(value, int | float) or _is_real(value, torch.Size())) and float(value) >= 0
    without_momentum = name == "momentum_buffer" and value is None
    return name not in AVERAGES or without_momentum or _is_real(value, parameter.shape)


def _is_real(value: Any, shape: torch.Size) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.is_floating_point()
        and value.shape == shape
        and bool(value.isfinite().all())
    )


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
    old, new = (dict(flat_options({key: each[key] for key in both})) for each in (before, now))
    found = []
    for option in sorted((old.keys() | new.keys()) - IGNORED):
        was, is_now = old.get(option, NOT_SET), new.get(option, NOT_SET)
        of_backbone = option.startswith("model.backbone_args.") and new.get("model.backbone") is None
        follows = (option in FILLED_IN or of_backbone) and is_now in (None, NOT_SET)
        if was != is_now and not follows:
            found.append(Change(option, was, is_now))
    return found


def check(before: Mapping[str, Any], now: Mapping[str, Any], *, allowed: bool, checkpoint: Path) -> None:
    """Refuse changes (see `changes`) in a run that resumes, or say what they are if they are allowed."""
    found = changes(before, now)
    if found and not allowed:
        differing = "; ".join(map(str, found[:LISTED]))
        if len(found) > LISTED:
            differing += f"; and {len(found) - LISTED} more"
        remedy = f"leave the options out (locat fit --ckpt_path {checkpoint} takes those of the run)"
        if {IMAGES, SHARDS} & {change.option for change in found}:
            remedy = "restore the images"
        raise InputError(
            f"resuming from {checkpoint}, {differing}: {remedy}, or allow the change with --{OPTION} true"
        )
    for change in found:
        rank_zero_info(f"resuming with a change: {change}")
