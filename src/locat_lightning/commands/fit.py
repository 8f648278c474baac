"""`locat fit`, `validate`, `test`, `predict`: LightningCLI with configs by name and a directory per run."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeInt
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from rich import get_console

import locat_lightning.data
import locat_lightning.methods  # noqa: F401 - as the line above: a config names its classes
from locat import jobs
from locat.runs import claim, lock, unlock
from locat_lightning.backbones.weights import RANDOM, read_checkpoint
from locat_lightning.callbacks.bands import Bands
from locat_lightning.callbacks.checkpoints import CheckpointFiles, Checkpoints
from locat_lightning.callbacks.interrupts import Interrupts
from locat_lightning.callbacks.kernels import KernelWidths
from locat_lightning.callbacks.pictures import Pictures
from locat_lightning.callbacks.predictions import Predictions
from locat_lightning.callbacks.probes import KnnProbe, LinearProbe
from locat_lightning.callbacks.progress import EpochLines, ProgressBar
from locat_lightning.callbacks.record import MetricsTable, RunRecord
from locat_lightning.callbacks.retrieval_probe import RetrievalProbe
from locat_lightning.callbacks.signs import FeatureSigns
from locat_lightning.callbacks.throughput import Throughput
from locat_lightning.commands import checks, defaults, parsing, resume
from locat_lightning.commands.loggers import OptionParser, make_loggers
from locat_lightning.commands.messages import errors_in_a_line
from locat_lightning.commands.rendezvous import meet
from locat_lightning.commands.sources import record_of_run
from locat_lightning.data.statistics import read_statistics
from locat_lightning.errors import InputError
from locat_lightning.tasks.base import Task
from locat_lightning.tasks.sharding import ShardedStrategy

# Arguments of the trainer's methods that are not options.
NO_OPTIONS = {"model", "datamodule", "dataloaders", "train_dataloaders", "val_dataloaders"}
NO_OPTIONS |= {"weights_only", "return_predictions", "verbose"}
HELP_TO_OPTIONS = (
    "The options of model and data are those of their class: see locat fit --model.help Classification (or "
    "Dino, Segmentation) and locat fit --data.help ImageData (or MultiViewData, SegmentationData)."
)


class LocatCLI(LightningCLI):
    """LightningCLI with a directory for each run, and weights from `--weights`."""

    def __init__(self, arguments: list[str]) -> None:
        self._command = arguments[0]
        self._given = parsing.decisive_options(arguments[1:])
        self._recorded = parsing.as_arguments(defaults.of_command(self._command, arguments[1:]))
        # Before what is typed, and checked like it.
        arguments = [self._command, *self._recorded, *arguments[1:]]
        options = {"exit_on_error": False, "allow_abbrev": False}
        usage = f"locat {self._command} --config CONFIG [options]"
        own = options | {"usage": usage, "description": HELP_TO_OPTIONS}
        with ExitStack() as self._held:  # the directory of the run, and the signals
            super().__init__(
                save_config_callback=RunRecord,
                save_config_kwargs={"save_to_log_dir": False},
                auto_configure_optimizers=False,
                parser_kwargs=options | {"prog": "locat", self._command: own},
                parser_class=OptionParser,
                args=arguments,
            )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        # Only the command that is run: to build the parsers of the others takes time.
        own = set() if self._command == "fit" else {"ckpt_path"}  # fit resumes; weights come from --weights
        return {self._command: NO_OPTIONS | own}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = self.parser_class(**kwargs)
        help_ = "a config file, or the name of a shipped config"
        parser.add_argument("-c", "--config", action=parsing.ConfigByName, help=help_)
        return parser

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        help_ = "seed of everything that is drawn; true for a random one"
        parser.add_argument("--seed_everything", type=bool | NonNegativeInt, default=0, help=help_)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        add = parser.add_argument
        help_ = "where weights come from: a checkpoint, a file, an exported folder, a timm name, or 'random'"
        add("--weights", type=str | None, default=None, help=help_)
        parser.link_arguments("weights", "model.init_args.weights")
        help_ = "whether a resumed run (--ckpt_path) may have other options than before"
        add(f"--{resume.OPTION}", type=bool, default=False, help=help_)
        add("--runs", type=str, default="runs", help="directory of all runs")
        add("--name", type=str | None, default=None, help="name of the run; the config's by default")
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.add_lightning_class_args(Pictures, "pictures")
        parser.add_lightning_class_args(KnnProbe, "knn")
        parser.add_lightning_class_args(LinearProbe, "linear")
        parser.add_lightning_class_args(RetrievalProbe, "retrieval")
        own = {
            "trainer.enable_model_summary": False,
            "trainer.precision": parsing.mixed_precision(),
            "checkpoint.filename": "best",
            "checkpoint.auto_insert_metric_name": False,
            "checkpoint.save_last": True,
            "checkpoint.save_on_exception": True,
            "checkpoint.enable_version_counter": False,
            **dict.fromkeys((f"{probe}.every_n_epochs" for probe in ("knn", "linear", "retrieval")), 0),
        }
        parser.set_defaults(own)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        # Private: LightningCLI's parser of the command.
        own = self._subcommand_parsers[self._command]
        self.config = parsing.parse(parser, args, own, self._recorded)
        checks.check_numbers(self.config[self._command])

    def _parse_ckpt_path(self) -> None:
        """Do nothing: a resumed run has the options that it is given, not those of its checkpoint."""

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        if self.subcommand == "fit":
            config.ckpt_path = config.ckpt_path or self._given.ckpt_path  # a record as --config says null
        elif config.weights is None:
            raise InputError(
                f"locat {self.subcommand} needs --weights: a checkpoint of a run, a file or a timm name "
                f"('{RANDOM}' for an untrained model)"
            )
        if "data" in config and (stats := config.get("data.init_args.stats")) is not None:
            data = config.data.init_args  # a run's record needs no other file
            data.mean, data.std, data.stats = *read_statistics(stats), None
            data.channels = len(data.mean) if data.channels is None else data.channels
        if self.subcommand == "predict":
            config.trainer.logger = False  # predictions are files, not curves
        checks.check_name(config.name)
        data = config.get("data.init_args", {}) if "data" in config else {}
        checks.check_root(self._given, data.get("dataset"), data.get("stream"))
        checks.check_start(config)
        if not config.name:  # of an exported model that of its folder
            exported = Path((config.get("weights") or "").removeprefix("local-dir:"))
            default = exported.resolve().name if exported.is_dir() else "run"
            config.name = Path(str(config.config[-1])).stem if config.config else default
        self._resumed: dict[str, Any] = {}  # contents of the checkpoint that a run resumes from
        self._resume_from: Path | None = None
        self._directory: Path | None = None  # its directory
        meet()
        if self.subcommand == "fit":
            self._take_up(config)
        if self.subcommand == "fit" and config.ckpt_path is not None:
            self._resume_from = defaults.checkpoint_to_resume(config.ckpt_path, config.runs, config.name)
            if self._given.weights is not None:
                raise InputError("--weights starts a run, --ckpt_path resumes one: give only one of them")
            config.ckpt_path = None
            self._resumed = read_checkpoint(self._resume_from)
            if not isinstance(self._resumed.get("global_step"), int):
                raise InputError(
                    f"--ckpt_path: {self._resume_from} is not a checkpoint of a run (see --weights)"
                )
            if (record := record_of_run(self._resume_from)) is not None:
                self._directory = record.parent
        option = "--runs" if self._directory is None else "--ckpt_path"
        checks.check_writable(option, self._directory or Path(config.runs) / self._name(config))

    def _take_up(self, config: Namespace) -> None:
        """Resume the run that this job had begun before SLURM or torchrun restarted it, if there is one."""
        runs = [*(Path(config.runs) / self._name(config)).glob("version_*")]
        if config.ckpt_path is not None:
            given = defaults.checkpoint_to_resume(config.ckpt_path, config.runs, config.name)
            runs += [] if (record := record_of_run(given)) is None else [record.parent]
        run = jobs.run_of_this_job(runs)
        if run is not None and (last := run / "checkpoints" / "last.ckpt").is_file():
            rank_zero_info(f"this job was restarted: its run resumes from {last}")
            config.ckpt_path, self._given.weights = str(last), None

    def _name(self, config: Namespace) -> str:
        """Return the name of the directory that groups runs of this kind."""
        return str(config.name) if self.subcommand == "fit" else f"{config.name}_{self.subcommand}"

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        for each in filter(None, (self.model, self.datamodule)):  # loggers write down what the user gave
            vars(each).get("_hparams_initial", {}).pop("_instantiator", None)  # private: LightningCLI's own
        if self._resume_from is not None:
            config = self.config[self.subcommand]
            now = {"model": self.model.hparams, "data": self.datamodule.hparams}
            now |= resume.of_trainer(self.trainer, config.seed_everything)
            resume.check_states(self._resumed, self.trainer, self._resume_from)
            before = resume.of_checkpoint(self._resumed)
            resume.check(before, now, allowed=config.allow_changes, checkpoint=self._resume_from)
        if isinstance(self.model, Task):  # not a module of the user's own
            if self._resumed:
                self.model.resume(self._resumed)
            self.model.check(self.trainer, training=self.subcommand == "fit")
        self._resumed = {}  # the trainer has it, and frees it when it has taken it up
        if not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            # After all checks: some loggers write files when they are made.
            given = self._get(self.config_init, "trainer").logger
            self.trainer.loggers += make_loggers(given, Path(self.trainer.default_root_dir))

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        config = self.config[self.subcommand]
        step = self._resumed.get("global_step", 0)
        run = self._hold(config)
        board = TensorBoardLogger(
            run.parent, name="", version=run.name, purge_step=step or None, default_hp_metric=False
        )
        logger = config.trainer.logger is not False and [board, MetricsTable(board.log_dir, step)]
        try:
            trainer = super().instantiate_trainer(default_root_dir=board.log_dir, logger=logger, **kwargs)
        except (ValueError, TypeError, ImportError, RuntimeError) as error:
            raise InputError(f"trainer: {error}") from error
        if isinstance(trainer.accelerator, CPUAccelerator):
            checks.check_processes(trainer.num_devices)
        release = self._held.pop_all().close
        self._held.callback(release)
        trainer.callbacks.append(interrupts := Interrupts(trainer, release))  # type: ignore[attr-defined]
        self._held.enter_context(interrupts)
        return trainer

    def _hold(self, config: Namespace) -> Path:
        """Return the directory of the run, which no other process has: a new one, or the resumed run's.

        Processes other than the first are told by it later (`RunRecord.setup`).
        """
        new = Path(config.runs) / self._name(config)
        if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
            return self._directory or new / "version_0"
        missing = [each for each in (new, *new.parents) if not each.exists()]
        run = self._directory or claim(new)
        made = [] if run == self._directory else [run, *missing]
        try:
            self._held.callback(unlock, run, lock(run), made)
        except BlockingIOError as error:
            raise InputError(
                f"--ckpt_path: another process is training in {run}: wait for its end, or stop it"
            ) from error
        return run

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[pl.Callback]) -> pl.Trainer:
        """Add what every run has: callbacks, and how checkpoints are written and read."""
        # Private: the public hook does not see the callbacks that come from options.
        options = self.config[self.subcommand]
        callbacks += [Throughput(), KernelWidths(), FeatureSigns(), Bands(), Predictions()]
        callbacks.append(resume.ResumeGuard(options.seed_everything, allowed=options.allow_changes))
        if config["enable_progress_bar"] is not False:
            config["enable_progress_bar"] = on_terminal = get_console().is_terminal
            if on_terminal:
                callbacks.insert(0, ProgressBar())  # it stops before any other prints results
            else:
                callbacks.append(EpochLines())  # after those that measure
        if config["strategy"] == "fsdp":
            config["strategy"] = ShardedStrategy()
        plugins = config["plugins"] or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        config["plugins"] = [*plugins, CheckpointFiles(self._resumed or None)]
        return super()._instantiate_trainer(config, callbacks)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Resume without executing anything in the checkpoint; keep no predictions, which are written."""
        # Private: LightningCLI has no other place for arguments that are no options.
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand == "fit":
            return kwargs | {"ckpt_path": self._resume_from, "weights_only": True}
        own = "return_predictions" if subcommand == "predict" else "verbose"  # RunRecord prints the results
        return kwargs | {own: False}


@errors_in_a_line
def main(arguments: list[str]) -> None:
    """Run `locat fit …`, `validate`, `test` or `predict`."""
    LocatCLI(arguments)


def validate(arguments: list[str]) -> Path | None:
    """Run `locat validate …`, and return the directory of its run, in the first process."""
    trainer = LocatCLI(arguments).trainer
    return Path(trainer.default_root_dir) if trainer.is_global_zero else None
