"""Mixing the images of a batch, and how much each of two images counts in the label of their mixture.

A mixture has an image's own pixels and those of its partner. λ is the share of its own label.
"""

import math
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from timm.data import Mixup
from timm.data.mixup import cutmix_bbox_and_lam, one_hot
from torch import Tensor, nn
from torch.nn import functional as F

from locat_lightning.errors import InputError
from locat_lightning.nn.class_attention import ClassAttention

Kind = Literal["mixup", "transmix", "maskmix", "mixpro", "patch_mixing"]
OF_PATCHES = ("maskmix", "mixpro", "patch_mixing")
BY_ATTENTION = ("transmix", "mixpro")
CELLS = 4  # of MaskMix along each side of an image: 56 pixels of 224


class Mixed(NamedTuple):
    """A batch of mixtures.

    Attributes:
        images: [B, 3, height, width].
        labels: of the images themselves, int64 [B].
        partners: labels of the other images, int64 [B].
        area: λ by area: a number, or one for each image [B].
        own: bool [B or 1, height, width], where an image's own pixels are; None if labels follow the area.
    """

    images: Tensor
    labels: Tensor
    partners: Tensor
    area: Tensor | float
    own: Tensor | None = None


def mixed_labels(
    labels: Tensor, partners: Tensor, share: Tensor | float, num_classes: int, smoothing: float = 0.0
) -> Tensor:
    """Return λ y + (1 − λ) y_partner [B, classes] of smoothed one-hot labels; λ is a number or [B]."""
    off = smoothing / num_classes
    own, other = (one_hot(each, num_classes, 1 - smoothing + off, off) for each in (labels, partners))
    if isinstance(share, Tensor):
        share = share.unsqueeze(-1)
    mixture: Tensor = own * share + other * (1 - share)
    return mixture


def attended_share(own: Tensor, attention: Tensor) -> Tensor:
    """Return Σ m a / Σ a [B], the share of the attention that falls on an image's own patches.

    Args:
        own: bool [B or 1, height, width], of pixels; a patch is as its upper left pixel.
        attention: a, of [CLS] to the patches [B, H, W], at least 0.
    """
    m = F.interpolate(own[:, None].float(), attention.shape[-2:])[:, 0]
    return (m * attention).sum((1, 2)) / attention.sum((1, 2)).clamp_min(torch.finfo(attention.dtype).tiny)


def transmix_share(area: Tensor | float, attended: Tensor) -> Tensor:
    """Return TransMix's λ, the mean of the shares by area and by attention.

    Source: "TransMix: Attend to Mix for Vision Transformers" (CVPR 2022), as its code computes it.
    """
    return (area + attended) / 2


def progressive_share(area: Tensor, attended: Tensor, targets: Tensor, logits: Tensor) -> Tensor:
    """Return MixPro's λ = c λ_attention + (1 − c) λ_area: a model that is right may trust its attention.

    c is the cosine between the targets by area and the prediction, both [B, classes]. The gradient flows
    through it.

    Source: "MixPro: Data Augmentation with MaskMix and Progressive Attention Labeling for Vision
    Transformer" (ICLR 2023).
    """
    c = F.cosine_similarity(targets, logits.float().softmax(-1), dim=-1)
    return c * attended + (1 - c) * area


def own_cells(images: int, rows: int, columns: int) -> Tensor:
    """Draw which cells of each image stay its own: bool [B, rows, columns].

    Their share is drawn from Beta(1, 1) once for the batch and rounded up to whole cells, which are others
    in each image.
    """
    cells = rows * columns
    kept = math.ceil(np.random.beta(1.0, 1.0) * cells)  # noqa: NPY002 - seeded with timm's
    order = np.random.rand(images, cells).argsort(1)  # noqa: NPY002
    return torch.from_numpy(order < kept).view(images, rows, columns)


def own_pixels(cells: Tensor, height: int, width: int) -> Tensor:
    """Enlarge cells [B, rows, columns] to the pixels of an image, [B, height, width]."""
    rows, columns = cells.shape[1:]
    whole = cells.repeat_interleave(-(-height // rows), 1).repeat_interleave(-(-width // columns), 2)
    return whole[:, :height, :width]


class Mixing(Mixup):
    """timm's `Mixup` by batch, from the same random numbers, and further ways to mix and to label.

    - `mixup`: mixup or CutMix, each image with the one at the other end of the batch.
    - `transmix`: the same; the labels of a CutMix follow the attention (`transmix_share`).
    - `maskmix`: cells of a grid of 4 × 4 are the image's own or those of a random other image.
    - `mixpro`: the same; labels follow attention and prediction (`progressive_share`), without smoothing.
    - `patch_mixing`: the cells are the patches of the model.

    Source of the last: "Hardwiring ViT Patch Selectivity into CNNs using Patch Mixing" (arXiv 2306.17848,
    2023), whose code is not public: patches of another image and labels by area are the paper's; how many
    patches are drawn, as in MaskMix, is ours.

    Args:
        kind: one of these.
        mixing_prob: share of the batches that the last three mix; mixup and CutMix have the others.
        backbone: what is trained: its patches are the cells, and labels follow its attention.
        attention: which attention, as of `ClassAttention`.
        options: those of timm's class.

    Raises:
        InputError: the backbone lacks what this kind needs.
    """

    def __init__(
        self,
        kind: Kind,
        mixing_prob: float,
        backbone: nn.Module,
        attention: Literal["class", "refined"] = "class",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.kind, self.mixing_prob = kind, mixing_prob
        self._patches: Any = getattr(backbone, "patch_embed", None)
        self._attention: ClassAttention | None = None
        if kind == "patch_mixing" and not hasattr(self._patches, "patch_size"):
            raise InputError("model.mixing patch_mixing: the backbone has no patches: use maskmix")
        if kind == "transmix" and not self.cutmix_alpha:
            raise InputError("model.mixing: transmix is about the labels of CutMix: set model.cutmix to 1.0")
        if kind in BY_ATTENTION:
            try:
                self._attention = ClassAttention(backbone, attention)
            except ValueError as error:
                raise InputError(
                    f"model.mixing {kind} with model.mixing_attention {attention} does not fit "
                    f"model.backbone: {error}: choose another, or maskmix"
                ) from error

    def __call__(self, images: Tensor, labels: Tensor) -> Mixed:
        """Mix images [B, 3, height, width]; of an odd batch mixup and CutMix leave the last image out."""
        if self.kind in OF_PATCHES and np.random.rand() < self.mixing_prob:  # noqa: NPY002
            return self._mix_cells(images, labels)
        even = len(images) - len(images) % 2
        images, labels = images[:even], labels[:even]
        others, partners = images.flip(0), labels.flip(0)
        share, is_cutmix = self._params_per_batch()
        if share == 1 or not is_cutmix:
            mixture = images if share == 1 else images * share + others * (1 - share)
            return Mixed(mixture, labels, partners, share)
        (top, bottom, left, right), area = cutmix_bbox_and_lam(images.shape, share)
        mixture = images.clone()
        mixture[..., top:bottom, left:right] = others[..., top:bottom, left:right]
        own = None
        if self.kind == "transmix":
            own = torch.ones(1, *images.shape[-2:], dtype=torch.bool, device=images.device)
            own[:, top:bottom, left:right] = False
        return Mixed(mixture, labels, partners, float(area), own)

    def _mix_cells(self, images: Tensor, labels: Tensor) -> Mixed:
        height, width = images.shape[-2:]
        if self.kind == "patch_mixing":
            rows, columns = (
                -(-side // of) for side, of in zip((height, width), self._patches.patch_size, strict=True)
            )
        else:
            rows = columns = CELLS
        other = torch.from_numpy(np.random.permutation(len(images)))  # noqa: NPY002
        other = other.to(images.device, non_blocking=True)
        cells = own_cells(len(images), rows, columns).to(images.device, non_blocking=True)
        own = own_pixels(cells, height, width)
        mixture = torch.where(own[:, None], images, images[other])
        noted = own if self.kind == "mixpro" else None
        return Mixed(mixture, labels, labels[other], own.float().mean((1, 2)), noted)

    def targets(self, mixed: Mixed, logits: Tensor) -> tuple[Tensor, float]:
        """Return the shares of the classes [B, classes] in mixtures, and how much they are to be smoothed.

        The logits [B, classes] are those that the backbone has just made of them.
        """
        pair, share = (mixed.labels, mixed.partners), mixed.area
        smoothing: float = self.label_smoothing
        if mixed.own is not None:
            attended = attended_share(mixed.own, self._attention_map(mixed.images))
            if isinstance(share, Tensor):  # of MixPro
                by_area = mixed_labels(*pair, share, self.num_classes, smoothing)
                share, smoothing = progressive_share(share, attended, by_area, logits), 0.0
            else:
                share = transmix_share(share, attended)
        return mixed_labels(*pair, share, self.num_classes), smoothing

    def _attention_map(self, images: Tensor) -> Tensor:
        """Return the attention of [CLS] to the patches of these images, [B, H, W], mean over heads."""
        assert self._attention is not None
        assert self._attention.heads is not None
        grid = self._patches.dynamic_feat_size(images.shape[-2:])
        attention: Tensor = self._attention.heads.mean(1).unflatten(-1, grid)
        return attention


def mixing_of(hp: Any, backbone: nn.Module, num_classes: int) -> Mixing | None:
    """Return what mixes the batches, as the options of `Classification` say; None for nothing."""
    if hp.mixing == "mixup" and not (hp.mixup or hp.cutmix):
        return None
    return Mixing(
        hp.mixing,
        hp.mixing_prob,
        backbone,
        hp.mixing_attention,
        mixup_alpha=hp.mixup,
        cutmix_alpha=hp.cutmix,
        prob=hp.mixup_prob if hp.mixup or hp.cutmix else 0.0,
        switch_prob=hp.mixup_switch_prob,
        label_smoothing=hp.label_smoothing,
        num_classes=num_classes,
    )
