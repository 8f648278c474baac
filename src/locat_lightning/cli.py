"""The door: LightningCLI with shipped configs by name, run directories, and errors of one line."""

import csv
import json
import platform
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import timm
import torch
import yaml
from jsonargparse import ActionConfigFile, ArgumentError, Namespace
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

import locat_lightning
from locat import config_directory, list_configs
from locat_lightning.backbones.weights import RANDOM, read_checkpoint
from locat_lightning.callbacks.kernels import KernelWidths
from locat_lightning.callbacks.pictures import AttentionPictures
from locat_lightning.callbacks.predictions import PredictionTable
from locat_lightning.callbacks.progress import ProgressBar
from locat_lightning.callbacks.throughput import Throughput
from locat_lightning.errors import InputError

import locat_lightning.data  # isort: skip - their classes are known to the parser by short name
import locat_lightning.tasks  # isort: skip

COMMANDS = {
    "fit": "train",
    "validate": "measure on the val split",
    "test": "measure on the test split",
    "predict": "classes of a folder of images, as a CSV",
}


class ConfigByName(ActionConfigFile):
    """`--config` takes a local file, or else the name of a shipped config."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Parse the config that `values` names."""
        super().__call__(parser, cfg, find_config(str(values)), option_string)


def find_config(name: str) -> str:
    """The path of a config: a local file first, then a shipped one.

    Raises:
        InputError: there is neither.
    """
    for path in (Path(name), config_directory() / name, config_directory() / f"{name}.yaml"):
        if path.is_file():
            return str(path)
    shipped = ", ".join(line.split()[0] for line in list_configs().splitlines())
    raise InputError(f"--config: no file {Path(name).absolute()} and no shipped config {name!r} ({shipped})")


class RunRecord(SaveConfigCallback):
    """Writes down what a run is (config and versions) and, at its end, what came of it."""

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Config and versions as text in TensorBoard."""
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                config = self.parser.dump(self.config, skip_none=False)
                logger.experiment.add_text("config", _as_code(config))
                logger.experiment.add_text("versions", _as_code(_versions(trainer)))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Final metrics: `metrics.json` of the run, HParams of TensorBoard, and a line for the reader."""
        if not trainer.is_global_zero or trainer.log_dir is None:
            return
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        for checkpoint in trainer.checkpoint_callbacks:
            if isinstance(checkpoint, ModelCheckpoint) and checkpoint.best_model_score is not None:
                metrics[f"best {checkpoint.monitor}"] = float(checkpoint.best_model_score)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and metrics:
                logger.log_hyperparams(
                    _flat(pl_module.hparams), {f"final/{k}": v for k, v in metrics.items()}
                )
        directory = Path(trainer.log_dir)
        record = {"epochs": trainer.current_epoch, **metrics}
        (directory / "metrics.json").write_text(json.dumps(record, indent=2) + "\n")
        summary = "   ".join(f"{k} {v:.4g}" for k, v in record.items())
        rank_zero_info(f"{summary}\nrun: {directory}\nlook: tensorboard --logdir {directory.parent}")


class LocatCLI(LightningCLI):
    """LightningCLI whose runs have directories of their own and whose weights come from `--weights`."""

    def __init__(self, arguments: list[str]) -> None:
        self._recorded = _recorded_config(arguments)
        super().__init__(
            save_config_callback=RunRecord,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={"exit_on_error": False, "prog": "locat"}
            | {
                name: {"exit_on_error": False, "description": description}
                for name, description in COMMANDS.items()
            },
            args=arguments,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The trainer's commands; weights come from --weights alone, ckpt_path resumes."""
        own = {"model", "datamodule", "weights_only"}
        evaluation = own | {"dataloaders", "ckpt_path"}
        return {
            "fit": own | {"train_dataloaders", "val_dataloaders"},
            "validate": evaluation,
            "test": evaluation,
            "predict": evaluation | {"return_predictions"},
        }

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Like LightningCLI's, with configs by name."""
        parser = self.parser_class(**kwargs)
        parser.add_argument(
            "-c", "--config", action=ConfigByName, help="a config file, or the name of a shipped config"
        )
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What every run has besides trainer, model and data."""
        parser.add_argument(
            "--weights",
            type=str | None,
            default=None,
            help="where the model's weights come from: a checkpoint, a file, a timm name, or 'random'",
        )
        parser.link_arguments("weights", "model.init_args.weights")
        parser.add_argument("--runs", type=str, default="runs", help="directory of all runs")
        parser.add_argument(
            "--name", type=str | None, default=None, help="name of the run; the config's by default"
        )
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(AttentionPictures, "pictures")
        parser.set_defaults(
            {
                "trainer.enable_model_summary": False,
                "trainer.precision": _mixed_precision(),
                "checkpoint.filename": "best",
                "checkpoint.auto_insert_metric_name": False,
                "checkpoint.save_last": True,
                "checkpoint.save_on_exception": True,
            }
            | self._recorded
        )

    def _parse_ckpt_path(self) -> None:
        """Nothing: a resumed run has the options that it is given, not those of its checkpoint."""

    def before_instantiate_classes(self) -> None:
        """Options that contradict each other are found before anything is built."""
        config = self.config[self.subcommand]
        if self.subcommand != "fit" and config.weights is None:
            raise InputError(
                f"locat {self.subcommand} needs --weights: a checkpoint of a run, a file or a timm name "
                f"('{RANDOM}' for an untrained model)"
            )
        config.name = config.name or (Path(str(config.config[-1])).stem if config.config else "run")
        self.resume_from = self._checkpoint_to_resume(config) if self.subcommand == "fit" else None
        if self.resume_from is not None:
            config.ckpt_path = str(self.resume_from)
            config.model.init_args.weights = None

    def _checkpoint_to_resume(self, config: Namespace) -> Path | None:
        if config.ckpt_path is None:
            return None
        if config.ckpt_path != "last":
            path = Path(str(config.ckpt_path))
            if not path.is_file():
                raise InputError(f"--ckpt_path: no such file: {path.absolute()}")
            return path
        runs = Path(config.runs) / config.name
        found = sorted(runs.glob("*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise InputError(f"--ckpt_path last: no run in {runs.absolute()} has a last.ckpt")
        newest: Path = found[-1]
        return newest

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The trainer with a directory for the run: a fresh one, or that of the checkpoint to go on from."""
        config = self.config[self.subcommand]
        if config.trainer.logger in (None, True):
            kwargs["logger"] = self._loggers(config)
        return super().instantiate_trainer(default_root_dir=config.runs, **kwargs)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[pl.Callback]) -> pl.Trainer:
        """Add what watches every run."""
        callbacks += [Throughput(), KernelWidths(), PredictionTable()]
        if config["enable_progress_bar"] is not False:
            callbacks.append(ProgressBar())
        return super()._instantiate_trainer(config, callbacks)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Checkpoints are read without executing anything in them."""
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        return kwargs | {"weights_only": True} if subcommand == "fit" else kwargs

    def _loggers(self, config: Namespace) -> list[Any]:
        if self.resume_from is None:
            name = config.name if self.subcommand == "fit" else f"{config.name}_{self.subcommand}"
            board = TensorBoardLogger(config.runs, name=name, default_hp_metric=False)
            return [board, CSVLogger(board.log_dir, name="", version="")]
        directory = self.resume_from.parent.parent
        step = read_checkpoint(self.resume_from)["global_step"]
        board = TensorBoardLogger(
            directory.parent, name="", version=directory.name, default_hp_metric=False, purge_step=step
        )
        return [board, _continued_table(directory, step)]


@rank_zero_only
def _recorded(path: Path, step: int) -> list[dict[str, str]]:
    """Rows of a run's metrics.csv up to a step."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if int(row["step"]) < step]


def _continued_table(directory: Path, step: int) -> CSVLogger:
    """A logger whose metrics.csv keeps what was logged before `step`; Lightning's own would begin anew."""
    rows = _recorded(directory / "metrics.csv", step) or []
    (directory / "metrics.csv").unlink(missing_ok=True)
    table = CSVLogger(directory, name="", version="")
    table.experiment.metrics = [{k: v for k, v in row.items() if v != ""} for row in rows]
    return table


def _recorded_config(arguments: list[str]) -> dict[str, Any]:
    """What the given checkpoint's run wrote down of itself, where no --config says it, by dotted key.

    So `locat validate --weights runs/…/best.ckpt` and `locat fit --ckpt_path runs/…/last.ckpt` need no more.
    """
    command, options = arguments[0], dict(_options(arguments[1:]))
    if "--config" in options or "-c" in options:
        return {}
    checkpoint = Path(options.get("--ckpt_path" if command == "fit" else "--weights", ""))
    record = checkpoint.parent.parent / "config.yaml"
    if not (checkpoint.is_file() and record.is_file()):
        return {}
    config = yaml.safe_load(record.read_text())
    recorded = {key: config[key] for key in ("model", "data", "name", "runs") if config.get(key)}
    if command == "fit":
        for group in ("trainer", "checkpoint", "pictures"):
            recorded |= {f"{group}.{key}": value for key, value in config[group].items()}
    return recorded


def _options(arguments: list[str]) -> Iterator[tuple[str, str]]:
    """Pairs of `--option value` and `--option=value`."""
    for option, following in zip(arguments, [*arguments[1:], ""], strict=True):
        key, equals, value = option.partition("=")
        yield key, value if equals else following


def _mixed_precision() -> str | None:
    """The recipe's mixed precision where there is a GPU, else Lightning's default."""
    if not torch.cuda.is_available():
        return None
    return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"


def _versions(trainer: pl.Trainer) -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    return "\n".join(
        (
            f"locat-lightning {locat_lightning.__version__}",
            f"torch {torch.__version__}",
            f"lightning {version('lightning')}",
            f"timm {timm.__version__}",
            f"python {platform.python_version()}",
            f"{trainer.world_size} process(es) on {device}",
        )
    )


def _as_code(text: str) -> str:
    """Markdown that keeps the lines of a text."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _flat(hparams: Any, prefix: str = "") -> dict[str, Any]:
    """Hyper-parameters by dotted name, in the types that TensorBoard's HParams shows."""
    flat: dict[str, Any] = {}
    for key, value in dict(hparams).items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, bool | int | float | str):
            flat[prefix + key] = value
    return flat


@contextmanager
def _errors_in_a_line(debug: bool) -> Iterator[None]:
    """What a user can put right is one line on standard error and exit code 2."""
    try:
        yield
    except (InputError, ArgumentError) as error:
        if debug:
            raise
        print(f"locat: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def main(arguments: list[str]) -> None:
    """Run `locat` with these arguments."""
    debug = "--debug" in arguments
    # The run's directory holds TensorBoard's log before metrics.csv is begun, and all is as it should be.
    warnings.filterwarnings("ignore", "Experiment logs directory .* exists and is not empty")
    # Lightning 2.6 asks torch's pytree in a way that torch 2.15 wants asked differently.
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
    with _errors_in_a_line(debug):
        sys.argv = sys.argv[:1]  # LightningCLI warns of arguments besides those that it is given
        LocatCLI([argument for argument in arguments if argument != "--debug"])
