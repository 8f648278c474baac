"""Pictures of a segmentation, and its predictions as files."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from locat_lightning.callbacks import maps
from locat_lightning.callbacks.maps import draw_confusion, draw_iou, draw_segmentation, overlay
from locat_lightning.callbacks.pictures import spaced_items
from locat_lightning.commands.fit import main
from locat_lightning.evaluation.iou import count_pixels, iou
from locat_lightning.nn.decoder import IGNORED

COLOURS = np.array([[250, 0, 0], [0, 250, 0], [0, 0, 250]], np.uint8)
NAMES = ["sky", "road", "car"]
BACKBONE = "{img_size: 32, patch_size: 8, embed_dim: 24, depth: 2, num_heads: 3}"


def test_an_overlay_shows_the_colours_and_leaves_the_rest():
    image = Image.fromarray(np.full((2, 3, 3), (100, 150, 200), np.uint8))
    classes = np.array([[0, 1, 2], [IGNORED, 0, IGNORED]])
    drawn = np.asarray(overlay(image, classes, COLOURS)).astype(int)
    grey = int(np.asarray(image.convert("L"))[0, 0])
    assert drawn[0].tolist() == np.rint(0.6 * COLOURS + 0.4 * grey).astype(int).tolist()
    assert drawn[1, 0].tolist() == drawn[1, 2].tolist() == [100, 150, 200]


def colours_in(picture):
    return {tuple(colour) for colour in picture.flatten(1).T.tolist()}


def test_the_picture_has_a_row_for_each_image_and_a_legend_of_what_occurs():
    images = [torch.full((3, 20, 30), 0.5), torch.full((3, 40, 20), 0.5)]
    masks = [torch.zeros(20, 30, dtype=torch.uint8), torch.full((80, 40), IGNORED, dtype=torch.uint8)]
    predictions = [torch.zeros(20, 30, dtype=torch.int64), torch.zeros(80, 40, dtype=torch.int64)]
    plain = draw_segmentation(images, masks, predictions, NAMES, COLOURS, side=60)
    assert plain.dtype == torch.uint8
    assert (250, 0, 0) in colours_in(plain)
    assert not {(0, 250, 0), (0, 0, 250)} & colours_in(plain)
    predictions[1][:] = 2
    assert (0, 0, 250) in colours_in(draw_segmentation(images, masks, predictions, NAMES, COLOURS, side=60))
    kernels = [[torch.rand(1, 6, 2, 3)] * 4, [torch.rand(1, 8, 4, 2)] * 4]
    wider = draw_segmentation(images, masks, predictions, NAMES, COLOURS, kernels=kernels, side=60)
    assert wider.shape[2] > plain.shape[2]


def scored():
    annotations = torch.tensor([[0, 0, 0, 0, IGNORED, 1]])
    predictions = torch.tensor([[0, 0, 0, 1, 1, 1]])
    return iou(count_pixels(predictions, annotations, 3))


def test_bars_are_as_long_as_the_iou():
    picture = draw_iou(scored(), NAMES, COLOURS, title="whole image", line=20)
    red, green, blue = ((picture == torch.tensor(c)[:, None, None]).all(0).any(0).sum() for c in COLOURS)
    assert red.item() == pytest.approx(0.75 * 12 * 20, abs=3)
    assert green.item() == pytest.approx(0.5 * 12 * 20, abs=3)
    assert blue == 0  # does not occur


def test_many_classes_take_several_columns():
    many = iou(count_pixels(torch.arange(150)[None], torch.arange(150)[None], 150))
    colours = np.random.default_rng(0).integers(255, size=(150, 3), dtype=np.uint8)
    names = [f"class {i} of a long name indeed" for i in range(150)]
    picture = draw_iou(many, names, colours, title="", line=20)
    assert picture.shape[1] < 1000
    assert draw_confusion(many.confusion, names, side=300).shape[1:] == (350, 350)


def test_the_confusion_of_an_annotated_class_fills_its_row():
    picture = draw_confusion(scored().confusion, NAMES, side=300)
    margin, cell = 150, 100
    corner = picture[:, margin + 5 :: cell, margin + 5 :: cell][:, :3, :3].float().sum(0)
    assert corner[0, 0] > corner[0, 1] > corner[0, 2]  # 75 %, 25 %, none
    assert corner[1, 1] == corner[1, 1].max()
    assert corner[2].unique().numel() == 1


@pytest.fixture
def run(scenes, tmp_path, monkeypatch):
    """A run of a step on the folder `folder`, and options for more of it."""
    monkeypatch.chdir(tmp_path)
    root = scenes("folder")
    options = [
        *("--weights", "random", "--model.backbone", "locatvit_tiny", "--model.backbone_args", BACKBONE),
        *("--data.root", str(root), "--data.classes", json.dumps(NAMES), "--data.scale", "[48, 40]"),
        *("--data.crop_size", "32", "--data.batch_size", "3", "--data.num_workers", "0"),
        *("--model.hidden_dim", "16", "--pictures.images", "2", "--pictures.side", "64"),
        *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
        *(
            "--trainer.max_steps",
            "2",
            "--trainer.val_check_interval",
            "2",
            "--trainer.log_every_n_steps",
            "1",
        ),
    ]
    with pytest.warns(UserWarning, match="random: the model has not been trained"):
        main(["fit", "--config", "segment_folder.yaml", *options])
    [directory] = (tmp_path / "runs").rglob("version_0")
    return SimpleNamespace(root=root, directory=directory, weights=directory / "checkpoints" / "best.ckpt")


def events_in(directory):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(directory)).Reload()


def test_tensorboard_shows_pictures_iou_and_confusion(run):
    found = events_in(run.directory).Tags()
    assert set(found["images"]) == {f"pictures/{name}" for name in ("validation", "iou", "confusion")}
    assert {"train/loss", "train/lr", "train/grad_norm", "val/miou", "train/images_per_s"} <= set(
        found["scalars"]
    )
    assert {"iou/sky", "iou/car"} <= set(found["scalars"])
    assert {"gaug_variance/block_00", "gaug_alpha/block_01"} <= set(found["scalars"])


def test_measured_again_it_says_by_which_protocol(run, caplog):
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
    main(["validate", "--weights", str(run.weights), *quiet])
    final = json.loads((run.directory / "metrics.json").read_text())["val/miou"]
    assert f"val/miou {final:.4f} (whole image resized to fit 48 × 40)" in caplog.text


def test_predictions_are_index_pngs_and_overlays_of_any_folder(run, tmp_path):
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
    (tmp_path / "mine").mkdir()
    pixels = np.random.default_rng(0).integers(256, size=(33, 57, 3), dtype=np.uint8)
    (tmp_path / "mine" / "more").mkdir()
    for name in ("holiday.png", "holiday.jpg", "more/holiday.png"):
        Image.fromarray(pixels).save(tmp_path / "mine" / name)
    main(["predict", "--weights", str(run.weights), "--data.root", str(tmp_path / "mine"), *quiet])
    [directory] = (tmp_path / "runs").rglob("predictions")
    files = {str(path.relative_to(directory)) for path in directory.rglob("*.png")}
    assert files == {"holiday.jpg.png", "holiday.png.png", "more/holiday.png.png"}  # none over another
    with Image.open(directory / "holiday.png.png") as indexed:
        assert (indexed.size, indexed.mode) == ((57, 33), "P")
        assert np.asarray(indexed).max() < len(NAMES)
    with Image.open(directory.parent / "overlays" / "holiday.png.png") as drawn:
        assert (drawn.size, drawn.mode) == ((57, 33), "RGB")


def test_a_run_goes_on_in_its_directory_and_reads_its_pictures_once(run, monkeypatch):
    read = []
    monkeypatch.setattr(maps, "spaced_items", lambda *of: read.append(spaced_items(*of)) or read[-1])
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
    last = run.directory / "checkpoints" / "last.ckpt"
    more = ["--trainer.max_steps", "6", "--allow_changes", "true"]
    main(["fit", "--ckpt_path", str(last), *more, *quiet])
    assert torch.load(last, weights_only=True)["global_step"] == 6
    assert [picture.step for picture in events_in(run.directory).Images("pictures/validation")] == [1, 3, 5]
    assert [len(items) for items in read] == [2]
