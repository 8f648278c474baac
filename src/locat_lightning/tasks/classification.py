"""Supervised classification: the paper's ImageNet recipe around any timm model."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveInt
from lightning.pytorch import Trainer
from timm.optim import create_optimizer_v2, list_optimizers
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from locat_lightning.backbones.create import create_backbone, create_for_any_size, noted_arguments
from locat_lightning.backbones.flexible import check_rest, make_flexible, use_patches
from locat_lightning.backbones.weights import contents_of, load_weights
from locat_lightning.data.dataset import ImageBatch
from locat_lightning.errors import InputError, near
from locat_lightning.evaluation.gather import gather_rows
from locat_lightning.evaluation.knn import label_ranks
from locat_lightning.evaluation.per_image import Scores, names_of
from locat_lightning.evaluation.shots import FIGURES, shots_of
from locat_lightning.schedules import warmup_then_linear
from locat_lightning.tasks.base import announce_size
from locat_lightning.tasks.channels import agree_on_channels, tell_channels
from locat_lightning.tasks.class_names import DATA_CLASSES, check_same_classes, classes_of
from locat_lightning.tasks.experts import add_experts, check_number, share
from locat_lightning.tasks.mixing import Kind, Mixed, mixing_of
from locat_lightning.tasks.patch_sizes import check_given, check_sizes, size_of_batch
from locat_lightning.tasks.prediction_files import write_table
from locat_lightning.tasks.token_distillation import TokenDistilled


class Classification(TokenDistilled):
    """Train a timm model to name the class of an image.

    The defaults are the recipe of "Locality-Attending Vision Transformer" (ICLR 2026) for ImageNet-1K, which
    is DeiT's: AdamW, warm-up then linear decay by step, mixup, cutmix and label smoothing.

    Args:
        backbone: timm's name of the model: `locatvit_tiny`, `vit_tiny_patch16_224`, …
        backbone_args: further arguments of the model, as in `timm.create_model`.
        locat: puts LocAt into a model that has none: arguments of `locat_lightning.add_locat`, for example
            `{start: identity}`, with which a pretrained model begins as it is.
        num_classes: number of classes; null takes that of the data.
        lr: peak learning rate; null takes base_lr · global batch / 512.
        base_lr: learning rate at 512 images a step.
        optimizer: timm's name of an optimizer.
        weight_decay: weight decay of matrices; biases, 1-d parameters, position and class tokens have none.
        warmup_epochs: epochs of linear warm-up.
        warmup_lr: learning rate of the first step.
        min_lr: learning rate of the last step.
        label_smoothing: share of the target that is spread over all classes.
        mixing: how images are mixed, and what their labels follow (see `Mixing`): `mixup` (and CutMix),
            `transmix`, `maskmix`, `mixpro` or `patch_mixing`.
        mixing_attention: the attention that labels of `transmix` and `mixpro` follow: `class`, that of [CLS]
            in the last block, or `refined`, that of [CLS] in PRR, which the classifier reads.
        mixing_prob: probability that a batch is mixed by patches with `maskmix`, `mixpro` or `patch_mixing`;
            mixup and CutMix have the other batches.
        mixup: α of mixup's Beta distribution; 0 for none.
        cutmix: α of cutmix's Beta distribution; 0 for none.
        mixup_prob: probability that a batch is mixed at all.
        mixup_switch_prob: probability of cutmix where both are on.
        patch_sizes: sides of the patches in pixels, of which each training batch draws one, [2, 4, 8] for
            example (FlexiViT): the model can be measured with each. Images are evaluated with the backbone's
            own, with which alone null trains.
        patch_shares: shares of the training, in which these sizes come one after the other instead: [0.3,
            0.7] for sizes [8, 4] begins with coarse patches, whose steps cost less.
        experts: copies of every second feed-forward network, among which each step shares out the tokens at
            random (experts' weight averaging); evaluated is one of their mean weights. null for none.
        expert_share: β, how far each expert moves to the mean of the others after a step; it grows from 0 to
            this along the run.
        class_names: names of the classes, by label; null takes those of the data.
        options: those of `TokenDistilled`, `LongTailed`, `SharpnessAware` (`sam`) and every task (`Task`).

    Attributes:
        data_classes: classes of the data that the model was trained on, by label; [] if unknown.
        results: what the last evaluation found of each image.
    """

    results: Scores | None = None
    _own_patch: int | None = None  # side of the backbone's patches, where those of batches differ

    def __init__(
        self,
        backbone: str = "locatvit_tiny",
        *,
        backbone_args: dict[str, Any] | None = None,
        locat: dict[str, Any] | None = None,
        num_classes: PositiveInt | None = None,
        lr: NonNegativeFloat | None = None,
        base_lr: NonNegativeFloat = 5e-4,
        optimizer: str = "adamw",
        weight_decay: NonNegativeFloat = 0.05,
        warmup_epochs: NonNegativeFloat = 20,
        warmup_lr: NonNegativeFloat = 1e-7,
        min_lr: NonNegativeFloat = 1e-7,
        label_smoothing: ClosedUnitInterval = 0.1,
        mixing: Kind = "mixup",
        mixing_attention: Literal["class", "refined"] = "class",
        mixing_prob: ClosedUnitInterval = 0.5,
        mixup: NonNegativeFloat = 0.8,
        cutmix: NonNegativeFloat = 1.0,
        mixup_prob: ClosedUnitInterval = 1.0,
        mixup_switch_prob: ClosedUnitInterval = 0.5,
        patch_sizes: list[PositiveInt] | None = None,
        patch_shares: list[ClosedUnitInterval] | None = None,
        experts: PositiveInt | None = None,
        expert_share: ClosedUnitInterval = 0.3,
        class_names: list[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.data_classes: list[str] = []
        self._predicted: list[tuple[Tensor, Tensor]] = []  # by `write_predictions`
        self._ranked: list[tuple[Tensor, Tensor, Tensor]] = []  # by `_evaluate`: indices, labels and ranks

    def check(self, trainer: Trainer, *, training: bool) -> None:
        super().check(trainer, training=training)
        name, known = self.hp.optimizer, list_optimizers()
        if name.lower().removeprefix("lookahead_") not in known:
            raise InputError(f"model.optimizer: timm knows no optimizer {name!r}{near(name, known, n=5)}")
        check_given(self.hp.patch_sizes, self.hp.patch_shares)
        check_number(self.hp.experts)

    def configure_model(self) -> None:
        hp, new = self.hp, not hasattr(self, "backbone")
        contents = contents_of(self.weights) if new and self.weights else None
        num_classes = self._agree_on_classes(contents or {})
        self.agree_on_class_counts(contents, training=self._is_training())
        if not new:
            return
        agree_on_channels(self)
        flexible = bool(hp.patch_sizes) and self._is_training()
        create = create_for_any_size if flexible else create_backbone
        self.backbone = create(hp.backbone, noted_arguments(hp), num_classes)
        self._agree_on_size(strict=flexible)
        tell_channels(self, self.backbone)
        announce_size(hp.backbone, self.backbone)
        if self.weights is not None:
            load_weights(self.backbone, self.weights, warm_start=self._is_training(), contents=contents)
        if self._is_training():
            self.add_teacher(self.backbone, self.data_classes)
        if flexible:
            self._take_patch_sizes()
        if hp.experts is not None and self._is_training():
            add_experts(self.backbone, hp.experts)
        tops = [k for k in (1, 5) if k < num_classes]
        accuracy = MetricCollection(
            {
                f"top{k}": MulticlassAccuracy(num_classes, top_k=k, average="micro", validate_args=False)
                for k in tops
            }
        )
        self.train_accuracy, self.val_accuracy, self.test_accuracy = (
            accuracy.clone(prefix=f"{split}/") for split in ("train", "val", "test")
        )
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()
        self.mixup = mixing_of(hp, self.backbone, num_classes)

    def _is_training(self) -> bool:
        return self._trainer is not None and self.trainer.training  # `trainer` is an error without one

    def _agree_on_classes(self, contents: Mapping[str, Any]) -> int:
        """Return the number of classes; note the names in the data, or check that they are those learnt."""
        number, names = self.agree_on_classes("data.root")
        self.data_classes = self.data_classes or classes_of(contents)
        if self._is_training():
            self.data_classes = names
        elif self._trainer is not None and not self.trainer.predicting:
            learnt = self.data_classes or self.class_names
            if len(learnt) == len(names):  # load_weights reports another number
                check_same_classes(learnt, names)
        if self._is_training() and self.class_names and len(self.class_names) != number:
            raise InputError(f"model.class_names: {len(self.class_names)} names for {number} classes")
        if number < 2:
            raise InputError(f"with {number} class ({', '.join(names)}) there is nothing to classify")
        return number

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.data_classes != self.class_names:  # where `class_names` renames them
            checkpoint[DATA_CLASSES] = self.data_classes

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        before = classes_of(checkpoint)
        check_same_classes(before, self.data_classes)
        self.data_classes = self.data_classes or before

    def _agree_on_size(self, *, strict: bool) -> None:
        """Check that the model takes images of the data's size, is built for it if `strict`."""
        given = self.of_data("img_size")
        patches = getattr(self.backbone, "patch_embed", None)
        strict = strict or getattr(patches, "strict_img_size", False)
        taken = getattr(patches, "img_size", None) if strict else None
        if given is not None and taken is not None and tuple(taken) != (given, given):
            raise InputError(
                f"data.img_size is {given}, but {self.hp.backbone} takes {taken[0]}×{taken[1]}: make "
                f"them agree, for example with --model.backbone_args.img_size {given}"
            )
        check_rest(self.backbone, given)

    def _take_patch_sizes(self) -> None:
        """Let the backbone take patches of all sizes, and note its own."""
        sizes, backbone = self.hp.patch_sizes, self.backbone
        own = getattr(getattr(backbone, "patch_embed", None), "patch_size", (0,))[0]
        check_sizes(sizes, self.hp.patch_shares, own, self.of_data("img_size"))
        try:
            make_flexible(backbone, sizes)
        except ValueError as error:
            raise InputError(f"model.patch_sizes does not fit {self.hp.backbone}: {error}") from error
        self._own_patch = own

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        if self._own_patch is not None:
            hp, seed = self.hp, [self._seed or 0, self.current_epoch, batch_idx]
            size = size_of_batch(hp.patch_sizes, hp.patch_shares, self.step / self.steps, seed)
            use_patches(self.backbone, size)
            self.log("train/patch_size", float(size))

    def on_after_backward(self) -> None:
        super().on_after_backward()
        if self._own_patch is not None:  # for whatever looks at the model between two batches
            use_patches(self.backbone, self._own_patch)

    def after_step(self, step: int) -> None:
        if self.hp.experts is not None:
            share(self.backbone, self.hp.expert_share * (step + 1) / self.steps)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Return the cross-entropy with soft targets; loss and accuracy are logged of the first process."""
        images, labels = batch[:2]
        mixed = self.mixup(images, labels) if self.mixup is not None and len(images) > 1 else None
        taught = self.taught(images if mixed is None else mixed.images)
        found, trained_with = self.sharpened(lambda: self._compare(images, labels, mixed, taught))
        loss, logits, labels = found
        self.log("train/loss", loss)
        if self.is_logged():
            self.log_dict(self.train_accuracy(logits, labels))
        return trained_with

    def _compare(
        self, images: Tensor, labels: Tensor, mixed: Mixed | None, taught: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss, logits and labels of a batch or its mixtures; `taught` are a teacher's logits."""
        outputs: Any = self(images if mixed is None else mixed.images)
        of_class, of_token = outputs if taught is not None else (outputs, outputs)
        logits = outputs if taught is None else (of_class + of_token) / 2
        targets, smoothing = labels, self.hp.label_smoothing
        if self.mixup is not None and mixed is not None:
            targets, smoothing = self.mixup.targets(mixed, logits)
        loss = self.cross_entropy(of_class, targets, smoothing, reweighted=taught is None)
        if taught is not None:
            loss = self.distilled(loss, of_token, taught)
        return loss, logits, targets if targets.ndim == 1 else targets.argmax(-1)

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        return self._evaluate(batch, "val", self.val_loss, self.val_accuracy)

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self._evaluate(batch, "test", self.test_loss, self.test_accuracy)

    def _evaluate(
        self, batch: ImageBatch, split: str, mean_loss: MeanMetric, accuracy: MetricCollection
    ) -> Tensor:
        """Measure loss, top-1 and top-5 over the whole set, each image once, and return the logits."""
        images, labels = batch[:2]
        logits = self.watched(self(images))
        mean_loss.update(F.cross_entropy(logits.float(), labels, reduction="none"))
        accuracy.update(logits, labels)
        if not self.trainer.sanity_checking:
            indices = batch.indices if hasattr(batch, "indices") else torch.full_like(labels, -1)
            self._ranked.append((indices, labels, label_ranks(logits, labels)))
        self.log(f"{split}/loss", mean_loss, prog_bar=split == "val")
        self.log_dict(accuracy, prog_bar=True)
        return logits

    def hardness(self, outputs: Tensor, batch: ImageBatch) -> Tensor:
        """Return how much surer of a wrong class than of the label each prediction is, [B]; 0 where right."""
        shares = outputs.float().softmax(-1)
        return shares.amax(-1) - shares.gather(-1, batch[1][:, None])[:, 0]

    def _conclude(self, split: str) -> None:
        """Keep the hits of each image of all processes as `results`; log top-1 of groups of classes."""
        if self.trainer.sanity_checking:
            return
        nothing = torch.empty(3, 0, dtype=torch.int64, device=self.device)
        columns = [torch.cat(column).cpu() for column in zip(nothing, *self._ranked, strict=True)]
        self._ranked.clear()
        indices = columns[0]
        if (indices < 0).any():  # of data of the user's own
            indices = torch.arange(len(indices)) * self.trainer.world_size + self.global_rank
        indices, labels, ranks = gather_rows(indices, indices, *columns[1:], device=self.device)
        tops = {f"top{k}": ranks < k for k in (1, 5) if k < self.hp.num_classes}
        names = names_of(self.trainer.datamodule, split, indices.tolist())  # type: ignore[attr-defined]
        found = Scores(indices, names, labels, tops, shots_of(labels, self.class_counts))
        self.results = found if names else None
        figures = found.figures(found.statistics().sum(0), len(labels))
        for name in FIGURES:
            if name in figures:
                value = figures[name].to(self.device, torch.float32)  # as NCCL has it
                self.log(f"{split}/{name}", value, sync_dist=True, prog_bar=name == "balanced")

    def predict_step(self, batch: ImageBatch, batch_idx: int) -> tuple[Tensor, Tensor]:
        """Return positions in the data set [B] and probabilities [B, classes] (float32)."""
        probabilities = self.watched(self(batch.images)).float().softmax(-1)
        self.check_outputs()
        return batch.indices, probabilities

    def write_predictions(self, prediction: tuple[Tensor, Tensor], data: Any, directory: Path) -> None:
        self._predicted.append((prediction[0].cpu(), prediction[1].cpu()))

    def finish_predictions(self, data: Any, directory: Path) -> str:
        """Write `predictions.csv` of all processes, in the order of the data set."""
        nothing = torch.empty(0, dtype=torch.int64), torch.empty(0, self.hp.num_classes)
        indices, probabilities = map(torch.cat, zip(nothing, *self._predicted, strict=True))
        self._predicted.clear()
        indices, probabilities = gather_rows(indices, indices, probabilities, device=self.device)
        if not len(indices):
            raise InputError("nothing is predicted: none of the images can be read")
        table = directory / "predictions.csv"
        if self.global_rank == 0:
            paths = [data.predict_paths[index] for index in indices.tolist()]
            write_table(table, paths, probabilities, self.class_names)
        return f"{len(indices)} predictions: {table}"

    def configure_optimizers(self) -> Optimizer:
        """Return AdamW (or another of timm's) without weight decay of biases, norms and tokens."""
        hp, peak = self.hp, self.peak_learning_rate(reference_batch=512)
        steps, warmup = self.optimizer_steps(), self.warmup_steps(hp.warmup_epochs)
        self._learning_rate = partial(
            warmup_then_linear, steps=steps, warmup=warmup, peak=peak, start=hp.warmup_lr, end=hp.min_lr
        )
        own = {"fused": self.fused} if hp.optimizer in ("adam", "adamw") else {}  # of torch
        optimizer: Optimizer = create_optimizer_v2(
            self.backbone, opt=hp.optimizer, lr=peak, weight_decay=hp.weight_decay, **own
        )
        return optimizer

    def set_rates(self, groups: list[dict[str, Any]]) -> None:
        for group in groups:
            group["lr"] = self._learning_rate(self.step)
            if group["weight_decay"] > 0:  # perhaps from a checkpoint
                group["weight_decay"] = self.hp.weight_decay
