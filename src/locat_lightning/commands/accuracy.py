"""The measurements of `locat knn` and `locat linear`, and where their features are kept."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveFloat, PositiveInt
from lightning.fabric import Fabric
from torch import Tensor, nn

from locat_lightning.callbacks.record import versions
from locat_lightning.commands.measurement import (
    Measurement,
    check_images,
    columns,
    protocol_of,
    shape_of,
)
from locat_lightning.data import ImageData
from locat_lightning.data.dataset import digest_of_images
from locat_lightning.evaluation.features import Features, autocast_type, extract_features
from locat_lightning.evaluation.intervals import Figures
from locat_lightning.evaluation.kept_features import digest_of_model, kept_features
from locat_lightning.evaluation.knn import knn_ranks
from locat_lightning.evaluation.linear import DINOV2_LEARNING_RATES, LinearSweep, sweep_linear, train_linear
from locat_lightning.evaluation.per_image import Scores, names_of
from locat_lightning.evaluation.shots import FIGURES, shots_of


def add_knn_options(parser: ArgumentParser) -> None:
    """Add the options of k-NN to those of the data."""
    _add_options(parser)
    add = parser.add_argument
    add("--k", type=list[PositiveInt], default=[10, 20, 100, 200], help="numbers of neighbours")
    add("--temperature", type=PositiveFloat, default=0.07, help="of the votes, exp(cosine / temperature)")


def add_linear_options(parser: ArgumentParser) -> None:
    """Add the options of linear classifiers to those of the data."""
    _add_options(parser)
    add = parser.add_argument
    help_ = "paper: SGD on augmented images; sweep: many learning rates, on features extracted once"
    add("--protocol", type=Literal["paper", "sweep"], default="paper", help=help_)
    add("--epochs", type=PositiveInt, default=100, help="passes over the training images")
    add("--learning_rate", type=PositiveFloat, default=0.001, help="of paper, for 256 images a step")
    rates, help_ = list(DINOV2_LEARNING_RATES), "of sweep, for 256 features a step"
    add("--learning_rates", type=list[PositiveFloat], default=rates, help=help_)
    add("--sweep_batch_size", type=PositiveInt, default=1024, help="features per step of the sweep")


def _add_options(parser: ArgumentParser) -> None:
    help_ = "measure on each of these instead: folders, digits, or timm's names; one table, a run each"
    parser.add_argument("--datasets", type=list[str] | None, default=None, help=help_)
    help_ = "measure with these channels each, as 0,1,4: one table, a run each"
    parser.add_argument("--subsets", type=list[str] | None, default=None, help=help_)
    help_ = "folder in which features are kept: the next command with this model and images reads them there"
    parser.add_argument("--features", type=str | None, default=None, help=help_)


def measure_knn(backbone: nn.Module, data: ImageData, config: Namespace, fabric: Fabric) -> Measurement:
    """Measure the accuracy of k-NN with each k."""
    bank, queries = (_features(backbone, data, split, config, fabric) for split in ("train", "val"))
    found = knn_ranks(*bank[:2], *queries[:2], k=config.k, temperature=config.temperature)
    hits = dict[str, Tensor]()
    for k, (neighbours, ranks) in found.items():
        hits |= {f"top1_k{k}": ranks < 1, f"top5_k{k}": ranks < min(5, neighbours)}
    figures = Figures(_scores(data, queries, hits), "knn")
    groups = [name for name in FIGURES if f"{name}_k{config.k[0]}" in figures.values]
    rows, table = list[tuple[str, ...]](), columns("k", "top-1", "top-5", *groups)
    for k, (neighbours, _) in found.items():
        voters = f"{k}" if neighbours == k else f"{k} (all {neighbours})"
        rows.append((voters, figures.cell(f"top1_k{k}"), figures.cell(f"top5_k{k}")))
        table.add_row(*rows[-1], *(figures.cell(f"{name}_k{k}") for name in groups))
    heading = f"k-NN: {len(queries.labels):,} images, each by its nearest among {len(bank.labels):,}"
    protocol = protocol_of(
        f"k-NN at temperature {config.temperature:g} among {len(bank.labels):,} images",
        shape_of(data),
        precision=config.precision,
    )
    return Measurement(heading, table, figures.metrics(), protocol, figures, rows)


def measure_linear(backbone: nn.Module, data: ImageData, config: Namespace, fabric: Fabric) -> Measurement:
    """Measure the accuracy of a linear classifier, or of one for each learning rate."""
    val = _features(backbone, data, "val", config, fabric)
    if config.protocol == "paper":
        number, rates = len(data.source("train")), [config.learning_rate]
        images = min(data.batch_size * fabric.world_size, number)
        result = train_linear(
            backbone,
            data.train_dataloader(),
            val,
            fabric.device,
            num_classes=data.num_classes,
            batch_size=images,
            epochs=config.epochs,
            learning_rate=config.learning_rate,
            seed=config.seed,
            autocast_dtype=autocast_type(config.precision),
        )
        sweep, manner = LinearSweep((result,)), f"{images} augmented images a step"
        augmented = ", ".join(f"{key} {value}" for key, value in data.augmentation.items() if value)
        drawn = f"{images} images a step, seeds {config.seed} and {data.seed}, augmented: {augmented}"
    else:
        train = _features(backbone, data, "train", config, fabric)
        number, rates = len(train.labels), config.learning_rates
        sweep = sweep_linear(
            *train[:2],
            *val[:2],
            learning_rates=rates,
            epochs=config.epochs,
            batch_size=config.sweep_batch_size,
            seed=config.seed,
            progress=fabric.is_global_zero,
        )
        features = min(config.sweep_batch_size, number)
        manner = f"{features} features a step, best top-1 {sweep.best.top1:.2%}"
        drawn = f"{features} features a step, seed {config.seed}"
    best, hits = sweep.best, {"top1": sweep.best.ranks < 1, "top5": sweep.best.ranks < 5}
    several = len(sweep.results) > 1
    for r in sweep.results if several else ():
        hits |= {f"top1_rate{r.learning_rate:g}": r.ranks < 1, f"top5_rate{r.learning_rate:g}": r.ranks < 5}
    figures = Figures(_scores(data, val, hits), "linear")
    groups = [name for name in FIGURES if name in figures.values]
    rows, table = list[tuple[str, ...]](), columns("learning rate", "of a step", "top-1", "top-5", *groups)
    for r in sweep.results:
        ending = f"_rate{r.learning_rate:g}" if several else ""
        tops = figures.cell(f"top1{ending}"), figures.cell(f"top5{ending}")
        rows += [(f"{r.learning_rate:g}", f"{r.effective_learning_rate:.3g}", *tops)]
        table.add_row(*rows[-1], *(figures.cell(f"{name}{ending}") for name in groups))
    heading = f"linear, {config.protocol}: {config.epochs} epochs, {manner}"
    listed = ", ".join(f"{rate:g}" for rate in rates)
    protocol = protocol_of(
        f"linear, {config.protocol}, {config.epochs} epochs of {number:,} images at {listed}",
        drawn,
        shape_of(data),
        precision=config.precision,
    )
    metrics = figures.metrics() | {"linear/learning_rate": best.learning_rate}
    of_best = [row for row, r in zip(rows, sweep.results, strict=True) if r is best]
    return Measurement(heading, table, metrics, protocol, figures, of_best)


def _features(
    backbone: nn.Module, data: ImageData, split: str, config: Namespace, fabric: Fabric
) -> Features:
    """Extract the features of a split, or read them where they are kept."""
    dtype, source = autocast_type(config.precision), data.source(split)

    def extract() -> Features:
        check_images(backbone, data, fabric.device)
        return extract_features(backbone, data.eval_dataloader(split), fabric.device, autocast_dtype=dtype)

    if config.features is None:
        return extract().to(fabric.device)
    decisive = {
        "features": "cls",
        "model": digest_of_model(backbone),
        "images": digest_of_images(source),
        "dataset": [data.dataset, str(data.root), split],
        "classes": data.class_names,
        "preprocessing": data.preprocessing,
        "precision": str(dtype),
        "versions": versions(),
    }
    number, classes = len(source), data.num_classes
    found = kept_features(
        Path(config.features), decisive, extract, fabric.device, images=number, classes=classes
    )
    return found.to(fabric.device)


def _scores(data: ImageData, of: Features, hits: Mapping[str, Tensor]) -> Scores:
    """Return hits [N] by name as results of the validation images."""
    names, labels = names_of(data, "val", of.indices.tolist()), of.labels.cpu()
    counts = [] if data.class_counts is None else data.class_counts.tolist()
    return Scores(of.indices, names, labels, hits, shots_of(labels, counts))
