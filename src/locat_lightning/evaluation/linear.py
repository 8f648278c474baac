"""Linear classification of a frozen backbone's features: the paper's recipe and a sweep of rates."""

import math
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.seed import isolate_rng
from rich.progress import Progress, track
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from locat_lightning.errors import InputError
from locat_lightning.evaluation.batches import frozen
from locat_lightning.evaluation.features import Features, extract_features, image_features
from locat_lightning.evaluation.gather import distributed, first_process
from locat_lightning.evaluation.knn import check_labelled, check_same_width, inverse_norms, label_ranks
from locat_lightning.schedules import cosine

DINOV2_LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
MOMENTUM = 0.9


class LinearResult(NamedTuple):
    """A trained linear classifier and its accuracy."""

    learning_rate: float  # as asked for, per 256 images
    effective_learning_rate: float  # learning_rate * images per step / 256, at the first step
    top1: float  # share of the validation images, 0 to 1; 0 for a head that diverged
    top5: float
    head: nn.Linear  # [C, D], on the CPU
    ranks: Tensor  # [M] int64 on the CPU: of each validation image, classes before the right one


class LinearSweep(NamedTuple):
    """One result for each learning rate, in the order given."""

    results: tuple[LinearResult, ...]

    @property
    def best(self) -> LinearResult:
        """The result with the highest top-1; of equal ones the first."""
        return max(self.results, key=lambda result: result.top1)


def train_linear(
    backbone: nn.Module,
    train_loader: DataLoader,
    val: DataLoader | Features,
    device: torch.device | str,
    *,
    num_classes: int,
    batch_size: int,
    epochs: int = 100,
    learning_rate: float = 0.001,
    seed: int = 0,
    autocast_dtype: torch.dtype | None = None,
    progress: bool = True,
) -> LinearResult:
    """Train a linear classifier on `ImageBatch`es of augmented images, as DINO and the paper do.

    SGD with momentum 0.9 and no weight decay, at a learning rate of `learning_rate` * `batch_size` / 256 that
    falls as a cosine to 0; `batch_size` is the number of images in a step, over all processes. `seed` is that
    of the head's initial weights. The backbone (see `image_features`) is on `device`, and only it computes in
    `autocast_dtype`. Validation images (`val`, or their features) are not augmented, so they
    pass through it only once.

    With `torch.distributed` initialised, each process brings its part of both data sets (the training parts
    with equally many batches; a `DistributedSampler` is told the epoch) and gradients are averaged over all
    images. A training around this call is not touched.
    """
    device = torch.device(device)
    steps = epochs * len(train_loader)
    if steps == 0:
        raise InputError(
            f"no step to train for: {epochs} epochs of {len(train_loader)} batches "
            "(are there fewer images than in a batch, and the last one is dropped?)"
        )
    if not isinstance(val, Features):
        val = extract_features(backbone, val, device, autocast_dtype=autocast_dtype, progress=progress)
    _check_labels(val.labels, "validation", num_classes)
    inverse_norms(val.features, "validation")  # for its check that they are finite
    val = val.to(device)
    heads = _Heads([learning_rate], batch_size, steps, num_classes, val.features.shape[1], seed, device)
    sampler = getattr(train_loader, "sampler", None)
    shown = progress and first_process()
    with isolate_rng(), frozen(backbone), Progress(disable=not shown) as bar:
        task = bar.add_task("Training a linear classifier", total=steps)
        for epoch in range(epochs):
            if isinstance(sampler, DistributedSampler):
                sampler.set_epoch(epoch)
            for batch in train_loader:
                _check_labels(batch.labels, "training", num_classes)
                with torch.inference_mode():
                    images = batch.images.to(device, non_blocking=True)
                    features = image_features(backbone, images, autocast_dtype=autocast_dtype)
                    inverse_norms(features, "training")  # as above
                heads.step(features, batch.labels.to(device), average_processes=distributed())
                bar.advance(task)
            if shown:
                top1 = float((heads.ranks(val.features, val.labels)[0] < 1).double().mean())
                bar.update(task, description=f"Linear classifier, epoch {epoch + 1}: top-1 {top1:.2%}")
    return heads.results(val.features, val.labels)[0]


def sweep_linear(
    train_features: Tensor,
    train_labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    *,
    learning_rates: Sequence[float] = DINOV2_LEARNING_RATES,
    epochs: int = 100,
    batch_size: int = 1024,
    seed: int = 0,
    progress: bool = True,
) -> LinearSweep:
    """Train one linear classifier for each learning rate, all at once, on features that are already there.

    Features are [N, D], labels [N] int64. The heads start alike and see the same batches, so each is what it
    would be alone; every product with the features is one matrix product for all of them. They are optimized
    as in `train_linear`, where `train_features` are, with rates per 256 images (by default DINOv2's) and the
    training images in a new order each epoch. Initial weights and order follow from `seed`; the global random
    number generators are not used.
    """
    device = train_features.device
    check_labelled(train_features, train_labels, "training")
    check_labelled(val_features, val_labels, "validation")
    check_same_width(train_features, val_features)
    inverse_norms(train_features, "training")  # for its check that they are finite
    inverse_norms(val_features, "validation")
    if not learning_rates or epochs < 1 or batch_size < 1:
        raise InputError(
            f"a linear sweep with {len(learning_rates)} learning rates, {epochs} epochs and batches of "
            f"{batch_size} trains nothing: give at least one of each"
        )
    if len(train_labels.unique()) < 2:
        raise InputError("all training images are of one class: a linear classifier needs two or more")

    classes = int(max(train_labels.max(), val_labels.max())) + 1
    images, dim = train_features.shape
    batch_size = min(batch_size, images)
    steps = epochs * math.ceil(images / batch_size)
    heads = _Heads(learning_rates, batch_size, steps, classes, dim, seed, device)
    generator = torch.Generator().manual_seed(seed)
    orders = (torch.randperm(images, generator=generator).to(device) for _ in range(epochs))
    batches = chain.from_iterable(order.split(batch_size) for order in orders)
    train_labels = train_labels.to(device)
    title = f"Training {len(learning_rates)} linear classifiers"
    for rows in track(batches, title, total=steps, disable=not progress):
        heads.step(train_features[rows].float(), train_labels[rows])
    return LinearSweep(heads.results(val_features.to(device), val_labels.to(device)))


class _Heads:
    """G linear classifiers of the same features, trained together by SGD with momentum.

    The gradient of softmax regression is written out: nothing is kept for a backward pass, and it works
    inside `torch.inference_mode`, where Lightning runs its validation, too.
    """

    def __init__(
        self,
        learning_rates: Sequence[float],
        batch_size: int,
        steps: int,
        classes: int,
        dim: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.learning_rates = learning_rates
        self.effective = [rate * batch_size / 256 for rate in learning_rates]
        self.steps = steps
        self.steps_taken = 0
        generator = torch.Generator().manual_seed(seed)
        start = torch.empty(classes, dim).normal_(std=0.01, generator=generator)
        self.weight = start.to(device).repeat(len(learning_rates), 1, 1)  # [G, C, D]
        self.bias = torch.zeros(len(learning_rates), classes, device=device)
        self.velocity = torch.zeros_like(self.weight), torch.zeros_like(self.bias)

    def logits(self, features: Tensor) -> Tensor:
        """Map features [B, D] to logits [B, G, C]: one matrix product for all heads."""
        with torch.autocast(features.device.type, enabled=False):
            flat: Tensor = torch.addmm(self.bias.flatten(), features.float(), self.weight.flatten(0, 1).T)
        return flat.view(len(features), *self.bias.shape)

    @torch.no_grad()
    def step(self, features: Tensor, labels: Tensor, *, average_processes: bool = False) -> None:
        """Take a step of each head at its own rate, on features [B, D] and labels [B]."""
        residual = self.logits(features).softmax(-1)
        residual[torch.arange(len(labels), device=labels.device), :, labels] -= 1
        with torch.autocast(features.device.type, enabled=False):
            gradients = (residual.flatten(1).T @ features).view_as(self.weight), residual.sum(0)
        count = torch.tensor(float(len(labels)), device=features.device)
        if average_processes:
            for term in (*gradients, count):
                dist.all_reduce(term)
        now = [cosine(self.steps_taken, steps=self.steps, start=rate, end=0.0) for rate in self.effective]
        rates = torch.tensor(now).to(features.device)
        parameters = self.weight, self.bias
        for parameter, velocity, gradient in zip(parameters, self.velocity, gradients, strict=True):
            velocity.mul_(MOMENTUM).add_(gradient.div_(count))
            parameter.addcmul_(velocity, rates.view(-1, *[1] * (velocity.ndim - 1)), value=-1)
        self.steps_taken += 1

    @torch.no_grad()
    def ranks(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return how many classes each head places before the right one, [G, M] int64."""
        chunk = max(1, 2**24 // self.bias.numel())
        parts = zip(features.split(chunk), labels.split(chunk), strict=True)
        found = [
            label_ranks(self.logits(part), truth[:, None].expand(-1, len(self.bias))) for part, truth in parts
        ]
        return torch.cat(found).T

    @torch.inference_mode(False)
    def results(self, features: Tensor, labels: Tensor) -> tuple[LinearResult, ...]:
        """Measure each head on features [M, D] and labels [M]: `InputError` if all of them diverged."""
        if not self.weight.isfinite().flatten(1).all(1).any():
            raise InputError(
                f"the linear classifier diverged at learning rate {min(self.learning_rates):g}: lower it"
            )
        found = []
        for number, ranks in enumerate(self.ranks(features, labels).cpu()):
            head = nn.Linear(self.weight.shape[2], self.weight.shape[1], device="meta").to_empty(device="cpu")
            head.weight.data.copy_(self.weight[number])
            head.bias.data.copy_(self.bias[number])
            rates = self.learning_rates[number], self.effective[number]
            top1, top5 = (int((ranks < top).sum()) / len(ranks) for top in (1, 5))
            found.append(LinearResult(*rates, top1, top5, head, ranks))
        return tuple(found)


def _check_labels(labels: Tensor, split: str, num_classes: int) -> None:
    if num_classes < 2:
        raise InputError("there is only one class: a linear classifier needs two or more")
    wrong = int(((labels < 0) | (labels >= num_classes)).sum())
    if wrong:
        raise InputError(
            f"{wrong} of {len(labels)} {split} images have no label in 0..{num_classes - 1}: "
            "use labelled images (a folder for each class), of the same classes for training and validation"
        )
