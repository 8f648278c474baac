"""`locat show` as a user calls it: every kind of picture, of one model or several, of images of any shape."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from locat.command import main
from locat_lightning.commands import show
from locat_lightning.structure import similarity_to

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
OWN = ["--backbone", "locatvit_tiny", "--backbone_args", json.dumps(SIZES)]
QUIET = ["--accelerator", "cpu", "--tile", "32"]


@pytest.fixture(autouse=True)
def place(workplace):
    """Weights and images of several shapes in the working directory."""
    torch.manual_seed(0)
    torch.save(timm.create_model("locatvit_tiny", num_classes=0, **SIZES).state_dict(), "net.pth")
    rng = np.random.default_rng(0)
    for name, size in {"wide.png": (30, 60), "tall.JPG": (75, 40), "square.webp": (32, 32)}.items():
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(name)


def written(name):
    sizes = {}
    for path in Path(f"runs/{name}/version_0").iterdir():
        with Image.open(path) as picture:
            sizes[path.name] = picture.size
    return sizes


def test_pictures_by_default(capsys):
    main(["show", "--weights", "net.pth", "wide.png", *OWN, *QUIET])
    assert set(written("net_show")) == {"kernels.png", "attention.png", "pca.png"}
    assert capsys.readouterr().out.splitlines()[-1] == "runs/net_show/version_0/pca.png"


def test_the_images_of_a_folder(capsys):
    Path("some/more").mkdir(parents=True)
    for name in ("wide.png", "tall.JPG", "square.webp"):
        Path(name).rename(Path("some", name))
    Path("some/.hidden.png").write_text("")
    Path("some/notes.txt").write_text("")
    main(["show", "--weights", "net.pth", "some", "--what", "pca", "--name", "all", *OWN, *QUIET])
    main(["show", "some", "--weights", "net.pth", "--what", "pca", "--name", "again", *OWN, *QUIET])
    rows = [f"some/{name}" for name in ("square.webp", "tall.JPG", "wide.png")]
    main(["show", *rows, "--weights", "net.pth", "--what", "pca", "--name", "named", *OWN, *QUIET])
    pictures = [Path(f"runs/{name}/version_0/pca.png").read_bytes() for name in ("all", "again", "named")]
    assert pictures[0] == pictures[1] == pictures[2]
    with pytest.raises(SystemExit):
        main(["show", "some/more", "--weights", "net.pth", *OWN, *QUIET])
    assert "some/more is a folder without images in it: name image files" in capsys.readouterr().err


def test_a_foreground_without_a_cut_is_said(capsys):
    """All patches are alike: the cosine of each two is above -1."""
    options = ["--what", "foreground", "--threshold", "0", *OWN, *QUIET]
    Image.new("RGB", (32, 32), "red").save("red.png")
    main(["show", "--weights", "net.pth", "red.png", *options])
    assert "foreground of red.png: no cut found; lower or raise --threshold (0)" in capsys.readouterr().out


def test_every_kind_of_several_models(monkeypatch):
    chosen = []

    def spy(maps, patch):
        chosen.append((patch, [tuple(each.shape) for each in maps]))
        return similarity_to(maps, patch)

    monkeypatch.setattr(show.structure, "similarity_to", spy)
    kinds = [*("kernels", "attention", "pca", "similarity", "clusters", "foreground", "matches")]
    images = ["wide.png", "tall.JPG", "square.webp"]
    main(
        [
            "show",
            "--weights",
            "net.pth",
            "net.pth",
            *images,
            "--what",
            *kinds,
            "--patch",
            "59,16",
            *OWN,
            *QUIET,
        ]
    )
    sizes = written("net_0_net_1_show")
    assert set(sizes) == {f"{kind}.png" for kind in kinds}
    assert sizes["pca.png"] == sizes["attention.png"] == sizes["clusters.png"]
    assert (
        sizes["kernels.png"] == sizes["foreground.png"] > sizes["pca.png"]
    )  # blocks; eigenvector and object
    # Patches of 8 pixels, 4 along the shorter side; 16 of 30 pixels down is in the third of four rows.
    assert chosen == [((2, 7), [(24, 4, 8), (24, 8, 4), (24, 4, 4)])] * 2


def test_a_patch_adds_the_picture_of_its_similarity_and_size_sets_the_grid(monkeypatch):
    seen = []
    monkeypatch.setattr(
        show.structure, "similarity_to", lambda maps, patch: seen.append(patch) or maps[0][:1]
    )
    main(["show", "wide.png", "--weights", "net.pth", "--patch", "0,0", "--img_size", "64", *OWN, *QUIET])
    assert seen == [(0, 0)]
    assert "similarity.png" in written("net_show")


def test_a_model_without_kernels_or_cls_goes_without(capsys):
    plain = {**SIZES, "class_token": False, "global_pool": "avg"}
    options = ["--backbone", "vit_tiny_patch16_224", "--backbone_args", json.dumps(plain)]
    with pytest.warns(UserWarning, match="not been trained"):
        main(["show", "--weights", "random", "wide.png", *options, *QUIET])
    assert set(written("random_show")) == {"pca.png"}
    said = capsys.readouterr().out.splitlines()
    assert said[-3:-1] == ["no kernels: no model has any", "no attention: no model has any"]


def test_normalisation_and_size_are_those_of_the_weights(trained, monkeypatch):
    """`trained` is a run of 32 pixels."""
    weights = "runs/classify_tiny/version_0/checkpoints/last.ckpt"
    inputs = []
    original = show.patch_features
    monkeypatch.setattr(show, "patch_features", lambda model, x: inputs.append(x) or original(model, x))
    main(["show", "--weights", weights, "wide.png", "--what", "pca", *QUIET])
    assert inputs[0].shape == (1, 3, 32, 64)
    assert set(written("classify_tiny_show")) == {"pca.png"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "needs images: files ending in .jpg"),
        (["gone.png"], "cannot read image gone.png: No such file or directory"),
        (["wide.png", "--what", "similarity"], "--what similarity needs --patch x,y"),
        (["wide.png", "--what", "matches"], "--what matches needs two images or more"),
        (["wide.png", "--patch", "60,3"], "--patch: 60,3 is outside wide.png, which has 60 x 30 pixels"),
        (["wide.png", "--patch", "a,3"], "--patch: 'a,3' is not x,y in pixels, such as 120,80"),
        (
            ["wide.png", "--img_size", "2000"],
            "125,000 patches in an image are too many to draw: lower --img_size (2000)",
        ),
        (["wide.png", "--what", "clusters", "--clusters", "200"], "200 clusters of 32 different patches"),
        (["wide.png"] * 33, "at most 32 images, not 33"),
        (["wide.png", "--name", "../out"], "is not the name of a folder"),
    ],
)
def test_mistakes_are_one_line(arguments, expected, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["show", "--weights", "net.pth", *arguments, *OWN, *QUIET])
    assert stopped.value.code == 2
    assert expected in capsys.readouterr().err.splitlines()[-1]
    assert not Path("runs").exists()
