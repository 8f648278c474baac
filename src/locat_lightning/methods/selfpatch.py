"""SelfPatch: DINO, and each patch learns what its most similar neighbours have in common."""

from functools import partial
from typing import Any

import torch
from jsonargparse.typing import NonNegativeFloat, PositiveInt
from timm.layers import Mlp, trunc_normal_
from timm.models.cait import ClassAttn
from torch import Tensor, nn
from torch.nn import functional as F

from locat_lightning.data.views import ViewBatch
from locat_lightning.errors import InputError
from locat_lightning.methods.base import Output, features, freeze_pooling, widths
from locat_lightning.methods.dino import Dino
from locat_lightning.methods.self_distillation import Network
from locat_lightning.methods.targets import Targets

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


class SelfPatch(Dino):
    """Train a timm model on images without labels, by self-distillation of [CLS] and of patches.

    The loss is DINO's, of a [CLS] token that a head of two class-attention blocks aggregates from the patches
    of a view, plus `patch_weight` times the cross-entropy of patches: in every view, the student's patch
    learns the teacher's aggregate of the most similar of the eight patches around it (grids wrap at their
    edges). The defaults are those of "Patch-level Representation Learning for Self-supervised Vision
    Transformers" (CVPR 2022).

    The paper's backbone has neither [CLS] nor a final norm. The [CLS] of one that has it, as its classifier
    reads it (after PRR), is aggregated with the patches; patches are read after the final norm.

    Args:
        backbone: timm's name of the model; drop path applies to the student only.
        patch_out_dim: number of prototypes of patches.
        patch_weight: weight of the loss of patches.
        neighbours: of how many of its eight neighbours a patch learns the aggregate.
        options: those of `Dino`; its `hidden_dim`, `bottleneck_dim`, temperatures, `center_momentum` and
            frozen last layer hold for both heads.
    """

    student: "SelfPatchNetwork"
    teacher: "SelfPatchNetwork"

    by_channel = False

    def __init__(
        self,
        backbone: str = "locatvit_small",
        *,
        patch_out_dim: PositiveInt = 4096,
        patch_weight: NonNegativeFloat = 0.1,
        neighbours: PositiveInt = 4,
        **options: Any,
    ) -> None:
        super().__init__(backbone, **options)
        self.patch_targets = Targets(patch_out_dim, "centering", self.hp.center_momentum)

    def make_network(self, backbone: Any) -> "SelfPatchNetwork":
        pooled, width = widths(backbone)
        if pooled != width:
            raise InputError(
                f"model.backbone: [CLS] of {self.hp.backbone} is {pooled} wide and its patches are {width}: "
                "choose a model that has both of one width"
            )
        heads = [each.num_heads for each in backbone.modules() if hasattr(each, "num_heads")]
        return SelfPatchNetwork(
            backbone,
            AggregationHead(width, heads[-1] if heads else 1, self.hp.neighbours),
            self.make_head(width),
            self.make_head(width, output_dim=self.hp.patch_out_dim),
        )

    def compute_loss(self, batch: ViewBatch) -> Output:
        """Compute the loss of [CLS], as DINO's, and of the patches of all views."""
        views = [each.crops for each in batch.views]
        with torch.no_grad():
            cls, taught, taught_patches = self.teacher(views, of_neighbours=True)
        _, learnt, learnt_patches = self.student(views)
        global_views = len(views[0])
        cls_loss, scalars = self.compare_views(taught[:global_views], learnt)
        with torch.autocast(self.device.type, enabled=False):
            self.loss.update_center(taught[global_views:])  # the mean is that of all views
            temperature = self.teacher_temperature(self.current_epoch)
            of_patches, entropy = patch_loss(
                self.patch_targets, taught_patches, learnt_patches, temperature, self.hp.student_temp
            )
            if self.is_logged():
                p = self.patch_targets(taught_patches[0].flatten(0, 1), temperature)
                self.watch_for_collapse(p, entropy, of_patches.detach() - entropy, "patch")
        loss = cls_loss + self.hp.patch_weight * of_patches
        scalars |= {
            "cls_loss": cls_loss.detach(),
            "patch_loss": of_patches.detach(),
            "patch_teacher_entropy": entropy,
            "patch_centre_norm": self.patch_targets.center.norm(),
        }
        return Output(loss, scalars, cls[: global_views * len(batch.labels)])

    def after_step(self, step: int) -> None:
        super().after_step(step)
        self.patch_targets.move_center()


class SelfPatchNetwork(Network):
    """A backbone with a head that aggregates [CLS], and projection heads of [CLS] and of patches."""

    def __init__(
        self, backbone: Any, ca_head: "AggregationHead", head: nn.Module, patch_head: nn.Module
    ) -> None:
        super().__init__(backbone, head)
        self.ca_head, self.patch_head = ca_head, patch_head
        self.reads_cls = getattr(backbone, "cls_token", None) is not None
        if not self.reads_cls:
            freeze_pooling(backbone)

    @property
    def heads(self) -> list[Any]:
        return [self.head, self.patch_head]

    def forward(  # type: ignore[override]
        self, views: list[Tensor], *, of_neighbours: bool = False
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return the backbone's features, and the logits of [CLS] and of patches, float32.

        Args:
            views: of each size, [V, B, 3, H, W], which are one batch.
            of_neighbours: patches are the aggregates of their neighbours, not themselves.

        Returns:
            [views · B, D]; [views, B, out_dim]; and of each view [B, patches, patch_out_dim].
        """
        found: list[Tensor] = []
        of_cls: list[Tensor] = []
        of_patches: list[Tensor] = []
        for images in views:
            pooled, maps = features(self.backbone, images.flatten(0, 1))
            patches = maps.flatten(2).mT
            cls = self.ca_head(torch.cat([pooled.unsqueeze(1), patches], 1) if self.reads_cls else patches)
            if of_neighbours:
                height, width = maps.shape[-2:]
                nearest = self.ca_head.nearest(patches, (height, width))
                patches = self.ca_head(nearest.flatten(0, 1)).view_as(patches)
            else:
                patches = self.ca_head.norm(patches)
            # Logits in bfloat16, divided by the temperature, would be off by a tenth.
            with torch.autocast(images.device.type, enabled=False):
                of_cls += self.head(cls.float()).split(images.shape[1])
                of_patches += self.patch_head(patches.float()).split(images.shape[1])
            found.append(pooled)
        return torch.cat(found), torch.stack(of_cls), of_patches


class AggregationHead(nn.Module):
    """Aggregate tokens [N, T, D] into one [N, D], by two class-attention blocks with a learned query."""

    def __init__(self, width: int, num_heads: int, neighbours: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(trunc_normal_(torch.empty(1, 1, width), std=0.02))
        self.cls_blocks = nn.ModuleList(ClassBlock(width, num_heads) for _ in range(2))
        self.norm = LayerNorm(width)
        self.neighbours = neighbours

    def forward(self, tokens: Tensor) -> Tensor:
        cls = self.cls_token.expand(len(tokens), -1, -1)
        for block in self.cls_blocks:
            cls = block(cls, tokens)
        aggregate: Tensor = self.norm(cls).squeeze(1)
        return aggregate

    def nearest(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return of patches [N, P, D] the neighbours with the largest cosine to each, [N, P, k, D]."""
        chosen = self.choose(patches, grid)
        rows = torch.arange(len(patches), device=patches.device)[:, None, None]
        return patches[rows, chosen]

    def choose(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the positions [N, P, k] of those neighbours."""
        around = neighbours(grid, patches.device).expand(len(patches), -1, -1)
        with torch.autocast(patches.device.type, enabled=False):
            unit = F.normalize(patches.float(), dim=-1)
            cosine = (unit @ unit.mT).gather(-1, around)
        best = cosine.topk(min(self.neighbours, around.shape[-1])).indices
        return around.gather(-1, best)


class ClassBlock(nn.Module):
    """A block in which a [CLS] token attends to itself and to other tokens, without layer scale.

    Source: "Going deeper with Image Transformers" (ICCV 2021), class attention.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn = ClassAttn(width, num_heads, qkv_bias=True)
        self.norm2 = LayerNorm(width)
        self.mlp = Mlp(width, 4 * width)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, cls: Tensor, tokens: Tensor) -> Tensor:
        """Update [CLS] [N, 1, D] by tokens [N, T, D]."""
        cls = cls + self.attn(self.norm1(torch.cat([cls, tokens], 1)))
        updated: Tensor = cls + self.mlp(self.norm2(cls))
        return updated


def neighbours(grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Return the positions of the patches around each patch of a grid [H·W, n], ascending.

    The grid wraps at its edges, so that n is 8 unless a side is shorter than 3: each is counted once.

    Raises:
        InputError: the grid has a single patch.
    """
    height, width = grid
    around = {(i % height, j % width) for i in (-1, 0, 1) for j in (-1, 0, 1)} - {(0, 0)}
    if not around:
        raise InputError("SelfPatch needs views of more than one patch: use smaller patches or larger views")
    positions = torch.arange(height * width, device=device).view(height, width)
    shifted = [positions.roll(by, (0, 1)).flatten() for by in around]
    return torch.stack(shifted, -1).sort(-1).values


def patch_loss(
    targets: Targets, taught: list[Tensor], learnt: list[Tensor], teacher_temp: float, student_temp: float
) -> tuple[Tensor, Tensor]:
    """Compare logits [B, patches, K] of each view, at the same places, and note the teacher's for the centre.

    Returns:
        The cross-entropy, of which the teacher's mean entropy is the second: the mean over views of the mean
        over a view's patches.
    """
    losses, entropies = [], []
    for teacher, student in zip(taught, learnt, strict=True):
        p = targets(teacher.flatten(0, 1), teacher_temp)
        targets.add_to_center(teacher.sum((0, 1)), len(p))
        log_q = (student.flatten(0, 1) / student_temp).log_softmax(-1)
        losses.append(-(p * log_q).sum(-1).mean())
        entropies.append(torch.special.entr(p).sum(-1).mean())
    return torch.stack(losses).mean(), torch.stack(entropies).mean()
