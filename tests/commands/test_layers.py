"""`locat layers` as a user calls it."""

import json
from pathlib import Path

import pytest
from PIL import Image

from locat.command import main
from locat_lightning.backbones.create import load_backbone
from locat_lightning.evaluation.layers import by_layer, measure_layers
from tests.commands.runs import BEST

RESULT = Path("runs/classify_tiny_layers/version_0")
CPU = ["--accelerator", "cpu"]


@pytest.mark.usefixtures("workplace")
def test_layers_of_a_run(trained, capsys):
    main(["layers", "--weights", str(BEST), "--images", "2", *CPU])
    out = capsys.readouterr().out
    assert "layers: 2 images, 32 × 32 px, bicubic, crop 0.875" in out
    record = json.loads((RESULT / "metrics.json").read_text())
    assert record["protocol"] == "2 images, 32 × 32 px, bicubic, crop 0.875"
    found = by_layer(record)
    blocks = len(load_backbone(str(BEST)).blocks)
    assert list(found["distance"]) == [*(f"block_{number:02}" for number in range(blocks)), "prr"]
    for layer, distance in found["distance"].items():
        heads = [value for name, value in record.items() if name.startswith(f"layers/distance/{layer}/head_")]
        assert sum(heads) / len(heads) == pytest.approx(distance)
        assert found["distance_px"][layer] == pytest.approx(8 * distance, rel=1e-5)
        assert f"{distance:.3f}" in out
    with Image.open(RESULT / "layers.png") as picture:
        assert min(picture.size) > 300


@pytest.mark.usefixtures("workplace")
def test_images_are_spaced_over_the_classes(trained, monkeypatch):
    seen = []

    def note(backbone, loader, *rest, **options):
        seen.extend(index for batch in loader for index in batch.indices.tolist())
        return measure_layers(backbone, loader, *rest, **options)

    monkeypatch.setattr("locat_lightning.commands.layers.measure_layers", note)
    main(["layers", "--weights", str(BEST), "--images", "3", *CPU])
    assert seen == [0, 4, 7]  # of 3, 3 and 2


@pytest.mark.filterwarnings("ignore:.*the model has not been trained")
@pytest.mark.usefixtures("workplace")
def test_models_without_such_layers_are_refused(folder, capsys):
    data = ["--data.root", str(folder), "--data.img_size", "64", "--data.num_workers", "0"]
    with pytest.raises(SystemExit) as stopped:
        main(["layers", "--weights", "random", "--backbone", "resnet10t", *data, *CPU])
    assert stopped.value.code == 2
    assert "only Vision Transformers have layers to measure" in capsys.readouterr().err.splitlines()[-1]
