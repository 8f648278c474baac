"""`locat track` as a user calls it."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from locat.command import main
from locat_lightning.data.videos import VideoData
from locat_lightning.evaluation.tracking import Propagation, measure_tracking

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


@pytest.fixture
def options(davis, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(3)
    torch.save(timm.create_model("locatvit_tiny", num_classes=0, **SIZES).state_dict(), "net.pth")
    return [
        *("--weights", "net.pth", "--backbone", "locatvit_tiny", "--backbone_args", json.dumps(SIZES)),
        *(
            "--data.root",
            str(davis),
            "--data.short_side",
            "64",
            "--data.num_workers",
            "0",
            "--accelerator",
            "cpu",
        ),
    ]


def test_track(options, davis, capsys):
    main(["track", *options, "--radius", "3"])

    data = VideoData(root=str(davis), short_side=64, num_workers=0)
    model = timm.create_model("locatvit_tiny", num_classes=0, dynamic_img_size=True, **SIZES)
    model.load_state_dict(torch.load("net.pth"))
    written = {}
    expected = measure_tracking(
        model,
        data.frames_dataloader("val", [0, 1], 8),
        data.source("val"),
        "cpu",
        Propagation(radius=3),
        write=written.__setitem__,
        progress=False,
    )
    run = Path("runs/net_track/version_0")
    found = json.loads((run / "metrics.json").read_text())
    objects = torch.cat([expected["boat"], expected["cars"]])  # the mean is over objects, not over videos
    j, f = objects.mean(0).tolist()
    assert found["tracking/J"] == pytest.approx(j)
    assert found["tracking/F"] == pytest.approx(f)
    assert found["tracking/J&F"] == pytest.approx((j + f) / 2)
    assert found["tracking/J_cars"] == pytest.approx(float(expected["cars"][:, 0].mean()))
    assert found["weights"] == "net.pth"
    masks = sorted((run / "masks").rglob("*.png"))
    assert [str(path.relative_to(run / "masks")) for path in masks[4:6]] == [
        "boat/00004.png",
        "cars/00000.png",
    ]
    for place, path in enumerate(masks):
        with Image.open(path) as mask:
            assert mask.mode == "P"
            assert mask.getpalette()[:9] == [0, 0, 0, 200, 0, 0, 0, 200, 0]
            assert np.array_equal(np.asarray(mask), written[place].numpy())
    assert len(masks) == 11
    out = capsys.readouterr().out
    protocol = (
        "video object segmentation, videos of 2017, 480p resized to a short side of 64, first frame and 7 "
        "before, radius 3, 5 neighbours at temperature 0.1"
    )
    assert found["protocol"] == protocol
    assert f"J&F {(j + f) / 2:.4f} (3 objects in 2 videos; {protocol})" in out
    assert "95 % intervals, bootstrap over 3 objects" in out
    low, high = found["intervals"]["tracking/J"]
    assert low < j < high
    rows = (run / "images.csv").read_text().splitlines()
    assert [row.split(",")[1] for row in rows[1:]] == ["boat/1", "cars/1", "cars/2"]
    main(["compare", str(run), str(run)])
    assert "A − B on 3 objects, with 95 % intervals (video object segmentation" in capsys.readouterr().out
    main(["runs"])
    assert f"tracking/J&F {(j + f) / 2:.4g}" in capsys.readouterr().out


def test_masks_are_written_where_nothing_can_be_scored(options, davis, capsys):
    for path in davis.glob("Annotations/480p/*/0000[1-9].png"):
        path.unlink()
    main(["track", *options])
    run = Path("runs/net_track/version_0")
    assert not any(key.startswith("tracking") for key in json.loads((run / "metrics.json").read_text()))
    assert len(list((run / "masks").rglob("*.png"))) == 11
    assert "no annotations to compare with" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data.root", "nowhere"], "no such file: "),
        (["--split", "all"], "split"),
        (["--radius", "0"], "radius"),
        (["--data.img_size", "32"], "--data.img_size: there is no such option"),
    ],
)
def test_mistakes_are_one_line(options, more, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["track", *options, *more])
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("locat: error: ")
    assert message in error
    assert not Path("runs").exists()


def test_of_a_config_of_a_training_only_the_normalisation_is_taken(options, davis, capsys):
    own = {"mean": [0.1, 0.2, 0.3], "root": "elsewhere", "crop_size": 32, "dataset": "ade20k"}
    Path("mine.yaml").write_text(json.dumps({"data": {"class_path": "SegmentationData", "init_args": own}}))
    main(["track", "--config", "mine.yaml", *options])
    first = json.loads(Path("runs/net_track/version_0/metrics.json").read_text())
    main(["track", "--data.mean", "[0.1, 0.2, 0.3]", *options])
    assert first == json.loads(Path("runs/net_track/version_1/metrics.json").read_text())
    main(["track", *options])
    assert first != json.loads(Path("runs/net_track/version_2/metrics.json").read_text())
