"""Pictures of what a model does, for each logger that takes images: when, and of which samples."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import IterableDataset

from locat_lightning.data.dataset import Failure
from locat_lightning.errors import InputError
from locat_lightning.evaluation.batches import frozen

LARGEST = 4_000_000  # of a picture's images; half a minute on a CPU


class Pictures(Callback):
    """Log the figures that the task draws, as `pictures/NAME`.

    At each validation the task draws the same validation samples (`pictures`), those that were hardest
    (`pictures` again, of what `hardness` says, as `pictures/hard`), and what the validation found
    (`result_pictures`). A task without validation draws samples of `val`, or else of `train`, at the end of
    the epoch. Before the first step of a new run it draws the training batch (`input_pictures`). A task that
    lacks one of these methods goes without; one that fails is warned of, and draws no more in this run.

    Args:
        images: how many samples, evenly spaced over the data set.
        every_n_epochs: epochs from one picture to the next; 0 draws none at all.
        side: shorter side of an image in the picture, in pixels; small images are enlarged without smoothing.

    Raises:
        InputError: an argument is out of its range.
    """

    def __init__(self, images: int = 8, every_n_epochs: int = 1, side: int = 224) -> None:
        ranges = {"images": (images, 1), "every_n_epochs": (every_n_epochs, 0), "side": (side, 1)}
        for name, (value, least) in ranges.items():
            if value < least:
                raise InputError(f"pictures.{name} ({value}) must be at least {least}")
        if images * side**2 > LARGEST:
            raise InputError(
                f"pictures.images ({images}) of pictures.side ({side}) pixels: images · side² must be at "
                f"most {LARGEST:,}"
            )
        self.images = images
        self.every_n_epochs = every_n_epochs
        self.side = side

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._samples: list[Any] | None = None
        self._hardness: list[tuple[Tensor, Tensor]] = []  # of a validation's batches, and the images' indices
        self._loggers = [logger for logger in trainer.loggers if _takes_figures(logger)]
        self.active = bool(self.every_n_epochs and self._loggers and trainer.is_global_zero)
        if self.active and stage in ("fit", "validate") and not hasattr(pl_module, "pictures"):
            name = type(pl_module).__name__
            rank_zero_info(f"no pictures: {name} has no method pictures(samples, data, side)")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # A resumed run has that picture already.
        if self.active and not (trainer.current_epoch or batch_idx or trainer.ckpt_path):
            self._log(trainer, "input_pictures", batch, self.side)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw the samples after the first batch: averaged weights are still in place then."""
        if dataloader_idx:
            return
        if not batch_idx:
            self._hardness = []
            self._log_samples(trainer)
        hardness: Any = getattr(pl_module, "hardness", None)
        indices = getattr(batch, "indices", None)  # batches of the user's own may have none
        if hardness is not None and indices is not None and self._is_due(trainer):
            with giving_up(self, "pictures"):
                self._hardness.append((hardness(outputs, batch), indices))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the samples that were hardest: averaged weights are still in place here, too."""
        found, self._hardness = self._hardness, []
        if not found or not self._is_due(trainer):
            return
        with giving_up(self, "pictures"):
            if samples := hardest_items(validation_loader(trainer), found, self.images):
                data: Any = trainer.datamodule  # type: ignore[attr-defined]
                self._log(trainer, "pictures", samples, data, self.side, renamed={"validation": "hard"})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_due(trainer):
            self._log(trainer, "result_pictures", trainer.datamodule)  # type: ignore[attr-defined]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.enable_validation:
            self._log_samples(trainer)

    def _is_due(self, trainer: Trainer) -> bool:
        """Return whether to draw now: in any validation by itself, in every n-th epoch of a training."""
        if not self.active or trainer.sanity_checking:
            return False
        return trainer.state.fn != TrainerFn.FITTING or (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def _log_samples(self, trainer: Trainer) -> None:
        if not self._is_due(trainer) or not hasattr(trainer.lightning_module, "pictures"):
            return
        with giving_up(self, "pictures"):
            if self._samples is None:
                self._samples = watched_samples(trainer, self.images)
            if self._samples:
                self._log(trainer, "pictures", self._samples, trainer.datamodule, self.side)  # type: ignore[attr-defined]

    def _log(
        self, trainer: Trainer, method: str, *arguments: Any, renamed: Mapping[str, str] | None = None
    ) -> None:
        module = trainer.lightning_module
        draw = getattr(module, method, None)
        if draw is None:
            return
        step = max(0, trainer.global_step - 1)  # the step just taken, as for the scalars of a validation
        with giving_up(self, "pictures"), isolate_rng(), frozen(module), torch.no_grad():
            for name, figure in draw(*arguments).items():
                for logger in self._loggers:
                    _log_figure(logger, f"pictures/{(renamed or {}).get(name, name)}", figure, step)


@contextmanager
def giving_up(callback: Any, what: str) -> Iterator[None]:
    """Turn an error into a warning and set `callback.active` to False: a failed picture stops no training."""
    try:
        yield
    except Exception as error:
        callback.active = False
        rank_zero_warn(f"no more {what} in this run: {type(error).__name__}: {error}")


def watched_samples(trainer: Trainer, count: int) -> list[Any]:
    """Read samples to look at: of the validation or, without one, of the data's `val`, or else `train`.

    There are none of data that give no loader for a split.
    """
    loader = validation_loader(trainer)
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    if loader is None and hasattr(data, "eval_dataloader"):
        try:
            loader = data.eval_dataloader("val")
        except InputError:
            loader = data.eval_dataloader("train")
    return spaced_items(loader, count) if hasattr(loader, "dataset") else []


def validation_loader(trainer: Trainer) -> Any:
    """Return the first loader of the validation, None without one."""
    loader: Any = trainer.val_dataloaders
    return loader[0] if isinstance(loader, Sequence) else loader


def hardest_items(loader: Any, found: Sequence[tuple[Tensor, Tensor]], count: int) -> list[Any]:
    """Read the items of a loader's data set that were hardest, hardest first; none if it is iterable.

    `found` are the hardness and the indices of each batch; items of hardness 0 are left out.
    """
    hardness, indices = (torch.cat([*of_batches]) for of_batches in zip(*found, strict=True))
    if isinstance(getattr(loader, "dataset", None), IterableDataset | None):
        return []
    hardest, places = hardness.nan_to_num(0).topk(min(count, len(hardness)))
    indices = indices.to(places.device)[places][hardest > 0]
    with isolate_rng():
        items = [loader.dataset[index] for index in indices.tolist()]
    return [item for item in items if not isinstance(item, Failure)]


def watched_images(trainer: Trainer, count: int) -> Tensor:
    """Read the images [N, 3, H, W] of `watched_samples`; N is 0 if there are none."""
    samples = watched_samples(trainer, count)
    return torch.stack([image for image, *_ in samples]) if samples else torch.empty(0)


def spaced_items(loader: Any, count: int) -> list[Any]:
    """Read items of a loader's data set, evenly spaced (the first if it is iterable), that can be read."""
    dataset = loader.dataset
    with isolate_rng():
        if isinstance(dataset, IterableDataset):
            items = list(islice(dataset, count))
        else:
            last = len(dataset) - 1
            places = torch.linspace(0, last, min(count, last + 1)).round().int().tolist()
            items = [dataset[place] for place in places]
    return [item for item in items if not isinstance(item, Failure)]


def _takes_figures(logger: Logger) -> bool:
    return isinstance(logger, TensorBoardLogger | MLFlowLogger) or hasattr(logger, "log_image")


def _log_figure(logger: Any, name: str, figure: Figure, step: int) -> None:
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_figure(name, figure, step)
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_figure(logger.run_id, figure, f"{name}/{step:08}.png")
    else:  # Weights & Biases
        logger.log_image(name, [figure], step=step)
