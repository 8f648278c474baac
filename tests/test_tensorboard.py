"""What TensorBoard itself shows of a run of each task, asked over its HTTP interface."""

import contextlib
import json
import shutil
import time
import warnings
from importlib import import_module
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from locat_lightning.callbacks import pictures
from locat_lightning.callbacks.pictures import spaced_items
from locat_lightning.commands.fit import main

pytestmark = pytest.mark.slow
BACKBONE = "{img_size: 32, patch_size: 8, embed_dim: 24, depth: 2, num_heads: 3}"
SHORT = {
    "data.num_workers": 0,
    "data.batch_size": 6,
    "model.backbone_args": BACKBONE,
    "pictures.images": 2,
    "pictures.side": 32,
    "pictures.every_n_epochs": 1,
    "trainer.accelerator": "cpu",
    "trainer.enable_progress_bar": "false",
    "trainer.limit_train_batches": 2,
    "trainer.limit_val_batches": 1,
    "trainer.log_every_n_steps": 1,
}
TASKS = {
    "quickstart": {"trainer.max_epochs": 1, "model.warmup_epochs": 0},
    "dino_digits": {
        "trainer.max_epochs": 1,
        "model.warmup_epochs": 0,
        "model.out_dim": 64,
        "model.hidden_dim": 32,
        "model.bottleneck_dim": 16,
        "data.views.global_size": 32,
        "data.views.local_size": 16,
        "data.views.local_views": 2,
        "data.batch_size": 90,
        "knn.every_n_epochs": 1,
        "knn.images": 90,
        "linear.every_n_epochs": 1,
        "linear.images": 90,
        "linear.epochs": 1,
    },
    "segment_digits": {
        "weights": "random",
        "model.backbone": "locatvit_tiny",
        "model.hidden_dim": 16,
        "data.crop_size": 32,
        "data.eval_batch_size": 4,
        "trainer.max_steps": 2,
        "trainer.val_check_interval": 2,
    },
}
COMMON = {
    f"train/{name}" for name in ("loss", "lr", "weight_decay", "grad_norm", "images_per_s", "data_wait")
}
KERNELS = {f"gaug_{of}/block_{block:02}" for of in ("variance", "alpha") for block in (0, 1)}
SCALARS = {
    "quickstart": {"train/top1", "train/top5", "val/loss", "val/top1", "val/top5"} | KERNELS,
    "dino_digits": {"train/teacher_temp", "train/momentum", "train/teacher_entropy", "train/kl"}
    | {"train/centre_norm", "train/feature_std", "train/last_layer_frozen"}
    | {f"signs/{name}" for name in ("effective_rank", "patch_cosine", "patch_rank", "patch_cls_cosine")}
    | {"knn/top1", "linear/top1"}
    | KERNELS,
    "segment_digits": {"val/miou", "val/pixel_accuracy", "val/mean_accuracy", "iou/0", "iou/ground"}
    | KERNELS,
}
PICTURES = {
    "quickstart": {"pictures/validation", "pictures/hard"},
    "dino_digits": {"pictures/validation", "pictures/crops"},
    "segment_digits": {"pictures/validation", "pictures/hard", "pictures/iou", "pictures/confusion"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A directory with a short run of each task."""
    folder = tmp_path_factory.mktemp("tensorboard")
    with contextlib.chdir(folder), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*random: the model has not been trained")
        for task, options in TASKS.items():
            main(["fit", "--config", task, *(f"--{key}={value}" for key, value in (SHORT | options).items())])
    return folder / "runs"


@pytest.fixture(scope="module")
def shown(runs):
    """What TensorBoard answers to a path, once it has read the runs."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # of what tensorboard brings along
        board = import_module("tensorboard.program").TensorBoard()
        board.configure(argv=[None, "--logdir", str(runs), "--port", "0", "--load_fast", "false"])
        url = board.launch() + "data/plugin/"

    def ask(path, body=None):
        data = None if body is None else json.dumps(body).encode()
        with urlopen(Request(url + path, data, {"Content-Type": "application/json"})) as answer:
            return json.load(answer)

    deadline = time.monotonic() + 30
    while len(ask("text/tags")) < len(TASKS) and time.monotonic() < deadline:
        time.sleep(0.1)
    return ask


def of_task(answer, task):
    [run] = [run for run in answer if task in Path(run).parts]
    return set(answer[run])


@pytest.mark.parametrize("task", TASKS)
def test_scalars(shown, task):
    assert of_task(shown("scalars/tags"), task) >= COMMON | SCALARS[task]


@pytest.mark.parametrize("task", TASKS)
def test_pictures(shown, task):
    assert of_task(shown("images/tags"), task) == PICTURES[task]


@pytest.mark.parametrize("task", TASKS)
def test_text(shown, task):
    assert of_task(shown("text/tags"), task) == {"config/text_summary", "versions/text_summary"}


def test_a_resumed_segmentation_goes_on_drawing_and_reads_its_samples_once(runs, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(pictures, "spaced_items", lambda *of: read.append(spaced_items(*of)) or read[-1])
    run = shutil.copytree(runs / "segment_digits" / "version_0", tmp_path / "copy" / "version_0")
    last = run / "checkpoints" / "last.ckpt"
    longer = ["--trainer.max_steps", "6", "--allow_changes", "true"]
    main(["fit", "--ckpt_path", str(last), *longer])
    assert torch.load(last, weights_only=True)["global_step"] == 6
    events = EventAccumulator(str(run)).Reload()
    assert [picture.step for picture in events.Images("pictures/validation")] == [1, 3, 5]
    assert [len(items) for items in read] == [2]


def test_hyper_parameters_stand_beside_the_final_metrics(shown):
    experiment = shown("hparams/experiment", {"experimentName": ""})
    names = {each["name"] for each in experiment["hparamInfos"]}
    assert {"model.backbone", "model.lr", "data.batch_size"} <= names
    assert not any(name.startswith("_") for name in names)
    columns = [each["name"] for each in experiment["metricInfos"]]
    request = {
        "experimentName": "",
        "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"],
        "colParams": [{"metric": name} for name in columns],
        "startIndex": 0,
        "sliceSize": 10,
    }
    groups = shown("hparams/session_groups", request)["sessionGroups"]
    headlines = {"quickstart": "val/top1", "dino_digits": "knn/top1", "segment_digits": "val/miou"}
    assert len(groups) == len(headlines)
    for task, headline in headlines.items():
        [group] = [group for group in groups if task in Path(group["sessions"][0]["name"]).parts]
        values = {each["name"]["tag"]: each["value"] for each in group["metricValues"]}
        [(run, _)] = [item for item in shown("scalars/tags").items() if task in Path(item[0]).parts]
        logged = shown(f"scalars/scalars?tag={headline}&run={run}")
        assert values[headline] == logged[-1][2]
        assert headline in {column["tag"] for column in columns}
