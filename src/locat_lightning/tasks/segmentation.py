"""Semantic segmentation by a small decoder on a backbone's patch features: what they are worth."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import ceil, inf, isnan
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from matplotlib.figure import Figure
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer

from locat_lightning.backbones.create import create_for_any_size, load_backbone, model_of
from locat_lightning.backbones.weights import DECODER_OF, RANDOM, Network, check_source, read_checkpoint
from locat_lightning.data.class_lists import distinct_colours
from locat_lightning.data.segmentation import MaskBatch
from locat_lightning.errors import InputError
from locat_lightning.evaluation.dense import padded_size, patch_features
from locat_lightning.evaluation.features import frozen
from locat_lightning.evaluation.iou import IoU, MeanIoU
from locat_lightning.figures.grid import rgb
from locat_lightning.figures.segmentation import confusion_figure, iou_figure, segmentation_figure
from locat_lightning.inspection import gaussian_kernels
from locat_lightning.nn.decoder import IGNORED, MlpDecoder, upsampled_argmax, upsampled_cross_entropy
from locat_lightning.schedules import one_cycle
from locat_lightning.tasks.base import Task, announce_learning_rate, check_range
from locat_lightning.tasks.prediction_files import file_names, write_classes


class Segmentation(Task):
    """Trains a decoder to name the class of each pixel from the patch features of a backbone.

    The defaults are the protocol of "Locality-Attending Vision Transformer" (ICLR 2026): the backbone is
    frozen, its features are the last block's patch tokens before the final norm and without PRR, the decoder
    has one hidden layer, and AdamW follows one linear cycle.

    A checkpoint holds the decoder, and says where the weights of the frozen backbone are; a backbone that is
    trained, or has random weights, is in it.

    Args:
        backbone: timm's name of the model; null takes what the weights say of themselves.
        backbone_args: further arguments of the model, as in `timm.create_model`.
        weights: where the backbone's weights come from (see --weights); or a checkpoint of a segmentation.
        backbone_weights: where the frozen backbone of a checkpoint of a segmentation is, if it has moved.
        student: whether to take the student of a DINO checkpoint, not the teacher.
        train_backbone: whether the backbone is trained, too, with less and less at its earlier layers.
        layer_decay: factor of the learning rate from each layer of a trained backbone to the one before.
        save_backbone: whether checkpoints hold a frozen backbone as well.
        num_classes: how many classes there are; null takes as many as the data have.
        class_names: names of the classes, by label; null takes those of the data.
        hidden_dim: width of the decoder's hidden layer.
        lr: peak learning rate.
        weight_decay: of the decoder, and of the matrices of a trained backbone.
        warmup: share of the steps in which the learning rate rises.
        protocol: of the evaluation: `whole` takes the whole image at once, `slide` windows over it, whose
            logits are averaged where they overlap.
        window: height and width of a sliding window, in pixels.
        stride: pixels from one sliding window to the next.

    Attributes:
        iou: what came of the last evaluation.

    Raises:
        InputError: an argument is out of its range.
    """

    iou: IoU | None = None

    def __init__(
        self,
        backbone: str | None = None,
        *,
        backbone_args: dict[str, Any] | None = None,
        weights: str | None = None,
        backbone_weights: str | None = None,
        student: bool = False,
        train_backbone: bool = False,
        layer_decay: float = 0.65,
        save_backbone: bool = False,
        num_classes: int | None = None,
        class_names: list[str] | None = None,
        hidden_dim: int = 512,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.25,
        protocol: Literal["whole", "slide"] = "whole",
        window: int = 512,
        stride: int = 341,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["weights", "backbone_weights"])
        for name, value, least, most in (
            ("lr", lr, 0, inf),
            ("weight_decay", weight_decay, 0, inf),
            ("layer_decay", layer_decay, 0, 1),
            ("warmup", warmup, 0, 1),
            ("hidden_dim", hidden_dim, 1, inf),
            ("window", window, 1, inf),
            ("stride", stride, 1, window),
        ):
            check_range(name, value, least, most)
        self.weights = weights
        self.backbone_weights = backbone_weights
        self.class_names = list(class_names or [])
        self._goes_on = False
        self._reference: dict[str, str] = {}  # of a backbone that checkpoints leave out

    def check(self, trainer: Trainer, *, training: bool) -> None:
        """Find mistakes that show without data or a model.

        Raises:
            InputError: as for any task; also, a frozen backbone has no weights.
        """
        if self.weights is None and not (self.hp.train_backbone or self._goes_on):
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
                f"trainer.val_check_interval ({every}) is more than trainer.max_steps ({steps}): nothing "
                f"would be measured; add --trainer.val_check_interval {steps}"
            )

    @property
    def protocol(self) -> str:
        """How an image is evaluated, in words: what an mIoU is to be compared by."""
        data = getattr(self._trainer, "datamodule", None)
        scale = getattr(data, "scale", None)
        resized = f" resized to fit {scale[0]} × {scale[1]}" if scale else ""
        if self.hp.protocol == "whole":
            return f"whole image{resized}"
        return f"windows of {self.hp.window} px every {self.hp.stride} px, image{resized}"

    def resume(self, checkpoint: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; a frozen backbone that is not in it is read again."""
        self._goes_on = True
        own = checkpoint["hyper_parameters"]
        self.hp.backbone, self.hp.backbone_args = own["backbone"], own["backbone_args"]
        reference = checkpoint.get(DECODER_OF)
        self.weights = None if reference is None else self.backbone_weights or reference["weights"]

    def configure_model(self) -> None:
        """Build backbone and decoder, and read their weights.

        Raises:
            InputError: model, weights and data do not fit each other.
        """
        if hasattr(self, "backbone"):
            return
        classes = self._agree_on_classes()
        self.backbone, decoder = self._read_backbone()
        self.decoder = MlpDecoder(_width(self.backbone), classes, self.hp.hidden_dim)
        if (obstacle := _load(self.decoder, decoder)) and not self.trainer.training:
            raise InputError(f"--weights {self.weights}: {obstacle}; train a decoder with locat fit")
        if decoder and self.trainer.training:
            rank_zero_info(f"{self.weights}: {obstacle or 'the decoder in it'} is where training begins")
        if self.hp.train_backbone:
            self._freeze_what_is_not_read()
        else:
            self.backbone.requires_grad_(False)
        self.val_iou, self.test_iou = MeanIoU(classes), MeanIoU(classes)
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        whole = sum(p.numel() for p in self.parameters())
        rank_zero_info(f"{self.hp.backbone}: {whole:,} parameters with the decoder, {trained:,} are trained")
        self.train(self.training)

    def _freeze_what_is_not_read(self) -> None:
        """Leave out what follows the features (norm, pooling): DDP would wait for its gradients."""
        side: int = self.trainer.datamodule.crop_size  # type: ignore[attr-defined]
        weight = next(self.backbone.parameters())
        with frozen(self.backbone), torch.enable_grad():
            images = torch.zeros(1, 3, side, side, device=weight.device, dtype=weight.dtype)
            patch_features(self.backbone, images).sum().backward()
        for parameter in self.backbone.parameters():
            parameter.requires_grad_(parameter.grad is not None)
            parameter.grad = None

    def _agree_on_classes(self) -> int:
        number, names = self.agreed_classes("data.classes")
        if not 2 <= number <= IGNORED:
            raise InputError(f"{number} classes: between 2 and {IGNORED} can be told apart")
        self.class_names = self.class_names or list(names)
        self.hp.num_classes, self.hp.class_names = number, self.class_names
        return number

    def _read_backbone(self) -> tuple[nn.Module, dict[str, Tensor]]:
        """The backbone with its weights, and the decoder's weights if there are any."""
        if self.weights is None:
            return create_for_any_size(self.hp.backbone, self.hp.backbone_args), {}
        source = self.weights
        contents = read_checkpoint(source) if Path(source).is_file() else None
        decoder = _beneath("decoder.", (contents or {}).get("state_dict", {}))
        name, arguments = model_of(source, self.hp.backbone, self.hp.backbone_args, contents)
        if (reference := (contents or {}).get(DECODER_OF)) is not None:
            source = self.backbone_weights or reference["weights"]
            if not (Path(source).is_file() or source == reference["weights"]):
                raise InputError(f"model.backbone_weights: no such file: {Path(source).absolute()}")
            if Path(reference["weights"]).is_absolute() and not Path(source).is_file():
                raise InputError(
                    f"{self.weights} is a decoder of the backbone in {source}, which is not there any more: "
                    "say with model.backbone_weights where it is"
                )
            contents = read_checkpoint(source) if Path(source).is_file() else None
            name, arguments = model_of(source, name, arguments, contents)
        network: Network = "student" if self.hp.student else "teacher"
        backbone = load_backbone(source, name, arguments, network=network, any_size=True, contents=contents)
        self.hp.backbone, self.hp.backbone_args = name or source, arguments
        left_out = not (self.hp.train_backbone or self.hp.save_backbone or source == RANDOM)
        if reference is None and not left_out:
            return backbone, decoder
        digest = _digest(backbone)
        if reference is not None and digest != reference["digest"]:
            raise InputError(
                f"{source} is not the backbone that the decoder in {self.weights} was trained on (the "
                "weights differ): say with model.backbone_weights where that one is"
            )
        if left_out:
            where = str(Path(source).absolute()) if Path(source).is_file() else source
            self._reference = {"weights": where, "digest": digest}
        return backbone, decoder

    def train(self, mode: bool = True) -> "Segmentation":
        """Switch dropout and the like; a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if hasattr(self, "backbone") and not self.hp.train_backbone:
            self.backbone.eval()
        return self

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave a frozen backbone out, and say where it is."""
        super().on_save_checkpoint(checkpoint)
        if not self._reference:
            return
        for state in self._states_in(checkpoint):
            for name in [name for name in state if name.startswith("backbone.")]:
                del state[name]
        checkpoint[DECODER_OF] = self._reference

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the frozen backbone that was read already in the place of the one left out.

        Raises:
            InputError: it is another one than the run had.
        """
        super().on_load_checkpoint(checkpoint)
        if (reference := checkpoint.get(DECODER_OF)) is None:
            return
        if self._reference and reference["digest"] != self._reference["digest"]:
            raise InputError(
                f"{self._reference['weights']} is not the backbone that the run began with "
                f"({reference['weights']}): give that one as --weights"
            )
        own = self.backbone.state_dict()
        for state in self._states_in(checkpoint):
            state |= {f"backbone.{name}": value for name, value in own.items()}

    def _states_in(self, checkpoint: dict[str, Any]) -> list[dict[str, Tensor]]:
        """The weights, and those that Lightning's averaging of weights keeps beside them."""
        return [checkpoint[key] for key in ("state_dict", "current_model_state") if key in checkpoint]

    def features(self, images: Tensor) -> Tensor:
        """Patch features [B, D, h, w] of images [B, 3, H, W], whose sides are padded to whole patches."""
        on = torch.is_autocast_enabled(images.device.type)
        dtype = torch.get_autocast_dtype(images.device.type) if on else None
        if self.hp.train_backbone:
            return patch_features(self.backbone, images, autocast_dtype=dtype).to(self._precision())
        with torch.inference_mode():
            found = patch_features(self.backbone, images, autocast_dtype=dtype)
        return found.clone().to(self._precision())  # an ordinary tensor, fit for autograd

    def _precision(self) -> torch.dtype:
        """What the decoder computes in: float32, if the trainer has not made all of it half precision."""
        return next(self.decoder.parameters()).dtype

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes, H, W] of normalised images [B, 3, H, W], by the protocol of the evaluation."""
        if self.hp.protocol == "whole":
            return self._whole(images)
        height, width = images.shape[-2:]
        window, stride = self.hp.window, self.hp.stride
        total = images.new_zeros(len(images), self.hp.num_classes, height, width)
        times = images.new_zeros(height, width)
        for top in _starts(height, window, stride):
            for left in _starts(width, window, stride):
                part = (..., slice(top, top + window), slice(left, left + window))
                total[part] += self._whole(images[part])
                times[part[1:]] += 1
        return total / times

    def _whole(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        size = padded_size(self.backbone, (height, width))
        small = self.decoder(self.features(images)).float()
        return F.interpolate(small, size, mode="bilinear")[..., :height, :width]

    def training_step(self, batch: MaskBatch, batch_idx: int) -> Tensor:
        """Cross-entropy of the annotated pixels, at their own resolution."""
        images, masks, _ = batch
        height, width = images.shape[-2:]
        below, beside = (
            p - s for p, s in zip(padded_size(self.backbone, (height, width)), (height, width), strict=True)
        )
        masks = F.pad(masks, (0, beside, 0, below), value=IGNORED)
        loss = upsampled_cross_entropy(self.decoder(self.features(images)), masks)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def predicted(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Classes [B, H, W] int64 of images [B, 3, H', W'] at another size."""
        return upsampled_argmax(self(images), size)

    def validation_step(self, batch: MaskBatch, batch_idx: int) -> Tensor:
        """Count the pixels of each pair of classes, at the annotation's own size; gives the prediction."""
        return self._evaluate(batch, self.val_iou)

    def test_step(self, batch: MaskBatch, batch_idx: int) -> Tensor:
        """Count the pixels of each pair of classes, at the annotation's own size; gives the prediction."""
        return self._evaluate(batch, self.test_iou)

    def _evaluate(self, batch: MaskBatch, iou: MeanIoU) -> Tensor:
        height, width = batch.masks.shape[-2:]
        predicted = self.predicted(batch.images, (height, width))
        iou.update(predicted, batch.masks)
        return predicted

    def on_validation_epoch_end(self) -> None:
        """IoU from one confusion matrix over the whole set, of all processes."""
        self._conclude("val", self.val_iou)

    def on_test_epoch_end(self) -> None:
        """IoU from one confusion matrix over the whole set, of all processes."""
        self._conclude("test", self.test_iou)

    def _conclude(self, split: str, metric: MeanIoU) -> None:
        if self.trainer.sanity_checking:
            metric.reset()
            return
        self.iou = metric.compute()
        metric.reset()
        for name in IoU.SCALARS:
            self.log(f"{split}/{name}", getattr(self.iou, name), prog_bar=name == "miou", sync_dist=True)
        by_class = zip(self.class_names, self.iou.per_class.tolist(), strict=True)
        shares = {f"iou/{name}": share for name, share in by_class if not isnan(share)}
        for logger in self.trainer.loggers:
            logger.log_metrics(shares, step=max(0, self.global_step - 1))
        if self.trainer.state.fn != TrainerFn.FITTING:
            rank_zero_info(f"{split}/miou {float(self.iou.miou):.4f} ({self.protocol})")

    def predict_step(self, batch: MaskBatch, batch_idx: int) -> tuple[Tensor, Tensor]:
        """Positions in the data set [B], and classes [B, H, W] uint8 at the image's own size."""
        height, width = batch.masks.shape[-2:]
        return batch.indices, self.predicted(batch.images, (height, width)).byte()

    def on_predict_start(self) -> None:
        """Name a file for each image."""
        self._file_names = file_names(self.trainer.datamodule.predict_paths)  # type: ignore[attr-defined]

    def write_predictions(self, prediction: tuple[Tensor, Tensor], data: Any, directory: Path) -> None:
        """Write the classes of each image as PNGs: their indices, and their colours over the image."""
        colours = data.colours if len(data.colours) else distinct_colours(self.hp.num_classes)
        indices, maps = prediction
        for index, classes in zip(indices.tolist(), maps.cpu().numpy(), strict=True):
            image, _ = data.source("predict").read(index)
            write_classes(directory, self._file_names[index], image, classes, colours)

    def finish_predictions(self, data: Any, directory: Path) -> str:
        """Say where the files are."""
        return f"predictions and overlays: {directory}"

    def pictures(self, samples: Sequence[Any], data: Any, side: int) -> dict[str, Figure]:
        """Draw input, annotation, prediction and kernels of some samples, each in its own size."""
        inputs = [sample[0][None].to(self.device) for sample in samples]
        masks = [sample[1] for sample in samples]
        pairs = zip(inputs, masks, strict=True)
        predictions = [self.predicted(image, tuple(mask.shape[-2:]))[0].cpu() for image, mask in pairs]
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
        """Draw IoU by class and the confusion matrix."""
        if self.iou is None:
            return {}
        return {
            "iou": iou_figure(self.iou, self.class_names, data.colours, title=self.protocol),
            "confusion": confusion_figure(self.iou.confusion, self.class_names),
        }

    def configure_optimizers(self) -> Optimizer:
        """AdamW on the decoder, and on a trained backbone with a learning rate that falls by layer."""
        hp = self.hp
        announce_learning_rate(hp.lr, self.global_batch_size())
        self._learning_rate = partial(one_cycle, steps=self.optimizer_steps(), peak=hp.lr, up=hp.warmup)
        groups: list[dict[str, Any]] = [{"params": list(self.decoder.parameters())}]
        if hp.train_backbone:
            backbone: Any = self.backbone
            without_decay = backbone.no_weight_decay() if hasattr(backbone, "no_weight_decay") else ()
            groups += param_groups_layer_decay(
                backbone,
                weight_decay=hp.weight_decay,
                no_weight_decay_list=without_decay,
                layer_decay=hp.layer_decay,
            )
        return AdamW(groups, lr=hp.lr, weight_decay=hp.weight_decay)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Take a step with that step's learning rate."""
        for group in optimizer.param_groups:
            group["lr"] = self._learning_rate(self.global_step) * group.get("lr_scale", 1.0)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


def _width(backbone: Any) -> int:
    """D of the patch features."""
    if (widths := getattr(backbone, "feature_info", None)) is None:
        raise InputError(
            f"{type(backbone).__name__} does not tell its features: choose a timm model that does"
        )
    channels: int = widths[-1]["num_chs"]
    return channels


def _starts(length: int, window: int, stride: int) -> Iterator[int]:
    """Where the windows along a side begin; the last one ends with the side."""
    for number in range(max(0, ceil((length - window) / stride)) + 1):
        yield max(0, min(number * stride, length - window))


def _beneath(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _load(decoder: MlpDecoder, state: dict[str, Tensor]) -> str:
    """Load the decoder's weights, or say why that cannot be."""
    if not state:
        return "there is no decoder in it"
    own, given = (
        {name: list(value.shape) for name, value in each.items()} for each in (decoder.state_dict(), state)
    )
    if own != given:
        return f"its decoder is of other features or classes ({given} in place of {own})"
    decoder.load_state_dict(state)
    return ""


def _digest(backbone: nn.Module) -> str:
    """SHA-256 of all weights: two backbones with the same are the same."""
    digest = hashlib.sha256()
    for name, value in sorted(backbone.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
