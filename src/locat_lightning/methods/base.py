"""What every pre-training has: a loss of views, schedules by step, clipping, and a watch over the numbers."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from jsonargparse.typing import NonNegativeFloat, OpenUnitInterval, PositiveFloat
from lightning.pytorch import Trainer
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer

from locat_lightning.backbones.channelvit import ChannelViT
from locat_lightning.backbones.create import create_for_any_size, noted_arguments
from locat_lightning.backbones.locate import architecture_of
from locat_lightning.backbones.weights import RANDOM, load_weights
from locat_lightning.data.views import ViewBatch
from locat_lightning.errors import InputError
from locat_lightning.evaluation.features import check_size
from locat_lightning.figures.views import views_figure
from locat_lightning.schedules import cosine, warmup_then_cosine
from locat_lightning.tasks.base import announce_size
from locat_lightning.tasks.channels import agree_on_channels, tell_channels
from locat_lightning.tasks.sharding import clip, norms
from locat_lightning.tasks.sharpness import SharpnessAware


class Output(NamedTuple):
    """What a method makes of a batch.

    Attributes:
        loss: scalar, float32.
        scalars: what is logged beside it as `train/NAME`; tensors are averaged over accumulated batches.
        features: [N, D], of the images, whose spread is logged.
    """

    loss: Tensor
    scalars: Mapping[str, Tensor | float]
    features: Tensor


class Group(NamedTuple):
    """Parameters that the optimizer treats alike.

    Attributes:
        parameters: some of those that are trained.
        decays: whether they have weight decay.
        lr_scale: what the learning rate is multiplied by.
        frozen_epochs: first epochs in which it is 0.
    """

    parameters: list[nn.Parameter]
    decays: bool
    lr_scale: float = 1.0
    frozen_epochs: int = 0


class Pretraining(SharpnessAware):
    """Train a timm model on views of images, without labels. A method says how: `build` and `compute_loss`.

    The backbone that callbacks and evaluation see is `backbone`.

    Args:
        backbone: timm's name of the model: `locatvit_small`, `vit_small_patch16_224`, …
        backbone_args: further arguments of the model, as in `timm.create_model`.
        locat: puts LocAt into a model that has none: arguments of `locat_lightning.add_locat`, for example
            `{start: identity}`, with which a pretrained model begins as it is.
        lr: peak learning rate; null takes base_lr · global batch / 256.
        base_lr: learning rate at 256 images a step.
        min_lr: learning rate at the end of the cosine.
        warmup_epochs: epochs of linear warm-up.
        weight_decay: weight decay of matrices at the beginning; biases and 1-d parameters have none.
        weight_decay_end: weight decay at the end, along a cosine.
        betas: decay of AdamW's two averages.
        clip_grad: largest norm of a gradient (see `clipped_together`); null does not clip.
        options: `sam`, and those of every task (`SharpnessAware`, `Task`).
    """

    def __init__(
        self,
        backbone: str = "locatvit_small",
        *,
        backbone_args: dict[str, Any] | None = None,
        locat: dict[str, Any] | None = None,
        lr: NonNegativeFloat | None = None,
        base_lr: NonNegativeFloat = 5e-4,
        min_lr: NonNegativeFloat = 1e-6,
        warmup_epochs: NonNegativeFloat = 10,
        weight_decay: NonNegativeFloat = 0.04,
        weight_decay_end: NonNegativeFloat = 0.4,
        betas: tuple[OpenUnitInterval, OpenUnitInterval] = (0.9, 0.999),
        clip_grad: PositiveFloat | None = 3.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._accumulated: list[Tensor] = []  # scalars of the batches of this step so far

    by_channel: ClassVar[bool] = False  # whether its backbone may have tokens of each channel

    def build(self, make_backbone: Callable[[], Any]) -> None:
        """Build the networks as attributes, so that `backbone` is one of them.

        `make_backbone` makes one with random weights; `start` gives it those of the options.
        """
        raise NotImplementedError

    def compute_loss(self, batch: ViewBatch) -> Output:
        """Compute loss, scalars and features of a batch."""
        raise NotImplementedError

    def check(self, trainer: Trainer, *, training: bool) -> None:
        if not training:
            raise InputError(
                f"{type(self).__name__} trains without classes, so there is nothing to predict or compare: "
                "measure its features with locat knn, linear or retrieve"
            )
        if self.hp.get("heads") and self.weights in (None, RANDOM) and not self.resumed:
            raise InputError("model.heads: --weights says where the heads are: give a checkpoint")
        super().check(trainer, training=training)

    def configure_model(self) -> None:
        if not hasattr(self, "backbone"):
            agree_on_channels(self)
            self.build(partial(create_for_any_size, self.hp.backbone, noted_arguments(self.hp)))
            tell_channels(self, *self.networks().values())
            if not self.by_channel and isinstance(self.backbone, ChannelViT):
                raise InputError(
                    f"{type(self).__name__} needs a token for each place, and {self.hp.backbone} has one for "
                    "each channel: use Dino or Distillation, or another backbone (with data.channels)"
                )

    def start(self, backbone: nn.Module) -> None:
        """Give a new backbone the weights of the options, if there are any."""
        announce_size(self.hp.backbone, backbone)
        if self.weights is not None:
            load_weights(backbone, self.weights, warm_start=True)

    def configure_optimizers(self) -> Optimizer:
        """Return AdamW over `parameter_groups`."""
        peak = self.peak_learning_rate()
        self.optimizer_steps()  # for `rates`
        self.warmup = self.warmup_steps(self.hp.warmup_epochs)
        if self.trainer.gradient_clip_val:
            raise InputError(
                f"trainer.gradient_clip_val ({self.trainer.gradient_clip_val}) clips by the global norm, but "
                f"{type(self).__name__} clips parameters by themselves: use model.clip_grad"
            )
        if self.trainer.precision not in ("32-true", "bf16-mixed", "16-mixed"):
            raise InputError(
                f"trainer.precision ({self.trainer.precision}): small steps need float32 weights, which half "
                "precision rounds away: use bf16-mixed"
            )
        self._groups = self.parameter_groups()
        decay = self.hp.weight_decay
        groups = [{"params": g.parameters, "weight_decay": decay if g.decays else 0.0} for g in self._groups]
        return AdamW(groups, lr=peak, betas=self.hp.betas, fused=self.fused)

    def parameter_groups(self) -> list[Group]:
        """Return the optimizer's groups: matrices, which decay, and the other parameters."""
        trained = [parameter for parameter in self.trained() if parameter.requires_grad]
        return [
            Group([p for p in trained if p.ndim > 1], decays=True),
            Group([p for p in trained if p.ndim <= 1], decays=False),
        ]

    def rates(self, step: int) -> tuple[float, float]:
        """Return learning rate and weight decay of an optimizer step, from 0 on."""
        hp, steps = self.hp, self.steps
        lr = warmup_then_cosine(step, steps=steps, warmup=self.warmup, peak=self.peak_lr, end=hp.min_lr)
        return lr, cosine(step, steps=steps, start=hp.weight_decay, end=hp.weight_decay_end)

    def set_rates(self, groups: list[dict[str, Any]]) -> None:
        lr, weight_decay = self.rates(self.step)
        for group, own in zip(groups, self._groups, strict=True):
            group["lr"] = 0.0 if self.current_epoch < own.frozen_epochs else lr * own.lr_scale
            if own.decays:
                group["weight_decay"] = weight_decay

    def on_fit_start(self) -> None:
        super().on_fit_start()
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        views = getattr(data, "views", None)
        sizes = dict.fromkeys(getattr(views, "sizes", ()))
        options = [*zip(("global_size", "local_size"), sizes, strict=False)]
        options += [
            ("mixed_sizes", side) for mixed in getattr(views, "mixed_sizes", ()) or () for side in mixed[:2]
        ]
        for option, size in options:
            advice = (
                f"set data.views.{option} to one that it takes, or choose a model that takes any, as "
                "vit_… and locatvit_… do"
            )
            for network in self.networks().values():
                check_size(network, size, self.device, advice=advice, name=architecture_of(network))

    def training_step(self, batch: ViewBatch, batch_idx: int) -> Tensor:
        """Return the method's loss, and log it with its scalars and how far features are spread."""
        output, trained_with = self.sharpened(partial(self.compute_loss, batch))
        loss = output.loss.detach()
        spread = F.normalize(output.features.float(), dim=-1).std(0).mean()
        scalars = {"loss": loss, "feature_std": spread, **output.scalars}
        tensors = {name: value for name, value in scalars.items() if isinstance(value, Tensor)}
        self._accumulated.append(torch.stack(list(tensors.values())))
        means = dict(zip(tensors, torch.stack(self._accumulated).mean(0).unbind(), strict=True))
        for name, value in (scalars | means).items():
            self.log(f"train/{name}", value)
        return trained_with

    def input_pictures(self, batch: ViewBatch, side: int) -> dict[str, Figure]:
        views = [each.crops[:, :4] for each in batch.views]
        return {"crops": views_figure(views, self.of_data("normalisation"), side=side)}

    def configure_gradient_clipping(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        """Clip gradients by the norms of `clipped_together`; `train/grad_norm` is the norm of all before."""
        together = [[p.grad for p in part if p.grad is not None] for part in self.clipped_together()]
        gradients = [gradient for part in together for gradient in part]
        own = norms(gradients)
        self.log("train/grad_norm", own.norm())
        if self.hp.clip_grad is None:
            return
        sizes = [len(part) for part in together]
        if max(sizes) > 1:
            own = torch.cat([part.norm().expand(len(part)) for part in own.split(sizes)])
        clip(gradients, own, self.hp.clip_grad)

    def clipped_together(self) -> Iterable[list[nn.Parameter]]:
        """Return the parameters whose gradients are clipped by their common norm: each by its own."""
        return ([parameter] for parameter in self.trained())

    def after_step(self, step: int) -> None:
        self._accumulated.clear()


def features(backbone: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return [CLS] [N, D] as a classifier reads it, and patch features [N, C, h, w] after the final norm."""
    final, [patches] = backbone.forward_intermediates(images, indices=1, norm=True, output_fmt="NCHW")
    return backbone.forward_head(final, pre_logits=True), patches


def widths(backbone: Any) -> tuple[int, int]:
    """Return the widths of `features`."""
    return backbone.head_hidden_size, backbone.feature_info[-1]["num_chs"]


def freeze_pooling(backbone: nn.Module) -> None:
    """Freeze what follows the final norm, where the loss does not see it: DDP would wait for gradients."""
    for name in ("attn_pool", "fc_norm", "head"):
        if isinstance(part := getattr(backbone, name, None), nn.Module):
            part.requires_grad_(False)
