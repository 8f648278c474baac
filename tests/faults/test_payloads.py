"""A run from elsewhere: whatever its files say, no command executes it or writes where it says."""

import contextlib
import copy
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from locat.command import main

pytestmark = pytest.mark.usefixtures("workplace")

CALL = {"class_path": "os.system", "init_args": {"command": "touch PWNED"}}
HOOK = {
    "class_path": "lightning.pytorch.callbacks.LambdaCallback",
    "init_args": {"on_fit_start": "evil.touch"},
}
STATE = {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": {"ddp_comm_state": CALL}}
# By place in the config of a run, what somebody may have written there.
IN_THE_RECORD = {
    "model": ["evil.Task", CALL, {"class_path": "evil.Task"}, {"class_path": "locat_lightning.evil.Task"}],
    "model.class_path": ["evil.Task", "os.system", "locat_lightning.commands.fit.LocatCLI"],
    "model.init_args.backbone_args": [CALL, {"prr": CALL}, {"gaug": [CALL]}],
    "model.init_args.locat": [CALL, {"start": CALL}],
    "model.init_args.num_classes": [CALL],
    "model.init_args.optimizer": [CALL, "evil.Optimizer"],
    "data.class_path": ["evil.Data", "os.system"],
    "data.init_args.views": ["evil.Views", CALL],
    "data.init_args.scale": [CALL, [CALL]],
    "data.init_args.dataset": [CALL],
    "trainer.callbacks": [[HOOK], "evil.Callback", [CALL], ["EarlyStopping"]],
    "trainer.strategy": [STATE, "evil.Strategy", CALL],
    "trainer.accelerator": [CALL, "evil.Accelerator"],
    "trainer.logger": [CALL, "evil.Logger", {"class_path": "CSVLogger", "init_args": {"save_dir": "PWNED"}}],
    "trainer.plugins": [[CALL], "evil.Plugin"],
    "trainer.profiler": [
        CALL,
        {"class_path": "SimpleProfiler", "init_args": {"dirpath": ".", "filename": "PWNED"}},
    ],
    "trainer.default_root_dir": ["PWNED"],
    "trainer.devices": [CALL],
    "checkpoint.dirpath": ["PWNED"],
    "checkpoint.filename": ["../../../../PWNED"],
    "checkpoint.monitor": [CALL],
    "knn.data": ["evil.Data", CALL],
    "pictures.images": [CALL],
    "name": ["../PWNED"],
    "runs": ["PWNED"],
    "weights": [CALL],
    "seed_everything": [CALL],
}
# The same in the checkpoint.
IN_THE_CHECKPOINT = {
    "hyper_parameters": [CALL],
    "hyper_parameters._class_path": ["evil.Task"],
    "hyper_parameters._instantiator": ["evil.touch"],
    "hyper_parameters.backbone": [CALL, "hf-hub:evil/model", "local-dir:evil"],
    "hyper_parameters.backbone_args": [
        CALL,
        {"prr": CALL},
        {"pretrained": True},
        {"checkpoint_path": "evil.pth"},
    ],
    "hyper_parameters.locat": [CALL, {"start": CALL}],
    "hyper_parameters.class_names": [CALL, [CALL]],
    "datamodule_hyper_parameters.views": [CALL],
    "run": [CALL],
    "decoder_of": [{"weights": "hf-hub:evil/model"}],
}
EVIL = """
from pathlib import Path
Path("PWNED").touch()
from locat_lightning.tasks import Classification as Task
from locat_lightning.data import ImageData as Data
touch = Views = Callback = Strategy = Logger = Plugin = Accelerator = Optimizer = Task
"""
# The same in config.json of an exported folder.
IN_THE_FOLDER = {
    "architecture": [CALL, "hf-hub:evil/model", "evil.Model", "local-dir:evil", 3],
    "model_args": [CALL, {"prr": CALL}, {"pretrained": True}, {"checkpoint_path": "evil.pth"}, "evil"],
    "model_args.img_size": [CALL, "evil", [CALL]],
    "num_classes": [CALL],
    "label_names": [CALL, [CALL]],
    "pretrained_cfg": [CALL, "evil"],
    "pretrained_cfg.custom_load": [True, "hf", CALL],
    "pretrained_cfg.file": ["evil.pth", CALL],
    "pretrained_cfg.hf_hub_id": ["evil/model", CALL],
    "pretrained_cfg.source": ["hf-hub", CALL],
    "pretrained_cfg.url": ["https://localhost:1/evil.pth", CALL],
    "pretrained_cfg.mean": [CALL, [CALL]],
    "pretrained_cfg.interpolation": [CALL, "evil"],
    "pretrained_cfg.first_conv": [CALL, "evil"],
}
# Each command, and which groups of a run's record it reads.
COMMANDS = {
    "validate": (["validate", "--weights", "best"], ("model", "data", "name", "runs")),
    "test": (["test", "--weights", "best"], ("model", "data", "name", "runs")),
    "predict": (["predict", "--weights", "best"], ("model", "data", "name", "runs")),
    "fit": (["fit", "--ckpt_path", "last"], ("",)),
    "knn": (["knn", "--weights", "best", "--k", "3"], ("model", "data", "name", "runs")),
    "linear": (
        ["linear", "--weights", "best", "--protocol", "sweep", "--epochs", "1"],
        ("model", "data", "name", "runs"),
    ),
    "retrieve": (
        ["retrieve", "--weights", "best", "--data.root", "folder", "--data.classes", "[a, b, c]"],
        ("model", "data", "name", "runs"),
    ),
    "embed": (
        ["embed", "--weights", "best", "--to", "exported/features.npy"],
        ("model", "data", "name", "runs"),
    ),
    "show": (
        ["show", "--weights", "best", "--what", "pca", "images/val/ant/0.png"],
        ("model", "data", "name", "runs"),
    ),
    "export": (["export", "--weights", "best", "--to", "exported"], ("model", "data", "trainer")),
    "info": (["info", "best", "--batch_size", "1"], ()),
}


def put(contents, place, value):
    *parts, last = place.split(".")
    for part in parts:
        contents = contents.setdefault(part, {})
    contents[last] = value


@pytest.fixture
def elsewhere(trained, scenes, tmp_path, monkeypatch):
    """A run of somebody else's in `downloads`, and a module in the path that shows when it is imported."""
    monkeypatch.syspath_prepend(tmp_path)
    Path("evil.py").write_text(EVIL)
    Path("downloads").mkdir()
    scenes("folder")  # for retrieve
    Path("runs/classify_tiny").rename("downloads/theirs")
    shutil.rmtree("runs")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # a decoder may name a hub
    return Path("downloads/theirs/version_0")


def attempt(command, run):
    """Run a command on the files of a run, and check that it does no more than it should."""
    attempt_on(command, {name: str(run / f"checkpoints/{name}.ckpt") for name in ("best", "last")})


def attempt_on(command, files):
    before = set(Path().iterdir())
    with contextlib.suppress(SystemExit):
        main([files.get(argument, argument) for argument in COMMANDS[command][0]])
    assert "evil" not in sys.modules
    assert set(Path().iterdir()) - before <= {Path("exported"), Path("runs")}
    assert not list(Path().parent.rglob("*PWNED*"))
    shutil.rmtree("exported", ignore_errors=True)  # else the next is refused


def spoilt(sound, places):
    """Yield copies of what a file holds, each with one payload in one place."""
    for place, values in places.items():
        for value in values:
            contents = copy.deepcopy(sound)
            put(contents, place, value)
            yield contents


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_that_a_run_recorded_is_executed(command, elsewhere, record_property):
    record, groups = elsewhere / "config.yaml", COMMANDS[command][1]
    read = {place: values for place, values in IN_THE_RECORD.items() if place.startswith(groups)}
    texts = [yaml.safe_dump(config) for config in spoilt(yaml.safe_load(record.read_text()), read)]
    texts.append("model: !!python/object/apply:os.system ['touch PWNED']\n")
    for text in texts:
        record.write_text(text)
        attempt(command, elsewhere)
    record_property(f"{command}: payloads in a record", len(texts))


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_that_a_checkpoint_holds_is_executed(command, elsewhere, record_property):
    files = [elsewhere / f"checkpoints/{name}.ckpt" for name in ("best", "last")]
    sound = torch.load(files[1], weights_only=True)
    payloads = list(spoilt(sound, IN_THE_CHECKPOINT))
    for contents in payloads:
        for file in files:
            torch.save(contents, file)
        attempt(command, elsewhere)
    record_property(f"{command}: payloads in a checkpoint", len(payloads))


@pytest.mark.parametrize("command", ["validate", "knn", "export", "info"])
def test_nothing_in_an_exported_folder_is_executed(command, elsewhere, record_property):
    main(["export", "--weights", str(elsewhere / "checkpoints/best.ckpt"), "--to", "downloads/folder"])
    config, weights = Path("downloads/folder/config.json"), Path("downloads/folder/model.safetensors")
    sound = json.loads(config.read_text())
    payloads = list(spoilt(sound, IN_THE_FOLDER))
    for contents in payloads:
        config.write_text(json.dumps(contents))
        attempt_on(command, {"best": "downloads/folder"})
    config.write_text(json.dumps(sound))
    weights.unlink()
    Path("downloads/folder/pytorch_model.bin").write_bytes(pickle.dumps(Touch(), 2))
    attempt_on(command, {"best": "downloads/folder"})
    record_property(f"{command}: payloads in an exported folder", len(payloads) + 1)


class Touch:
    def __reduce__(self):
        return os.system, ("touch PWNED",)
