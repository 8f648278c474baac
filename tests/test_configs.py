"""Every shipped config runs, with all that it says of its model, on small generated images."""

import csv
import json
from pathlib import Path

import pytest
import timm
import torch
import yaml

from locat import configs
from locat_lightning.commands import compare
from locat_lightning.commands.fit import main

SHIPPED = sorted(configs.config_directory().rglob("*.yaml"))
# test_study.py runs what is of several runs.
CONFIGS = [str(p.relative_to(configs.config_directory())) for p in SHIPPED if not p.name.startswith("study_")]
DROP_PATH = {
    "classify_tiny": 0.1,
    "classify_small": 0.2,
    "classify_base": 0.4,
    "channel_small": 0.1,
    "dino_tiny": 0.1,
    "dino_small": 0.1,
    "dino_digits": 0.0,
    "ibot_small": 0.1,
    "ibot_digits": 0.0,
    "dinov2_small": None,
    "dinov2_digits": None,
    "distill_tiny": None,
    "mae_small": None,
    "mae_digits": None,
    "simmim_digits": None,
    "distill_digits": None,
    "simmim_small": 0.1,
    "selfpatch_small": 0.1,
    "selfpatch_digits": None,
    "quickstart": 0.05,
    "adapt_pretrained": 0.1,
    "adapt_locality": None,
    "adapt_locality_digits": None,
}
SEGMENTS = {"ade20k": 150, "coco_stuff": 171, "digits": 11, "folder": 3, "pascal_context": 59}
SEGMENTS |= {"pascal_voc": 21, "cityscapes": 19}
# One key at a time: the others, rightly or wrongly spelt, stay as the config has them.
TEACHER = "vit_base_patch14_reg4_dinov2"
BACKBONE = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
VIEWS = {"views.global_size": 32, "views.local_size": 16}
# What makes a config of a kind small, by the beginning of its name.
DINO = {
    "data": VIEWS | {"views.local_views": 2},
    "model": {"out_dim": 64, "hidden_dim": 32, "bottleneck_dim": 16},
    "knn": {"every_n_epochs": 1},
}
MASKED = {
    **DINO,
    "data": DINO["data"] | {"views.patch_size": 8, "views.min_block": 1},
    "model": DINO["model"] | {"warmup_teacher_temp_epochs": 0},
}
SMALL = {
    "dino": DINO,
    "ibot": MASKED,
    "dinov2": MASKED,
    "selfpatch": {**DINO, "model": DINO["model"] | {"patch_out_dim": 48}},
    "mae": {
        "data": {"views.global_size": 32},
        "model": {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2},
        "knn": {"every_n_epochs": 1},
    },
    "simmim": {
        "data": {"views.global_size": 32},
        "model": {"mask_size": 16},
        "knn": {"every_n_epochs": 1},
    },
    "adapt_locality": {
        "data": {"views.global_size": 32},
        "knn": {"every_n_epochs": 1},
        "retrieval": {"every_n_epochs": 0},
    },
    "distill": {
        "data": VIEWS,
        "model": {"teacher": "vit.pth", "teacher_backbone": TEACHER, "teacher_args": BACKBONE},
    },
}


def one_step(config, folder):
    """The command that takes one step of a config, made small, with these images."""
    options = {
        "data": {"dataset": "folder", "root": folder, "batch_size": 6, "num_workers": 0},
        "model": {"warmup_epochs": 0},
        "model.backbone_args": BACKBONE,
        "pictures": {"images": 1, "side": 32},
        "trainer": {
            "accelerator": "cpu",
            "enable_progress_bar": "false",
            "limit_train_batches": 1,
            "limit_val_batches": 1,
            "log_every_n_steps": 1,
            "max_epochs": 1,
        },
    }
    kind = "adapt_locality" if config.startswith("adapt_locality") else config.partition("_")[0]
    more = SMALL.get(kind, {"data": {"img_size": 32}})
    for group, keys in more.items():
        options[group] = options.get(group, {}) | keys
    given = (f"--{group}.{key}={value}" for group, keys in options.items() for key, value in keys.items())
    return ["fit", "--config", config, *given]


def test_there_are_configs():
    known = {
        "dinov2_highres",
        *DROP_PATH,
        *(f"segment_{name}" for name in SEGMENTS),
        "depth_nyu",
    }  # a new one belongs there too
    assert {Path(config).stem for config in CONFIGS} == known


@pytest.mark.slow
@pytest.mark.parametrize("name", SEGMENTS)
def test_segmentation_runs_a_step_and_is_measured_again(name, scenes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {
        "weights": "random",
        "model.backbone": "locatvit_tiny",
        "model.backbone_args": BACKBONE,
        "model.hidden_dim": 16,
        "data.num_workers": 0,
        "data.batch_size": 3,
        "data.crop_size": 32,
        "pictures.images": 1,
        "pictures.side": 32,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "trainer.max_steps": 1,
        "trainer.val_check_interval": 1,
        "trainer.log_every_n_steps": 1,
    }
    if name == "digits":
        options |= {"trainer.limit_val_batches": 1, "data.eval_batch_size": 4}
    else:
        options |= {"data.root": scenes(name), "data.scale": [45, 35]}  # no whole number of patches
    if name not in ("coco_stuff", "digits", "folder"):
        options["pictures.every_n_epochs"] = (
            0  # coco_stuff's have the most classes, the folder's names of its own
        )
    if name == "folder":
        options["data.classes"] = "[sky, road, car]"
    given = [f"--{key}={value}" for key, value in options.items()]
    with pytest.warns(UserWarning, match="random: the model has not been trained"):
        main(["fit", "--config", f"segment_{name}.yaml", *given])

    [run] = (tmp_path / "runs").rglob("version_0")
    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 1
    assert last["hyper_parameters"]["num_classes"] == SEGMENTS[name]
    metrics = json.loads((run / "metrics.json").read_text())
    shipped = yaml.safe_load((configs.config_directory() / f"segment_{name}.yaml").read_text())
    assert {"val/miou", "best val/miou"} <= metrics.keys()
    assert shipped["data"]["init_args"]["dataset"].removesuffix("_aug") == name


@pytest.mark.slow
def test_depth_runs_a_step_and_is_measured_and_predicted(nyu, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    quiet = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--data.num_workers=0"]
    options = {
        "model.backbone": "locatvit_tiny",
        "model.backbone_args": BACKBONE,
        "data.root": nyu,
        "data.batch_size": 2,
        "data.crop_size": [30, 38],
        "pictures.images": 1,
        "pictures.side": 32,
        "trainer.max_steps": 1,
        "trainer.val_check_interval": 1,
        "trainer.log_every_n_steps": 1,
    }
    given = [f"--{key}={value}" for key, value in options.items()]
    with pytest.warns(UserWarning, match="random: the model has not been trained"):
        main(["fit", "--config", "depth_nyu.yaml", "--weights", "random", *given, *quiet])
    run = Path("runs/depth_nyu/version_0")
    fitted = json.loads((run / "metrics.json").read_text())
    assert {"val/rmse", "best val/rmse", "val/delta1"} <= fitted.keys()
    best = str(run / "checkpoints" / "best.ckpt")
    main(["validate", "--weights", best, *quiet])
    assert "(depth, Eigen's crop, up to 10 m, with its mirror image; 95 % intervals" in caplog.text
    [evaluated] = Path("runs").glob("*_validate/version_0")
    record = json.loads((evaluated / "metrics.json").read_text())
    assert record["val/rmse"] == pytest.approx(fitted["val/rmse"])
    low, high = record["intervals"]["val/rmse"]
    assert low < record["val/rmse"] < high
    assert f"val/rmse {record['val/rmse']:.4f} m [{low:.4f}, {high:.4f}]" in caplog.text
    compare.main(["compare", str(evaluated), str(evaluated)])
    main(["predict", "--weights", best, *quiet])
    assert len(list(Path("runs").rglob("predictions/*/rgb_*.png"))) == 3


@pytest.mark.slow
@pytest.mark.parametrize("config", [config for config in CONFIGS if Path(config).stem in DROP_PATH])
def test_it_runs_a_step(config, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained = "vit_base_patch14_dinov2" if config.startswith("adapt_locality") else TEACHER
    torch.save(timm.create_model(trained, init_values=1.0, **BACKBONE).state_dict(), "vit.pth")
    weights = ["--weights", "vit.pth"] if config.startswith("adapt_") else []
    first = next(each for each in CONFIGS if each.partition("_")[0] == config.partition("_")[0])
    # Pictures are of a kind of task and views: its first config draws them.
    pictures = [] if config == first else ["--pictures.every_n_epochs=0"]
    main([*one_step(config, folder), *weights, *pictures])

    [run] = (tmp_path / "runs").rglob("version_0")
    assert run.parent.name == Path(config).stem
    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 1
    model = last["hyper_parameters"]
    shipped = yaml.safe_load((configs.config_directory() / config).read_text())["model"]["init_args"]
    assert model["backbone"] == shipped["backbone"]
    assert model["backbone_args"] == shipped.get("backbone_args", {}) | BACKBONE
    assert model["backbone_args"].get("drop_path_rate") == DROP_PATH[Path(config).stem]
    with (run / "metrics.csv").open() as file:
        logged = set(file.readline().strip().split(","))
    if config.startswith("dino_"):
        assert {"train/loss", "train/teacher_entropy"} <= logged
    elif config.startswith(("mae_", "simmim_")):
        assert {"train/loss", "train/hidden_share", "signs/patch_cosine", "knn/top1"} <= logged
    elif config.startswith(("ibot_", "dinov2_")):
        assert {"train/cls_loss", "train/patch_loss", "signs/patch_cosine", "knn/top1"} <= logged
    elif config.startswith("adapt_locality"):
        assert {"train/views_loss", "train/cls_loss", "signs/outlying_share", "knn/top1"} <= logged
    elif config.startswith(("distill_", "selfpatch_")):
        assert {"train/loss", "train/cls_loss", "train/patch_loss", "knn/top1"} <= logged
    else:
        assert {"val/loss", "val/top1"} <= json.loads((run / "metrics.json").read_text()).keys()


@pytest.mark.slow
def test_a_pretraining_continues_at_high_resolutions(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(one_step("dinov2_small.yaml", folder))
    weights = "runs/dinov2_small/version_0/checkpoints/last.ckpt"
    larger = ["--data.views.mixed_sizes=[[48, 16, 0.5], [64, 24, 0.5]]", "--data.views.undistorted_size=48"]
    given = ["--weights", weights, *larger]
    main([*one_step("dinov2_highres.yaml", folder), *given, "--trainer.limit_train_batches=3"])
    run = Path("runs/dinov2_highres/version_0")
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3
    with (run / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    shipped = yaml.safe_load((configs.config_directory() / "dinov2_highres.yaml").read_text())
    mixed = shipped["data"]["init_args"]["views"]["init_args"]["mixed_sizes"]
    assert all(size % 16 == 0 for *sizes, _ in mixed for size in sizes)
    assert [float(row["train/lr"]) for row in rows] == pytest.approx([1.25e-5] * 3)
    assert [float(row["train/momentum"]) for row in rows] == pytest.approx([0.999] * 3)
    # Its own teacher of before the first step, whose views are larger.
    assert all(0 < float(row["train/gram_loss"]) < 1 for row in rows)


@pytest.mark.parametrize(
    ("config", "key", "misspelt"),
    [
        ("classify_base.yaml", "drop_path_rate", "drop_pathrate"),
        ("quickstart.yaml", "patch_size", "patch_sise"),
    ],
)
def test_a_misspelt_key_of_the_model_does_not_pass(
    config, key, misspelt, folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    text = (configs.config_directory() / config).read_text()
    assert key in text
    (tmp_path / config).write_text(text.replace(key, misspelt))
    with pytest.raises(SystemExit) as stopped:
        main(one_step(config, folder))
    assert stopped.value.code == 2
    assert misspelt in capsys.readouterr().err
