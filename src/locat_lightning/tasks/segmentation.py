"""Semantic segmentation by a small decoder on the patch features of a backbone."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from math import isnan
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveInt
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from matplotlib.figure import Figure
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
from locat_lightning.data.class_lists import distinct_colours
from locat_lightning.data.segmentation import MaskBatch
from locat_lightning.errors import InputError
from locat_lightning.evaluation.batches import frozen as in_evaluation
from locat_lightning.evaluation.dense import padded_size, patch_features
from locat_lightning.evaluation.iou import IoU, MeanIoU, image_miou
from locat_lightning.figures.grid import rgb
from locat_lightning.figures.segmentation import confusion_figure, iou_figure, segmentation_figure
from locat_lightning.inspection import gaussian_kernels
from locat_lightning.labels import IGNORE
from locat_lightning.nn.decoder import MlpDecoder, upsampled_argmax, upsampled_cross_entropy
from locat_lightning.schedules import one_cycle
from locat_lightning.tasks.frozen import FrozenNetwork, check_same, reference_to
from locat_lightning.tasks.prediction_files import file_names, write_classes
from locat_lightning.tasks.windows import slide


class Segmentation(FrozenNetwork):
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
        hidden_dim: width of the decoder's hidden layer.
        lr: peak learning rate.
        weight_decay: weight decay of the decoder, and of the matrices of a trained backbone.
        warmup: share of the steps in which the learning rate rises.
        protocol: how an image is evaluated: `whole` takes all of it at once, `slide` takes windows and
            averages their logits where they overlap.
        window: height and width of a sliding window, in pixels.
        stride: pixels from one sliding window to the next.
        options: those of every task (`Task`). `weights` may be a segmentation checkpoint, too.

    Attributes:
        iou: result of the last evaluation.
    """

    iou: IoU | None = None
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
        hidden_dim: PositiveInt = 512,
        lr: NonNegativeFloat = 1e-3,
        weight_decay: NonNegativeFloat = 0.01,
        warmup: ClosedUnitInterval = 0.25,
        protocol: Literal["whole", "slide"] = "whole",
        window: PositiveInt = 512,
        stride: PositiveInt = 341,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if stride > window:
            raise InputError(f"model.stride ({stride}) must be at most model.window ({window})")
        self.backbone_weights = backbone_weights
        self._file_names: list[str] = []  # of the images that are predicted

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
        scale = self.of_data("scale")
        resized = f" resized to fit {scale[0]} × {scale[1]}" if scale else ""
        if self.hp.protocol == "whole":
            return f"whole image{resized}"
        return f"windows of {self.hp.window} px every {self.hp.stride} px, image{resized}"

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
        if (features := getattr(self.backbone, "feature_info", None)) is None:
            kind = type(self.backbone).__name__
            raise InputError(f"{kind} has no feature_info: choose a timm model with patch features")
        self.decoder = MlpDecoder(features[-1]["num_chs"], classes, self.hp.hidden_dim)
        if (obstacle := _load_decoder(self.decoder, decoder)) and not self.trainer.training:
            raise InputError(f"--weights {self.weights}: {obstacle}; train a decoder with locat fit")
        if decoder and self.trainer.training:
            rank_zero_info(f"{self.weights}: {obstacle or 'training begins with its decoder'}")
        self._compiled_features = torch.compile(patch_features, **self.compiler_options())
        if self.hp.train_backbone:
            self._freeze_what_is_not_read()
        else:
            self.backbone.requires_grad_(False)
        self.counts = MeanIoU(classes)
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        whole = sum(p.numel() for p in self.parameters())
        rank_zero_info(f"{self.hp.backbone}: {whole:,} parameters with the decoder, {trained:,} are trained")
        self.train(self.training)

    def _freeze_what_is_not_read(self) -> None:
        """Freeze what follows the features (norm, pooling): DDP would wait for its gradients."""
        side: int = self.trainer.datamodule.crop_size  # type: ignore[attr-defined]
        weight = next(self.backbone.parameters())
        with in_evaluation(self.backbone), torch.enable_grad():
            images = torch.zeros(1, 3, side, side, device=weight.device, dtype=weight.dtype)
            patch_features(self.backbone, images).sum().backward()
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
        state = (given or {}).get("state_dict", {})
        decoder = {k.removeprefix("decoder."): v for k, v in state.items() if k.startswith("decoder.")}
        left_out = not (hp.train_backbone or hp.save_backbone or weights == RANDOM)
        recorded = (given or {}).get(DECODER_OF)
        if left_out or recorded is not None:
            reference = reference_to(weights, backbone)
        if recorded is not None:
            learnt = f"the backbone that the decoder in {self.weights} was trained on"
            check_same(reference, recorded, learnt, "model.backbone_weights")
        if left_out:
            self._reference = reference
        return backbone, decoder

    def features(self, images: Tensor) -> Tensor:
        """Return patch features [B, D, h, w] of images [B, 3, H, W], padded to whole patches."""
        kind = images.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        compiled = self.hp.compile and self.training  # in evaluation each image may have its own size
        find = self._compiled_features if compiled else patch_features
        with nullcontext() if self.hp.train_backbone else torch.inference_mode():
            found = find(self.backbone, images, autocast_dtype=dtype)
        found = found.clone() if found.is_inference() else found  # an ordinary tensor, fit for autograd
        return found.to(next(self.decoder.parameters()).dtype)  # half only if the trainer made all weights so

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, classes, H, W] of normalised images [B, 3, H, W], by the protocol."""
        if self.hp.protocol == "whole":
            return self._whole(images)
        return slide(self._whole, images, self.hp.num_classes, self.hp.window, self.hp.stride)

    def _whole(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        size = padded_size(self.backbone, (height, width))
        logits = F.interpolate(self.decoder(self.features(images)).float(), size, mode="bilinear")
        return logits[..., :height, :width]

    def training_step(self, batch: MaskBatch, batch_idx: int) -> Tensor:
        """Return the cross-entropy of the annotated pixels, at their own resolution."""
        images, masks, _ = batch
        height, width = images.shape[-2:]
        padded_height, padded_width = padded_size(self.backbone, (height, width))
        masks = F.pad(masks, (0, padded_width - width, 0, padded_height - height), value=IGNORE)
        loss = upsampled_cross_entropy(self.decoder(self.features(images)), masks)
        self.log("train/loss", loss)
        return loss

    def predicted(self, images: Tensor, masks: Tensor) -> Tensor:
        """Return classes [B, H, W] int64 of images [B, 3, H', W'], at the size of their masks [.., H, W]."""
        height, width = masks.shape[-2:]
        return upsampled_argmax(self.watched(self(images)), (height, width))

    def validation_step(self, batch: MaskBatch, batch_idx: int) -> Tensor:
        """Count the pixels of each pair of classes at the annotation's size, and return the prediction."""
        predicted = self.predicted(batch.images, batch.masks)
        self.counts.update(predicted, batch.masks)
        return predicted

    test_step = validation_step

    def hardness(self, outputs: Tensor, batch: MaskBatch) -> Tensor:
        """Return 1 - mIoU of each image by itself, [B]."""
        return 1 - image_miou(outputs, batch.masks, self.hp.num_classes)

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self._conclude("val")

    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        self._conclude("test")

    def _conclude(self, split: str) -> None:
        """Log IoU from one confusion matrix over the whole set, of all processes."""
        iou = self.counts.compute()
        self.counts.reset()
        if self.trainer.sanity_checking:
            return
        self.iou = iou
        for name in IoU.SCALARS:
            self.log(f"{split}/{name}", getattr(iou, name), prog_bar=name == "miou", sync_dist=True)
        by_class = zip(self.class_names, iou.per_class.tolist(), strict=True)
        shares = {f"iou/{name}": share for name, share in by_class if not isnan(share)}
        for logger in self.trainer.loggers:
            logger.log_metrics(shares, step=max(0, self.global_step - 1))
        if self.trainer.state.fn != TrainerFn.FITTING:
            rank_zero_info(f"{split}/miou {float(iou.miou):.4f} ({self.summary()})")

    def predict_step(self, batch: MaskBatch, batch_idx: int) -> tuple[Tensor, Tensor]:
        """Return positions in the data set [B], and classes [B, H, W] uint8 at the image's own size."""
        predicted = self.predicted(batch.images, batch.masks).byte()
        self.check_outputs()
        return batch.indices, predicted

    def write_predictions(self, prediction: tuple[Tensor, Tensor], data: Any, directory: Path) -> None:
        """Write the classes of each image as PNGs: their indices, and their colours over the image."""
        self._file_names = self._file_names or file_names(data.predict_paths)
        colours = data.colours if len(data.colours) else distinct_colours(self.hp.num_classes)
        indices, maps = prediction
        for index, classes in zip(indices.tolist(), maps.cpu().numpy(), strict=True):
            image, _ = data.source("predict").read(index)
            write_classes(directory, self._file_names[index], image, classes, colours)

    def finish_predictions(self, data: Any, directory: Path) -> str:
        self._file_names = []
        return f"predictions and overlays: {directory}"

    def pictures(self, samples: Sequence[Any], data: Any, side: int) -> dict[str, Figure]:
        """Draw input, annotation, prediction and kernels of some samples, each in its own size."""
        inputs = [sample[0][None].to(self.device) for sample in samples]
        masks = [sample[1] for sample in samples]
        pairs = zip(inputs, masks, strict=True)
        predictions = [self.predicted(image, mask)[0].cpu() for image, mask in pairs]
        kernels = [gaussian_kernels(self.backbone, image) for image in inputs]
        figure = segmentation_figure(
            [rgb(image, data.normalisation)[0] for image in inputs],
            masks,
            predictions,
            self.class_names,
            data.colours,
            kernels=[[each[0] for each in block] for block in zip(*kernels, strict=True)],
            side=side,
        )
        return {"validation": figure}

    def result_pictures(self, data: Any) -> dict[str, Figure]:
        if self.iou is None:
            return {}
        return {
            "iou": iou_figure(self.iou, self.class_names, data.colours, title=self.summary()),
            "confusion": confusion_figure(self.iou.confusion, self.class_names),
        }

    def configure_optimizers(self) -> Optimizer:
        """Return AdamW over the decoder, and a trained backbone with a learning rate for each layer."""
        hp = self.hp
        peak = self.peak_learning_rate()
        self._learning_rate = partial(one_cycle, steps=self.optimizer_steps(), peak=peak, up=hp.warmup)
        groups: list[dict[str, Any]] = [{"params": list(self.decoder.parameters())}]
        if hp.train_backbone:
            backbone: Any = self.backbone
            without_decay = backbone.no_weight_decay() if hasattr(backbone, "no_weight_decay") else ()
            groups += param_groups_layer_decay(
                backbone, hp.weight_decay, no_weight_decay_list=without_decay, layer_decay=hp.layer_decay
            )
        return AdamW(groups, lr=hp.lr, weight_decay=hp.weight_decay, fused=self.fused)

    def set_rates(self, groups: list[dict[str, Any]]) -> None:
        for group in groups:
            group["lr"] = self._learning_rate(self.step) * group.get("lr_scale", 1.0)


def _load_decoder(decoder: MlpDecoder, state: dict[str, Tensor]) -> str:
    """Load a decoder's weights, or return why they do not fit."""
    if not state:
        return "it holds no decoder"
    own, given = (
        {name: list(value.shape) for name, value in each.items()} for each in (decoder.state_dict(), state)
    )
    if own != given:
        return f"its decoder has other features or classes ({given} instead of {own})"
    decoder.load_state_dict(state)
    return ""
