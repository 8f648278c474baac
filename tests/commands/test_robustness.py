"""`locat robustness` as a user calls it."""

import json
from pathlib import Path

import pytest
import timm
import torch
from torch.nn import functional as F

from locat.command import main
from locat_lightning.data import SegmentationData
from locat_lightning.evaluation.iou import MeanIoU
from locat_lightning.evaluation.per_image import read_table
from locat_lightning.tasks.segmenter import load_segmenter
from tests.commands.runs import BEST, QUIET, RUN

RESULT = Path("runs/classify_tiny_robustness/version_0")
CPU = ["--accelerator", "cpu"]


@pytest.mark.usefixtures("workplace")
def test_curves_of_a_run(trained, capsys):
    options = ["--kinds", "[occlusion, shuffle]", "--numbers", "[2, 16]", "--temperatures", "[1, 2.5]"]
    main(["robustness", "--weights", str(BEST), *options, *CPU])
    record = json.loads((RESULT / "metrics.json").read_text())
    assert record["robustness/top1"] == json.loads((RUN / "metrics.json").read_text())["best val/top1"]
    table = read_table(RESULT / "images.csv")
    at = ("", "_t2.5")
    names = [
        f"top1{own}{t}"
        for own in ("", *(f"_{k}_n{n}" for k in ("occlusion", "shuffle") for n in (2, 16)))
        for t in at
    ]
    assert list(table.scores) == names
    for name in names:
        assert record[f"robustness/{name}"] == pytest.approx(float(table.scores[name].mean()))
        low, high = record["intervals"][f"robustness/{name}"]
        assert low <= record[f"robustness/{name}"] <= high
    assert record["robustness/top1_occlusion_n16"] == pytest.approx(1 / 3, abs=0.1)  # all images are alike
    assert (
        record["protocol"] == "patches of 8 px corrupted, severity 5, seed 0, 32 × 32 px, bicubic, crop 0.875"
    )
    assert (RESULT / "robustness.png").stat().st_size > 10_000
    assert "top-1 at temperature 2.5" in capsys.readouterr().out

    main(["compare", str(RESULT), str(RESULT)])
    differences = json.loads(Path("runs/compare/version_0/metrics.json").read_text())["differences"]
    assert list(differences) == names


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["robustness", *map(str, arguments), *CPU])
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.usefixtures("workplace")
def test_what_is_no_classifier_of_the_data_is_refused(trained, folder, capsys):
    data = ["--data.root", folder, "--data.img_size", "32", "--data.num_workers", "0"]
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    model = ["--backbone", "locatvit_tiny", "--backbone_args", json.dumps(sizes)]
    for classes, said in ((0, "has no classifier"), (7, "has a classifier of 7 classes")):
        net = timm.create_model("locatvit_tiny", num_classes=classes, **sizes)
        torch.save(net.state_dict(), "net.pth")
        error = refused(capsys, "--weights", "net.pth", *data, *model)
        assert f"net.pth {said}, and the data have 3 classes" in error
    assert "there is no corruption 'fog'" in refused(capsys, "--weights", BEST, "--kinds", "[fog]")
    (folder / "train" / "cat").rename(folder / "train" / "cow")
    (folder / "val" / "cat").rename(folder / "val" / "cow")
    error = refused(capsys, "--weights", BEST)
    assert "the weights were trained on other classes than the data have: only the weights have cat" in error


@pytest.mark.filterwarnings("ignore:.*the model has not been trained")
@pytest.mark.usefixtures("workplace")
def test_curves_of_a_segmentation(scenes, capsys):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    torch.manual_seed(0)
    net = timm.create_model("locatvit_tiny", num_classes=0, **sizes)
    own = {"backbone": "locatvit_tiny", "backbone_args": sizes}
    torch.save({"state_dict": net.state_dict(), "hyper_parameters": own}, "net.pth")
    root, classes = scenes("folder"), ["sky", "road", "car"]
    data = ["--data.root", str(root), "--data.classes", str(classes), "--data.num_workers", "0"]
    steps = ["--trainer.max_steps", "4", "--trainer.val_check_interval", "4", "--trainer.log_every_n_steps=1"]
    steps += ["--data.crop_size", "32", "--data.scale", "[48, 40]", "--data.batch_size", "3"]
    main(["fit", "--config", "segment_folder.yaml", "--weights", "net.pth", *data, *steps, *QUIET])
    weights = "runs/segment_folder/version_0/checkpoints/last.ckpt"
    options = ["--kinds", "[occlusion]", "--numbers", "[16]", "--temperatures", "[1, 9]"]
    main(["robustness", "--weights", weights, *options, *CPU])

    result = Path("runs/segment_folder_robustness/version_0")
    record = json.loads((result / "metrics.json").read_text())
    model, found = load_segmenter(weights, any_size=True).eval(), MeanIoU(3)
    images = SegmentationData(root=str(root), classes=classes, num_workers=0).square_dataloader("val", 32)
    with torch.no_grad():
        for batch in images:  # of 40 x 48 pixels, as are the masks
            scores = F.interpolate(model(batch.images), batch.masks.shape[1:], mode="bilinear")
            found.update(scores.argmax(1), batch.masks)
    assert record["robustness/miou"] == pytest.approx(float(found.compute().miou), abs=2e-3)
    assert record["protocol"] == "patches of 8 px corrupted, severity 5, seed 0, images resized to 32 × 32"
    table = read_table(result / "images.csv")
    names = ["miou", "miou_t9", "miou_occlusion_n16", "miou_occlusion_n16_t9"]
    assert list(table.areas) == names
    for name, areas in table.under_each().items():
        summed = areas.figures(areas.statistics().sum(0), 3)
        assert record[f"robustness/{name}"] == pytest.approx(float(summed["miou"]))
        low, high = record["intervals"][f"robustness/{name}"]
        assert low <= record[f"robustness/{name}"] <= high
    assert (result / "robustness.png").stat().st_size > 10_000
    assert "mIoU at temperature 9" in capsys.readouterr().out

    main(["compare", str(result), str(result)])
    differences = json.loads(Path("runs/compare/version_0/metrics.json").read_text())["differences"]
    assert list(differences) == names
    error = refused(capsys, "--weights", weights, "--image_size", "36")
    assert "images of 36 × 36 pixels have no whole patches of 8: set --patch_size" in error
    error = refused(capsys, "--weights", weights, "--data.classes", "[sky, car, road]")
    assert "the weights were trained on other classes than the data have: another order" in error
