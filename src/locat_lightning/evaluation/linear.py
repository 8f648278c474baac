"""Linear classification of a frozen backbone's features: the paper's recipe and a sweep of rates."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.seed import isolate_rng
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from locat_lightning.errors import InputError
from locat_lightning.evaluation.batches import Batches, LabelledBatch, frozen
from locat_lightning.evaluation.features import extract_features, image_features
from locat_lightning.evaluation.gather import distributed, first_process
from locat_lightning.evaluation.knn import check_labelled, inverse_norms, label_ranks
from locat_lightning.schedules import cosine

DINOV2_LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)


class LinearResult(NamedTuple):
    """A trained linear classifier and its accuracy."""

    learning_rate: float  # as asked for, per 256 images
    effective_learning_rate: float  # learning_rate * images per step / 256, at the first step
    top1: float  # share of the validation images, 0 to 1; 0 for a head that diverged
    top5: float
    head: nn.Linear  # [C, D], on the CPU


class LinearSweep(NamedTuple):
    """One result for each learning rate, in the order given."""

    results: tuple[LinearResult, ...]

    @property
    def best(self) -> LinearResult:
        """The result with the highest top-1; of equal ones the first."""
        return max(self.results, key=lambda result: result.top1)


def train_linear(
    backbone: nn.Module,
    train_loader: Batches[LabelledBatch],
    val_loader: Batches[LabelledBatch],
    device: torch.device | str,
    *,
    num_classes: int,
    batch_size: int,
    epochs: int = 100,
    learning_rate: float = 0.001,
    momentum: float = 0.9,
    seed: int = 0,
    autocast_dtype: torch.dtype | None = None,
    progress: bool = True,
) -> LinearResult:
    """Train a linear classifier on augmented images, as DINO and the paper do.

    SGD with momentum and no weight decay, learning rate `learning_rate` * `batch_size` / 256 falling as a
    cosine to 0 over all steps. Validation images are not augmented, so they pass through the backbone only
    once. With `torch.distributed` initialised, each process brings its part of both data sets (the training
    parts with equally many batches) and gradients are averaged over all images. A training around this call
    is not touched.

    Args:
        backbone: see `features.image_features`; already on `device`.
        train_loader: batches of augmented images; a `DistributedSampler` of it is told the epoch.
        val_loader: batches of validation images.
        device: where to compute.
        num_classes: C.
        batch_size: images per step, over all processes.
        epochs: passes over the training images.
        learning_rate: at the first step, per 256 images.
        momentum: of SGD.
        seed: of the head's initial weights.
        autocast_dtype: mixed precision of the backbone; the head computes in float32.
        progress: show progress bars (on the first process only).

    Raises:
        InputError: a loader is empty, labels are missing or not below `num_classes`, or there is one class.
    """
    device = torch.device(device)
    steps = epochs * len(train_loader)
    if steps == 0:
        raise InputError(
            f"no step to train for: {epochs} epochs of {len(train_loader)} batches "
            "(are there fewer images than in a batch, and the last one is dropped?)"
        )
    val = extract_features(backbone, val_loader, device, autocast_dtype=autocast_dtype, progress=progress)
    _check_labels(val.labels, "validation", num_classes)
    effective = learning_rate * batch_size / 256
    heads = _Heads(1, num_classes, val.features.shape[1], momentum, seed, device)
    val_features, val_labels = val.features.to(device), val.labels.to(device)
    show = progress and first_process()
    step = 0
    sampler = getattr(train_loader, "sampler", None)
    with isolate_rng(), frozen(backbone), Progress(disable=not show) as bar:
        task = bar.add_task("Training a linear classifier", total=steps)
        for epoch in range(epochs):
            if isinstance(sampler, DistributedSampler):
                sampler.set_epoch(epoch)
            for batch in train_loader:
                _check_labels(batch.labels, "training", num_classes)
                with torch.inference_mode():
                    images = batch.images.to(device, non_blocking=True)
                    features = image_features(backbone, images, autocast_dtype=autocast_dtype)
                rates = torch.tensor([cosine(step, steps=steps, start=effective, end=0.0)])
                heads.step(features, batch.labels.to(device), rates, average_processes=distributed())
                step += 1
                bar.advance(task)
            top1 = heads.accuracy(val_features, val_labels)[0][0]
            bar.update(task, description=f"Linear classifier, epoch {epoch + 1}: top-1 {top1:.2%}")
    return heads.results((learning_rate,), (effective,), val_features, val_labels)[0]


def sweep_linear(
    train_features: Tensor,
    train_labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    *,
    learning_rates: Sequence[float] = DINOV2_LEARNING_RATES,
    epochs: int = 100,
    batch_size: int = 1024,
    momentum: float = 0.9,
    seed: int = 0,
    progress: bool = True,
) -> LinearSweep:
    """Train one linear classifier for each learning rate, all at once, on features that are already there.

    The heads start alike and see the same batches, so each is what it would be alone; every product with
    the features is one matrix product for all of them. It runs where `train_features` are. The global random
    number generators are not used.

    Args:
        train_features: [N, D].
        train_labels: [N] int64.
        val_features: [M, D].
        val_labels: [M] int64.
        learning_rates: the grid (by default DINOv2's), at the first step and per 256 images.
        epochs: passes over the training images, in a new order each.
        batch_size: images per step, at most N; the last batch of an epoch may be smaller.
        momentum: of SGD.
        seed: of initial weights and order.
        progress: show a progress bar.

    Raises:
        InputError: images or labels are missing, features do not match or are not finite, there is only one
            class, or no learning rate or epoch.
    """
    device = train_features.device
    check_labelled(train_features, train_labels, "training")
    check_labelled(val_features, val_labels, "validation")
    if train_features.ndim != 2 or train_features.shape[1:] != val_features.shape[1:]:
        raise InputError(
            f"features of shape {list(train_features.shape)} and {list(val_features.shape)} cannot be "
            "compared: extract both with the same backbone"
        )
    inverse_norms(train_features, "training")  # for its check that they are finite
    inverse_norms(val_features, "validation")
    if not learning_rates or epochs < 1 or batch_size < 1:
        raise InputError(
            f"a linear sweep with {len(learning_rates)} learning rates, {epochs} epochs and batches of "
            f"{batch_size} trains nothing: give at least one of each"
        )
    num_classes = int(max(train_labels.max(), val_labels.max())) + 1
    if len(train_labels.unique()) < 2:
        raise InputError("all training images are of one class: a linear classifier needs two or more")

    images = len(train_features)
    batch_size = min(batch_size, images)
    steps = epochs * math.ceil(images / batch_size)
    effective = [rate * batch_size / 256 for rate in learning_rates]
    heads = _Heads(len(learning_rates), num_classes, train_features.shape[1], momentum, seed, device)
    generator = torch.Generator().manual_seed(seed)
    train_labels, val_labels = train_labels.to(device), val_labels.to(device)
    step = 0
    with Progress(disable=not progress) as bar:
        task = bar.add_task(f"Training {len(learning_rates)} linear classifiers", total=steps)
        for _ in range(epochs):
            for rows in torch.randperm(images, generator=generator).to(device).split(batch_size):
                rates = torch.tensor([cosine(step, steps=steps, start=rate, end=0.0) for rate in effective])
                heads.step(train_features[rows].float(), train_labels[rows], rates)
                step += 1
                bar.advance(task)
    return LinearSweep(heads.results(learning_rates, effective, val_features.to(device), val_labels))


class _Heads:
    """G linear classifiers of the same features, trained together by SGD with momentum.

    The gradient of softmax regression is written out: nothing is kept for a backward pass, and it works
    inside `torch.inference_mode`, where Lightning runs its validation, too.

    Attributes:
        weight: [G, C, D].
        bias: [G, C].
    """

    def __init__(
        self, heads: int, classes: int, dim: int, momentum: float, seed: int, device: torch.device
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        start = torch.empty(classes, dim).normal_(std=0.01, generator=generator)
        self.weight = start.to(device).repeat(heads, 1, 1)
        self.bias = torch.zeros(heads, classes, device=device)
        self.momentum = momentum
        self.velocity = torch.zeros_like(self.weight), torch.zeros_like(self.bias)

    def logits(self, features: Tensor) -> Tensor:
        """Map features [B, D] to logits [B, G, C]: one matrix product for all heads."""
        with torch.autocast(features.device.type, enabled=False):
            flat: Tensor = torch.addmm(self.bias.flatten(), features.float(), self.weight.flatten(0, 1).T)
        return flat.view(len(features), *self.bias.shape)

    @torch.no_grad()
    def step(
        self, features: Tensor, labels: Tensor, rates: Tensor, *, average_processes: bool = False
    ) -> None:
        """Take a step of each head at its own rate, `rates` [G], on features [B, D] and labels [B]."""
        residual = self.logits(features).softmax(-1)
        residual[torch.arange(len(labels), device=labels.device), :, labels] -= 1
        with torch.autocast(features.device.type, enabled=False):
            gradients = (residual.flatten(1).T @ features).view_as(self.weight), residual.sum(0)
        count = torch.tensor(float(len(labels)), device=features.device)
        if average_processes:
            for term in (*gradients, count):
                dist.all_reduce(term)
        rates = rates.to(features.device)
        for parameter, velocity, gradient in zip(
            (self.weight, self.bias), self.velocity, gradients, strict=True
        ):
            velocity.mul_(self.momentum).add_(gradient.div_(count))
            parameter.addcmul_(velocity, rates.view(-1, *[1] * (velocity.ndim - 1)), value=-1)

    @torch.no_grad()
    def accuracy(self, features: Tensor, labels: Tensor) -> list[list[float]]:
        """Return (top-1, top-5) of each head, as shares of the images."""
        hits = torch.zeros(len(self.bias), 2, dtype=torch.int64, device=features.device)
        chunk = max(1, 2**24 // self.bias.numel())
        for part, truth in zip(features.split(chunk), labels.split(chunk), strict=True):
            ranks = label_ranks(self.logits(part), truth[:, None].expand(-1, len(self.bias)))
            hits += torch.stack([(ranks < 1).sum(0), (ranks < 5).sum(0)], 1)
        return [[hit / len(labels) for hit in row] for row in hits.tolist()]

    def results(
        self,
        learning_rates: Sequence[float],
        effective_learning_rates: Sequence[float],
        features: Tensor,
        labels: Tensor,
    ) -> tuple[LinearResult, ...]:
        """Measure each head on features [M, D] and labels [M]."""
        accuracy = self.accuracy(features, labels)
        return tuple(
            LinearResult(rate, effective, top1, top5, _linear(weight, bias))
            for rate, effective, (top1, top5), weight, bias in zip(
                learning_rates, effective_learning_rates, accuracy, self.weight, self.bias, strict=True
            )
        )


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    with torch.inference_mode(False):
        head = nn.Linear(weight.shape[1], weight.shape[0], device="meta").to_empty(device="cpu")
        head.weight.data.copy_(weight)
        head.bias.data.copy_(bias)
    return head


def _check_labels(labels: Tensor, split: str, num_classes: int) -> None:
    if num_classes < 2:
        raise InputError("there is only one class: a linear classifier needs two or more")
    wrong = int(((labels < 0) | (labels >= num_classes)).sum())
    if wrong:
        raise InputError(
            f"{wrong} of {len(labels)} {split} images have no label in 0..{num_classes - 1}: "
            "use labelled images (a folder for each class), of the same classes for training and validation"
        )
