"""DINOv2: iBOT with features spread out by KoLeo, and DINOv3's Gram anchoring of patches."""

import re
from collections.abc import Callable, Iterable
from itertools import groupby
from math import isqrt
from typing import Any, Literal

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveInt
from lightly.loss import KoLeoLoss
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from locat_lightning.backbones.sample_drop import drop_samples
from locat_lightning.backbones.weights import check_source, load_weights
from locat_lightning.data.views import ViewBatch
from locat_lightning.errors import InputError
from locat_lightning.methods.base import Group
from locat_lightning.methods.ibot import Ibot, Tokens
from locat_lightning.methods.self_distillation import without_drop_path
from locat_lightning.schedules import cosine, linear_warmup, square_root_rule


class Dinov2(Ibot):
    """Train a timm model on images without labels, as DINOv2 does: iBOT with KoLeo and other schedules.

    The defaults are those of "DINOv2: Learning Robust Visual Features without Supervision" (2023), its short
    recipe for ViT-L/16. Its longer ones have heads of their own for patches and Sinkhorn-Knopp.

    Gram anchoring (DINOv3) keeps the cosines between the patches of an image near those of an earlier model,
    the Gram teacher. With `data.views.undistorted_size` that sees larger views, and its patch features are
    resampled.

    Args:
        backbone: timm's name of the model, a Vision Transformer.
        base_lr: learning rate at 1,024 images a step; it grows with the square root of these.
        momentum: the teacher's share of itself in an update at the beginning.
        koleo_weight: weight of KoLeo, which keeps the [CLS] features of the images in a process apart.
        layer_decay: what the learning rate is multiplied by from a block to the one before it.
        patch_embed_lr: what the learning rate of the patch embedding is multiplied by besides.
        sample_drop: share of the images that each branch of the student's blocks leaves out in training.
        gram_weight: weight of Gram anchoring; 0 leaves it out.
        gram_teacher: where the weights of the Gram teacher come from, as for --weights; null takes the moving
            average at `gram_start`.
        gram_start: optimizer step from which Gram anchoring counts.
        gram_warmup: steps in which its weight grows along a cosine.
        gram_updates: steps at which the moving average becomes the Gram teacher.
        options: those of iBOT (`Ibot`), here with DINOv2's defaults.
    """

    def __init__(
        self,
        backbone: str = "locatvit_small",
        *,
        base_lr: NonNegativeFloat = 4e-3,
        momentum: ClosedUnitInterval = 0.992,
        out_dim: PositiveInt = 65536,
        patch_center_of: Literal["all", "masked"] = "masked",
        koleo_weight: NonNegativeFloat = 0.1,
        layer_decay: ClosedUnitInterval = 0.9,
        patch_embed_lr: NonNegativeFloat = 0.2,
        sample_drop: ClosedUnitInterval = 0.3,
        gram_weight: NonNegativeFloat = 0.0,
        gram_teacher: str | None = None,
        gram_start: NonNegativeInt = 0,
        gram_warmup: NonNegativeInt = 0,
        gram_updates: list[int] | None = None,
        **options: Any,
    ) -> None:
        own = {"base_lr": base_lr, "momentum": momentum, "out_dim": out_dim}
        super().__init__(backbone, patch_center_of=patch_center_of, **own, **options)
        self.koleo = KoLeoLoss()

    def check(self, trainer: Trainer, *, training: bool) -> None:
        super().check(trainer, training=training)
        hp = self.hp
        if hp.sample_drop and (hp.backbone_args or {}).get("drop_path_rate"):
            raise InputError("model.sample_drop and model.backbone_args.drop_path_rate: set one of them to 0")
        if hp.gram_teacher is not None and not self.resumed:
            check_source(hp.gram_teacher, "model.gram_teacher")

    def build(self, make_backbone: Callable[[], Any]) -> None:
        super().build(make_backbone)
        hp = self.hp
        if hp.sample_drop:
            try:
                drop_samples(self.student.backbone, hp.sample_drop)
            except ValueError as error:
                raise InputError(
                    f"model.sample_drop: {error}: use 0, and model.backbone_args.drop_path_rate"
                ) from error
        if hp.gram_weight:
            self.gram = without_drop_path(make_backbone()).requires_grad_(False)
            self.gram.load_state_dict(self.backbone.state_dict())
            if hp.gram_teacher is not None and not self.resumed:  # else the checkpoint holds it
                load_weights(self.gram, hp.gram_teacher)

    def make_head(self, width: int, **options: Any) -> nn.Module:
        """Make a head whose last layer is frozen by a learning rate of 0 (`parameter_groups`)."""
        return super().make_head(width, **({"freeze_last_layer": 0} | options))

    def peak_learning_rate(
        self, reference_batch: int = 1024, rule: Callable[[float, int, int], float] = square_root_rule
    ) -> float:
        return super().peak_learning_rate(reference_batch, rule)

    def parameter_groups(self) -> list[Group]:
        """Return groups by layer: their learning rates fall towards the patch embedding."""
        backbone: Any = self.student.backbone
        hp, depth = self.hp, len(backbone.blocks)
        keys = {}
        for name, parameter in self.student.named_parameters():
            scale = hp.layer_decay ** layers_above(name, depth)
            if name.startswith("backbone.patch_embed."):
                scale *= hp.patch_embed_lr
            frozen = hp.freeze_last_layer_epochs if ".last_layer." in name else 0
            keys[parameter] = frozen, -scale, parameter.ndim <= 1
        trained = sorted((p for p in keys if p.requires_grad), key=lambda p: keys[p])
        return [
            Group(list(group), decays=not flat, lr_scale=-scale, frozen_epochs=frozen)
            for (frozen, scale, flat), group in groupby(trained, key=lambda p: keys[p])
        ]

    def clipped_together(self) -> Iterable[list[nn.Parameter]]:
        """Return the backbone's parameters and those of each head."""
        yield [*self.student.backbone.parameters(), *self.student.mask_token.parameters()]
        for head in self.student.heads:
            yield list(head.parameters())

    def temperatures(self) -> tuple[float, float]:
        """Return the temperatures, which change by step instead of by epoch."""
        hp, step = self.hp, self.step
        spans = (
            (hp.warmup_teacher_temp, hp.teacher_temp),
            (hp.warmup_teacher_patch_temp, hp.teacher_patch_temp),
        )
        of_cls, of_patches = (
            linear_warmup(step, warmup=self._temperature_warmup, start=start, end=end) for start, end in spans
        )
        return of_cls, of_patches

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._temperature_warmup = self.in_steps(self.hp.warmup_teacher_temp_epochs)

    def further_terms(self, batch: ViewBatch, seen: Tokens) -> dict[str, tuple[float, Tensor]]:
        """Return KoLeo and Gram anchoring, where they have a weight."""
        terms = {}
        if weight := self.hp.koleo_weight:
            with torch.autocast(self.device.type, enabled=False):
                spread = [self.koleo(view) for view in seen.cls.float().chunk(2)]
            terms["koleo_loss"] = weight, torch.stack(spread).sum()
        if weight := self.weight_of_gram(self.step):
            views = batch.views[0] if batch.undistorted is None else batch.undistorted
            with torch.no_grad():
                anchors: Tensor = self.gram.forward_features(views.crops.flatten(0, 1))  # type: ignore[operator]
            anchors = anchors[:, self.student.backbone.num_prefix_tokens :].float()
            with torch.autocast(self.device.type, enabled=False):
                anchors = resampled(anchors, isqrt(seen.patches.shape[1]))
                terms["gram_loss"] = weight, gram_loss(seen.patches.float(), anchors)
        return terms

    def weight_of_gram(self, step: int) -> float:
        """Return the weight of Gram anchoring in an optimizer step, from 0 on."""
        hp = self.hp
        since = step - hp.gram_start
        if since < 0 or not hp.gram_weight:
            return 0.0
        if since >= hp.gram_warmup:
            return float(hp.gram_weight)
        return cosine(since, steps=hp.gram_warmup, start=0.0, end=hp.gram_weight)

    def after_step(self, step: int) -> None:
        super().after_step(step)
        hp = self.hp
        updates = {*(hp.gram_updates or ()), *([] if hp.gram_teacher else [hp.gram_start])}
        if hp.gram_weight and step + 1 in updates:
            self.gram.load_state_dict(self.backbone.state_dict())


def layers_above(name: str, depth: int) -> int:
    """Return how many layers follow that of a parameter of the student, whose backbone has `depth` blocks.

    The embedding of patches, positions and tokens is the first layer; the last are final norm and heads.
    """
    if (block := re.match(r"backbone\.blocks\.(\d+)\.", name)) is not None:
        return depth - int(block[1])
    embedding = r"(backbone\.)?(mask_token|cls_token|reg_token|pos_embed|patch_embed|norm_pre)\b"
    return depth + 1 if re.match(embedding, name) else 0


def resampled(patches: Tensor, side: int) -> Tensor:
    """Resample patch features [R, n, D] of a square grid to [R, side², D], bicubic, not antialiased."""
    if patches.shape[1] == side**2:
        return patches
    grid = patches.mT.unflatten(-1, (isqrt(patches.shape[1]), -1))
    return F.interpolate(grid, (side, side), mode="bicubic").flatten(2).mT


def gram_loss(patches: Tensor, anchors: Tensor) -> Tensor:
    """Return the mean squared difference of the cosines among the patches of an image, [R, n, D] each.

    Source: "DINOv3" (Siméoni et al. 2025), Gram anchoring.
    """
    own, others = (F.normalize(each, dim=-1) for each in (patches, anchors))
    return F.mse_loss(own @ own.mT, others @ others.mT)
