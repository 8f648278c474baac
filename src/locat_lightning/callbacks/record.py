"""What a run records: its config and versions, its curves as a table, and its results."""

import csv
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from textwrap import indent
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch import Tensor
from torch.utils.tensorboard.summary import hparams

from locat import jobs
from locat.runs import HEADLINES, LOCK, replaced, write_json
from locat_lightning.callbacks.checkpoints import Checkpoints, is_worthless
from locat_lightning.evaluation.intervals import Figures
from locat_lightning.evaluation.per_image import TABLE, PerImage, write_table

PACKAGES = ("locat-lightning", "torch", "lightning", "timm", "torchvision")
DURING = ("train/", "signs/", "gaug_")  # metrics of the training itself; all others are results
LOGGERS = "loggers"  # folder in the directory of a run, for the files of loggers that the user adds
# What a run writes before it has results.
LOGS = ("events.out.tfevents", "hparams.yaml", "metrics.csv", "config.yaml", LOGGERS, LOCK, jobs.MARK)


class RunRecord(SaveConfigCallback):
    """Record the config and the versions when a run starts, and its results when it ends."""

    _said = ""  # of the figures of an evaluation

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tell all processes the directory; defer writing until training starts, as the start may fail."""
        # Private: a trainer's directory is known before its processes can talk to each other.
        trainer._default_root_dir = trainer.strategy.broadcast(trainer.default_root_dir)  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().setup(trainer, pl_module, str(trainer.state.fn))
        if trainer.is_global_zero and trainer.state.fn == TrainerFn.FITTING:
            rank_zero_info(_data(trainer))
        if self.config.trainer.log_every_n_steps is None:  # often enough for a small data set
            steps = -(-trainer.num_training_batches // trainer.accumulate_grad_batches)
            trainer.log_every_n_steps = min(trainer.log_every_n_steps, max(1, steps))  # type: ignore[attr-defined]

    on_test_start = on_predict_start = on_train_start

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self.on_train_start(trainer, pl_module)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        texts = {"config": self.parser.dump(self.config, skip_none=False), "versions": _versions(trainer)}
        # Written atomically: a run that resumes at the same moment may be reading it.
        with replaced(Path(trainer.default_root_dir) / "config.yaml") as part:
            part.write_text(texts["config"], encoding="utf-8")
        if trainer.state.fn == TrainerFn.FITTING:
            jobs.mark(Path(trainer.default_root_dir))
        for logger in _boards(trainer):
            for name, text in texts.items():  # as code, in Markdown
                logger.experiment.add_text(name, indent(text, "    "), trainer.global_step)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the directory of a run that has nothing but logs."""
        directory = Path(trainer.default_root_dir)
        if self.already_saved and not is_worthless(trainer, exception):
            return
        if not trainer.is_global_zero or not directory.is_dir():
            return
        for logger in trainer.loggers:
            logger.finalize("failed")
        if all(file.name.startswith(LOGS) for file in directory.iterdir()):
            shutil.rmtree(directory)
            with suppress(OSError):
                directory.parent.rmdir()  # only if there is no other run in it

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the results to `metrics.json` and to TensorBoard's HParams, and print them."""
        if not self.already_saved:
            rank_zero_info(
                "nothing is left to train: raise trainer.max_epochs (with --allow_changes true) to continue"
            )
        if not self.already_saved or not trainer.is_global_zero:
            return
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if not k.startswith(DURING)}
        metrics = {k: v for k, v in metrics.items() if isfinite(v)}  # a probe that did not measure says NaN
        for checkpoint in trainer.checkpoint_callbacks:
            if isinstance(checkpoint, Checkpoints) and checkpoint.best_model_score is not None:
                metrics[f"best {checkpoint.monitor}"] = float(checkpoint.best_model_score)
        self._write_hparams(trainer, pl_module, metrics)
        record: dict[str, Any] = {"epochs": trainer.current_epoch, **metrics}
        line = "   ".join(f"{k} {v:.4g}" for k, v in record.items())
        summary = getattr(pl_module, "summary", None)  # a module of the user's own may have none
        if protocol := summary() if summary else "":
            record["protocol"] = protocol
            line += f"   ({protocol})"
        record["versions"] = versions()
        # Of data of the user's own there may be no results of single images.
        if isinstance(results := getattr(pl_module, "results", None), PerImage):
            record |= Figures(results, "val").record() | {"protocol": _protocol(pl_module)}
        write_json(Path(trainer.default_root_dir) / "metrics.json", record)
        rank_zero_info(f"{line}\n{_where(trainer.default_root_dir)}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._write_results(trainer, pl_module, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write_results(trainer, pl_module, "test")

    def _write_results(self, trainer: Trainer, pl_module: LightningModule, split: str) -> None:
        """Write what an evaluation found, with intervals, to `metrics.json`, and of each image to a table."""
        results = getattr(pl_module, "results", None)  # a module of the user's own may have none
        logged = {k: float(v) for k, v in trainer.callback_metrics.items()}
        if not isinstance(results, PerImage) or not trainer.is_global_zero:
            self._said = "   ".join(f"{name} {value:.4g}" for name, value in logged.items())
            return
        figures, protocol = Figures(results, split), _protocol(pl_module)
        shown = {f"{split}/{name}": figures.cell(name) for name in figures.values if "iou_" not in name}
        plain = {name: f"{value:.4g}" for name, value in logged.items() if name not in figures.metrics()}
        number = len(results.indices)
        self._said = "   ".join(f"{name} {value}" for name, value in (shown | plain).items())
        self._said += f"   ({protocol}; 95 % intervals: bootstrap over {number:,} images)"
        record: dict[str, Any] = {
            "weights": self.config.get("weights"),
            "seed": self.config.get("seed_everything"),
            **figures.metrics(),
            **{name: value for name, value in logged.items() if isfinite(value)},
            "protocol": protocol,
            "versions": versions(),
            **figures.record(),
        }
        run = Path(trainer.default_root_dir)
        write_table(run / TABLE, results)
        write_json(run / "metrics.json", record)

    def _write_hparams(self, trainer: Trainer, pl_module: LightningModule, metrics: dict[str, float]) -> None:
        options = {"seed_everything": self.config.get("seed_everything"), "model": pl_module.hparams}
        options["data"] = getattr(trainer.datamodule, "hparams", {})  # type: ignore[attr-defined]
        shown = {k: v for k, v in flat_options(options) if isinstance(v, bool | int | float | str)}
        # The columns are those of one run: with the headlines, all runs have them.
        summaries = hparams(shown, dict.fromkeys((*HEADLINES, *metrics), 0.0))
        for logger in _boards(trainer):
            for summary in summaries:
                # Private: the public `add_hparams` opens a run of its own beside this one.
                logger.experiment._get_file_writer().add_summary(summary)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """After an evaluation, print what it found, and where its log is."""
        if trainer.state.fn in (TrainerFn.VALIDATING, TrainerFn.TESTING):
            if self._said:
                rank_zero_info(self._said)
            rank_zero_info(_where(trainer.default_root_dir))


class MetricsTable(Logger):
    """`metrics.csv` of a run. A resumed run keeps the rows before its first step, and has each row once.

    Args:
        directory: of the run.
        step: the first to log.
    """

    name = version = None  # the run's directory says both

    def __init__(self, directory: str, step: int) -> None:
        super().__init__()
        self._file, self._step = Path(directory) / "metrics.csv", step
        self._rows: list[dict[str, Any]] = []
        self._kept: set[tuple[int, frozenset[str]]] = set()  # rows of before by step and names
        self._columns: list[str] = []

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add a row, unless it was measured again because the run was cut off after it."""
        if not self._columns and self._file.is_file():
            self._read()
        if (step, frozenset(metrics)) in self._kept:
            return
        row = {name: value.item() if isinstance(value, Tensor) else value for name, value in metrics.items()}
        self._rows.append(row | {"step": step})
        columns = sorted({"step", *self._columns, *row})
        if columns != self._columns:
            self._write(columns)
            return
        with self._file.open("a", newline="") as file:
            csv.DictWriter(file, columns).writerow(self._rows[-1])

    def _read(self) -> None:
        text = self._file.read_text(errors="replace")
        whole = text[: text.rfind("\n") + 1]  # the last line may be cut
        rows: Any = [{k: v for k, v in row.items() if k and v} for row in csv.DictReader(whole.splitlines())]
        self._rows = [
            row for row in rows if row.get("step", "").isdecimal() and int(row["step"]) < self._step
        ]
        self._kept = {(int(row["step"]), frozenset(row) - {"step"}) for row in self._rows}
        self._write(sorted({"step", *(name for row in self._rows for name in row)}))

    def _write(self, columns: list[str]) -> None:
        self._columns = columns
        with replaced(self._file) as part, part.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self._rows)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: they are in `config.yaml`."""


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide what a run computes, by name."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def _protocol(module: Any) -> str:
    """Return what the figures of a task depend on besides weights and images, in words."""
    return ", ".join(filter(None, [type(module).__name__.lower(), module.summary()]))


def _boards(trainer: Trainer) -> list[TensorBoardLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def _versions(trainer: Trainer) -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    lines = [f"{name} {number}" for name, number in versions().items()]
    return "\n".join([*lines, f"{trainer.world_size} process(es) on {device}"])


def _where(directory: str) -> str:
    """Say where a run's log is, and how to look at it beside the others."""
    return f"run: {directory}\nlook: tensorboard --logdir {Path(directory).parent.parent}"


def _data(trainer: Trainer) -> str:
    """Say how many images and classes the run has, as far as its data say so."""
    found = []
    for name, loader in (("training", trainer.train_dataloader), ("validation", trainer.val_dataloaders)):
        dataset: Any = getattr(loader, "dataset", None)
        if hasattr(dataset, "__len__"):
            found.append(f"{len(dataset):,} {name} images")
    if classes := getattr(trainer.datamodule, "class_names", None):  # type: ignore[attr-defined]
        found.append(f"{len(classes):,} classes")
    return f"data: {', '.join(found) or 'of unknown size'}"


def flat_options(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield options by dotted name, as on the command line; classes under the name of their group."""
    for key, value in options.items():
        if key in ("_class_path", "class_path"):
            yield prefix.removesuffix("."), str(value).rpartition(".")[2]
        elif key == "_instantiator":  # Lightning's own
            continue
        elif key == "init_args":  # of a class among the options, as data.views
            yield from flat_options(value, prefix)
        elif isinstance(value, Mapping):
            yield from flat_options(value, f"{prefix}{key}.")
        elif key.endswith("_args") and value is None:  # the same as no arguments
            continue
        else:
            yield prefix + key, list(value) if isinstance(value, tuple) else value
