"""What all tasks share: a backbone with its weights, the size of the run, and the scalars of every step."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import ceil, inf
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse.typing import ClosedUnitInterval
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.utilities import rank_zero_info
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import Optimizer

from locat_lightning.backbones.create import check_arguments, noted_arguments
from locat_lightning.backbones.locate import lack
from locat_lightning.backbones.weights import check_source
from locat_lightning.errors import InputError, check_finite, in_a_line
from locat_lightning.evaluation.dense import patch_features
from locat_lightning.figures.grid import rgb
from locat_lightning.figures.validation import validation_figure
from locat_lightning.inspection import cls_attention, gaussian_kernels, observe
from locat_lightning.schedules import linear_rule
from locat_lightning.tasks.average import WeightAverage
from locat_lightning.tasks.sharding import clip, norms
from locat_lightning.tasks.watch import Watched

# Callbacks of Lightning that would change what a task computes from its options, and what to do instead.
UNFIT: dict[type[Callback], str] = {
    StochasticWeightAveraging: "it would replace the schedule; --model.ema averages the weights",
    LearningRateFinder: "the schedule follows from --model.lr: compare short runs with several",
    BatchSizeFinder: "the schedule follows from --data.batch_size: set that",
    GradientAccumulationScheduler: "the schedule follows from --trainer.accumulate_grad_batches: set that",
    ModelPruning: "it would rename the weights in checkpoints; prune those of a finished run",
    BaseFinetuning: "freeze parameters in a callback of your own, in on_fit_start",
}


class Task(Watched):
    """A LightningModule around a backbone, which knows the size of its run and answers for itself.

    Args:
        weights: where the weights of the backbone come from (see --weights); null starts from random ones.
        compile: whether to compile the networks with `torch.compile`, for each size of images; the names of
            the weights stay. `reduce-overhead` also records CUDA graphs, for small batches, which a GPU
            computes faster than Python starts its kernels.
        checkpoint_blocks: whether to recompute the activations of each block in the backward pass instead of
            keeping them: less memory, longer steps.
        ema: decay of a moving average of all weights, 0.9999 for example, which is validated and saved in
            their place; null for none.
    """

    backbone: nn.Module
    unfit = UNFIT
    resumed = False  # whether its weights come from a checkpoint of the run itself
    _seed: int | None = None  # of the run
    _surplus = 0  # steps that a resumed run has taken more than it would have with batches as they are now

    def __init__(
        self,
        *,
        weights: str | None = None,
        compile: bool | Literal["reduce-overhead"] = False,  # noqa: A002 - the option's name
        checkpoint_blocks: bool = False,
        ema: ClosedUnitInterval | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["weights", "backbone_weights"])
        check_finite("model", self.hparams)
        self.weights = weights

    @property
    def hp(self) -> Any:
        """Return the hyper-parameters: the arguments of the constructor."""
        return self.hparams

    @property
    def class_names(self) -> list[str]:
        """Return the names of the classes, by label; [] where there are none."""
        return self.hp.get("class_names") or []

    def forward(self, images: Tensor) -> Tensor:
        """Return what the backbone makes of normalised images [B, 3, H, W]: logits or features [B, ..]."""
        output: Tensor = self.backbone(images)
        return output

    def networks(self) -> dict[str, nn.Module]:
        """Return the networks to look at, by name; the only one has no name."""
        return {"": self.backbone}

    def to_compile(self) -> Iterable[nn.Module]:
        """Return the modules that `compile` compiles."""
        return self.networks().values()

    def compiler_options(self) -> dict[str, Any]:
        """Return the options of `torch.compile`: one graph for each size, instead of one for any size."""
        return {"dynamic": False, "mode": None if self.hp.compile is True else self.hp.compile}

    def pictures(self, samples: Sequence[Any], data: Any, side: int) -> dict[str, Figure]:
        """Draw what the model makes of some samples: figures by name.

        Samples are items of a data set of `data`: image, label, and perhaps more. `side` is the shorter side
        of an image in the picture, in pixels. The model is in evaluation mode, without gradients.
        """
        images = torch.stack([sample[0] for sample in samples])
        backbone: Any = self.backbone
        inputs = images.to(self.device, next(backbone.parameters()).dtype)
        has_features = hasattr(backbone, "forward_intermediates")
        probabilities = None
        if getattr(backbone, "num_classes", 0) > 0:
            [call] = observe(backbone, inputs, [backbone])
            probabilities = call.output.float().softmax(-1)
        figure = validation_figure(
            rgb(images, getattr(data, "normalisation", None)),
            [int(sample[1]) for sample in samples],
            self.class_names,
            kernels=gaussian_kernels(backbone, inputs),
            attention={name: cls_attention(each, inputs) for name, each in self.networks().items()},
            features=patch_features(backbone, inputs) if has_features else None,
            probabilities=probabilities,
            side=side,
        )
        return {"validation": figure}

    def result_pictures(self, data: Any) -> dict[str, Figure]:
        """Draw what a validation on `data` found, when it has ended: figures by name."""
        return {}

    def input_pictures(self, batch: Any, side: int) -> dict[str, Figure]:
        """Draw what the first training batch holds, images `side` pixels wide: figures by name."""
        return {}

    def write_predictions(self, prediction: Any, data: Any, directory: Path) -> None:
        """Write what `predict_step` returned for a batch as files, or keep it for `finish_predictions`.

        The images come from `data`; the directory may not exist yet.
        """

    def finish_predictions(self, data: Any, directory: Path) -> str:
        """Write what `write_predictions` kept, and return the closing line. All processes call it."""
        return ""

    def summary(self) -> str:
        """Return how the headline figure was measured, in words; nothing if the figure says it all."""
        return ""

    def check(self, trainer: Trainer, *, training: bool) -> None:
        """Find mistakes that show without data or a model, before either is made: `InputError`."""
        if self.hp.backbone is not None:
            check_arguments(self.hp.backbone, noted_arguments(self.hp))
        if self.weights is not None:
            check_source(self.weights)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            for unfit, instead in self.unfit.items():
                if isinstance(callback, unfit):
                    raise InputError(f"trainer.callbacks: no {type(callback).__name__} here: {instead}")
        epochs, warmup = trainer.max_epochs or 0, self.hp.get("warmup_epochs", 0)
        if training and trainer.max_steps == -1 and epochs > 0 and epochs <= warmup:
            few = f"model.warmup_epochs ({warmup:g}) has to be less than trainer.max_epochs ({epochs})"
            raise InputError(f"{few}: set one of them, as by --model.warmup_epochs {epochs // 10}")

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        """Load the weights of a checkpoint: `InputError` if they are not of this model."""
        try:
            return super().load_state_dict(state_dict, *args, **options)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise InputError(f"the weights of the checkpoint do not fit: {in_a_line(error)[:200]}") from error

    def resume(self, checkpoint: Mapping[str, Any]) -> None:
        """Prepare to resume from a checkpoint, given without its weights: read no others."""
        self.resumed = True
        self.weights = None

    def configure_callbacks(self) -> list[Callback]:
        return [] if self.hp.ema is None else [WeightAverage(self.hp.ema)]

    def agree_on_classes(self, option: str) -> tuple[int, list[str]]:
        """Return number and names of the classes in the data, and note them in the options.

        The data may have no names, if `num_classes` is given. `option` decides which classes the data have.
        """
        names = list(self.of_data("class_names") or ())
        number: int = self.hp.num_classes or len(names)
        if not number:
            raise InputError("the data do not name their classes: set model.num_classes")
        if names and number != len(names):
            raise InputError(
                f"model.num_classes is {number}, but the data have {len(names)} classes "
                f"({', '.join(names[:5])}{', …' if len(names) > 5 else ''}): leave model.num_classes out, or "
                f"correct {option}"
            )
        self.hp.num_classes, self.hp.class_names = number, self.class_names or names
        return number, names

    def of_data(self, name: str) -> Any:
        """Return an attribute of the data module; None where it has none, or there is no data module."""
        # `_trainer` is private, but `trainer` is an error where there is none.
        return getattr(getattr(self._trainer, "datamodule", None), name, None)

    def global_batch_size(self) -> int:
        """Return the images per optimizer step, over all processes and accumulated batches."""
        trainer: Any = self.trainer
        trainer.fit_loop.setup_data()  # makes the loader
        sources = (trainer.datamodule, trainer.train_dataloader)
        images = next((size for each in sources if (size := getattr(each, "batch_size", None))), None)
        if images is None:
            raise InputError("the data do not say how large a batch is: give the data module a batch_size")
        return int(images * trainer.world_size * trainer.accumulate_grad_batches)

    def peak_learning_rate(
        self, reference_batch: int = 256, rule: Callable[[float, int, int], float] = linear_rule
    ) -> float:
        """Return, print and keep as `peak_lr`: `lr`, or `base_lr` at `reference_batch` images a step."""
        hp, batch = self.hp, self.global_batch_size()
        peak: float = hp.lr if hp.lr is not None else rule(hp.base_lr, batch, reference_batch)
        rank_zero_info(f"learning rate {peak:.3g} at {batch} images a step")
        self.peak_lr = peak
        return peak

    def optimizer_steps(self) -> int:
        """Return the optimizer steps of the whole run, and keep them as `steps`."""
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise InputError("the schedule needs an end: set trainer.max_epochs or trainer.max_steps")
        self.steps = int(steps)
        return self.steps

    def warmup_steps(self, warmup_epochs: float) -> int:
        """Return the optimizer steps of the warm-up, which has to be shorter than the run."""
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return 0
        steps = self.optimizer_steps()
        warmup = self.in_steps(warmup_epochs)
        if warmup >= steps:
            raise InputError(
                f"model.warmup_epochs ({warmup_epochs:g}) is {warmup} optimizer steps, but the whole run has "
                f"only {steps}: lower --model.warmup_epochs or raise --trainer.max_epochs"
            )
        return warmup

    def in_steps(self, epochs: float) -> int:
        """Return how many optimizer steps so many epochs have; one without end counts as the whole run."""
        steps = self.optimizer_steps()
        self.trainer.fit_loop.setup_data()  # makes the number of batches known
        batches = self.trainer.num_training_batches
        of_one = steps if batches == inf else ceil(batches / self.trainer.accumulate_grad_batches)
        return round(epochs * of_one)

    def on_fit_start(self) -> None:
        if self._seed is None:  # no checkpoint brought it
            self._seed = self.trainer.strategy.broadcast(torch.initial_seed())
        if self.hp.compile:
            for module in self.to_compile():
                module.compile(**self.compiler_options())
        for network in self.networks().values():
            if self.hp.checkpoint_blocks and any(p.requires_grad for p in network.parameters()):
                try:
                    network.set_grad_checkpointing()  # type: ignore[operator]
                except (AssertionError, AttributeError) as error:
                    raise InputError(f"model.checkpoint_blocks: {self.hp.backbone}: {error}") from error

    @property
    def step(self) -> int:
        """Optimizer steps so far, for schedules: as many as if batches had always been as they are now."""
        return self.global_step - self._surplus

    def on_train_start(self) -> None:
        trainer: Any = self.trainer
        if trainer.max_steps == -1:
            loop, number = trainer.fit_loop, trainer.num_training_batches
            together: int = trainer.accumulate_grad_batches
            epochs, batches = loop.epoch_progress.current, loop.epoch_loop.batch_progress.current.ready
            begun, steps = epochs.ready > epochs.processed, ceil(number / together)
            of_this_epoch = (steps if batches == number else batches // together) if begun else 0
            self._surplus = self.global_step - epochs.processed * steps - of_this_epoch

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed drop path and mixup by seed, epoch and batch: a resumed run draws the same numbers."""
        if self.hp.compile == "reduce-overhead":  # the graphs' outputs of the last step may be overwritten
            torch.compiler.cudagraph_mark_step_begin()
        state = np.random.SeedSequence([self._seed or 0, self.current_epoch, batch_idx, self.global_rank])
        torch.manual_seed(int(state.generate_state(1, np.uint64)[0]))
        np.random.seed(state.generate_state(4))  # noqa: NPY002 - timm's mixup draws from the global state

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["seed"] = self._seed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._seed = checkpoint.get("seed")

    @property
    def fused(self) -> bool | None:
        """Whether AdamW updates all weights in one kernel: on CUDA, and torch's own choice (None) elsewhere.

        With 16-mixed a fused one would see gradients that are still scaled, and clipping, too.
        """
        on_cuda = self.trainer.strategy.root_device.type == "cuda"
        return True if on_cuda and self.trainer.precision != "16-mixed" else None

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip by the global norm, and log the norm before clipping."""
        if gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        norm = norms(gradients).norm()
        if gradient_clip_val:
            clip(gradients, norm, gradient_clip_val)
        self.log("train/grad_norm", norm)

    def set_rates(self, groups: list[dict[str, Any]]) -> None:
        """Set the learning rate and weight decay of the optimizer's parameter groups for this step."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Take a step with the rates of that step.

        They follow from the step and the options alone, so that a resumed run may have other options.
        """
        step = self.step
        self.set_rates(optimizer.param_groups)
        super().optimizer_step(epoch, batch_idx, optimizer, *args, **kwargs)
        self.after_step(step)

    def after_step(self, step: int) -> None:
        """Do what follows an optimizer step, counted from 0."""

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.log("train/lr", max(group["lr"] for group in optimizer.param_groups))
        self.log("train/weight_decay", max(group["weight_decay"] for group in optimizer.param_groups))


def announce_size(name: str, model: nn.Module) -> None:
    """Print how many parameters a model has, and what it lacks of LocAt if its name has it."""
    rank_zero_info(f"{name}{lack(name, model)}: {sum(p.numel() for p in model.parameters()):,} parameters")
