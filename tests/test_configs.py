"""Every shipped config runs."""

import pytest

import locat
from locat_lightning.cli import main

CONFIGS = sorted(path.name for path in locat.config_directory().rglob("classify_*.yaml"))
assert len(CONFIGS) >= 3


@pytest.mark.parametrize("config", [*CONFIGS, "quickstart.yaml"])
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
    assert (tmp_path / "runs" / config.removesuffix(".yaml") / "version_0" / "metrics.json").is_file()
