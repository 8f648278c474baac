"""The door: LightningCLI with shipped configs by name, run directories, and errors of one line."""

import csv
import json
import logging
import os
import platform
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import timm
import torch
import yaml
from jsonargparse import Namespace
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from rich import get_console
from torch.utils.tensorboard.summary import hparams

import locat_lightning
import locat_lightning.data
from locat.runs import LOCK, is_locked, lock
from locat_lightning.backbones.weights import RANDOM, read_checkpoint
from locat_lightning.callbacks.checkpoints import Checkpoints, came_to_nothing
from locat_lightning.callbacks.kernels import KernelWidths
from locat_lightning.callbacks.pictures import Pictures
from locat_lightning.callbacks.predictions import Predictions
from locat_lightning.callbacks.probes import KnnProbe, LinearProbe
from locat_lightning.callbacks.progress import EpochLines, ProgressBar
from locat_lightning.callbacks.retrieval_probe import RetrievalProbe
from locat_lightning.callbacks.throughput import Throughput
from locat_lightning.commands import resume
from locat_lightning.commands.parsing import (
    ConfigByName,
    check_processes,
    check_root,
    check_weights,
    check_writable,
    errors_in_a_line,
    given_options,
    mixed_precision,
    near_options,
    record_of_run,
    shipped_configs,
)
from locat_lightning.errors import InputError
from locat_lightning.tasks.base import Task

import locat_lightning.methods  # isort: skip

# Warnings of Lightning's that say nothing to a user.
EXPECTED = (
    # A run's directory has TensorBoard's log before metrics.csv is begun, a resumed run's all that it had.
    "Experiment logs directory .* exists and is not empty",
    "Checkpoint directory .* exists and is not empty",
    # A checkpoint from elsewhere begins a run of its own.
    "The dirpath has changed from .* to ",
    # Models that are too large for one GPU are not for this trainer, and all others can be averaged.
    "You're using the WeightAveraging callback with a model that overrides the configure_model",
    # A frozen backbone stays in evaluation mode.
    "Found .* module.* in eval mode at the start of training",
    # It logs as often as there are batches then, unless somebody said otherwise.
    "The number of training batches .* is smaller than the logging interval",
    # Lightning 2.6 asks torch's pytree in a way that torch 2.15 wants asked differently.
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)
# Lines of Lightning's that say nothing to a user either; --debug shows them.
NO_NEWS = (
    "Seed set to",
    "GPU available",
    "TPU available",
    "HPU available",
    "Loading `train_dataloader` to estimate",
    "💡 Tip",
)
GROUPS = ("trainer", "checkpoint", "pictures", "knn", "linear", "retrieval")
# What HParams shows, the last value of each. Its columns are those of one run: all runs name the same.
COMPARED = ("val/top1", "val/miou", "knn/top1", "linear/top1", "retrieval/miou", "val/loss")
MEASURED = ("val/", "knn/", "linear/", "retrieval/")  # metrics that say what came of a run
HELP = {"--model.help", "--data.help"}  # of a class
# What Lightning and torch take, and fail with later.
LEAST = {
    "seed_everything": 0,
    "trainer.accumulate_grad_batches": 1,
    "trainer.check_val_every_n_epoch": 1,
    "trainer.gradient_clip_val": 0,
}
HELP_TO_OPTIONS = (
    "The options of model and data are those of their class: locat fit --model.help Classification (or Dino, "
    "Segmentation), locat fit --data.help ImageData (or MultiViewData, SegmentationData)."
)
COMMANDS = {
    "fit": "train",
    "validate": "measure on the val split",
    "test": "measure on the test split",
    "predict": "classes of a folder of images as a CSV, or of their pixels as PNGs",
}


class RunRecord(SaveConfigCallback):
    """Writes down what a run is (config and versions) and, at its end, what came of it."""

    _lock: int | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Nothing yet: a run that fails before its work begins leaves nothing, and no record is lost."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Config and versions, once; from now on no other process trains here."""
        super().setup(trainer, pl_module, str(trainer.state.fn))
        if trainer.is_global_zero and trainer.state.fn == TrainerFn.FITTING:
            self._lock = lock(Path(trainer.default_root_dir))
        if self.config.trainer.log_every_n_steps is None:  # often enough for a small data set
            steps = -(-trainer.num_training_batches // trainer.accumulate_grad_batches)
            trainer.log_every_n_steps = min(trainer.log_every_n_steps, max(1, steps))  # type: ignore[attr-defined]

    on_test_start = on_predict_start = on_train_start

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The same, where validation is all there is to do."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self.on_train_start(trainer, pl_module)

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Config and versions as text in TensorBoard."""
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                config = self.parser.dump(self.config, skip_none=False)
                logger.experiment.add_text("config", _as_code(config), trainer.global_step)
                logger.experiment.add_text("versions", _as_code(_versions(trainer)), trainer.global_step)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """A checkpoint keeps what shapes the training, so that no resumed run changes it silently."""
        checkpoint[resume.RECORD] = resume.of_trainer(trainer, self.config.get("seed_everything"))
        checkpoint[resume.RECORD] |= resume.of_data(trainer.datamodule)  # type: ignore[attr-defined]

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Images that came or went since show when the data are there, unlike the options."""
        resume.check(
            checkpoint.get(resume.RECORD, {}),
            resume.of_data(trainer.datamodule),  # type: ignore[attr-defined]
            allowed=self.config.allow_changes,
            checkpoint=Path(str(trainer.ckpt_path)),
        )

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Remove the directory of a run that came to nothing: there are just logs in it."""
        directory = Path(trainer.default_root_dir)
        if self.already_saved and not came_to_nothing(trainer, exception):
            return
        if not trainer.is_global_zero or not directory.is_dir():
            return
        for logger in trainer.loggers:
            logger.finalize("failed")
        files = list(directory.iterdir())
        logs = ("events.out.tfevents", "hparams.yaml", "metrics.csv", "config.yaml", LOCK)
        if all(file.name.startswith(logs) for file in files):
            for file in files:
                file.unlink()
            directory.rmdir()
            if not any(directory.parent.iterdir()):
                directory.parent.rmdir()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Final metrics: `metrics.json` of the run, HParams of TensorBoard, and a line for the reader."""
        directory = trainer.log_dir  # in every process: they agree on it
        if not self.already_saved:
            rank_zero_info(
                "nothing was left to train: raise trainer.max_epochs (with --allow_changes true) to go on"
            )
        if not (self.already_saved and trainer.is_global_zero):
            return
        assert directory is not None
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(MEASURED)}
        for checkpoint in trainer.checkpoint_callbacks:
            if isinstance(checkpoint, Checkpoints) and checkpoint.best_model_score is not None:
                metrics[f"best {checkpoint.monitor}"] = float(checkpoint.best_model_score)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for summary in hparams(_flat(pl_module.hparams), dict.fromkeys(COMPARED, 0.0)):
                    logger.experiment._get_file_writer().add_summary(summary)
        record: dict[str, Any] = {"epochs": trainer.current_epoch, **metrics}
        summary = "   ".join(f"{k} {v:.4g}" for k, v in record.items())
        if isinstance(pl_module, Task) and (protocol := pl_module.summary()):
            record["protocol"] = protocol
            summary += f"   ({protocol})"
        (Path(directory) / "metrics.json").write_text(json.dumps(record, indent=2) + "\n")
        rank_zero_info(f"{summary}\n{_where(directory)}")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the directory to others, and say where the log of a measurement is, below its table."""
        directory = trainer.log_dir  # in every process: they agree on it
        if self._lock is not None:
            (Path(trainer.default_root_dir) / LOCK).unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None
        if directory is not None and trainer.state.fn in (TrainerFn.VALIDATING, TrainerFn.TESTING):
            rank_zero_info(_where(directory))


class LocatCLI(LightningCLI):
    """LightningCLI whose runs have directories of their own and whose weights come from `--weights`."""

    def __init__(self) -> None:
        self._recorded = _recorded_config(sys.argv[1:])
        super().__init__(
            save_config_callback=RunRecord,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={"exit_on_error": False, "prog": "locat", "allow_abbrev": False}
            | {
                name: {"exit_on_error": False, "description": description, "epilog": HELP_TO_OPTIONS}
                for name, description in COMMANDS.items()
            },
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
        parser.add_argument(
            f"--{resume.OPTION}",
            type=bool,
            default=False,
            help="whether a run that goes on (--ckpt_path) may have other options than it had",
        )
        parser.add_argument("--runs", type=str, default="runs", help="directory of all runs")
        parser.add_argument(
            "--name", type=str | None, default=None, help="name of the run; the config's by default"
        )
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.add_lightning_class_args(Pictures, "pictures")
        parser.add_lightning_class_args(KnnProbe, "knn")
        parser.add_lightning_class_args(LinearProbe, "linear")
        parser.add_lightning_class_args(RetrievalProbe, "retrieval")
        parser.set_defaults(
            {
                "trainer.enable_model_summary": False,
                "trainer.precision": mixed_precision(),
                "checkpoint.filename": "best",
                "checkpoint.auto_insert_metric_name": False,
                "checkpoint.save_last": True,
                "checkpoint.save_on_exception": True,
                "checkpoint.enable_version_counter": False,
                "knn.every_n_epochs": 0,
                "linear.every_n_epochs": 0,
                "retrieval.every_n_epochs": 0,
            }
            | self._recorded
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Like LightningCLI's, with the options that are like one that is unknown.

        Raises:
            InputError: a number is less than it can be.
        """
        command = self._subcommand_parsers.get(next(iter(sys.argv[1:]), ""), parser)
        with near_options(command):
            super().parse_arguments(parser, args)
        options = self.config[self.config.subcommand]
        for option, least in LEAST.items():
            if (value := options.get(option)) is not None and value < least:
                raise InputError(f"{option}: {value} is less than {least}")
        if self.config.subcommand == "fit" and options.trainer.limit_train_batches == 0:
            raise InputError("trainer.limit_train_batches: 0 leaves nothing to train (see locat validate)")

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
        check_root(sys.argv[1:], config.get("data.init_args.dataset") if "data" in config else None)
        locat = (config.get("model.init_args.locat") if "model" in config else None) or {}
        if locat.get("start") == "identity" and config.weights is None and config.ckpt_path is None:
            raise InputError(
                "model.locat: with start: identity a model begins as its weights have it: pass --weights "
                f"(or '{RANDOM}')"
            )
        config.name = config.name or (Path(str(config.config[-1])).stem if config.config else "run")
        self.resume_from = self._checkpoint_to_resume(config) if self.subcommand == "fit" else None
        if self.resume_from is not None:
            if "--weights" in given_options(sys.argv[1:]):
                raise InputError("--weights starts a run and --ckpt_path goes on with one: give one of them")
            config.ckpt_path = None
        record = None if self.resume_from is None else record_of_run(self.resume_from)
        if record is not None:
            check_writable("--ckpt_path", record.parent)
        else:
            check_writable("--runs", Path(config.runs) / self._name(config))

    def instantiate_classes(self) -> None:
        """What can be said without data or a model is said before they are made."""
        super().instantiate_classes()
        for each in (self.model, self.datamodule):  # loggers write down what is the user's
            vars(each).get("_hparams_initial", {}).pop("_instantiator", None)
        if self.resume_from is not None:
            config = self.config[self.subcommand]
            now = {"model": self.model.hparams, "data": self.datamodule.hparams}
            now |= resume.of_trainer(self.trainer, config.seed_everything)
            before = resume.of_checkpoint(self._resumed)
            resume.check(before, now, allowed=config.allow_changes, checkpoint=self.resume_from)
            if isinstance(self.model, Task):
                self.model.resume(self._resumed)
        if isinstance(self.model, Task):
            self.model.check(self.trainer, training=self.subcommand == "fit")

    def _checkpoint_to_resume(self, config: Namespace) -> Path | None:
        if config.ckpt_path is None:
            return None
        if config.ckpt_path != "last":
            return _checkpoint_file(str(config.ckpt_path))
        return _last_checkpoint(Path(config.runs) / config.name)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The trainer with a directory for the run: a fresh one, or that of the checkpoint to go on from.

        Raises:
            InputError: Lightning cannot make a trainer of these options, a CPU has too few cores for it, or
                another process trains in the directory.
        """
        config = self.config[self.subcommand]
        board, step = self._board(config)
        if config.trainer.logger in (None, True):
            kwargs["logger"] = [board, MetricsTable(board.log_dir, step)]
        try:
            trainer = super().instantiate_trainer(default_root_dir=board.log_dir, **kwargs)
        except (ValueError, TypeError, ImportError, RuntimeError) as error:
            raise InputError(f"trainer: {error}") from error
        if isinstance(trainer.accelerator, CPUAccelerator):
            check_processes(trainer.num_devices)
        # Before loggers are made: they cut off what came after the checkpoint.
        if self.resume_from is not None and trainer.is_global_zero and is_locked(Path(board.log_dir)):
            raise InputError(
                f"--ckpt_path: another process is training in {board.log_dir}: wait for its end, or stop it"
            )
        return trainer

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[pl.Callback]) -> pl.Trainer:
        """Add what watches every run."""
        callbacks += [Throughput(), KernelWidths(), Predictions()]
        if config["enable_progress_bar"] is not False:
            on_terminal = get_console().is_terminal
            # It stands still before any other says what came of the run.
            callbacks.insert(0, ProgressBar() if on_terminal else EpochLines())
            config["enable_progress_bar"] = on_terminal
        return super()._instantiate_trainer(config, callbacks)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Read checkpoints without executing anything in them; keep no predictions, which are written."""
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand == "fit":
            return kwargs | {"ckpt_path": self.resume_from, "weights_only": True}
        return kwargs | {"return_predictions": False} if subcommand == "predict" else kwargs

    def _board(self, config: Namespace) -> tuple[TensorBoardLogger, int]:
        """TensorBoard's logger in the directory of the run, and the step at which it begins or goes on."""
        if self.resume_from is not None:
            checkpoint = read_checkpoint(self.resume_from)
            step = checkpoint.get("global_step")
            if step is None:
                raise InputError(f"--ckpt_path: {self.resume_from} is no checkpoint of a run (see --weights)")
            heavy = {"state_dict", "optimizer_states"}
            self._resumed = {key: checkpoint[key] for key in checkpoint.keys() - heavy}
            if (record := record_of_run(self.resume_from)) is not None:
                directory = record.parent
                options: dict[str, Any] = {"name": "", "version": directory.name, "purge_step": step}
                return TensorBoardLogger(directory.parent, default_hp_metric=False, **options), step
        return TensorBoardLogger(config.runs, name=self._name(config), default_hp_metric=False), 0

    def _name(self, config: Namespace) -> str:
        """Of the directory of the runs that are like this one."""
        name: str = config.name
        return name if self.subcommand == "fit" else f"{name}_{self.subcommand}"


class MetricsTable(CSVLogger):
    """`metrics.csv` of a run. It keeps the rows before a step, where Lightning's logger would begin anew.

    Args:
        directory: of the run.
        step: at which the run begins or goes on.
    """

    def __init__(self, directory: str, step: int) -> None:
        super().__init__(directory, name="", version="")
        self._step = step

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Lightning's writer, which deletes the table there is: the rows to keep are written again."""
        if self._experiment is None:
            rows = self._rows_before()
            writer: Any = super().experiment
            writer.metrics = rows
            writer.save()
        return super().experiment

    def _rows_before(self) -> list[dict[str, str]]:
        path = Path(self.log_dir) / "metrics.csv"
        if not path.is_file():
            return []
        with path.open(newline="") as file:
            return [row for row in csv.DictReader(file) if int(row["step"]) < self._step]


def _last_checkpoint(runs: Path) -> Path:
    """The `last.ckpt` of the newest run of a name.

    Args:
        runs: the directory of the runs of that name.

    Raises:
        InputError: there is none.
    """
    found = sorted(runs.glob("*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise InputError(f"--ckpt_path last: no run in {runs.absolute()} has a last.ckpt")
    return found[-1]


def _checkpoint_file(given: str) -> Path:
    """The checkpoint that --ckpt_path names by its path.

    Raises:
        InputError: there is no such file.
    """
    path = Path(given)
    if not path.is_file():
        raise InputError(f"--ckpt_path: no such file: {path.absolute()}")
    return path


def _recorded_config(arguments: list[str]) -> dict[str, Any]:
    """What the given checkpoint's run wrote down of itself, where no --config says it, by dotted key.

    So `locat validate --weights runs/…/best.ckpt` and `locat fit --ckpt_path runs/…/last.ckpt` need no more.

    Raises:
        InputError: there is neither a config nor a record.
    """
    options = given_options(arguments)
    command = next(iter(options), "")
    if command not in COMMANDS or options.keys() & {
        "--config",
        "-c",
        "--help",
        "-h",
        "--print_config",
        *HELP,
    }:
        return {}
    checkpoint = Path(options.get("--ckpt_path" if command == "fit" else "--weights", ""))
    if command == "fit" and checkpoint == Path("last"):
        runs = Path(options.get("--runs", "runs"))
        if "--name" not in options:
            names = sorted({path.parents[2].name for path in runs.glob("*/*/checkpoints/last.ckpt")})
            raise InputError(
                "--ckpt_path last needs --name, the name of the run"
                + (f" ({', '.join(names)})" if names else "")
                + ", or its --config"
            )
        checkpoint = _last_checkpoint(runs / options["--name"])
    record = record_of_run(checkpoint)
    if record is None:
        if "--weights" in options:
            check_weights(options["--weights"])
        elif command == "fit" and "--ckpt_path" in options:
            checkpoint = _checkpoint_file(str(checkpoint))
        if checkpoint.is_file():
            read_checkpoint(checkpoint)  # what is none is that, and does not lack a config
        if options.keys() & {"--model", "--model.class_path"}:
            return {}
        if command != "fit" and "--weights" not in options:
            raise InputError(
                f"locat {command} needs --weights: a checkpoint of a run, or other weights with --config"
            )
        raise InputError(f"locat {command} needs --config, a file or one of {shipped_configs()}")
    config = yaml.safe_load(record.read_text())
    keys = {"model", "data", "name", "runs"}
    if command == "fit":
        keys |= {"seed_everything", "weights"}
        nested = {f"{group}.{key}": v for group in GROUPS for key, v in config.get(group, {}).items()}
    else:
        # The data of a run say how many classes it has; those to predict may have none.
        arguments_of_model = config["model"]["init_args"]
        known = read_checkpoint(checkpoint).get("hyper_parameters", {})
        arguments_of_model |= {key: known[key] for key in arguments_of_model.keys() & known.keys()}
        nested = {}
    return {key: config[key] for key in keys if config.get(key) is not None} | nested


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


def _where(directory: str) -> str:
    """Where a run's log is, and how to look at it beside the others."""
    return f"run: {directory}\nlook: tensorboard --logdir {Path(directory).parent.parent}"


def _as_code(text: str) -> str:
    """Markdown that keeps the lines of a text."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _flat(hparams: Any, prefix: str = "") -> dict[str, Any]:
    """Hyper-parameters by dotted name, in the types that TensorBoard's HParams shows."""
    flat: dict[str, Any] = {}
    for key, value in dict(hparams).items():
        if key.startswith("_"):  # Lightning's own
            continue
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, bool | int | float | str):
            flat[prefix + key] = value
    return flat


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(NO_NEWS)


class Messages(logging.StreamHandler):
    """Writes where standard error is now: above the progress bar, while there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        self.stream = sys.stderr
        super().emit(record)


def direct_messages(*, debug: bool) -> None:
    """Have Lightning's messages written by `Messages`; without `debug` those that are news."""
    messages = Messages()
    if not debug:
        messages.addFilter(_is_news)
    for name in ("lightning.pytorch", "lightning.fabric"):
        if not (logger := logging.getLogger(name)).propagate:  # else whoever imports this decides
            logger.handlers = [messages]


def main(arguments: list[str]) -> None:
    """Run `locat` with these arguments."""
    for expected in EXPECTED:
        warnings.filterwarnings("ignore", expected)
    direct_messages(debug="--debug" in arguments)
    given = sys.argv
    # Lightning starts the other processes of a run on several GPUs with the arguments in sys.argv.
    sys.argv = [given[0], *(argument for argument in arguments if argument != "--debug")]
    try:
        with errors_in_a_line("--debug" in arguments):
            LocatCLI()
    finally:
        sys.argv = given
