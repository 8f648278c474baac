"""`locat pack` and what reads its shards, as a user calls them."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
import yaml

from locat.command import main
from locat_lightning.commands import pack as command
from locat_lightning.commands.sources import read_record
from locat_lightning.data.shards import INDEX, Index
from locat_lightning.errors import InputError
from tests.commands.runs import FIT, LAST, RUN

pytestmark = pytest.mark.usefixtures("workplace")

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
STREAM = ["--data.img_size", "32", "--data.num_workers", "0", "--accelerator", "cpu"]


def refused(*arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, arguments)])
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def packed(folder, capsys):
    """The folder as shards of two or three images, in `shards`."""
    main(["pack", "--data.root", str(folder), "--to", "shards", "--shard_size", "12KB", "--workers", "1"])
    said = capsys.readouterr().out
    assert "shards/train: 18 images in 6 shards, 1" in said
    assert "shards/val: 8 images in 3 shards" in said
    return Path("shards").absolute()


@pytest.fixture
def net():
    """Weights in `net.pth`, and the options that name them."""
    torch.manual_seed(0)
    torch.save(timm.create_model("locatvit_tiny", num_classes=0, **SIZES).state_dict(), "net.pth")
    return ["--weights", "net.pth", "--backbone", "locatvit_tiny", "--backbone_args", json.dumps(SIZES)]


def test_masks_are_packed_by_a_config(scenes, capsys):
    root = scenes("ade20k")
    main(["pack", "--config", "segment_ade20k", "--data.root", str(root), "--to", "shards"])
    found = Index.load((Path("shards") / "val" / INDEX).read_bytes(), INDEX)
    assert len(found.masks) == len(found) == 3
    assert found.meaning.masks == {"ignore_index": 255, "reduce_zero_label": True, "labels": []}
    assert len(found.meaning.classes) == 150
    again = Path("shards/train").stat().st_mtime_ns
    main(["pack", "--config", "segment_ade20k", "--data.root", str(root), "--to", "shards"])
    assert Path("shards/train").stat().st_mtime_ns == again
    capsys.readouterr()
    main(["pack", "--tars", "shards/val", "--class_names", "[a, b]"])
    assert "shards/val: 3 images in 1 shard, " in capsys.readouterr().out
    assert Index.load((Path("shards") / "val" / INDEX).read_bytes(), INDEX).meaning.classes == ["a", "b"]


def test_mistakes_are_told_in_a_line(folder, capsys):
    root = ["--data.root", folder]
    assert "locat pack needs --to, a folder for the shards" in refused("pack", *root, capsys=capsys)
    assert "--tars writes an index beside" in refused("pack", "--tars", "x", "--to", "y", capsys=capsys)
    assert "no .tar file in x" in refused("pack", "--tars", "x", capsys=capsys)
    said = refused("pack", *root, "--to", "y", "--shard_size", "many", capsys=capsys)
    assert "--shard_size (many) must be a number of bytes" in said
    assert "no such folder" in refused("pack", "--data.root", "nowhere", "--to", "y", capsys=capsys)
    Path("empty.yaml").write_text("model: {class_path: Dino}\n")
    assert "has no data" in refused("pack", "--config", "empty.yaml", "--to", "y", capsys=capsys)
    for content in ("- a\n", "data: [a]\n"):
        Path("empty.yaml").write_text(content)
        assert "empty.yaml" in refused("pack", "--config", "empty.yaml", "--to", "y", capsys=capsys)
    said = refused("pack", *root, "--to", "y", "--data.shards_at_once", "2", capsys=capsys)
    assert "shards_at_once" in said
    assert "quickstart.yaml" not in refused("pack", "--config", "quickstart", "--to", "y", capsys=capsys)


def test_the_record_of_a_run_is_a_config_of_the_data(folder):
    reading = {"stream": None, "cache": None, "cache_size": "50GB", "shards_at_once": 16}
    data = {"class_path": "locat_lightning.data.ImageData", "init_args": {"root": str(folder), **reading}}
    Path("record.yaml").write_text(yaml.safe_dump({"data": data}))
    main(["pack", "--config", "record.yaml", "--to", "shards"])
    assert len(Index.load((Path("shards") / "val" / INDEX).read_bytes(), INDEX)) == 8


def test_a_folder_in_a_record_is_not_fetched():
    data = {"class_path": "locat_lightning.data.ImageData", "init_args": {"stream": "file:///shards"}}
    model = {"class_path": "locat_lightning.tasks.Classification"}
    record = Path("runs/a/version_0/config.yaml").absolute()
    record.parent.mkdir(parents=True)
    record.write_text(yaml.safe_dump({"model": model, "data": data}))
    assert read_record(record, ["data"], set())["data"]["init_args"] == {"stream": "file:///shards"}


def test_an_interrupt_says_how_to_go_on(folder, capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise SystemExit(130)

    monkeypatch.setattr(command, "pack", interrupted)
    with pytest.raises(SystemExit):
        main(["pack", "--data.root", str(folder), "--to", "shards"])
    assert capsys.readouterr().out == "the same command continues\n"


def rows_of(name):
    with Path(name).open(newline="") as file:
        return list(csv.DictReader(file))


def weights_of(checkpoint):
    return torch.load(checkpoint, weights_only=True)["state_dict"]


@pytest.mark.slow
def test_a_run_from_a_web_server_resumes_as_if_it_had_not_been_cut_off(packed, small, web, monkeypatch):
    stream = ["--data.stream", f"{web.url}/shards", "--data.cache", "cache", "--data.batch_size", "3"]
    stream += ["--data.shards_at_once", "2", "--trainer.max_epochs", "1"]
    options = [*FIT, *small[2:], *stream]
    main(options)
    whole = weights_of(LAST)
    shutil.move(RUN, "whole")

    Path("stop.py").write_text(
        "import os, signal\n"
        "from lightning.pytorch import Callback\n"
        "class Stop(Callback):\n"
        "    def on_after_backward(self, trainer, module):\n"
        "        if trainer.global_step == 1:\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    monkeypatch.syspath_prepend(Path.cwd())
    with pytest.raises(SystemExit):
        main([*options, "--trainer.callbacks+=stop.Stop"])
    assert torch.load(LAST, weights_only=True)["global_step"] == 2
    main(["fit", "--config", str(RUN / "config.yaml"), "--ckpt_path", str(LAST)])
    resumed = weights_of(LAST)
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())


@pytest.mark.slow
def test_a_run_on_shards_is_measured_and_resumed_from_its_record(packed, small, web, folder, capsys):
    main([*FIT, *small[2:], "--data.stream", str(packed), "--trainer.max_epochs", "1"])
    main(["validate", "--weights", str(LAST), "--trainer.enable_progress_bar", "false"])
    main(["validate", "--weights", str(LAST), *small[:2], "--trainer.enable_progress_bar", "false"])
    shards, files = (
        json.loads(Path(f"runs/classify_tiny_validate/version_{number}/metrics.json").read_text())
        for number in (0, 1)
    )
    assert shards["fingerprint"] == files["fingerprint"]  # shards of validation keep names and order
    assert shards["val/loss"] == pytest.approx(files["val/loss"], rel=1e-5)

    # The same shards may move to another store; other shards, or their folder, have another order.
    web_stream = ["--data.stream", f"{web.url}/shards", "--data.cache", "cache"]
    longer = ["fit", "--ckpt_path", LAST, "--trainer.max_epochs", "2", "--allow_changes", "true"]
    main([*map(str, longer), *web_stream])
    assert "digest of the training shards" not in capsys.readouterr().err
    said = refused("fit", "--ckpt_path", LAST, *small[:2], capsys=capsys)
    assert "the digest of the training shards was" in said
    assert "is none now: restore the images" in said

    # A record chooses neither what is fetched, nor where it goes.
    said = refused("knn", "--weights", LAST, capsys=capsys)
    assert f"names a data set that is fetched: if you want it, add --data.stream {web.url}/shards" in said
    record = RUN / "config.yaml"
    assert yaml.safe_load(record.read_text())["data"]["init_args"]["cache"] == "cache"
    assert "cache" not in read_record(record, ["data"], {"--data.stream"})["data"]["init_args"]
    assert "stream" not in read_record(record, ["data"], {"--data.root"})["data"]["init_args"]
    config = yaml.safe_load(record.read_text())
    probe = {"class_path": "locat_lightning.data.ImageData", "init_args": {"cache": "/elsewhere"}}
    record.write_text(yaml.safe_dump(config | {"knn": {"data": probe}}))
    with pytest.raises(InputError, match=r"knn\.data\.cache is /elsewhere"):
        read_record(record, ["data", "knn"], {"--data.stream"})


def test_probes_and_features_of_shards_are_those_of_their_folder(packed, net, web, folder, capsys):
    url = ["--data.cache", "cache", "--data.stream", f"{web.url}/shards"]
    for name, images in (("folder", ["--data.root", str(folder)]), ("shards", url)):
        main(["knn", *net, *STREAM, *images, "--name", name])
        main(["embed", *net, *STREAM, *images, "--split", "val", "--to", f"{name}.npy"])
    files, shards = (
        json.loads(Path(f"runs/{name}/version_0/metrics.json").read_text()) for name in ("folder", "shards")
    )
    assert files["fingerprint"] == shards["fingerprint"]
    assert files["knn/top1_k10"] == shards["knn/top1_k10"]
    assert Path("folder.npy").read_bytes() == Path("shards.npy").read_bytes()
    rows = [rows_of(f"{name}.csv") for name in ("folder", "shards")]
    assert [row["path"].removeprefix(str(folder)) for row in rows[0]] == [
        row["path"].removeprefix(f"{web.url}/shards") for row in rows[1]
    ]
    said = refused("knn", *net, *STREAM, *url, "--data.root", folder, capsys=capsys)
    assert f"data.root: {folder} would not be read, because data.stream is {web.url}/shards" in said
    capsys.readouterr()
    main(["knn", *net, *STREAM, "--datasets", str(folder), str(packed), f"{web.url}/shards", *url[:2]])
    assert [line for line in capsys.readouterr().out.splitlines() if "shards" in line]


def test_the_features_of_shards_without_labels_have_their_folders_as_classes(net, folder):
    main(["pack", "--data.root", str(folder / "train"), "--to", "shards"])
    main(["embed", *net, *STREAM, "--data.stream", "shards", "--to", "features.npy"])
    rows = rows_of("features.csv")
    assert {row["class"] for row in rows} == {"ant", "bee", "cat"}
    assert all(f"/{row['class']}/" in row["path"] for row in rows)
