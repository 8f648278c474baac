"""Depth of each pixel by a linear head on the patch features of a backbone."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from locat_lightning.data.depth import DepthBatch, write_depth
from locat_lightning.errors import InputError
from locat_lightning.evaluation.dense import feature_width, padded_size
from locat_lightning.evaluation.depth import NAMES, depth_errors, eigen_crop
from locat_lightning.evaluation.gather import gather_rows
from locat_lightning.evaluation.per_image import Scores, names_of
from locat_lightning.figures.depth import depth_figure
from locat_lightning.figures.grid import rgb
from locat_lightning.nn.depth import DepthDecoder, gradient_loss, measured, scale_invariant_loss
from locat_lightning.schedules import one_cycle
from locat_lightning.tasks.dense import DenseTask
from locat_lightning.tasks.prediction_files import file_names


class Depth(DenseTask):
    """Train a linear head to predict the depth of each pixel from the patch features of a backbone.

    The head and the losses are those of DINOv2's linear evaluation on NYUv2: features before the final norm,
    each patch's with the [CLS] token's beside them, 256 bins. Length of the training, learning rate and
    weight decay are DINOv3's. Figures are means over the images of the errors of each.

    Args:
        layers: how many of the last blocks the head reads, or which, by index from 0.
        cls_token: whether the head also reads the [CLS] token, beside each patch.
        bins: number of depths that the head weighs.
        nearest: smallest depth that is predicted, in metres.
        farthest: largest depth that is predicted; measured ones beyond it do not count.
        gradient_weight: weight of the loss of gradients.
        steps_without_variance: optimizer steps at the beginning whose loss leaves out the variance.
        lr: peak learning rate.
        weight_decay: weight decay of the head, and of the matrices of a trained backbone.
        warmup: share of the steps in which the learning rate rises.
        crop: whether only Eigen's crop of an image is evaluated.
        flip: whether evaluation averages over the image and its mirror image.
        options: those of every task with a head (`DenseTask`).

    Attributes:
        errors: result of the last evaluation, by name.
        results: the same by image.
    """

    errors: dict[str, Tensor] | None = None
    results: Scores | None = None

    def __init__(
        self,
        backbone: str | None = None,
        *,
        layers: PositiveInt | list[NonNegativeInt] = 1,
        cls_token: bool = True,
        bins: PositiveInt = 256,
        nearest: PositiveFloat = 1e-3,
        farthest: PositiveFloat = 10.0,
        gradient_weight: NonNegativeFloat = 0.5,
        steps_without_variance: NonNegativeInt = 100,
        lr: NonNegativeFloat = 3e-4,
        weight_decay: NonNegativeFloat = 1e-4,
        warmup: ClosedUnitInterval = 1 / 3,
        crop: bool = True,
        flip: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(backbone, weight_decay=weight_decay, **options)
        if nearest >= farthest:
            raise InputError(f"model.nearest ({nearest:g}) must be less than model.farthest ({farthest:g})")
        self._file_names: list[str] = []  # of the images that are predicted
        # Positions, measured pixels and errors of the images seen so far.
        self._measured: list[tuple[Tensor, Tensor, Tensor]] = []

    @property
    def read(self) -> dict[str, Any]:
        return {"layers": self.hp.layers, "with_cls": self.hp.cls_token}

    def summary(self) -> str:
        how = "Eigen's crop" if self.hp.crop else "whole image"
        return f"{how}, up to {self.hp.farthest:g} m" + (", with its mirror image" if self.hp.flip else "")

    def configure_model(self) -> None:
        if not hasattr(self, "backbone"):
            self.read_weights(self._make_decoder)

    def _make_decoder(self, state: dict[str, Tensor]) -> nn.Module:
        hp = self.hp
        width = feature_width(self.backbone, hp.layers) * (2 if hp.cls_token else 1)
        head = DepthDecoder(width, hp.bins, hp.nearest, hp.farthest)
        self.load_decoder(head, state)
        return head

    def forward(self, images: Tensor) -> Tensor:
        """Return depths [B, H, W] in metres, of normalised images [B, 3, H, W]."""
        height, width = images.shape[-2:]
        depths = self.decoder(self.features(images))[:, None]
        size = padded_size(self.backbone, (height, width))
        return F.interpolate(depths, size, mode="bilinear")[:, 0, :height, :width]

    def training_step(self, batch: DepthBatch, batch_idx: int) -> Tensor:
        """Return the scale-invariant loss of the measured pixels, and their loss of gradients."""
        hp, predicted = self.hp, self(batch.images)
        with_variance = self.step >= hp.steps_without_variance
        options = {"farthest": hp.farthest, "with_variance": with_variance}
        loss = scale_invariant_loss(predicted, batch.depths, **options)
        self.log("train/loss_depth", loss)
        if hp.gradient_weight:
            of_gradients = gradient_loss(predicted, batch.depths, farthest=hp.farthest)
            self.log("train/loss_gradient", of_gradients)
            loss = loss + hp.gradient_weight * of_gradients
        self.log("train/loss", loss)
        return loss

    def predicted(self, images: Tensor, size: Sequence[int]) -> Tensor:
        """Return depths [B, H, W] in metres of images [B, 3, H', W'], in a size (H, W)."""
        found = self(images)
        if self.hp.flip:
            found = (found + self(images.flip(-1)).flip(-1)) / 2
        if found.shape[1:] != tuple(size):
            found = F.interpolate(found[:, None], tuple(size), mode="bilinear")[:, 0]
        return self.watched(found.clamp(self.hp.nearest, self.hp.farthest))

    def validation_step(self, batch: DepthBatch, batch_idx: int) -> Tensor:
        """Measure the errors at the size of the measured depths, and return the prediction."""
        predicted = self.predicted(batch.images, batch.depths.shape[1:])
        valid = measured(batch.depths, self.hp.farthest)
        if self.hp.crop:
            valid &= eigen_crop(batch.depths)
        errors = torch.stack(list(depth_errors(predicted, batch.depths, valid).values()), 1)
        self._measured.append((batch.indices, valid.sum((1, 2)), errors))
        return predicted

    test_step = validation_step

    def _conclude(self, split: str) -> None:
        """Log the mean errors over the images of all processes that have a measured pixel."""
        whole = torch.empty(2, 0, dtype=torch.int64, device=self.device)
        nothing = *whole, torch.empty(0, len(NAMES), dtype=torch.float32, device=self.device)
        columns = [torch.cat(column).cpu() for column in zip(nothing, *self._measured, strict=True)]
        self._measured.clear()
        if self.trainer.sanity_checking:
            return
        found = gather_rows(columns[0], *columns, device=self.device)
        indices, pixels, of_images = (each[found[1] > 0] for each in found)
        if not len(indices):
            raise InputError("no pixel of the images has a depth: check the files, and model.farthest")
        names = names_of(self.trainer.datamodule, split, indices.tolist())  # type: ignore[attr-defined]
        scores = dict(zip(NAMES, of_images.unbind(1), strict=True))
        self.results = Scores(indices, names, pixels, scores)
        self.errors = errors = {name: each.mean().to(self.device) for name, each in scores.items()}
        for name, value in errors.items():
            self.log(f"{split}/{name}", value, prog_bar=name == "rmse", sync_dist=True)

    def predict_step(self, batch: DepthBatch, batch_idx: int) -> tuple[Tensor, Tensor]:
        """Return positions in the data set [B], and depths [B, H, W] in metres at the image's own size."""
        predicted = self.predicted(batch.images, batch.depths.shape[1:])
        self.check_outputs()
        return batch.indices, predicted

    def write_predictions(self, prediction: tuple[Tensor, Tensor], data: Any, directory: Path) -> None:
        """Write the depths of each image as a PNG of 16 bits, in the unit of the measured ones."""
        self._file_names = self._file_names or file_names(data.predict_paths)
        for index, depths in zip(prediction[0].tolist(), prediction[1].cpu().numpy(), strict=True):
            write_depth(
                directory / "predictions" / f"{self._file_names[index]}.png", depths, data.depth_scale
            )

    def finish_predictions(self, data: Any, directory: Path) -> str:
        self._file_names = []
        return f"predictions: {directory / 'predictions'}"

    def pictures(self, samples: Sequence[Any], data: Any, side: int) -> dict[str, Figure]:
        """Draw input, measured and predicted depth of some samples, each in its own size."""
        inputs, depths = ([sample[place] for sample in samples] for place in (0, 1))
        predictions = [
            self.predicted(image[None].to(self.device), depth.shape)[0].cpu()
            for image, depth in zip(inputs, depths, strict=True)
        ]
        images = [rgb(image[None], data.normalisation)[0] for image in inputs]
        figure = depth_figure(images, depths, predictions, farthest=self.hp.farthest, side=side)
        return {"validation": figure}

    def configure_optimizers(self) -> Optimizer:
        """Return AdamW over the head, and a trained backbone with a learning rate for each layer."""
        peak = self.peak_learning_rate()
        self._learning_rate = partial(one_cycle, steps=self.optimizer_steps(), peak=peak, up=self.hp.warmup)
        return self.adamw([self.decoder])

    def set_rates(self, groups: list[dict[str, Any]]) -> None:
        for group in groups:
            group["lr"] = self._learning_rate(self.step) * group.get("lr_scale", 1.0)
