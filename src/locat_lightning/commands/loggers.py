"""Loggers that a user adds to a run's own, which are TensorBoard's and `metrics.csv`."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger, MLFlowLogger
from lightning.pytorch.utilities import rank_zero_only

from locat_lightning.callbacks.record import LOGGERS


class OptionParser(LightningArgumentParser):
    """LightningCLI's parser. No logger needs a `save_dir`, and each is made when the run has a directory."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_instantiator(lambda *arguments, **options: partial(*arguments, **options), Logger)

    def add_class_arguments(self, class_type: Any, *args: Any, **kwargs: Any) -> list[str]:
        added: list[str] = super().add_class_arguments(class_type, *args, **kwargs)
        if isinstance(class_type, type) and issubclass(class_type, Logger) and "save_dir" in added:
            self.set_defaults(save_dir=None)
            for action in self._actions:  # private: there is no other way to a default of what has none
                action.required = action.required and action.dest != "save_dir"
        return added


def make_loggers(given: Any, run: Path) -> list[Logger]:
    """Return the loggers of `trainer.logger`, as `OptionParser` leaves them: a partial, or several.

    Without other options they bear the name of the run, and their files are in its directory.
    """
    given = given if isinstance(given, Iterable) else [given]
    return [_make(each, run) for each in given if isinstance(each, partial)]


def _make(logger: Any, run: Path) -> Logger:
    options, files, name = logger.keywords, (run / LOGGERS).absolute(), f"{run.parent.name}/{run.name}"
    defaults = {"name": name, "run_name": name}
    if not issubclass(logger.func, MLFlowLogger):
        defaults["save_dir"] = options.get("dir") or str(files)
    elif not (options["tracking_uri"] or options["save_dir"]):  # MLflow no longer writes folders of files
        defaults |= {
            "tracking_uri": f"sqlite:///{files}/mlflow.db",
            "artifact_location": str(files / "mlruns"),
        }
    unset = {key: value for key, value in defaults.items() if options.get(key, "") is None}
    made: Logger = logger(**unset)
    if unset.get("save_dir") == str(files):
        rank_zero_only(files.mkdir)(exist_ok=True)  # there W&B looks for the commit of the code
    return made
