"""From patch features to classes of pixels: decoders of one patch at a time, and the loss at full size."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from locat_lightning.labels import IGNORE

CLASSES_AT_ONCE = 16  # upsampled at a time by `upsampled_argmax`
LOGITS_AT_ONCE = 2**24  # upsampled at a time by the loss, but at least those of one image


class MlpDecoder(nn.Sequential):
    """1×1 convolution to a hidden width, GroupNorm of one group, GELU, 1×1 convolution to the classes.

    Maps patch features [B, D, H, W] to logits [B, classes, H, W].

    Source: "Locality-Attending Vision Transformer" (ICLR 2026), the segmentation protocol.
    """

    def __init__(self, features: int, classes: int, hidden: int = 512) -> None:
        super().__init__(
            nn.Conv2d(features, hidden, 1), nn.GroupNorm(1, hidden), nn.GELU(), nn.Conv2d(hidden, classes, 1)
        )


class LinearDecoder(nn.Sequential):
    """BatchNorm and a 1×1 convolution to the classes, whose weights begin as N(0, 0.01).

    Maps patch features [B, D, H, W] to logits [B, classes, H, W]. In training, `dropout` is the share of the
    features that are 0 in a whole image: DINOv3 has 0.1, DINOv2 none.

    Source: `BNHead` in `dinov2/eval/segmentation` of github.com/facebookresearch/dinov2; the linear head of
    github.com/facebookresearch/dinov3.
    """

    def __init__(self, features: int, classes: int, dropout: float = 0.0) -> None:
        classifier = nn.Conv2d(features, classes, 1)
        nn.init.normal_(classifier.weight, std=0.01)
        nn.init.zeros_(classifier.bias)  # type: ignore[arg-type]
        super().__init__(nn.BatchNorm2d(features), classifier)
        self.dropout = dropout

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = super().forward(F.dropout2d(features, self.dropout, self.training))
        return logits


def upsampled_cross_entropy(logits: Tensor, masks: Tensor) -> Tensor:
    """Return the mean cross-entropy of annotated pixels, with logits upsampled bilinearly to the masks' size.

    The same as `interpolate` and `cross_entropy` of logits [B, C, h, w] and integer masks [B, H, W] (classes,
    or `IGNORE`), but logits of full size exist for one image (or a few small ones) at a time: their gradient
    at the small size is computed together with their loss. Float32; 0 where no pixel is annotated.
    """
    loss: Tensor = _UpsampledCrossEntropy.apply(logits, masks)
    return loss


class _UpsampledCrossEntropy(torch.autograd.Function):
    """∂loss/∂logits is softmax − one-hot at full size, brought to [h, w] by the adjoint of the upsampling."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, masks: Tensor) -> Tensor:
        size = masks.shape[-2:]
        pixels = (masks != IGNORE).sum().clamp_min(1)
        loss = torch.zeros((), device=logits.device)
        grad = torch.empty_like(logits, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        some = max(1, LOGITS_AT_ONCE // (logits.shape[1] * masks[0].numel()))
        for part, (small, mask) in enumerate(zip(logits.split(some), masks.split(some), strict=True)):
            labels = mask.long()
            log_p = F.interpolate(small.float(), size, mode="bilinear").log_softmax(1)
            loss += F.nll_loss(log_p, labels, ignore_index=IGNORE, reduction="sum")
            if grad is not None:
                annotated = (labels != IGNORE).unsqueeze(1)
                target = labels.unsqueeze(1).where(annotated, 0)
                difference = log_p.exp_().scatter_add_(1, target, -torch.ones_like(target, dtype=log_p.dtype))
                grad[part * some : (part + 1) * some] = torch.ops.aten.upsample_bilinear2d_backward(
                    difference.mul_(annotated), size, small.shape, False
                )
        if grad is not None:
            ctx.dtype = logits.dtype
            ctx.save_for_backward(grad.div_(pixels))
        return loss / pixels

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Cast last: half precision holds these numbers only after the loss has been scaled up.
        return (ctx.saved_tensors[0] * grad).to(ctx.dtype), None


def upsampled_argmax(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the likeliest class of each pixel [B, H, W] int64 of logits [B, C, h, w], for size (H, W).

    Logits are upsampled bilinearly, a few classes at a time. Of classes with equal logits, the first wins.
    """
    best = logits.new_full((len(logits), *size), -torch.inf, dtype=torch.float32)
    classes = torch.zeros_like(best, dtype=torch.int64)
    for start in range(0, logits.shape[1], CLASSES_AT_ONCE):
        some = logits[:, start : start + CLASSES_AT_ONCE].float()
        if some.shape[-2:] != size:
            some = F.interpolate(some, size, mode="bilinear")
        values, places = some.max(1)
        better = values > best
        best = values.where(better, best)
        classes = (places + start).where(better, classes)
    return classes
