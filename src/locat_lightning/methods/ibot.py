"""iBOT: beside DINO's loss, the student predicts the teacher's patches where it sees a mask."""

import copy
from typing import Any, Literal, NamedTuple

import torch
from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from locat_lightning.data.views import ViewBatch
from locat_lightning.errors import InputError
from locat_lightning.methods.base import Output
from locat_lightning.methods.self_distillation import Network, SelfDistillation
from locat_lightning.methods.targets import Centering, Targets, cross_view_loss, masked_patch_loss
from locat_lightning.nn import MaskToken, PatchRefinement
from locat_lightning.schedules import linear_warmup

CHUNK = 8192  # patches whose prototypes are averaged at once


class Tokens(NamedTuple):
    """What a backbone makes of R images: `cls` [R, D] as a classifier reads it, `patches` [R, n, D]."""

    cls: Tensor
    patches: Tensor


class MaskedNetwork(Network):
    """A backbone whose patches can be masked, with a projection head for [CLS] and one for patches.

    A learned token takes the place of a masked patch before positions are added.

    Args:
        backbone: a Vision Transformer of timm.
        head: of [CLS].
        patch_head: of patches; null shares `head`.
    """

    def __init__(self, backbone: Any, head: nn.Module, patch_head: nn.Module | None) -> None:
        super().__init__(backbone, head)
        self.patch_head: Any = patch_head
        self.mask_token = MaskToken(backbone.embed_dim)
        backbone.patch_embed.register_forward_hook(self.mask_token)

    @property
    def heads(self) -> list[Any]:
        return [self.head] if self.patch_head is None else [self.head, self.patch_head]

    def forward(  # type: ignore[override]
        self, images: Tensor, masks: Tensor | None = None, *, refined: bool = False
    ) -> Tokens:
        """Return the final-normed tokens of images [R, 3, H, W], of which masks bool [R, n] hide patches.

        `refined` returns the patches as PRR refines them.
        """
        backbone: Any = self.backbone
        self.mask_token.hidden = masks
        try:
            tokens = backbone.forward_features(images)
        finally:
            self.mask_token.hidden = None
        cls = backbone.forward_head(tokens, pre_logits=True)
        if refined:
            tokens = of_all_rows(backbone.attn_pool)(tokens)
        return Tokens(cls, tokens[:, backbone.num_prefix_tokens :])

    def patch_logits(self, patches: Tensor) -> Tensor:
        """Return the logits [M, K] of patches [M, D], float32."""
        logits: Tensor = self.heads[-1](patches.float())
        return logits

    @torch.no_grad()
    def total_patch_logits(self, patches: Tensor) -> Tensor:
        """Return the sum [K] of the logits of patches [R, n, D].

        The last layer is linear, so it needs to see no more than the sum of what it is given.
        """
        head = self.heads[-1]
        chunks = patches.flatten(0, 1).split(CHUNK)
        bottlenecks = (F.normalize(head.layers(each.float()), dim=-1) for each in chunks)
        total: Tensor = head.last_layer(sum(each.sum(0, keepdim=True) for each in bottlenecks))
        return total[0]


def of_all_rows(refinement: PatchRefinement) -> PatchRefinement:
    """Return a PRR that shares a model's parameters and refines all tokens, not only what it pools."""
    whole = copy.copy(refinement)
    whole.pool, whole.rows = "", slice(None)
    return whole


class Ibot(SelfDistillation):
    """Train a timm model on images without labels, by self-distillation of [CLS] and of masked patches.

    [CLS] learns as in DINO. The student sees its global views with blocks of patches masked, and predicts
    there what the teacher, which sees all, makes of these patches. The views come from `MaskedMultiCrop`.
    Only masked patches go through the prototypes.

    The defaults are those of "iBOT: Image BERT Pre-Training with Online Tokenizer" (ICLR 2022) for ViT-S.

    Args:
        backbone: timm's name of the model, a Vision Transformer; drop path applies to the student only.
        cls_weight: weight of the loss of [CLS].
        patch_weight: weight of the loss of the masked patches.
        out_dim: number of prototypes.
        norm_last_layer: whether the prototypes keep length 1, which is more stable.
        shared_head: whether patches have the projection head of [CLS], instead of one of their own.
        patch_out_dim: prototypes of the patches' own head; null for as many as `out_dim`.
        patch_bottleneck_dim: its width before the prototypes; null for `bottleneck_dim`.
        patch_targets: what of the teacher's patches the student predicts: `normed`, the tokens after the
            final norm, or `refined`, what PRR makes of all of these, with the neighbourhood in them.
        centering: how the teacher's logits become distributions: `centering` or `sinkhorn_knopp`.
        patch_center_of: which of the teacher's patches move the patches' centre: `all`, or those `masked`.
        teacher_temp: temperature of the teacher's distribution of [CLS].
        warmup_teacher_temp_epochs: epochs of linear change of both temperatures; 0 for none.
        teacher_patch_temp: temperature of the teacher's distribution of patches.
        warmup_teacher_patch_temp: the same in the first epoch.
        options: those of every self-distillation (`SelfDistillation`).
    """

    student: MaskedNetwork
    teacher: MaskedNetwork

    def __init__(
        self,
        backbone: str = "locatvit_small",
        *,
        cls_weight: NonNegativeFloat = 1.0,
        patch_weight: NonNegativeFloat = 1.0,
        out_dim: PositiveInt = 8192,
        norm_last_layer: bool = False,
        shared_head: bool = True,
        patch_out_dim: PositiveInt | None = None,
        patch_bottleneck_dim: PositiveInt | None = None,
        patch_targets: Literal["normed", "refined"] = "normed",
        centering: Centering = "centering",
        patch_center_of: Literal["all", "masked"] = "all",
        teacher_temp: PositiveFloat = 0.07,
        warmup_teacher_temp_epochs: NonNegativeInt = 30,
        teacher_patch_temp: PositiveFloat = 0.07,
        warmup_teacher_patch_temp: PositiveFloat = 0.04,
        center_momentum: ClosedUnitInterval = 0.9,
        **options: Any,
    ) -> None:
        super().__init__(
            backbone,
            out_dim=out_dim,
            norm_last_layer=norm_last_layer,
            teacher_temp=teacher_temp,
            warmup_teacher_temp_epochs=warmup_teacher_temp_epochs,
            center_momentum=center_momentum,
            **options,
        )
        self.cls_targets = Targets(out_dim, centering, center_momentum)
        of_patches = out_dim if shared_head or patch_out_dim is None else patch_out_dim
        self.patch_targets = Targets(of_patches, centering, center_momentum)

    def check(self, trainer: Trainer, *, training: bool) -> None:
        super().check(trainer, training=training)
        hp = self.hp
        if hp.shared_head and (hp.patch_out_dim, hp.patch_bottleneck_dim) != (None, None):
            raise InputError(
                "model.patch_out_dim and model.patch_bottleneck_dim are of a head for patches alone: set "
                "model.shared_head false"
            )

    def make_network(self, backbone: Any) -> MaskedNetwork:
        name, hp = self.hp.backbone, self.hp
        if not hasattr(backbone, "num_prefix_tokens") or not hasattr(backbone.patch_embed, "grid_size"):
            raise InputError(f"model.backbone: {name} has no patches to mask: choose a vit_… or locatvit_…")
        if hp.patch_targets == "refined" and not isinstance(
            getattr(backbone, "attn_pool", None), PatchRefinement
        ):
            raise InputError(f"model.patch_targets: {name} has no PRR to refine patches: use normed")
        pooled, width = backbone.head_hidden_size, backbone.embed_dim
        if hp.shared_head and pooled != width:
            raise InputError(
                f"model.shared_head: [CLS] of {name} is {pooled} wide and its patches are {width}: use false"
            )
        own = None
        if not hp.shared_head:
            own = self.make_head(
                width,
                output_dim=hp.patch_out_dim or hp.out_dim,
                bottleneck_dim=hp.patch_bottleneck_dim or hp.bottleneck_dim,
            )
        return MaskedNetwork(backbone, self.make_head(pooled), own)

    def patch_temperature(self, epoch: int) -> float:
        """Return the temperature of the teacher's distribution of patches in an epoch, from 0 on."""
        hp = self.hp
        start, end = hp.warmup_teacher_patch_temp, hp.teacher_patch_temp
        return linear_warmup(epoch, warmup=hp.warmup_teacher_temp_epochs, start=start, end=end)

    def temperatures(self) -> tuple[float, float]:
        """Return the temperatures of the teacher's distributions of [CLS] and of patches in this step."""
        return self.teacher_temperature(self.current_epoch), self.patch_temperature(self.current_epoch)

    def compute_loss(self, batch: ViewBatch) -> Output:
        """Compute the losses of [CLS] and of the masked patches."""
        crops = batch.views[0].crops
        masks, indices = self.masks_of(batch)
        images = crops.flatten(0, 1)
        with torch.no_grad():
            taught = self.teacher(images, refined=self.hp.patch_targets == "refined")
        seen = self.student(images, masks)
        of_locals = [self.student(each.crops.flatten(0, 1)).cls for each in batch.views[1:]]
        with torch.autocast(self.device.type, enabled=False):
            loss, scalars = self.losses(taught, seen, of_locals, masks, indices)
        for name, (weight, term) in self.further_terms(batch, seen).items():
            loss = loss + weight * term
            scalars[name] = term.detach()
        return Output(loss, scalars, taught.cls)

    def losses(
        self, taught: Tokens, seen: Tokens, of_locals: list[Tensor], masks: Tensor, indices: Tensor
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Return the weighted sum of both losses, and what is logged.

        Args:
            taught: what the teacher makes of the global views, R = 2 B.
            seen: what the student makes of them, masked.
            of_locals: what the student makes of the local views, [V · B, D] for each size.
            masks: bool [R, n].
            indices: int64 [M], the masked patches in the flattened masks.
        """
        hp, views = self.hp, (2, len(masks) // 2)
        temperature, patch_temperature = self.temperatures()

        taught_logits = self.teacher.head(taught.cls.float())
        p = self.cls_targets(taught_logits, temperature)
        logits = self.student.head(torch.cat([seen.cls, *of_locals]).float())
        cls_loss = cross_view_loss(
            p.unflatten(0, views), logits.unflatten(0, (-1, views[1])), hp.student_temp
        )

        taught_patches = self.teacher.patch_logits(taught.patches.flatten(0, 1)[indices])
        patch_p = self.patch_targets(taught_patches, patch_temperature)
        patch_logits = self.student.patch_logits(seen.patches.flatten(0, 1)[indices]) / hp.student_temp
        weights = (1 / masks.sum(1, keepdim=True).clamp(min=1)).expand(masks.shape).flatten()[indices]
        patch_loss = masked_patch_loss(patch_p, patch_logits, weights, len(masks))

        if hp.centering == "centering":
            self.cls_targets.add_to_center(taught_logits.sum(0), len(taught_logits))
            if hp.patch_center_of == "masked":
                self.patch_targets.add_to_center(taught_patches.sum(0), len(taught_patches))
            else:
                self.patch_targets.add_to_center(
                    self.teacher.total_patch_logits(taught.patches), masks.numel()
                )
        entropy = torch.special.entr(p).sum(-1).mean()
        divergence = cls_loss.detach() - entropy
        self.watch_for_collapse(p, entropy, divergence)
        scalars: dict[str, Tensor | float] = {
            "cls_loss": cls_loss.detach(),
            "patch_loss": patch_loss.detach(),
            "teacher_entropy": entropy,
            "kl": divergence,
            "masked": masks.float().mean(),
            "teacher_temp": temperature,
            "teacher_patch_temp": patch_temperature,
            "momentum": self.momentum(self.step),
            "last_layer_frozen": float(self.current_epoch < hp.freeze_last_layer_epochs),
        }
        if self.is_logged():
            of_each = torch.special.entr(patch_p).sum(-1)
            patch_kl = patch_loss.detach() - (weights * of_each).sum() / len(masks)
            self.watch_for_collapse(patch_p, of_each.mean(), patch_kl, "patch", "teacher_patch_temp")
            scalars["prototypes"] = torch.special.entr(p.mean(0)).sum().exp()
            scalars["patch_prototypes"] = torch.special.entr(patch_p.mean(0)).sum().exp()
        return hp.cls_weight * cls_loss + hp.patch_weight * patch_loss, scalars

    def further_terms(self, batch: ViewBatch, seen: Tokens) -> dict[str, tuple[float, Tensor]]:
        """Return further terms of the loss by name, each with its weight."""
        return {}

    def masks_of(self, batch: ViewBatch) -> tuple[Tensor, Tensor]:
        """Return the masks of the global views, bool [R, n], and the positions of masked patches in them."""
        if batch.masks is None:
            raise InputError(
                f"{type(self).__name__} needs views with masks: set data.views.class_path MaskedMultiCrop"
            )
        masks = batch.masks.flatten(0, 1).flatten(1)
        backbone: Any = self.student.backbone
        grid = backbone.patch_embed.dynamic_feat_size(tuple(batch.views[0].crops.shape[-2:]))
        if tuple(batch.masks.shape[-2:]) != tuple(grid):
            raise InputError(
                f"data.views.patch_size: masks are of {list(batch.masks.shape[-2:])} patches, but the model "
                f"has {list(grid)}: set it to the model's patch"
            )
        if (indices := batch.mask_indices) is None:
            indices = masks.flatten().nonzero().flatten()
        return masks, indices

    def after_step(self, step: int) -> None:
        super().after_step(step)
        self.cls_targets.move_center()
        self.patch_targets.move_center()
