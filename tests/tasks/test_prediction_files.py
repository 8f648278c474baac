"""Predictions as files: order, names, numbers, pixels."""

import csv
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from locat_lightning.commands.fit import main
from locat_lightning.errors import InputError
from locat_lightning.evaluation import gather
from locat_lightning.evaluation.intervals import Figures, intervals
from locat_lightning.evaluation.per_image import read_table
from locat_lightning.tasks import Classification
from locat_lightning.tasks.prediction_files import file_names, write_classes, write_table

DATA = SimpleNamespace(predict_paths=[f"{i}.jpg" for i in range(4)])


def part(*rows):
    positions, probabilities = zip(*rows, strict=True)
    return torch.tensor(positions), torch.tensor(probabilities)


def test_a_name_that_is_not_utf_8_is_written_as_it_is(tmp_path):
    path = os.fsdecode(b"caf\xe9.jpg")
    write_table(
        tmp_path / "run" / "predictions.csv", [path], torch.tensor([[0.25, 0.75]]), ["ant", "bier\u00e9"]
    )
    found = (tmp_path / "run" / "predictions.csv").read_bytes().splitlines()
    assert found == [
        "path,class,ant,bier\u00e9".encode(),
        b"caf\xe9.jpg," + "bier\u00e9,0.250000,0.750000".encode(),
    ]


def read(folder):
    with (folder / "run" / "predictions.csv").open(newline="") as file:
        return list(csv.reader(file))


def classification(names=("a", "b")):
    module = Classification(num_classes=2, class_names=list(names))
    for each in (part((2, (0.9, 0.1)), (0, (0.25, 0.75))), part((3, (1 / 3, 2 / 3)))):
        module.write_predictions(each, DATA, None)
    return module


@pytest.mark.parametrize("names", [["ant, red", "bee"], []])
def test_rows_are_in_the_order_of_the_data(tmp_path, names):
    line = classification(names).finish_predictions(DATA, tmp_path / "run")
    a, b = names or ["0", "1"]
    assert line == f"3 predictions: {tmp_path}/run/predictions.csv"
    assert read(tmp_path) == [
        ["path", "class", a, b],
        ["0.jpg", b, "0.250000", "0.750000"],
        ["2.jpg", a, "0.900000", "0.100000"],  # 1.jpg could not be read
        ["3.jpg", b, "0.333333", "0.666667"],
    ]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_writes_those_of_all(tmp_path, monkeypatch, rank):
    positions, probabilities = part((1, (0.0, 1.0)))

    def of_both(table, device):
        yield table
        yield positions if table.ndim == 1 else probabilities

    monkeypatch.setattr(gather, "parts", of_both)
    monkeypatch.setattr(Classification, "global_rank", rank)
    assert classification().finish_predictions(DATA, tmp_path / "run").startswith("4 predictions")
    if rank == 0:
        assert [row[0] for row in read(tmp_path)[1:]] == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    else:
        assert not (tmp_path / "run").exists()


def test_without_a_readable_image_nothing_is_written(tmp_path):
    with pytest.raises(InputError, match="none of the images can be read"):
        Classification(num_classes=2).finish_predictions(DATA, tmp_path)


def test_files_are_named_as_their_images_below_the_folder_that_holds_all():
    assert file_names(["/a/b/1.png", "/a/b/c/1.png"]) == ["1", "c/1"]
    assert file_names(["/a/1.png", "/a/1.jpg"]) == ["1.png", "1.jpg"]  # none over the other


QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directory of a segmentation that was trained for a step."""
    runs = tmp_path_factory.mktemp("segmentation")
    options = {
        "model.backbone_args": "{img_size: 32, patch_size: 8, embed_dim: 24, depth: 1, num_heads: 3}",
        "model.backbone": "locatvit_tiny",
        "model.hidden_dim": 16,
        "weights": "random",
        "data.crop_size": 32,
        "data.batch_size": 3,
        "data.num_workers": 0,
        "trainer.max_steps": 1,
        "trainer.val_check_interval": 1,
        "trainer.limit_val_batches": 1,
        "pictures.every_n_epochs": 0,
        "runs": runs,
        "name": "trained",
    }
    with pytest.warns(UserWarning, match="random: the model has not been trained"):
        main(["fit", "--config", "segment_digits.yaml", *(f"--{k}={v}" for k, v in options.items()), *QUIET])
    return runs / "trained" / "version_0"


@pytest.fixture(scope="module")
def predicted(trained, tmp_path_factory):
    """The index PNGs of a folder of images."""
    root = tmp_path_factory.mktemp("mine")
    pixels = np.random.default_rng(0).integers(256, size=(33, 57, 3), dtype=np.uint8)
    (root / "more").mkdir(parents=True)
    for name in ("holiday.png", "holiday.jpg", "more/holiday.png"):
        Image.fromarray(pixels).save(root / name)
    data = ["--data.dataset", "folder", "--data.root", str(root), "--data.eval_batch_size", "1"]
    main(["predict", "--weights", str(trained / "checkpoints" / "best.ckpt"), *data, *QUIET])
    [directory] = trained.parents[1].rglob("predictions")
    return directory


def test_measured_again_it_says_by_which_protocol(trained, caplog, capsys):
    limit = ["--trainer.limit_val_batches", "1", "--pictures.every_n_epochs", "0"]
    main(["validate", "--weights", str(trained / "checkpoints" / "best.ckpt"), *limit, *QUIET])
    final = json.loads((trained / "metrics.json").read_text())["val/miou"]
    said = caplog.text + capsys.readouterr().out
    assert said.count("val/miou") == 1
    assert f"val/miou {final:.2%} [" in said
    assert "(segmentation, whole image resized to fit 64 × 64; 95 % intervals: bootstrap over" in said
    [run] = trained.parents[1].glob("*_validate/version_0")
    record = json.loads((run / "metrics.json").read_text())
    areas = read_table(run / "images.csv")
    figures = Figures(areas, "val").values
    assert record["val/miou"] == pytest.approx(final) == pytest.approx(figures["miou"])
    assert record["intervals"]["val/miou"] == pytest.approx(list(intervals(areas)["miou"]))
    assert record["images"] == len(areas.indices)
    assert record["protocol"] == "segmentation, whole image resized to fit 64 × 64"


def test_predictions_are_index_pngs_and_overlays_of_any_folder(predicted):
    files = {str(path.relative_to(predicted)) for path in predicted.rglob("*.png")}
    assert files == {"holiday.jpg.png", "holiday.png.png", "more/holiday.png.png"}
    with Image.open(predicted / "holiday.png.png") as indexed:
        assert (indexed.size, indexed.mode) == ((57, 33), "P")
        assert np.asarray(indexed).max() < 11
        assert indexed.getpalette()[:3] != indexed.getpalette()[3:6]
    with Image.open(predicted.parent / "overlays" / "holiday.png.png") as drawn:
        assert (drawn.size, drawn.mode) == ((57, 33), "RGB")


def test_an_overlay_has_the_colours_over_the_image_in_grey(tmp_path):
    colours = np.array([[250, 0, 0], [0, 250, 0]], np.uint8)
    image = Image.fromarray(np.full((1, 2, 3), (100, 150, 200), np.uint8))
    write_classes(tmp_path, "more/a", image, np.array([[0, 1]], np.uint8), colours)
    with Image.open(tmp_path / "overlays" / "more" / "a.png") as drawn:
        np.testing.assert_allclose(
            np.asarray(drawn)[0], 0.6 * colours + 0.4 * image.convert("L").getpixel((0, 0)), atol=1
        )
    with Image.open(tmp_path / "predictions" / "more" / "a.png") as indexed:
        assert np.asarray(indexed).tolist() == [[0, 1]]
        assert indexed.getpalette()[:6] == colours.flatten().tolist()
