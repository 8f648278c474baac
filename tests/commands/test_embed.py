"""`locat embed` as a user calls it: any folder, an interrupt and the same command again, TensorBoard."""

import csv
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.numpy import load_file

from locat.command import main
from locat_lightning.commands import embed as command
from locat_lightning.data import ImageData
from locat_lightning.data.decoding import read_image
from locat_lightning.evaluation import embedding
from locat_lightning.evaluation.dense import patch_features
from locat_lightning.evaluation.features import image_features

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
QUIET = ["--data.img_size", "32", "--data.num_workers", "0", "--accelerator", "cpu"]


@pytest.fixture
def model(workplace):
    torch.manual_seed(0)
    found = timm.create_model("locatvit_tiny", num_classes=0, **SIZES).eval()
    torch.save(found.state_dict(), "net.pth")
    return found


def run(*arguments):
    named = ["--weights", "net.pth", "--backbone", "locatvit_tiny", "--backbone_args", json.dumps(SIZES)]
    main(["embed", *named, *QUIET, *map(str, arguments)])


def rows_of(name):
    with Path(name).open(newline="") as file:
        return list(csv.DictReader(file))


def input_of(path):
    return ImageData(img_size=32).eval_transform()(read_image(path))[None]


def pile(root, count):
    """Images of several sizes, some in folders."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = root / ["", "ant", "bee/deep"][i % 3] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20 + i % 7, 40, 3), dtype=np.uint8)).save(path)
    return root


@torch.no_grad()
def test_an_unlabelled_folder(model, tmp_path):
    root = pile(tmp_path / "pile", 9)
    (root / "ant/broken.png").write_text("no image")
    run("--data.root", root, "--to", "out/a.npy", "--data.batch_size", "4")
    features, rows = np.load("out/a.npy"), rows_of("out/a.csv")
    assert features.shape == (9, 24)
    assert [row["path"] for row in rows] == sorted(map(str, root.rglob("[0-9]*.png")))
    for feature, row in zip(features, rows, strict=True):
        torch.testing.assert_close(torch.tensor(feature)[None], image_features(model, input_of(row["path"])))
        parts = Path(row["path"]).relative_to(root).parts
        assert row["class"] == (parts[0] if len(parts) > 1 else "")
        assert row["label"] == {"": "-1", "ant": "0", "bee": "1"}[row["class"]]


@torch.no_grad()
def test_splits_with_classes(model, folder):
    run("--data.root", folder, "--to", "a.safetensors", "--what", "patches", "--dtype", "float16")
    features, rows = load_file("a.safetensors")["features"], rows_of("a.csv")
    assert features.shape == (8, 4, 4, 24)
    assert features.dtype == np.float16
    expected = patch_features(model, input_of(rows[0]["path"])).movedim(1, -1).half()
    torch.testing.assert_close(torch.tensor(features[:1]), expected)
    assert [(row["class"], row["label"]) for row in rows[::3]] == [("ant", "0"), ("bee", "1"), ("cat", "2")]
    assert all(f"/val/{row['class']}/" in row["path"] for row in rows)
    run("--data.root", folder, "--to", "b.npy", "--what", "patch_mean", "--split", "train")
    assert np.load("b.npy").shape == (18, 24)
    assert "/train/ant/" in rows_of("b.csv")[0]["path"]


def test_the_digits_by_name(model):
    run("--data.dataset", "digits", "--to", "a.npy", "--precision", "32")
    rows = rows_of("a.csv")
    assert len(rows) == len(np.load("a.npy")) == 360
    assert {(row["label"], row["class"]) for row in rows} == {(str(i), str(i)) for i in range(10)}


def test_an_interrupted_command_continues(model, tmp_path, monkeypatch, capsys):
    root = pile(tmp_path / "pile", 30)
    arguments = ["--data.root", root, "--data.batch_size", "4"]
    run(*arguments, "--to", "whole.npy")
    computed = []

    def counting(*arguments, stop_at=None, **options):
        computed.append(len(arguments[1]))
        if len(computed) == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return embedding_of(*arguments, **options)

    embedding_of = embedding.embed
    monkeypatch.setattr(embedding, "embed", lambda *a, **o: counting(*a, stop_at=4, **o))
    with pytest.raises(SystemExit) as stopped:
        run(*arguments, "--to", "a.npy")
    assert stopped.value.code == 128 + signal.SIGINT
    assert "8 of 30 images are done: the same command continues" in capsys.readouterr().err
    assert not Path("a.npy").exists()

    monkeypatch.setattr(embedding, "embed", lambda *a, **o: counting(*a, stop_at=len(computed) + 1, **o))
    with pytest.raises(SystemExit):
        run(*arguments, "--to", "none.npy")
    said = "interrupted before any of 30 images was done: the same command begins again"
    assert said in capsys.readouterr().err
    monkeypatch.setattr(embedding, "embed", counting)

    with pytest.raises(SystemExit) as stopped:
        run(*arguments, "--to", "a.npy", "--dtype", "float16")
    assert stopped.value.code == 2
    assert "holds features of another command (dtype differ)" in capsys.readouterr().err

    computed.clear()
    monkeypatch.setattr(embedding, "embed", counting)
    run(*arguments, "--to", "a.npy")
    assert sum(computed) == 22
    assert Path("a.npy").read_bytes() == Path("whole.npy").read_bytes()
    assert Path("a.csv").read_bytes() == Path("whole.csv").read_bytes()
    assert not Path("a.npy.part").exists()


def test_other_images_or_weights_are_another_command(model, tmp_path, monkeypatch, capsys):
    root = pile(tmp_path / "pile", 6)
    with monkeypatch.context() as patched:
        patched.setattr(command, "_describe", lambda *_: 1 / 0)  # after the last image
        with pytest.raises(ZeroDivisionError):
            run("--data.root", root, "--to", "a.npy")
    (root / "000.png").rename(root / "zzz.png")
    torch.save({key: value + 1 for key, value in model.state_dict().items()}, "net.pth")
    with pytest.raises(SystemExit):
        run("--data.root", root, "--to", "a.npy")
    assert "another command (paths, weights differ)" in capsys.readouterr().err
    run("--data.root", root, "--to", "a.npy", "--overwrite")
    assert rows_of("a.csv")[0]["path"].endswith("003.png")


def test_the_projector(model, folder):
    run("--data.root", folder, "--projector", "--points", "5", "--thumbnail", "16", "--split", "train")
    (place,) = Path("runs/net_embed/version_0").rglob("tensors.tsv")
    features = np.loadtxt(place, delimiter="\t")
    assert features.shape == (5, 24)
    header, *rows = (place.parent / "metadata.tsv").read_text().splitlines()
    assert header == "path\tlabel\tclass"
    assert [row.split("\t")[2] for row in rows] == ["ant", "ant", "bee", "cat", "cat"]
    sprite = Image.open(place.parent / "sprite.png")
    assert sprite.size == (48, 48)
    first = Image.open(rows[0].split("\t")[0]).resize((16, 16), Image.Resampling.BILINEAR)
    difference = np.abs(np.asarray(sprite.convert("RGB"), float)[:16, :16] - np.asarray(first, float))
    assert difference.mean() < 12


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "needs either --to (features.npy, features.parquet or features.safetensors) or --projector"),
        (["--to", "a.npy", "--projector"], "needs either --to"),
        (["--projector", "--what", "patches"], "--projector: a point is an image"),
        (["--projector", "--thumbnail", "5000"], "lower --thumbnail or --points"),
        (["--to", "a.txt"], "a.txt must end in one of"),
        (["--to", "a.npy", "--data.img_size", "36"], "does not take images of 36 pixels"),
    ],
)
def test_mistakes_are_one_line(model, folder, arguments, expected, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("--data.root", folder, *arguments)
    assert stopped.value.code == 2
    assert expected in capsys.readouterr().err.splitlines()[-1]
    assert not Path("runs").exists()


def test_features_beyond_float16_name_their_image(model, folder, capsys):
    state = model.state_dict()
    state["norm.weight"] *= 1e6
    torch.save(state, "net.pth")
    with pytest.raises(SystemExit):
        run("--data.root", folder, "--to", "a.npy", "--dtype", "float16")
    said = capsys.readouterr().err
    assert "val/ant/0.png are not finite: check the weights, or try --dtype float32" in said
