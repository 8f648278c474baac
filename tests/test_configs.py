"""Every shipped config runs."""

import json
from pathlib import Path

import pytest
import torch

import locat
from locat_lightning.cli import main

SHIPPED = sorted(locat.config_directory().rglob("*.yaml"))
CONFIGS = [str(path.relative_to(locat.config_directory())) for path in SHIPPED if "dino_" not in path.name]


def test_there_are_configs():
    assert {f"classify_{size}.yaml" for size in ("tiny", "small", "base")} < set(CONFIGS)
    assert len(SHIPPED) > len(CONFIGS)  # those of DINO run in tasks/test_dino.py


@pytest.mark.parametrize("config", CONFIGS)
def test_it_runs_a_step(config, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = [
        "--trainer.max_epochs",
        "1",
        "--trainer.limit_train_batches",
        "1",
        "--trainer.limit_val_batches",
        "1",
    ]
    main(["fit", "--config", config, *small, *one])
    [run] = (tmp_path / "runs").rglob("version_0")
    assert run.parent.name == Path(config).stem
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 1
    assert {"val/loss", "val/top1"} <= json.loads((run / "metrics.json").read_text()).keys()
