"""Semantic segmentation by a head on the patch features of a backbone."""

from collections.abc import Mapping
from contextlib import nullcontext
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
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer

from locat_lightning.backbones.create import (
    backbone_of_decoder,
    create_for_any_size,
    find_backbone,
    load_backbone,
)
from locat_lightning.backbones.weights import DECODER_OF, RANDOM, Role, check_source, contents_of
from locat_lightning.data.segmentation import MaskBatch
from locat_lightning.errors import InputError
from locat_lightning.evaluation.batches import frozen as in_evaluation
from locat_lightning.evaluation.dense import feature_width, padded_size, patch_features
from locat_lightning.labels import IGNORE
from locat_lightning.nn.decoder import upsampled_cross_entropy
from locat_lightning.schedules import one_cycle
from locat_lightning.tasks.frozen import check_same, reference_to
from locat_lightning.tasks.heads import BEST, NORMED, Head, HeadGrid, head_in, load_head, make_head
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
        backbone: timm's name of the model; null takes the one that the weights name.
        backbone_args: further arguments of the model, as in `timm.create_model`.
        backbone_weights: where the frozen backbone of a segmentation checkpoint is, if it has moved.
        student: whether to take the student of a DINO checkpoint instead of the teacher.
        train_backbone: whether to train the backbone, too, with smaller learning rates in earlier layers.
        layer_decay: factor of the learning rate from each layer of a trained backbone to the one before.
        save_backbone: whether checkpoints hold a frozen backbone as well.
        num_classes: number of classes; null takes that of the data.
        class_names: names of the classes, by label; null takes those of the data.
        head: `mlp` is the paper's decoder, of one hidden layer; `linear` is DINOv2's, BatchNorm and a linear
            map of features behind the backbone's final norm; `pyramid` is UPerNet on a feature pyramid that
            is made from the backbone's one scale.
        layers: how many of the last blocks the head reads, or which, by index from 0.
        hidden_dim: width of the hidden layer of `mlp`, of the levels of `pyramid`.
        lr: peak learning rate.
        lrs: peak learning rates, to train a head with each on the same batches instead, on a frozen backbone;
            `val/miou` is that of the best one, and checkpoints are evaluated by it.
        weight_decay: weight decay of the decoder, and of the matrices of a trained backbone.
        warmup: share of the steps in which the learning rate rises.
        protocol: how an image is evaluated: `whole` takes all of it at once, `slide` takes windows and
            averages their logits where they overlap.
        window: height and width of a sliding window, in pixels.
        stride: pixels from one sliding window to the next.
        scales: factors of the size of an image in evaluation, over which probabilities are averaged; null
            takes the image alone as it is.
        flip: whether evaluation also averages over the mirrored image.
        options: those of every task (`Task`). `weights` may be a segmentation checkpoint, too.

    Attributes:
        iou: result of the last evaluation.
        best: number of the best head, by the last validation.
    """

    frozen, recorded_as, read_from = "backbone", DECODER_OF, "--weights"

    def __init__(
        self,
        backbone: str | None = None,
        *,
        backbone_args: dict[str, Any] | None = None,
        backbone_weights: str | None = None,
        student: bool = False,
        train_backbone: bool = False,
        layer_decay: ClosedUnitInterval = 0.65,
        save_backbone: bool = False,
        num_classes: PositiveInt | None = None,
        class_names: list[str] | None = None,
        head: Head = "mlp",
        layers: PositiveInt | list[NonNegativeInt] = 1,
        hidden_dim: PositiveInt = 512,
        lr: NonNegativeFloat = 1e-3,
        lrs: list[NonNegativeFloat] | None = None,
        weight_decay: NonNegativeFloat = 0.01,
        warmup: ClosedUnitInterval = 0.25,
        protocol: Literal["whole", "slide"] = "whole",
        window: PositiveInt = 512,
        stride: PositiveInt = 341,
        scales: list[PositiveFloat] | None = None,
        flip: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if stride > window:
            raise InputError(f"model.stride ({stride}) must be at most model.window ({window})")
        if lrs is not None and (not lrs or train_backbone):
            raise InputError(f"model.lrs ({lrs}) needs one rate or more, and a backbone that stays frozen")
        self.backbone_weights = backbone_weights

    def check(self, trainer: Trainer, *, training: bool) -> None:
        if self.weights is None and not (self.hp.train_backbone or self.resumed):
            raise InputError(
                "a frozen backbone needs --weights: a checkpoint of a run, a file or a timm name "
                f"('{RANDOM}' for an untrained one, with --model.backbone)"
            )
        if self.weights is None and self.hp.backbone is None:
            raise InputError("give --weights, or --model.backbone to train one from random weights")
        if self.backbone_weights is not None:
            check_source(self.backbone_weights)
        super().check(trainer, training=training)
        every, steps = trainer.val_check_interval, trainer.max_steps
        if training and isinstance(every, int) and 0 < steps < every:
            raise InputError(
                f"trainer.val_check_interval ({every}) is more than trainer.max_steps ({steps}), so nothing "
                f"would be measured: add --trainer.val_check_interval {steps}"
            )

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

    def resume(self, checkpoint: Mapping[str, Any]) -> None:
        self.resumed = True
        own = checkpoint["hyper_parameters"]
        self.hp.backbone, self.hp.backbone_args = own["backbone"], own["backbone_args"]
        reference = checkpoint.get(DECODER_OF)
        moved = self.backbone_weights
        self.weights = reference and backbone_of_decoder(reference, "the checkpoint", moved)

    def configure_model(self) -> None:
        if hasattr(self, "backbone"):
            return
        classes, _ = self.agree_on_classes("data.classes")
        if not 2 <= classes <= IGNORE:
            raise InputError(f"segmentation takes from 2 to {IGNORE} classes, not {classes}")
        self.backbone, decoder = self._read_weights()
        self.decoder = self._make_decoder(classes, decoder)
        self._compiled_features = torch.compile(patch_features, **self.compiler_options())
        if self.hp.train_backbone:
            self._freeze_what_is_not_read()
        else:
            self.backbone.requires_grad_(False)
        rates = self.hp.lrs if isinstance(self.decoder, HeadGrid) else [self.hp.lr]
        self.measure_heads([f"lr_{rate:g}" for rate in rates])
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        whole = sum(p.numel() for p in self.parameters())
        rank_zero_info(f"{self.hp.backbone}: {whole:,} parameters with the decoder, {trained:,} are trained")
        self.train(self.training)

    def _make_decoder(self, classes: int, state: dict[str, Tensor]) -> nn.Module:
        """Build the head, with the weights of another one if they fit, or a grid of it."""
        hp, backbone, trainer = self.hp, cast(Any, self.backbone), self.trainer
        width, patch = feature_width(backbone, hp.layers), backbone.feature_info[-1]["reduction"]
        layers = hp.layers if isinstance(hp.layers, int) else len(hp.layers)
        head = make_head(hp.head, width, classes, hidden=hp.hidden_dim, layers=layers, patch=patch)
        if (obstacle := load_head(head, state)) and not trainer.training:
            raise InputError(f"--weights {self.weights}: {obstacle}; train a decoder with locat fit")
        if state and trainer.training:
            rank_zero_info(f"{self.weights}: {obstacle or 'training begins with its decoder'}")
        if trainer.training and hp.head == "pyramid" and self.of_data("batch_size") == 1:
            raise InputError("model.head pyramid needs batches of several images: set data.batch_size to 2")
        if trainer.world_size > 1 and trainer.strategy.root_device.type == "cuda":
            head = nn.SyncBatchNorm.convert_sync_batchnorm(head)
        return HeadGrid(head, len(hp.lrs)) if hp.lrs and trainer.training else head

    def _freeze_what_is_not_read(self) -> None:
        """Freeze what follows the features (norm, pooling): DDP would wait for its gradients."""
        side: int = self.trainer.datamodule.crop_size  # type: ignore[attr-defined]
        weight = next(self.backbone.parameters())
        with in_evaluation(self.backbone), torch.enable_grad():
            images = torch.zeros(1, 3, side, side, device=weight.device, dtype=weight.dtype)
            patch_features(self.backbone, images, **self._read).sum().backward()
        for parameter in self.backbone.parameters():
            parameter.requires_grad_(parameter.grad is not None)
            parameter.grad = None

    def _read_weights(self) -> tuple[nn.Module, dict[str, Tensor]]:
        """Return the backbone with its weights, and the decoder's weights if there are any."""
        hp = self.hp
        if self.weights is None:
            return create_for_any_size(hp.backbone, hp.backbone_args), {}
        given = contents_of(self.weights)
        weights, hp.backbone, hp.backbone_args, contents = find_backbone(
            self.weights, hp.backbone, hp.backbone_args, moved=self.backbone_weights, contents=given
        )
        network: Role = "student" if hp.student else "teacher"
        backbone = load_backbone(
            weights, hp.backbone, hp.backbone_args, network=network, any_size=True, contents=contents
        )
        hp.backbone = hp.backbone or weights
        left_out = not (hp.train_backbone or hp.save_backbone or weights == RANDOM)
        recorded = (given or {}).get(DECODER_OF)
        if left_out or recorded is not None:
            reference = reference_to(weights, backbone)
        if recorded is not None:
            learnt = f"the backbone that the decoder in {self.weights} was trained on"
            check_same(reference, recorded, learnt, "model.backbone_weights")
        if left_out:
            self._reference = reference
        return backbone, head_in(given or {})

    @property
    def _read(self) -> dict[str, Any]:
        """Which features the head reads, as arguments of `patch_features`."""
        return {"layers": self.hp.layers, "norm": self.hp.head in NORMED}

    def features(self, images: Tensor) -> Tensor:
        """Return patch features [B, D, h, w] of images [B, 3, H, W], padded to whole patches."""
        kind = images.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        compiled = self.hp.compile and self.training  # in evaluation each image may have its own size
        find = self._compiled_features if compiled else patch_features
        with nullcontext() if self.hp.train_backbone else torch.inference_mode():
            found = find(self.backbone, images, **self._read, autocast_dtype=dtype)
        found = found.clone() if found.is_inference() else found  # an ordinary tensor, fit for autograd
        return found.to(next(self.decoder.parameters()).dtype)  # half only if the trainer made all weights so

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
        size = padded_size(self.backbone, (height, width))
        logits = F.interpolate(self.decoder(self.features(images)).float(), size, mode="bilinear")
        return logits[..., :height, :width]

    def training_step(self, batch: MaskBatch, batch_idx: int) -> Tensor:
        """Return the cross-entropy of the annotated pixels, at their own resolution, summed over heads."""
        images, masks, _ = batch
        height, width = images.shape[-2:]
        padded_height, padded_width = padded_size(self.backbone, (height, width))
        masks = F.pad(masks, (0, padded_width - width, 0, padded_height - height), value=IGNORE)
        logits = self.decoder(self.features(images)).split(self.hp.num_classes, 1)
        losses = torch.stack([upsampled_cross_entropy(of_head, masks) for of_head in logits])
        self.log("train/loss", losses.mean())
        return losses.sum()  # each head has a gradient of its own

    def configure_optimizers(self) -> Optimizer:
        """Return AdamW over the heads, and a trained backbone with a learning rate for each layer."""
        hp = self.hp
        self._learning_rate = partial(one_cycle, steps=self.optimizer_steps(), up=hp.warmup)
        if isinstance(self.decoder, HeadGrid):
            self.peak_lr = max(hp.lrs)
            rank_zero_info(f"learning rates {', '.join(f'{rate:g}' for rate in hp.lrs)}, a head for each")
        else:
            self.peak_learning_rate()
        heads = self.decoder.heads if isinstance(self.decoder, HeadGrid) else [self.decoder]
        groups: list[dict[str, Any]] = [{"params": list(head.parameters())} for head in heads]
        if hp.train_backbone:
            backbone: Any = self.backbone
            without_decay = backbone.no_weight_decay() if hasattr(backbone, "no_weight_decay") else ()
            groups += param_groups_layer_decay(
                backbone, hp.weight_decay, no_weight_decay_list=without_decay, layer_decay=hp.layer_decay
            )
        return AdamW(groups, lr=hp.lr, weight_decay=hp.weight_decay, fused=self.fused)

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
