"""`locat knn`, `linear` and `retrieve` as a user calls them, on every kind of weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from locat.command import main
from locat_lightning.commands.defaults import of_data
from locat_lightning.data import ImageData, SegmentationData
from locat_lightning.evaluation.features import extract_features
from locat_lightning.evaluation.intervals import intervals
from locat_lightning.evaluation.knn import knn_classify
from locat_lightning.evaluation.per_image import fingerprint, read_table
from locat_lightning.evaluation.retrieval import Retrieval, compare_retrievals, segment_by_retrieval
from tests.conftest import write_images

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
OWN = {"backbone": "locatvit_tiny", "backbone_args": SIZES}


def backbone(seed=0, **arguments):
    torch.manual_seed(seed)
    return timm.create_model("locatvit_tiny", num_classes=0, **SIZES | arguments)


def run(*arguments):
    main([*map(str, arguments)])


@pytest.fixture
def images(folder, tmp_path, monkeypatch):
    """Options that name the images; runs go beneath an empty directory."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return ["--data.root", folder, "--data.img_size", "32", "--data.num_workers", "0", "--accelerator", "cpu"]


@pytest.fixture
def named(images):
    """The same with the name of the model, for weights that do not know theirs."""
    return [*images, "--backbone", "locatvit_tiny", "--backbone_args", json.dumps(SIZES)]


def metrics(name):
    return json.loads(Path(f"runs/{name}/version_0/metrics.json").read_text())


def knn_of(model, folder, k):
    data = ImageData(root=str(folder), img_size=32, num_workers=0)
    bank, queries = (
        extract_features(model, data.eval_dataloader(split), "cpu", progress=False)
        for split in ("train", "val")
    )
    return knn_classify(*bank[:2], *queries[:2], k=[k])[k]


def test_knn_of_a_state_dict(named, folder, capsys):
    model = backbone(seed=3)
    torch.save(model.state_dict(), "net.pth")

    run("knn", "--weights", "net.pth", *named, "--k", "1", "5", "200")

    expected = knn_of(model, folder, 5)
    found = metrics("net_knn")
    assert found["knn/top1_k5"] == expected.top1
    assert found["knn/top5_k5"] == expected.top5
    assert found["weights"] == "net.pth"
    out = capsys.readouterr().out
    assert "8 images, each by its nearest among 18" in out
    assert f"{expected.top1:.2%}" in out
    assert "200 (all 18)" in out  # k is capped at the bank's size
    assert found["seed"] == 0
    written = sorted(path.name for path in Path("runs/net_knn/version_0").iterdir())
    assert written == ["images.csv", "metrics.json"]
    table = read_table(Path("runs/net_knn/version_0/images.csv"))
    hits = table.scores["top1_k5"].mean()
    assert (float(hits), found["images"]) == (pytest.approx(expected.top1), 8)
    interval = intervals(table)["top1_k5"]
    assert found["intervals"]["knn/top1_k5"] == pytest.approx(list(interval))
    assert f"{expected.top1:.2%} {interval}" in out
    assert (found["fingerprint"], found["protocol"]) == (
        fingerprint(table),
        "k-NN at temperature 0.07 among 18 images, 32 × 32 px, bicubic, crop 0.875",
    )
    assert {"locat-lightning", "torch", "timm"} <= found["versions"].keys()


@pytest.mark.parametrize("network", ["teacher", "student"])
def test_knn_of_a_checkpoint_of_the_original_dino_code(network, named, folder):
    networks = {"teacher": backbone(seed=1), "student": backbone(seed=2)}
    torch.save(
        {
            name: {f"module.backbone.{key}": value for key, value in model.state_dict().items()}
            for name, model in networks.items()
        },
        "dino.pth",
    )
    run("knn", "--weights", "dino.pth", *named, "--k", "3", *(["--student"] if network == "student" else []))
    expected = knn_of(networks[network], folder, 3)
    assert metrics("dino_knn")["knn/top1_k3"] == expected.top1


def test_knn_of_a_local_dir(images, folder):
    model = backbone(seed=4)
    save_file(model.state_dict(), "model.safetensors")
    config = {"architecture": "locatvit_tiny", "num_classes": 0, "model_args": SIZES, "pretrained_cfg": {}}
    Path("config.json").write_text(json.dumps(config))
    run("knn", "--weights", "local-dir:.", *images, "--k", "3", "--name", "hub")
    assert metrics("hub")["knn/top1_k3"] == knn_of(model, folder, 3).top1


def test_a_local_dir_says_how_its_images_are_normalised(images, monkeypatch):
    save_file(backbone(seed=4).state_dict(), "model.safetensors")
    noted = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    config = {"architecture": "locatvit_tiny", "num_classes": 0, "model_args": SIZES, "pretrained_cfg": noted}
    Path("config.json").write_text(json.dumps(config))
    seen = []
    original = ImageData.eval_dataloader
    monkeypatch.setattr(
        ImageData,
        "eval_dataloader",
        lambda self, split: seen.append(self.normalisation) or original(self, split),
    )
    run("knn", "--weights", "local-dir:.", *images, "--k", "3")
    run("knn", "--weights", "local-dir:.", *images, "--k", "3", "--data.mean", "[0, 0, 0]")
    assert seen[0] == {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    assert seen[2] == {"mean": (0, 0, 0), "std": (0.2, 0.3, 0.4)}


def test_an_exported_folder_says_itself_what_it_is(small, images, folder):
    """To each command, by its name alone: the model, the size of its images and their normalisation."""
    run("fit", "--config", "classify_tiny.yaml", *small, "--trainer.max_epochs", "1", "--name", "mine")
    run("export", "--weights", "runs/mine/version_0/checkpoints/last.ckpt", "--to", "out")
    own = ["--data.root", folder, "--data.num_workers", "0"]
    quiet = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    for weights in ("out", "local-dir:out"):
        run("knn", "--weights", weights, *own, "--accelerator", "cpu", "--k", "3", "--name", "knn")
        run("predict", "--weights", weights, *own, *quiet, "--name", "out")
    assert metrics("knn") == metrics("knn")
    written = list(Path("runs/out_predict/version_1").iterdir())
    assert sorted(path.name for path in written) == ["config.yaml", "predictions.csv"]
    assert "ant" in Path("runs/out_predict/version_1/predictions.csv").read_text().splitlines()[0]
    fit = ["--model.warmup_epochs", "0", "--trainer.max_epochs", "1", "--data.batch_size", "6"]
    run("fit", "--weights", "out", *own, *quiet, *fit, "--pictures.every_n_epochs", "0", "--name", "further")
    assert metrics("further")["epochs"] == 1


def test_a_config_of_a_training_gives_the_images(named, tmp_path):
    torch.save(backbone().state_dict(), "net.pth")
    data = {
        "class_path": "locat_lightning.data.ImageData",
        "init_args": {"dataset": "digits", "img_size": 32},
    }
    Path("fit.yaml").write_text(json.dumps({"trainer": {"max_epochs": 3}, "data": data}))
    of_model = named[named.index("--accelerator") :]
    run(
        "knn",
        "--config",
        "fit.yaml",
        "--weights",
        "net.pth",
        *of_model,
        "--k",
        "3",
        "--data.num_workers",
        "0",
    )
    assert "360 images" in metrics("net_knn")["measured"]


def test_images_of_another_size_than_the_model_was_built_for(images, capsys):
    torch.save({"state_dict": backbone().state_dict(), "hyper_parameters": OWN}, "net.pth")
    run("knn", "--weights", "net.pth", *images, "--k", "100", "--data.img_size", "48")
    assert "100 (all 18)" in capsys.readouterr().out


def test_a_run_says_itself_what_it_is(small, images):
    """Model and data come from the run's own record; its augmentation does not."""
    fit = ["fit", "--config", "classify_tiny.yaml", *small, "--trainer.max_epochs", "1", "--name", "mine"]
    run(*fit)
    weights = "runs/mine/version_0/checkpoints/last.ckpt"
    run("knn", "--weights", weights, "--k", "3", "--accelerator", "cpu")
    assert "knn/top1_k3" in metrics("mine_knn")
    run("linear", "--weights", weights, "--epochs", "2", "--accelerator", "cpu")
    assert "linear/top1" in metrics("mine_linear")


@pytest.mark.parametrize("protocol", ["paper", "sweep"])
def test_linear(protocol, named, capsys):
    torch.save(backbone().state_dict(), "net.pth")
    options = ["--epochs", "30", "--data.batch_size", "6", "--learning_rate", "5", "--data.scale", "[0.9, 1]"]
    options += ["--sweep_batch_size", "6", "--learning_rates", "0.001", "4"]
    run("linear", "--weights", "net.pth", *named, "--protocol", protocol, *options)
    found = metrics("net_linear")
    assert found["linear/top1"] > 0.9  # the classes are colours
    rate = {"paper": 5, "sweep": 4}[protocol]
    assert found["linear/learning_rate"] == rate
    out = capsys.readouterr().out
    assert f"{rate * 6 / 256:.3g}" in out  # the effective one
    assert ("linear/top1_rate0.001" in found) == (protocol == "sweep")
    low, high = found["intervals"]["linear/top1"]
    assert low <= found["linear/top1"] <= high
    assert f"linear, {protocol}, 30 epochs of 18 images at " in found["protocol"]


def count_passes(monkeypatch):
    """The calls of timm's models."""
    calls = []
    original = timm.models.VisionTransformer.forward_features

    def counted(self, images, **options):
        calls.append(len(images))
        return original(self, images, **options)

    monkeypatch.setattr(timm.models.VisionTransformer, "forward_features", counted)
    return calls


def test_features_are_kept_between_commands(named, folder, monkeypatch):
    torch.save(backbone(seed=3).state_dict(), "net.pth")
    calls = count_passes(monkeypatch)
    kept = [*named, "--features", "kept"]
    run("knn", "--weights", "net.pth", *kept, "--k", "3")
    assert len(list(Path("kept").iterdir())) == 2
    assert sum(calls) == 18 + 8 + 2  # a black image each, for its size
    calls.clear()
    run("knn", "--weights", "net.pth", *kept, "--k", "3", "--name", "again")
    run("linear", "--weights", "net.pth", *kept, "--protocol", "sweep", "--epochs", "2")
    assert calls == []
    assert metrics("again")["knn/top1_k3"] == metrics("net_knn")["knn/top1_k3"]
    assert metrics("again")["fingerprint"] == metrics("net_knn")["fingerprint"]
    run("linear", "--weights", "net.pth", *named, "--protocol", "sweep", "--epochs", "2", "--name", "anew")
    assert metrics("net_linear")["linear/top1"] == metrics("anew")["linear/top1"]


@pytest.mark.parametrize(
    ("change", "extracted"),
    [
        (["--data.crop_pct", "1"], 28),
        (["--precision", "bf16-mixed"], 28),
        (["--data.mean", "0", "0", "0"], 28),
        (["--data.batch_size", "4"], 0),
    ],
)
def test_kept_features_are_of_what_decides_them(change, extracted, named, folder, monkeypatch):
    torch.save(backbone(seed=3).state_dict(), "net.pth")
    kept = ["knn", "--weights", "net.pth", *named, "--k", "3", "--features", "kept"]
    run(*kept)
    calls = count_passes(monkeypatch)
    run(*kept, *change)
    assert sum(calls) == extracted


def test_kept_features_are_of_these_weights_and_images(named, folder, monkeypatch, capsys):
    torch.save(backbone(seed=3).state_dict(), "net.pth")
    kept = ["knn", *named, "--k", "3", "--features", "kept", "--weights"]
    run(*kept, "net.pth")
    calls = count_passes(monkeypatch)
    torch.save(backbone(seed=4).state_dict(), "other.pth")
    run(*kept, "other.pth")
    assert sum(calls) == 28
    calls.clear()
    (folder / "val" / "ant" / "0.png").write_bytes((folder / "val" / "bee" / "0.png").read_bytes())
    run(*kept, "net.pth")
    assert sum(calls) == 9
    for file in Path("kept").iterdir():
        file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(SystemExit):
        run(*kept, "net.pth")
    [line] = [line for line in capsys.readouterr().err.splitlines() if "kept/" in line and "remove" in line]
    assert "does not hold the features of these images" in line


@pytest.mark.parametrize(
    "words", [["3", "5"], ["[3, 5]"], ["[3,", "5]"]], ids=["words", "a list", "a list without quotes"]
)
def test_a_list_is_given_in_words_or_as_one(words, named):
    torch.save(backbone(seed=3).state_dict(), "net.pth")
    run("knn", "--weights", "net.pth", "--k", *words, *named)
    assert {f"knn/top1_k{k}" for k in (3, 5)} == {key for key in metrics("net_knn") if "/top1_k" in key}


@pytest.mark.parametrize("command", [["knn", "--k", "3"], ["linear", "--protocol", "sweep", "--epochs", "2"]])
def test_several_data_sets_in_one_table(command, named, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")  # a row of the table in a line
    torch.save(backbone(seed=3).state_dict(), "net.pth")
    other = write_images(tmp_path / "others" / "flowers")
    (other / "val" / "ant" / "0.png").unlink()
    run(*command, "--weights", "net.pth", *named)
    alone = capsys.readouterr().out
    run(*command, "--weights", "net.pth", *named, "--datasets", folder, other)
    together = capsys.readouterr().out

    name = f"net_{command[0]}"
    assert metrics(f"{name}_images") == metrics(name)
    assert [metrics(f"{name}_{of}")["images"] for of in ("images", "flowers")] == [8, 7]
    assert together.count("┏") == alone.count("┏") == 1  # one table
    rows = [line for line in together.splitlines() if line.startswith("│")]
    for of in ("images", "flowers"):
        [row] = [row for row in rows if row.startswith(f"│ {of} ")]
        top1 = next(value for key, value in metrics(f"{name}_{of}").items() if "top1" in key)
        assert f"{top1:.2%}" in row


@pytest.mark.parametrize(
    ("command", "ending"), [(["knn", "--k", "2", "5"], "_k5"), (["linear", "--epochs", "2"], "")]
)
def test_groups_of_unequal_classes(command, ending, named, folder, capsys, monkeypatch):
    """One has a single training image: all are few-shot ones, and count alike whatever they have."""
    monkeypatch.setenv("COLUMNS", "300")
    classes = sorted(path.name for path in (folder / "train").iterdir())
    for image in sorted((folder / "train" / classes[0]).iterdir())[1:]:
        image.unlink()
    torch.save(backbone(seed=3).state_dict(), "net.pth")
    run(*command, "--weights", "net.pth", *named)
    found, group = metrics(f"net_{command[0]}"), f"{command[0]}/"
    table = read_table(Path(f"runs/net_{command[0]}/version_0/images.csv"))
    hits = table.scores[f"top1{ending}"]
    of_classes = [hits[table.labels == label].mean() for label in range(len(classes))]
    balanced = float(sum(of_classes) / len(classes))
    assert found[f"{group}balanced{ending}"] == found[f"{group}few{ending}"] == pytest.approx(balanced)
    assert f"{group}many{ending}" not in found
    assert table.shots[table.labels == 0].tolist() == [1] * int((table.labels == 0).sum())
    [heading] = [line for line in capsys.readouterr().out.splitlines() if "top-5" in line]
    assert heading.split()[-4:-1:2] == ["balanced", "few"]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("command", [["knn"], ["linear", "--epochs", "1"]])
def test_features_have_the_precision_asked_for(command, precision, named, monkeypatch):
    torch.save(backbone().state_dict(), "net.pth")
    seen = set()

    def linear(*arguments):
        output = original(*arguments)
        seen.add(output.dtype)
        return output

    original = torch.nn.functional.linear
    monkeypatch.setattr("torch.nn.functional.linear", linear)
    run(*command, "--weights", "net.pth", *named, "--precision", precision)
    assert (torch.bfloat16 in seen) == (precision != "32-true")


def test_more_processes_than_cores_are_refused(named, capsys, monkeypatch):
    torch.save(backbone().state_dict(), "net.pth")
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    monkeypatch.setattr("lightning.fabric.Fabric.launch", None)
    with pytest.raises(SystemExit) as stopped:
        run("knn", "--weights", "net.pth", *named, "--devices", "2")
    assert stopped.value.code == 2
    assert "devices: 2 processes need as many CPU cores, but there is 1" in capsys.readouterr().err


def test_commands_repeat_themselves(named):
    torch.save(backbone().state_dict(), "net.pth")
    for name in ("a", "b"):
        run(
            "linear",
            "--weights",
            "net.pth",
            *named,
            "--epochs",
            "2",
            "--data.batch_size",
            "6",
            "--name",
            name,
        )
    assert metrics("a") == metrics("b")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "locat knn needs --weights"),
        (["--weights", "nowhere.pth"], "no such file"),
        (["--weights", "net.pth"], "does not record its model: add --backbone"),
        (["--weights", "net.pth", "--backbone", "locatvit_tyni"], "did you mean locatvit_tiny"),
        (["--weights", "net.pth", "--backbone", "resnet18"], "less than half of the model matched"),
        (["--weights", "net.pth", "NAMED", "--student"], "holds no student"),
        (["--weights", "net.pth", "NAMED", "--k", "0"], '"k": Not of type PositiveInt: 0'),
        (["--weights", "net.pth", "NAMED", "--precision", "64-true"], "precision '64-true' is not supported"),
        (["--weights", "net.pth", "NAMED", "--data.img_size", "33"], "does not take images of 33 pixels"),
        (["--weights", "net.pth", "NAMED", "--data.root", "nowhere"], "no such folder"),
        (
            ["--weights", "net.pth", "NAMED", "--config", "digits.yaml"],
            "images would not be read, because data.dataset is digits: for the images there add",
        ),
        (
            ["--weights", "net.pth", "NAMED", "--datasets", "nowhere"],
            "--datasets: nowhere is not a folder, a URL of shards, 'digits'",
        ),
        (["--weights", "net.pth", "NAMED", "--datasets", "digits", "digits"], "digits is named twice"),
        (["--weights", "net.pth", "NAMED", "--datasets", "digits", "."], "no train/"),
        (["--weights", "net.pth", "NAMED", "--colour", "red"], "--colour"),
        (["--weights", "net.pth", "NAMED", "--runs", "net.pth"], "--runs: cannot write to net.pth"),
    ],
)
def test_mistakes_are_one_line(options, message, images, named, capsys):
    torch.save(backbone().state_dict(), "net.pth")
    Path("digits.yaml").write_text("data: {dataset: digits}\n")
    given = [part for option in options for part in (named if option == "NAMED" else [option])]
    with pytest.raises(SystemExit) as stopped:
        run("knn", *images, *given)
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("locat: error: ")
    assert message in error


def test_dense_retrieval(scenes, named, capsys):
    root = scenes("folder")
    torch.save(backbone(seed=3).state_dict(), "net.pth")
    of_model = named[named.index("--accelerator") :]
    options = [
        *of_model,
        "--data.root",
        root,
        "--data.classes",
        "[sky, road, car]",
        "--data.num_workers",
        "0",
    ]
    run("retrieve", "--weights", "net.pth", *options, "--image_size", "36", "--memory_size", "60")

    data = SegmentationData(root=str(root), classes=["sky", "road", "car"], num_workers=0)
    data.setup("fit")
    expected = segment_by_retrieval(
        backbone(seed=3, dynamic_img_size=True),
        data.square_dataloader("train", 36),
        data.square_dataloader("val", 36),
        "cpu",
        Retrieval(memory_size=60),
        num_classes=3,
        progress=False,
    )
    found = metrics("net_retrieve")
    assert found["retrieval/miou"] == pytest.approx(float(expected.miou))
    assert found["retrieval/iou_sky"] == pytest.approx(float(expected.per_class[0]))
    areas = read_table(Path("runs/net_retrieve/version_0/images.csv"))
    assert torch.equal(areas.areas.sum(0)[0].sum(), expected.confusion.diagonal().sum())
    assert found["intervals"]["retrieval/miou"] == pytest.approx(list(intervals(areas)["miou"]))
    manner = "60 patches kept, 30 neighbours at temperature 0.02, seed 0"
    assert found["protocol"] == f"dense retrieval, images resized to 36 × 36, {manner}"
    out = capsys.readouterr().out
    assert (
        f"dense retrieval: mIoU {float(expected.miou):.4f} (images resized to 36 × 36, 60 patches kept" in out
    )
    sure = intervals(areas)
    assert f"{float(expected.per_class[0]):.2%} {sure['iou_sky']}" in out
    assert f"retrieval/miou {float(expected.miou):.2%} {sure['miou']}" in out


def test_dense_retrieval_at_the_size_that_the_model_is_for(scenes, named):
    of_data = ["--data.root", scenes("folder"), "--data.classes", "sky", "road", "car"]
    options = [*named[named.index("--accelerator") :], *of_data, "--data.num_workers", "0"]
    torch.save(backbone(seed=3).state_dict(), "net.pth")
    run("retrieve", "--weights", "net.pth", *options, "--memory_size", "60")
    run(
        "retrieve",
        "--weights",
        "net.pth",
        *options,
        "--memory_size",
        "60",
        "--image_size",
        "32",
        "--name",
        "b",
    )
    assert metrics("net_retrieve")["retrieval/miou"] == metrics("b")["retrieval/miou"]
    assert "images resized to 32 × 32" in metrics("net_retrieve")["protocol"]


def test_dense_retrieval_over_splits_and_memory_sizes(scenes, named, capsys):
    root = scenes("folder")
    torch.save(backbone(seed=3).state_dict(), "net.pth")
    of_data = ["--data.root", root, "--data.classes", "[sky, road, car]", "--data.num_workers", "0"]
    options = [
        *named[named.index("--accelerator") :],
        *of_data,
        "--image_size",
        "32",
        "--augmentation_epochs",
        "2",
    ]
    run("retrieve", "--weights", "net.pth", *options, "--fraction", "2", "--memory_size", "5", "40")

    data = SegmentationData(root=str(root), classes=["sky", "road", "car"], num_workers=0)
    found, of_class = metrics("net_retrieve"), []
    for size in (5, 40):
        mious = []
        for seed in (42, 400, 783, 1293, 4019):
            settings = Retrieval(memory_size=size, seed=seed, fraction=2)
            passes = [data.square_dataloader("train", 32, augmented=number) for number in (1, 2)]
            parts = passes, data.square_dataloader("val", 32)
            model = backbone(seed=3, dynamic_img_size=True)
            [iou] = compare_retrievals(model, *parts, "cpu", [settings], num_classes=3, progress=False)
            assert found[f"retrieval/miou_seed{seed}_memory{size}"] == pytest.approx(float(iou.miou))
            mious.append(float(iou.miou))
            of_class.append(float(iou.per_class[0]))
        assert found[f"retrieval/miou_memory{size}"] == pytest.approx(np.mean(mious))
        assert found[f"retrieval/miou_std_memory{size}"] == pytest.approx(np.std(mious, ddof=1))
        table = read_table(Path("runs/net_retrieve/version_0/images.csv"))
        figures = table.figures(table.statistics().sum(0), len(table.indices))
        assert float(figures[f"miou_memory{size}"]) == pytest.approx(np.mean(mious))
        assert float(figures[f"miou_seed4019_memory{size}"]) == pytest.approx(mious[-1])
        low, high = found["intervals"][f"retrieval/miou_memory{size}"]
        assert low < np.mean(mious) < high
    assert found["retrieval/iou_sky_memory40"] == pytest.approx(np.mean(of_class[5:]))
    out = capsys.readouterr().out
    assert "1/2 of the training images (3), 2 augmented passes of seed 0, 30 neighbours at " in out
    assert f"{np.mean(mious):.4f} ± {np.std(mious, ddof=1):.4f} over 5 seeds with 40 patches" in out
    main(["runs"])
    assert "retrieval/miou_memory40" in capsys.readouterr().out
    main(["compare", *["runs/net_retrieve/version_0"] * 2])
    assert "A − B of miou_memory40: standard deviation over the seeds 0.00%" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*the model has not been trained")
def test_a_segmentations_run_says_itself_what_is_to_be_retrieved(scenes, images):
    torch.save({"state_dict": backbone().state_dict(), "hyper_parameters": OWN}, "net.pth")
    data = ["--data.root", scenes("ade20k"), "--data.crop_size", "32", "--data.scale", "[48, 40]"]
    quiet = [
        "--trainer.accelerator",
        "cpu",
        "--trainer.enable_progress_bar",
        "false",
        "--data.num_workers",
        "0",
    ]
    steps = ["--trainer.max_steps", "1", "--trainer.val_check_interval", "1", "--data.batch_size", "3"]
    steps += ["--trainer.log_every_n_steps", "1", "--pictures.every_n_epochs", "0"]
    run("fit", "--config", "segment_ade20k.yaml", "--weights", "net.pth", *data, *quiet, *steps)
    decoder = Path("runs/segment_ade20k/version_0/checkpoints/last.ckpt")
    run("retrieve", "--weights", decoder, "--image_size", "32", "--accelerator", "cpu")
    assert 0 <= metrics("segment_ade20k_retrieve")["retrieval/miou"] <= 1


def test_a_run_on_the_digits_is_measured_on_their_scenes_or_on_masks_of_ones_own():
    recorded = {"class_path": "locat_lightning.data.ImageData", "init_args": {"dataset": "digits"}}
    assert of_data("masks", recorded) == {"data.dataset": "digits"}
    assert of_data("masks", recorded, {"--data.root"}) == {}


def test_a_long_tail_of_a_run_is_not_made_of_other_images():
    own = {"root": "photos", "imbalance": 100.0, "img_size": 32}
    recorded = {"class_path": "locat_lightning.data.ImageData", "init_args": own}
    assert of_data("images", recorded)["data.imbalance"] == 100.0
    for option in ("root", "dataset", "stream"):
        assert "data.imbalance" not in of_data("images", recorded, {f"--data.{option}"})
