"""Self-distillation without labels (DINO): a student learns what its own average sees in other views."""

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from lightly.loss import DINOLoss
from lightly.models.modules import DINOProjectionHead
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_warn
from matplotlib.figure import Figure
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer

from locat_lightning.backbones.create import create_for_any_size
from locat_lightning.backbones.weights import load_weights
from locat_lightning.data.dataset import ImageBatch
from locat_lightning.data.multiview import MultiViewData
from locat_lightning.data.views import ViewBatch
from locat_lightning.errors import InputError
from locat_lightning.evaluation.features import check_size
from locat_lightning.evaluation.gather import distributed
from locat_lightning.evaluation.rank import effective_rank
from locat_lightning.figures.views import views_figure
from locat_lightning.schedules import cosine, linear_rule, linear_warmup, warmup_then_cosine
from locat_lightning.tasks.base import Task, announce_learning_rate, announce_size, check_range

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
COLLAPSED = 0.01  # share of the largest possible entropy that counts as none


class Schedule(NamedTuple):
    """What an optimizer step is taken with."""

    lr: float
    weight_decay: float
    momentum: float


class Dino(Task):
    """Trains a timm model on images without labels, by self-distillation.

    The defaults are those of "Emerging Properties in Self-Supervised Vision Transformers" (ICCV 2021) as
    "Locality-Attending Vision Transformer" (ICLR 2026) uses them. `backbone`, which callbacks and evaluation
    see, is the teacher's.

    Args:
        backbone: timm's name of the model: `locatvit_small`, `vit_small_patch16_224`, …
        backbone_args: further arguments of the model, as in `timm.create_model`; drop path is the student's.
        locat: puts LocAt into a model that has none: arguments of `locat_lightning.add_locat`, as in
            `{start: identity}`, with which a pretrained model begins as it is.
        weights: where the weights of both backbones come from (see --weights); null starts from random ones.
        out_dim: prototypes, over which student and teacher give a distribution.
        hidden_dim: width of the two hidden layers of the head.
        bottleneck_dim: width of the head before the prototypes.
        norm_last_layer: whether the prototypes keep length 1, which is more stable.
        lr: peak learning rate; null takes base_lr · global batch / 256.
        base_lr: learning rate at 256 images a step.
        min_lr: learning rate towards which the cosine goes.
        warmup_epochs: epochs of linear warm-up.
        weight_decay: of matrices, at the beginning; biases and 1-d parameters have none.
        weight_decay_end: the same at the end, along a cosine.
        momentum: the teacher's share of itself in an update, at the beginning; it goes to 1 along a cosine.
        teacher_temp: temperature of the teacher's distribution.
        warmup_teacher_temp: the same in the first epoch.
        warmup_teacher_temp_epochs: epochs of linear change from one to the other; 0 for none.
        student_temp: temperature of the student's distribution.
        center_momentum: the centre's share of itself in an update.
        clip_grad: largest norm of each parameter's gradient; null does not clip.
        freeze_last_layer_epochs: epochs in which the prototypes stay as they are.

    Raises:
        InputError: an argument is out of its range.
    """

    def __init__(
        self,
        backbone: str = "locatvit_small",
        *,
        backbone_args: dict[str, Any] | None = None,
        locat: dict[str, Any] | None = None,
        weights: str | None = None,
        out_dim: int = 65536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        norm_last_layer: bool = True,
        lr: float | None = None,
        base_lr: float = 5e-4,
        min_lr: float = 1e-6,
        warmup_epochs: float = 10,
        weight_decay: float = 0.04,
        weight_decay_end: float = 0.4,
        momentum: float = 0.996,
        teacher_temp: float = 0.04,
        warmup_teacher_temp: float = 0.04,
        warmup_teacher_temp_epochs: int = 0,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        clip_grad: float | None = 3.0,
        freeze_last_layer_epochs: int = 1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="weights")
        for name, value in (
            ("teacher_temp", teacher_temp),
            ("warmup_teacher_temp", warmup_teacher_temp),
            ("student_temp", student_temp),
            ("clip_grad", 1 if clip_grad is None else clip_grad),
        ):
            if not 0 < value < math.inf:
                raise InputError(f"model.{name} ({value}) must be above 0")
        for name, value, least, most in (
            ("out_dim", out_dim, 1, math.inf),
            ("hidden_dim", hidden_dim, 1, math.inf),
            ("bottleneck_dim", bottleneck_dim, 1, math.inf),
            ("lr", 0 if lr is None else lr, 0, math.inf),
            ("base_lr", base_lr, 0, math.inf),
            ("min_lr", min_lr, 0, math.inf),
            ("warmup_epochs", warmup_epochs, 0, math.inf),
            ("weight_decay", weight_decay, 0, math.inf),
            ("weight_decay_end", weight_decay_end, 0, math.inf),
            ("warmup_teacher_temp_epochs", warmup_teacher_temp_epochs, 0, math.inf),
            ("freeze_last_layer_epochs", freeze_last_layer_epochs, 0, math.inf),
            ("momentum", momentum, 0, 1),
            ("center_momentum", center_momentum, 0, 1),
        ):
            check_range(name, value, least, most)
        self.weights = weights
        self.class_names = []
        self.collapse = ""
        self._losses: list[tuple[int, Tensor]] = []  # that nobody has looked at yet, with their steps
        self._accumulated: list[Tensor] = []  # loss and teacher's entropy of a step's micro-batches so far

    def check(self, trainer: Trainer, *, training: bool) -> None:
        """Find mistakes that show without data or a model.

        Raises:
            InputError: also, this is not to train: without classes there is nothing to predict or measure.
        """
        if not training:
            raise InputError(
                "a DINO model has no classes to predict or to compare with: locat knn, linear and retrieve "
                "measure its features"
            )
        super().check(trainer, training=training)

    @property
    def backbone(self) -> nn.Module:  # type: ignore[override]
        """The teacher's backbone: the better of the two at any time."""
        return self.teacher.backbone

    def configure_model(self) -> None:
        """Build student, teacher and loss, and read the weights."""
        if hasattr(self, "student"):
            return
        hp = self.hp
        self.student = self._network()
        self.teacher = self._network()
        for module in self.teacher.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0
        announce_size(hp.backbone, self.student.backbone)
        if self.weights is not None:
            load_weights(self.student.backbone, self.weights, warm_start=True)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.loss = Loss(
            hp.out_dim,
            teacher_temp=hp.teacher_temp,
            student_temp=hp.student_temp,
            center_momentum=hp.center_momentum,
        )

    def _network(self) -> "Network":
        hp = self.hp
        backbone: Any = create_for_any_size(hp.backbone, self.backbone_arguments)
        with warnings.catch_warnings():
            # The old weight norm keeps the parameters' names those of the original code.
            warnings.filterwarnings("ignore", ".*weight_norm.* is deprecated", FutureWarning)
            head = DINOProjectionHead(
                backbone.head_hidden_size,
                hp.hidden_dim,
                hp.bottleneck_dim,
                hp.out_dim,
                freeze_last_layer=hp.freeze_last_layer_epochs,
                norm_last_layer=hp.norm_last_layer,
            )
        return Network(backbone, head)

    def forward(self, images: Tensor) -> Tensor:
        """The teacher's features [B, D] of normalised images [B, 3, H, W]."""
        features: Tensor = self.backbone(images)
        return features

    def configure_optimizers(self) -> Optimizer:
        """AdamW; its learning rate and weight decay follow from the step, in `optimizer_step`.

        Raises:
            InputError: a warm-up is longer than the run, or the trainer clips gradients or has weights in
                another precision than float32.
        """
        hp, batch = self.hp, self.global_batch_size()
        self.peak_lr = hp.lr if hp.lr is not None else linear_rule(hp.base_lr, batch, 256)
        announce_learning_rate(self.peak_lr, batch)
        self.steps, self.warmup = self.optimizer_steps(), self.warmup_steps(hp.warmup_epochs)
        epochs = self.trainer.max_epochs or 0
        if 0 < epochs < hp.warmup_teacher_temp_epochs:
            raise InputError(
                f"model.warmup_teacher_temp_epochs ({hp.warmup_teacher_temp_epochs}) is more than "
                f"trainer.max_epochs ({epochs})"
            )
        if self.trainer.gradient_clip_val:
            raise InputError(
                f"trainer.gradient_clip_val ({self.trainer.gradient_clip_val}) clips by the global norm, "
                "DINO by each parameter's: use model.clip_grad"
            )
        if self.trainer.precision not in PRECISIONS:
            raise InputError(
                f"trainer.precision ({self.trainer.precision}): DINO's weights are float32, since half "
                "precision rounds away what the teacher takes from the student: use bf16-mixed"
            )
        trained = [parameter for parameter in self.student.parameters() if parameter.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trained if p.ndim > 1]},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return AdamW(groups, lr=self.peak_lr, weight_decay=hp.weight_decay)

    def on_fit_start(self) -> None:
        """See that the model takes views of both sizes.

        Raises:
            InputError: it does not.
        """
        super().on_fit_start()
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, MultiViewData):
            for option, size in (("global_size", data.views.sizes[0]), ("local_size", data.views.sizes[-1])):
                advice = (
                    f"set data.views.{option} to one that it takes, or choose a model.backbone that takes "
                    "any, as vit_… and locatvit_… do"
                )
                check_size(self.backbone, size, self.device, advice=advice, name=self.hp.backbone)

    def schedule(self, step: int) -> Schedule:
        """Learning rate, weight decay and the teacher's momentum of an optimizer step, from 0 on."""
        hp, steps = self.hp, self.steps
        return Schedule(
            warmup_then_cosine(step, steps=steps, warmup=self.warmup, peak=self.peak_lr, end=hp.min_lr),
            cosine(step, steps=steps, start=hp.weight_decay, end=hp.weight_decay_end),
            cosine(step, steps=steps, start=hp.momentum, end=1.0),
        )

    def teacher_temperature(self, epoch: int) -> float:
        """Temperature of the teacher's distribution in an epoch, from 0 on."""
        hp = self.hp
        return linear_warmup(
            epoch,
            warmup=hp.warmup_teacher_temp_epochs,
            start=hp.warmup_teacher_temp,
            end=hp.teacher_temp,
        )

    def training_step(self, batch: ViewBatch, batch_idx: int) -> Tensor:
        """Cross-entropy between the teacher's distribution of a global view and the student's of each other.

        Raises:
            InputError: a loss since the last look was not finite (see `_has_to_look`).
        """
        views = [each.crops for each in batch.views]
        with torch.no_grad():
            features, taught = self.teacher(views[:1])
        _, learnt = self.student(views)
        temperature = self.teacher_temperature(self.current_epoch)
        with torch.autocast(self.device.type, enabled=False):
            loss: Tensor = self.loss(taught, learnt, teacher_temp=temperature)
            entropy = self.loss.teacher_entropy(taught, temperature)
        divergence = loss.detach() - entropy
        self._losses.append((self.global_step, loss.detach()))
        if self._has_to_look(batch_idx):
            self._stop_unless_finite()
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and batch_idx % every == 0:  # seldom, for it waits for the device
            of_mean = self.loss.entropy_of_mean(taught, temperature)
            self._warn_of_collapse(entropy.item(), of_mean.item(), divergence.item())
        if every and (self.global_step + 1) % every == 0:  # when it is written: singular values wait, too
            self.log("train/effective_rank", effective_rank(features))
        self._accumulated.append(torch.stack([loss.detach(), entropy]))
        mean_loss, mean_entropy = torch.stack(self._accumulated).mean(0)
        self.log("train/loss", mean_loss, prog_bar=True)
        self.log_dict(
            {
                "train/teacher_entropy": mean_entropy,
                "train/kl": mean_loss - mean_entropy,
                "train/centre_norm": self.loss.center.norm(),
                "train/feature_std": F.normalize(features.float(), dim=-1).std(0).mean(),
                "train/teacher_temp": temperature,
                "train/momentum": self.schedule(self.global_step).momentum,
                "train/last_layer_frozen": float(self.current_epoch < self.hp.freeze_last_layer_epochs),
            }
        )
        return loss

    def networks(self) -> dict[str, nn.Module]:
        """Return the backbones of student and teacher."""
        return {"student": self.student.backbone, "teacher": self.teacher.backbone}

    def input_pictures(self, batch: ViewBatch, side: int) -> dict[str, Figure]:
        """Draw the views of the first images of a batch."""
        return {"crops": views_figure([each.crops[:, :4] for each in batch.views], side=side)}

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Nothing: without labels there is nothing to measure, but callbacks look at the images."""

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip each parameter's gradient by its own norm; then drop those of a last layer that is frozen.

        Dropped, not zeroed: AdamW would still decay the weights. `train/grad_norm` is the norm of all before.
        """
        gradients = [p.grad for p in self.student.parameters() if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients))
        if self.hp.clip_grad is not None:
            torch._foreach_mul_(gradients, (self.hp.clip_grad / (norms + 1e-6)).clamp(max=1).unbind())
        self.log("train/grad_norm", norms.norm())
        self.student.head.cancel_last_layer_gradients(self.current_epoch)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Take a step with that step's learning rate and weight decay; then teacher and centre follow."""
        lr, weight_decay, momentum = self.schedule(self.global_step)
        matrices, others = optimizer.param_groups
        matrices["lr"] = others["lr"] = lr
        matrices["weight_decay"] = weight_decay
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self._accumulated.clear()
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.teacher.parameters()), list(self.student.parameters()), 1 - momentum
            )
        self.loss.move_center()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See that the weights are worth keeping, before a file is touched.

        Raises:
            InputError: a loss or a weight is not finite.
        """
        super().on_save_checkpoint(checkpoint)
        self._stop_unless_finite()
        largest = torch.stack(torch._foreach_norm([p.detach() for p in self.parameters()], math.inf))
        if not largest.isfinite().all():
            self._stop("a weight is not finite", self.global_step)

    def _has_to_look(self, batch_idx: int) -> bool:
        """Whether to look at the losses now: on a CPU always, else seldom, for a look waits for the device.

        At the last step there is a look, and before any checkpoint (`on_save_checkpoint`).
        """
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        last = self.trainer.is_last_batch or self.global_step + 1 == self.steps
        return self.device.type == "cpu" or last or (every > 0 and batch_idx % every == 0)

    def _stop_unless_finite(self) -> None:
        """Stop if a mean of all processes' losses is not finite, so that all of them stop."""
        if not self._losses:
            return
        steps, losses = zip(*self._losses, strict=True)
        self._losses.clear()
        means = torch.stack(losses)
        # A run cut off has its own processes' losses only: the others may be anywhere.
        if self.trainer.state.status != TrainerStatus.INTERRUPTED:
            means = self.trainer.strategy.reduce(means, reduce_op="mean")
        for step, loss in zip(steps, means.tolist(), strict=True):
            if not math.isfinite(loss):
                self._stop(f"the loss is {loss}", step)

    def _stop(self, reason: str, step: int) -> NoReturn:
        last = ""
        for callback in self.trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                callback.save_on_exception = False  # the weights may be spoilt already
                written = (callback.last_model_path, callback.best_model_path, *callback.best_k_models)
                # One that was about to be written has its name, but no file.
                last = next((path for path in written if path and get_filesystem(path).exists(path)), last)
        raise InputError(
            f"{reason} at optimizer step {step} (epoch {self.current_epoch}): lower model.lr (its peak is "
            f"{self.peak_lr:.3g}), lengthen model.warmup_epochs, or train with trainer.precision 32-true; "
            f"last good checkpoint: {last or 'none yet'}"
        )

    def _warn_of_collapse(self, entropy: float, of_mean: float, divergence: float) -> None:
        """Say in words that the training has collapsed, once.

        Args:
            entropy: of the teacher's distributions, their mean.
            of_mean: entropy of the mean of these distributions, which is no less.
            divergence: of the student's distributions from the teacher's.
        """
        most = math.log(self.hp.out_dim)
        collapse = ""
        if entropy > (1 - COLLAPSED) * most and abs(divergence) < COLLAPSED * most:
            collapse = "uniform: the teacher finds every prototype equally likely and the student agrees"
            advice = "lower model.teacher_temp"
        elif of_mean < COLLAPSED * most:
            collapse = "constant: the teacher is certain of a single prototype, whatever the image"
            advice = "raise model.teacher_temp, or lower model.center_momentum or model.lr"
        if collapse and collapse != self.collapse:
            rank_zero_warn(
                f"DINO has collapsed at step {self.global_step}, {collapse} (teacher entropy {entropy:.3g}, "
                f"at most {most:.3g}; KL {divergence:.3g}). If it stays so, nothing more is learnt: {advice}"
            )
        self.collapse = collapse


class Network(nn.Module):
    """A backbone with DINO's projection head.

    Args:
        backbone: maps images [B, 3, H, W] to features [B, D].
        head: maps features [B, D] to logits [B, out_dim].
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head: Any = head

    def forward(self, views: Iterable[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Features and logits of views, those of one size in one batch.

        Args:
            views: of each size, [V, B, 3, H, W].

        Returns:
            [views · B, D], and of each view [B, out_dim], float32.
        """
        views = list(views)
        features = torch.cat([self.backbone(each.flatten(0, 1)) for each in views])
        # Logits in bfloat16, divided by the temperature, would be off by a tenth.
        with torch.autocast(features.device.type, enabled=False):
            logits = self.head(features.float())
        return features, list(logits.split(views[0].shape[1]))


class Loss(DINOLoss):
    """lightly's `DINOLoss`, whose centre moves when it is told to.

    lightly moves it in every forward pass, so more than once an optimizer step under accumulation, and with a
    collective also where there is just one process.
    """

    def __init__(self, out_dim: int, **options: Any) -> None:
        super().__init__(out_dim, warmup_teacher_temp_epochs=0, **options)
        # No buffers: DDP would overwrite them with those of the first process.
        self._sum: Tensor | None = None
        self._count = 0

    @torch.no_grad()
    def update_center(self, teacher_out: Tensor) -> None:
        """Take note of logits [V, B, out_dim], at the end of each forward pass in training."""
        if not self.training:
            return
        summed = teacher_out.float().sum((0, 1))
        self._sum = summed if self._sum is None else self._sum + summed
        self._count += teacher_out.shape[0] * teacher_out.shape[1]

    @torch.no_grad()
    def move_center(self) -> None:
        """Move the centre towards the mean of what was noted since the last time, in all processes."""
        if self._sum is None:
            return
        mean = self._sum / self._count
        if distributed():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        self.center.mul_(self.center_momentum).add_(mean, alpha=1 - self.center_momentum)
        self._sum, self._count = None, 0

    @torch.no_grad()
    def teacher_entropy(self, teacher_out: list[Tensor], temperature: float) -> Tensor:
        """Mean entropy of the teacher's distributions, in nats; the rest of the loss is the mean KL.

        Args:
            teacher_out: of each view [B, out_dim].
            temperature: of the teacher.
        """
        log_p = self._log_probabilities(teacher_out, temperature)
        return -(log_p.exp() * log_p).sum(-1).mean()

    @torch.no_grad()
    def entropy_of_mean(self, teacher_out: list[Tensor], temperature: float) -> Tensor:
        """Entropy of the mean of the teacher's distributions, in nats; low only if all images have the same.

        Args:
            teacher_out: of each view [B, out_dim].
            temperature: of the teacher.
        """
        mean = self._log_probabilities(teacher_out, temperature).exp().mean((0, 1))
        entropy: Tensor = torch.special.entr(mean).sum()
        return entropy

    def _log_probabilities(self, teacher_out: list[Tensor], temperature: float) -> Tensor:
        """[views, B, out_dim]."""
        log_p: Tensor = ((torch.stack(teacher_out) - self.center) / temperature).log_softmax(-1)
        return log_p
