"""Loggers that a user adds: the run stays where it is, and each has the scalars and the pictures."""

import csv
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import Logger, MLFlowLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from locat_lightning.commands.fit import main
from locat_lightning.commands.loggers import make_loggers
from tests.commands.runs import BEST, FIT, LAST, RUN
from tests.commands.test_fit import refusal
from tests.conftest import PICTURES

pytestmark = pytest.mark.usefixtures("workplace")

ONE_EPOCH = ["--trainer.max_epochs", "1"]


class ServiceError(Exception):
    """As the errors of a logger's package, which say what to do."""

    __module__ = "wandb.errors"


class Service(Logger):
    """Takes images and writes files as Lightning's logger of Weights & Biases does."""

    made = ()  # all of a test
    name = version = save_dir = None  # the base has properties

    def __init__(
        self,
        name: str | None = None,
        save_dir: str = ".",
        dir: str | None = None,  # noqa: A002 - as there
        key: str = "secret",
    ):
        super().__init__()
        self.name, self.save_dir, self.key = name, save_dir, key
        self.scalars, self.images, self.params, self.status = [], [], {}, ""
        Service.made = (*Service.made, self)

    @property
    @rank_zero_experiment
    def experiment(self):
        if self.key == "":
            raise ServiceError("no API key configured.\nUse `wandb login`")
        folder = Path(self.save_dir, "wandb")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text("lr: {value: 1}\n")
        return self

    @rank_zero_only
    def log_metrics(self, metrics, step=None):
        self.scalars += [(step, name) for name in metrics]

    @rank_zero_only
    def log_hyperparams(self, params, *arguments):
        self.params |= params

    @rank_zero_only
    def log_image(self, key, images, step):
        self.images += [(step, key) for _ in images]

    @rank_zero_only
    def finalize(self, status):
        self.status = status


OWN = "tests.commands.test_loggers.Service"
ADDED = {
    "named": ["--trainer.logger", OWN],
    "appended": [f"--trainer.logger+={OWN}"],
    "from a config": ["--config", "more.yaml"],
}


@pytest.fixture(autouse=True)
def no_services(monkeypatch):
    monkeypatch.setattr(Service, "made", ())


@pytest.mark.parametrize("given", ADDED)
def test_an_added_logger_leaves_the_run_where_it_is(given, small, tmp_path):
    Path("config.yaml").write_text("# hand-written\n{}\n")
    spec = [{"class_path": "CSVLogger"}, {"class_path": OWN}]
    Path("more.yaml").write_text(yaml.safe_dump({"trainer": {"logger": spec}}))
    main([*FIT, *ADDED[given], *small, *PICTURES, *ONE_EPOCH, "--name", "classify_tiny"])
    assert Path("config.yaml").read_text() == "# hand-written\n{}\n"
    assert {path.name for path in Path().iterdir()} == {"config.yaml", "more.yaml", "images", "runs"}
    assert {"metrics.csv", "metrics.json", "config.yaml"} <= {path.name for path in RUN.iterdir()}

    [service] = Service.made
    assert service.name == "classify_tiny/version_0"
    assert service.save_dir == str(tmp_path / RUN / "loggers")
    assert service.status == "success"
    assert service.params["batch_size"] == 6
    events = EventAccumulator(str(RUN)).Reload()
    assert {name for _, name in service.scalars} == set(events.Tags()["scalars"])
    assert service.images == [(2, "pictures/validation")]
    assert [image.step for image in events.Images("pictures/validation")] == [2]
    copies = [RUN / "loggers/lightning_logs/version_0/metrics.csv"] if given == "from a config" else []
    for table in [RUN / "metrics.csv", *copies]:
        with table.open() as file:
            assert {row["step"] for row in csv.DictReader(file)} == set("012")


def test_a_run_with_a_logger_is_measured_and_resumed(small, capsys):
    main([*FIT, *small, *ONE_EPOCH, "--trainer.logger", OWN])
    main(["validate", "--weights", str(BEST)])  # with the run's own loggers alone
    [service] = Service.made
    resumed = ["--ckpt_path", "last", "--trainer.max_epochs", "2", "--allow_changes", "true"]
    record = RUN / "config.yaml"
    said = refusal(capsys, ["fit", *resumed, "--name", "classify_tiny"])
    assert said.startswith(f"{record}: sets trainer.logger: ")
    main(["fit", "--config", str(record), *resumed])  # a logger is code, so the record has to be named
    assert Service.made[1].save_dir == service.save_dir
    assert {step for step, _ in Service.made[1].scalars} == {3, 4, 5}


def test_only_the_first_process_makes_folders(small, monkeypatch, tmp_path):
    run = tmp_path / "a/version_0"
    run.mkdir(parents=True)
    logger = partial(Service, name=None, save_dir=None)
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert len(make_loggers([logger], run)) == 1
    assert not (run / "loggers").exists()
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    assert make_loggers(logger, run)[0].save_dir == str(run / "loggers")
    assert (run / "loggers").is_dir()
    assert make_loggers(None, run) == make_loggers(True, run) == []


def test_options_of_a_logger_are_obeyed(small):
    options = ["--trainer.logger.save_dir", "there", "--trainer.logger.name", "mine"]
    main([*FIT, *small, *ONE_EPOCH, "--trainer.logger", OWN, *options])
    assert (Service.made[0].save_dir, Service.made[0].name) == ("there", "mine")
    main([*FIT, *small, *ONE_EPOCH, "--trainer.logger", OWN, "--trainer.logger.dir", "elsewhere"])
    assert Service.made[1].save_dir == "elsewhere"
    options = ["--trainer.logger.save_dir", ".", "--trainer.logger.name", "board"]
    main([*FIT, *small, *ONE_EPOCH, "--trainer.logger", "TensorBoardLogger", *options])
    assert EventAccumulator("board/version_0").Reload().Tags()["scalars"]
    assert LAST.is_file()


def test_a_run_that_never_begins_leaves_nothing_of_its_loggers(small, capsys):
    service = ["--trainer.logger", OWN, "--trainer.logger.key", ""]
    with pytest.raises(SystemExit) as stopped:
        main([*FIT, *small, *service])
    assert stopped.value.code == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("locat: error: ")]
    assert line == "locat: error: wandb: no API key configured. Use `wandb login`"
    assert not Path("runs").exists()
    diverging = ["--model.lr", "1e30", "--model.optimizer", "sgd", "--trainer.log_every_n_steps", "50"]
    assert "loss is nan" in refusal(capsys, [*FIT, *small, "--trainer.logger", OWN, *diverging])
    assert Service.made[1].status == "failed"
    assert not Path("runs").exists()


def test_predictions_have_no_loggers(small, trained):
    arguments = ["predict", *FIT[1:], *small, "--weights", str(BEST), "--trainer.logger", OWN]
    main(arguments)
    main(["validate", *arguments[1:]])
    assert [service.name for service in Service.made] == ["classify_tiny_validate/version_0"]


def test_without_loggers_there_is_no_log(small):
    main([*FIT, *small, *ONE_EPOCH, "--trainer.logger", "false"])
    names = {path.name for path in RUN.iterdir()}
    assert names == {"checkpoints", "config.yaml", "metrics.json"}


@pytest.mark.parametrize(("logger", "package"), [("WandbLogger", "wandb"), ("MLFlowLogger", "mlflow")])
def test_a_missing_package_is_named(logger, package, small, capsys, monkeypatch):
    module = sys.modules[f"lightning.pytorch.loggers.{package}"]
    monkeypatch.setattr(module, f"_{package.upper()}_AVAILABLE", Missing(package))
    assert refusal(capsys, [*FIT, *small, "--trainer.logger", logger]) == f"no {package}"
    assert not Path("runs").exists()


class Missing(str):
    """What Lightning finds out about a package that is not installed."""

    def __bool__(self):
        return False

    def __str__(self):
        return f"no {self[:]}"


def test_mlflow_has_a_database_in_the_run_unless_told_otherwise(monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(MLFlowLogger, "__init__", lambda self, **options: made.append(options))
    unset = dict.fromkeys(("run_name", "tracking_uri", "save_dir", "artifact_location"))
    for options in ({}, {"tracking_uri": "http://there"}, {"save_dir": "there"}):
        make_loggers(partial(MLFlowLogger, **unset | options), tmp_path / "a/version_0")
    files = tmp_path / "a/version_0/loggers"
    assert made[0] == {
        "run_name": "a/version_0",
        "save_dir": None,
        "tracking_uri": f"sqlite:///{files}/mlflow.db",
        "artifact_location": str(files / "mlruns"),
    }
    assert made[1] == made[0] | {"tracking_uri": "http://there", "artifact_location": None}
    assert made[2] == unset | {"run_name": "a/version_0", "save_dir": "there"}
