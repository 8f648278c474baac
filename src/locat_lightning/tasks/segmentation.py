"""Semantic segmentation by a head on the patch features of a backbone."""

from collections.abc import Callable
from functools import partial
from itertools import repeat
from typing import Any, Literal, cast

import torch
from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from locat_lightning.data.segmentation import MaskBatch
from locat_lightning.errors import InputError
from locat_lightning.evaluation.dense import feature_width, padded_size, upsampled
from locat_lightning.labels import IGNORE
from locat_lightning.nn.decoder import upsampled_cross_entropy
from locat_lightning.schedules import one_cycle, warmup_then_cosine
from locat_lightning.tasks.heads import BEST, NORMED, Head, HeadGrid, make_head
from locat_lightning.tasks.pixel_classes import PixelClasses
from locat_lightning.tasks.windows import over_scales, slide


class Segmentation(PixelClasses):
    """Train a decoder to name the class of each pixel from the patch features of a backbone.

    The defaults are the protocol of "Locality-Attending Vision Transformer" (ICLR 2026): the backbone is
    frozen, its features are the last block's patch tokens before the final norm and without PRR, the decoder
    has one hidden layer, and AdamW follows one linear cycle.

    A checkpoint holds the decoder, and says where the weights of the frozen backbone are; it also holds a
    backbone that is trained or has random weights.

    Args:
        num_classes: number of classes; null takes that of the data.
        class_names: names of the classes, by label; null takes those of the data.
        head: `mlp` is the paper's decoder, of one hidden layer; `linear` is DINOv2's, BatchNorm and a linear
            map of features behind the backbone's final norm; `pyramid` is UPerNet on a feature pyramid that
            is made from the backbone's one scale.
        layers: how many of the last blocks the head reads, or which, by index from 0.
        hidden_dim: width of the hidden layer of `mlp`, of the levels of `pyramid`.
        dropout: probability that a feature of an image is 0 for `linear`, in training; DINOv3's is 0.1.
        lr: peak learning rate.
        lrs: peak learning rates, to train a head with each on the same batches instead, on a frozen backbone;
            `val/miou` is that of the best one, and checkpoints are evaluated by it.
        warmup: share of the steps in which the learning rate rises.
        decay: how it falls then: `linear`, or like half a `cosine`.
        protocol: how an image is evaluated: `whole` takes all of it at once, `slide` takes windows and
            averages their logits where they overlap.
        window: height and width of a sliding window, in pixels.
        stride: pixels from one sliding window to the next.
        scales: factors of the size of an image in evaluation, over which probabilities are averaged; null
            takes the image alone as it is.
        flip: whether evaluation also averages over the mirrored image.
        options: those of every task with a head (`DenseTask`).

    Attributes:
        iou: result of the last evaluation.
        results: the same by image.
        best: number of the best head, by the last validation.
    """

    def __init__(
        self,
        backbone: str | None = None,
        *,
        num_classes: PositiveInt | None = None,
        class_names: list[str] | None = None,
        head: Head = "mlp",
        layers: PositiveInt | list[NonNegativeInt] = 1,
        hidden_dim: PositiveInt = 512,
        dropout: ClosedUnitInterval = 0.0,
        lr: NonNegativeFloat = 1e-3,
        lrs: list[NonNegativeFloat] | None = None,
        warmup: ClosedUnitInterval = 0.25,
        decay: Literal["linear", "cosine"] = "linear",
        protocol: Literal["whole", "slide"] = "whole",
        window: PositiveInt = 512,
        stride: PositiveInt = 341,
        scales: list[PositiveFloat] | None = None,
        flip: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(backbone, **options)
        if stride > window:
            raise InputError(f"model.stride ({stride}) must be at most model.window ({window})")
        if lrs is not None and (not lrs or self.hp.train_backbone):
            raise InputError(f"model.lrs ({lrs}) needs one rate or more, and a backbone that stays frozen")

    def summary(self) -> str:
        hp, scale = self.hp, self.of_data("scale")
        windows = f"windows of {hp.window} px every {hp.stride} px, image"
        how = "whole image" if hp.protocol == "whole" else windows
        how += f" resized to fit {scale[0]} × {scale[1]}" if scale else ""
        how += f", scales {', '.join(f'{each:g}' for each in hp.scales)}" if hp.scales else ""
        how += ", with its mirror image" if hp.flip else ""
        how += f", {hp.head} head" if hp.head != "mlp" else ""
        how += f", layers {hp.layers}" if hp.layers != 1 else ""
        how += f", best of {len(hp.lrs)} learning rates" if hp.lrs else ""
        return how

    def configure_model(self) -> None:
        if hasattr(self, "backbone"):
            return
        classes, _ = self.agree_on_classes("data.classes")
        if not 2 <= classes <= IGNORE:
            raise InputError(f"segmentation takes from 2 to {IGNORE} classes, not {classes}")
        self.read_weights(lambda state: self._make_decoder(classes, state))
        rates = self.hp.lrs if isinstance(self.decoder, HeadGrid) else [self.hp.lr]
        self.measure_heads([f"lr_{rate:g}" for rate in rates])

    def check(self, trainer: Trainer, *, training: bool) -> None:
        super().check(trainer, training=training)
        if self.hp.lrs and training and trainer.gradient_clip_val:
            raise InputError(
                "trainer.gradient_clip_val clips by the norm of all heads: leave it out with model.lrs"
            )

    def _make_decoder(self, classes: int, state: dict[str, Tensor]) -> nn.Module:
        """Build the head, with the weights of another one if they fit, or a grid of it."""
        hp, backbone, trainer = self.hp, cast(Any, self.backbone), self.trainer
        width, patch = feature_width(backbone, hp.layers), backbone.feature_info[-1]["reduction"]
        layers = hp.layers if isinstance(hp.layers, int) else len(hp.layers)
        sizes = {"hidden": hp.hidden_dim, "layers": layers, "patch": patch}
        head = make_head(hp.head, width, classes, dropout=hp.dropout, **sizes)
        self.load_decoder(head, state)
        if trainer.training and hp.head == "pyramid" and self.of_data("batch_size") == 1:
            raise InputError("model.head pyramid needs batches of several images: set data.batch_size to 2")
        if trainer.world_size > 1 and trainer.strategy.root_device.type == "cuda":
            head = nn.SyncBatchNorm.convert_sync_batchnorm(head)
        return HeadGrid(head, len(hp.lrs)) if hp.lrs and trainer.training else head

    @property
    def read(self) -> dict[str, Any]:
        return {"layers": self.hp.layers, "norm": self.hp.head in NORMED}

    def logits(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return each head's logits [B, classes, H, W] of normalised images [B, 3, H, W], by the protocol.

        Over several scales they are mean probabilities.
        """
        hp, classes = self.hp, self.hp.num_classes
        find = self._whole
        if hp.protocol == "slide":
            channels = classes * len(self.counts)
            find = partial(slide, find, channels=channels, window=hp.window, stride=hp.stride)
        if hp.scales or hp.flip:
            find = partial(over_scales, find, classes=classes, scales=hp.scales or [1.0], flip=hp.flip)
        found: tuple[Tensor, ...] = find(images).split(classes, 1)
        return found

    def _whole(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        return upsampled(self.backbone, self.decoder(self.features(images)), (height, width))

    def training_step(self, batch: MaskBatch, batch_idx: int) -> Tensor:
        """Return the cross-entropy of the annotated pixels, at their own resolution, summed over heads."""
        images, masks, _ = batch
        height, width = images.shape[-2:]
        padded_height, padded_width = padded_size(self.backbone, (height, width))
        masks = F.pad(masks, (0, padded_width - width, 0, padded_height - height), value=IGNORE)
        logits = self.decoder(self.features(images)).split(self.hp.num_classes, 1)
        losses = torch.stack([upsampled_cross_entropy(of_head, masks) for of_head in logits])
        self.log("train/loss", losses.mean())
        return losses.sum()  # each head has a gradient of its own (and none is clipped, see `check`)

    def configure_optimizers(self) -> Optimizer:
        """Return AdamW over the heads, and a trained backbone with a learning rate for each layer."""
        hp = self.hp
        steps = self.optimizer_steps()
        self._learning_rate: Callable[..., float] = partial(one_cycle, steps=steps, up=hp.warmup)
        if hp.decay == "cosine":
            warmup = round(hp.warmup * steps)
            self._learning_rate = partial(warmup_then_cosine, steps=steps, warmup=warmup, end=0.0)
        if isinstance(self.decoder, HeadGrid):
            self.peak_lr = max(hp.lrs)
            rank_zero_info(f"learning rates {', '.join(f'{rate:g}' for rate in hp.lrs)}, a head for each")
        else:
            self.peak_learning_rate()
        heads = self.decoder.heads if isinstance(self.decoder, HeadGrid) else [self.decoder]
        return self.adamw(heads)

    def set_rates(self, groups: list[dict[str, Any]]) -> None:
        peaks = self.hp.lrs if isinstance(self.decoder, HeadGrid) else repeat(self.hp.lr)
        for group, peak in zip(groups, peaks, strict=False):
            group["lr"] = self._learning_rate(self.step, peak=peak) * group.get("lr_scale", 1.0)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if isinstance(self.decoder, HeadGrid):
            checkpoint[BEST] = self.best

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.best = checkpoint.get(BEST, 0)
        if self.best not in range(len(self.counts)):
            raise InputError(f"the checkpoint says that head {self.best!r:.80} of {len(self.counts)} is best")
