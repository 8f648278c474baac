"""Images of five channels through training, resuming, evaluation and export, in process."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import yaml
from PIL import Image

from locat.command import main

BACKBONE = "{img_size: 32, patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2}"
QUIET = [
    *("--data.num_workers", "0", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
    *("--trainer.log_every_n_steps", "1", "--pictures.images", "2", "--pictures.side", "48"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with `bands` (16-bit TIFF and .npy), `scenes` with masks, and the statistics of both."""
    place, draw = tmp_path_factory.mktemp("channels"), np.random.default_rng(0)
    for split, name, i in [(s, n, i) for s in ("train", "val") for n in ("ant", "bee") for i in range(4)]:
        bands = draw.normal(3000, 400, (32, 32, 5))
        bands[..., 3 if name == "bee" else 1] += 2000
        (folder := place / "bands" / split / name).mkdir(parents=True, exist_ok=True)
        if i % 2:
            np.save(folder / f"{i}.npy", bands.astype(np.uint16))
        else:
            planes = bands.astype(np.uint16).transpose(2, 0, 1)
            tifffile.imwrite(folder / f"{i}.tif", planes, photometric="minisblack")
    for split, i in [(s, i) for s in ("train", "val") for i in range(2)]:
        for part in ("images", "annotations"):
            (place / "scenes" / part / split).mkdir(parents=True, exist_ok=True)
        mask = (np.add.outer(np.arange(40), np.arange(56)) // (9 + i) % 2).astype(np.uint8)
        bands = mask[..., None] * [1, 2, 3, 4, 5] + draw.normal(0, 0.1, (40, 56, 5))
        np.save(place / "scenes" / "images" / split / f"{i}.npy", bands.astype(np.float32))
        Image.fromarray(mask).save(place / "scenes" / "annotations" / split / f"{i}.png")
    for name in ("bands", "scenes"):
        to = str(place / f"{name}.yaml")
        main(["stats", "--data.root", str(place / name), "--data.num_workers", "0", "--to", to])
    return place


def data_of(place, name):
    return ["--data.root", str(place / name), "--data.stats", str(place / f"{name}.yaml")]


@pytest.fixture(scope="module")
def classifier(place):
    """A run of ChannelViT with GAug and PRR on `bands`, of one epoch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        options = ["--data.img_size", "32", "--data.batch_size", "4", "--model.warmup_epochs", "0"]
        options += ["--model.backbone", "locatchannelvit_tiny", "--model.backbone_args", BACKBONE]
        own = [*data_of(place, "bands"), *options, *QUIET, "--trainer.max_epochs", "1", "--name", "classes"]
        main(["fit", "--config", "classify_tiny", *own])
    return place / "runs" / "classes" / "version_0"


def test_a_run_records_the_numbers_and_resumes_without_their_file(classifier, place, monkeypatch):
    monkeypatch.chdir(place)
    data = yaml.safe_load((classifier / "config.yaml").read_text())["data"]["init_args"]
    recorded = yaml.safe_load((place / "bands.yaml").read_text())
    assert (data["channels"], data["stats"]) == (5, None)
    assert data["mean"] == recorded["mean"]
    last = classifier / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["hyper_parameters"]["backbone_args"]["in_chans"] == 5
    (place / "bands.yaml").rename(place / "away.yaml")
    try:
        main(["fit", "--ckpt_path", str(last), "--trainer.max_epochs", "2", "--allow_changes", "true"])
    finally:
        (place / "away.yaml").rename(place / "bands.yaml")
    assert torch.load(last, weights_only=True)["global_step"] == 4


def test_any_subset_is_measured(classifier, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    weights = ["--weights", str(classifier / "checkpoints" / "best.ckpt")]
    main(["validate", *weights, "--data.channels", "[3, 1]", "--trainer.accelerator", "cpu"])
    assert "val/top1" in json.loads(Path("runs/classes_validate/version_0/metrics.json").read_text())
    main(["knn", *weights, "--accelerator", "cpu", "--k", "3", "--subsets", "3", "0,1,2,3,4"])
    out = capsys.readouterr().out
    assert "channels_3 " in out
    assert "channels_0_1_2_3_4" in out
    with pytest.raises(SystemExit, match="2"):
        main(["validate", *weights, "--data.channels", "[3, 5]", "--trainer.accelerator", "cpu"])
    assert "give indices from 0 to 4" in capsys.readouterr().err


def test_corrupted_patches_of_all_channels(classifier, place, monkeypatch):
    monkeypatch.chdir(place)
    weights = ["--weights", str(classifier / "checkpoints" / "best.ckpt"), "--accelerator", "cpu"]
    main(["robustness", *weights, "--kinds", "[occlusion]", "--numbers", "[16]"])
    found = json.loads(Path("runs/classes_robustness/version_0/metrics.json").read_text())
    best = json.loads((classifier / "metrics.json").read_text())["best val/top1"]
    assert found["robustness/top1"] == pytest.approx(best)
    assert found["robustness/top1_occlusion_n16"] == 0.5  # all images are alike, and of two classes


def test_export_and_features_have_the_channels(classifier, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    weights = ["--weights", str(classifier / "checkpoints" / "best.ckpt")]
    main(["export", *weights, "--to", "timm"])
    config = json.loads(Path("timm/config.json").read_text())
    assert config["pretrained_cfg"]["input_size"][0] == 5
    assert config["pretrained_cfg"]["mean"] == pytest.approx(
        yaml.safe_load((place / "bands.yaml").read_text())["mean"]
    )
    main(["knn", "--weights", "timm", "--data.root", "bands", "--accelerator", "cpu", "--k", "3"])
    main(["embed", *weights, "--accelerator", "cpu", "--split", "val", "--to", "features.npy"])
    assert np.load("features.npy").shape == (8, 24)
    image = str(place / "bands" / "val" / "ant" / "0.tif")
    main(["show", image, *weights, "--accelerator", "cpu", "--tile", "64", "--show_channels", "0", "3", "1"])
    assert "pca.png" in capsys.readouterr().out


def test_pretraining_sees_views_of_all_channels(place, monkeypatch):
    monkeypatch.chdir(place)
    options = [
        "--data.views.global_size",
        "32",
        "--data.views.local_size",
        "16",
        "--data.views.local_views",
        "1",
    ]
    options += ["--model.backbone_args", BACKBONE, "--model.warmup_epochs", "0", "--data.batch_size", "4"]
    options += ["--trainer.max_steps", "2", "--knn.every_n_epochs", "0", "--linear.every_n_epochs", "0"]
    options += ["--model.out_dim", "16", "--model.hidden_dim", "8", "--model.bottleneck_dim", "4"]
    own = ["--model.backbone", "locatchannelvit_tiny", *data_of(place, "bands"), *options, *QUIET]
    main(["fit", "--config", "dino_tiny", *own, "--data.show", "[0, 3, 4]"])
    state = torch.load("runs/dino_tiny/version_0/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert state["student.backbone.patch_embed.channel_embed"].shape == (5, 24)
    assert state["student.backbone.patch_embed.proj.weight"].shape == (24, 1, 8, 8)


def test_methods_of_tokens_by_place_refuse_tokens_by_channel(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    own = [*data_of(place, "bands"), "--model.backbone", "channelvit_tiny", *QUIET]
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--config", "mae_small", *own])
    assert "Mae needs a token for each place" in capsys.readouterr().err


def test_a_segmentation_learns_and_predicts(place, monkeypatch):
    monkeypatch.chdir(place)
    options = ["--data.classes", "[even, odd]", "--data.crop_size", "32", "--data.scale", "[56, 32]"]
    options += ["--data.batch_size", "2", "--trainer.max_steps", "2", "--trainer.val_check_interval", "1"]
    options += ["--model.backbone", "vit_tiny_patch16_224", "--model.backbone_args", BACKBONE]
    own = [*data_of(place, "scenes"), *options, *QUIET, "--model.train_backbone", "true", "--name", "seg"]
    own += ["--pictures.every_n_epochs", "0"]
    main(["fit", "--config", "segment_folder", *own])
    last = "runs/seg/version_0/checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["state_dict"]["backbone.patch_embed.proj.weight"].shape[1] == 5
    main(["predict", "--weights", last, "--trainer.accelerator", "cpu"])
    with Image.open("runs/seg_predict/version_0/predictions/0.png") as found:
        assert found.size == (56, 40)


def test_a_file_with_another_number_of_channels_is_named(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("ant", "bee"):
        for split in ("train", "val"):
            (tmp_path / "odd" / split / name).mkdir(parents=True)
            np.save(tmp_path / "odd" / split / name / "a.npy", np.zeros((32, 32, 4), np.uint8))
    options = ["--data.root", "odd", "--data.stats", str(place / "bands.yaml"), "--data.img_size", "32"]
    options += ["--model.backbone_args", BACKBONE, "--model.warmup_epochs", "0"]
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--config", "classify_tiny", *options, *QUIET])
    assert "a.npy has 4 channels, but data.mean and data.std are of 5" in capsys.readouterr().err
