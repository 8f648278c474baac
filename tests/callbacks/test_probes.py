"""Probes: their numbers, when they are logged, when they are off, and training as without them."""

import csv
import logging
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig
from torch.nn.functional import cross_entropy

from locat_lightning.callbacks.probes import KnnProbe, LinearProbe
from locat_lightning.callbacks.retrieval_probe import RetrievalProbe
from locat_lightning.data import ImageData, MultiViewData
from locat_lightning.data.dataset import Images
from locat_lightning.data.views import MultiCrop
from locat_lightning.errors import InputError
from locat_lightning.evaluation.features import Features, image_features
from locat_lightning.evaluation.knn import knn_classify
from locat_lightning.evaluation.linear import sweep_linear
from locat_lightning.methods import Dino
from locat_lightning.tasks import Classification

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers:UserWarning",
    "ignore:Be aware that when using `ckpt_path`",
)

BACKBONE = {
    "img_size": 16,
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
    "drop_path_rate": 0.5,
}


def classification():
    return Classification(backbone_args=BACKBONE | {"proj_drop_rate": 0.2}, warmup_epochs=0, lr=1e-3)


def dino():
    return Dino(
        backbone_args=BACKBONE,
        out_dim=32,
        hidden_dim=16,
        bottleneck_dim=8,
        lr=1e-2,
        warmup_epochs=0,
    )


def image_data(root, **options):
    return ImageData(**({"root": str(root), "img_size": 16, "batch_size": 6, "num_workers": 0} | options))


def multicrop(root, **options):
    plain = {"views": MultiCrop(16, 8, 2), "batch_size": 6, "num_workers": 0}
    return MultiViewData(**({"root": str(root)} | plain | options))


class Record(Callback):
    """What the callbacks see at the end of each epoch, and the training flags of each batch."""

    def __init__(self):
        self.metrics, self.flags = [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.flags.append([each.training for each in module.modules()])

    def on_train_epoch_end(self, trainer, module):
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def fit(task, data, *callbacks, resume=None, **options):
    seed_everything(1, verbose=False)
    plain = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "limit_val_batches": 0,
        "log_every_n_steps": 1,
    }
    trainer = Trainer(callbacks=list(callbacks), **(plain | options))
    trainer.fit(task, data, ckpt_path=resume)
    return trainer


def points(trainer, name):
    events = EventAccumulator(trainer.logger.log_dir).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def random_states():
    numpy = np.random.get_state()[1].tolist()  # noqa: NPY002 - timm draws from it
    return random.getstate(), numpy, torch.get_rng_state().tolist()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("make", "data"), [(classification, image_data), (dino, multicrop)])
def test_training_is_the_same_without(folder, make, data, workers):
    outcomes = []
    for probes in ([], [KnnProbe(images=10), LinearProbe(image_data(folder), every_n_epochs=1, epochs=2)]):
        record = Record()
        seed_everything(0, verbose=False)
        trainer = fit(task := make(), data(folder, num_workers=workers), *probes, record)
        [optimizer] = trainer.optimizers
        moments = {
            f"{index} {name}": value
            for index, state in optimizer.state_dict()["state"].items()
            for name, value in state.items()
        }
        gradients = {name: p.grad for name, p in task.named_parameters() if p.grad is not None}
        outcomes.append((task.state_dict() | moments, gradients, random_states(), record.flags))
    assert {"knn/top1", "linear/top1"} <= record.metrics[-1].keys()
    (weights, gradients, states, flags), (weights_with, gradients_with, states_with, flags_with) = outcomes
    assert same(weights, weights_with)
    assert same(gradients, gradients_with)
    assert states == states_with
    assert flags == flags_with


def features_of(task, data, split, places=None):
    """[N, D] and labels [N], in one batch."""
    images = Images(data.source(split), data.eval_transform())
    items = [images[place] for place in (range(len(images)) if places is None else places)]
    task.backbone.eval()
    with torch.no_grad():
        features = image_features(task.backbone, torch.stack([image for image, _, _ in items]))
    _, labels, indices = zip(*items, strict=True)
    return Features(features, torch.tensor(labels), torch.tensor(indices))


@pytest.mark.parametrize(("make", "data"), [(classification, image_data), (dino, multicrop)])
def test_values_before_and_after(folder, tmp_path, make, data):
    """On the curve from step 0 on; those of the teacher's backbone for DINO."""
    other = image_data("", dataset="digits")
    knn, linear = KnnProbe(k=5, temperature=0.1), LinearProbe(other, images=100, epochs=3, seed=3)

    class Untrained(Callback):
        def on_train_start(self, trainer, module):
            module.eval()
            self.expected = expected(module)
            module.train()
            module.teacher.eval() if make is dino else None

    own = data(folder)

    def expected(task):
        train, val = (features_of(task, own, split) for split in ("train", "val"))
        places = np.sort(np.random.default_rng(3).choice(1437, 100, replace=False)).tolist()
        bank, digits = features_of(task, other, "train", places), features_of(task, other, "val")
        best = sweep_linear(*bank[:2], *digits[:2], epochs=3, seed=3, progress=False).best
        return {
            "knn/top1": knn_classify(*train[:2], *val[:2], k=[5], temperature=0.1)[5].top1,
            "linear/top1": best.top1,
            "linear/top5": best.top5,
            "linear/rate": best.learning_rate,
        }

    other.setup("fit")
    untrained = Untrained()
    logger = TensorBoardLogger(tmp_path, name="", version="")
    trainer = fit(task := make(), own, untrained, knn, linear, logger=logger, max_epochs=3)
    found, after = trainer.callback_metrics, expected(task)
    for name, value in after.items():
        assert found[name].item() == pytest.approx(value, abs=1e-6), name
        curve = points(trainer, name)
        epochs = [0, 2, 5, 8] if name.startswith("knn") else [0, 8]  # 3 steps an epoch
        assert [step for step, _ in curve] == epochs
        assert curve[0][1] == pytest.approx(untrained.expected[name], abs=1e-6), name
        assert curve[-1][1] == pytest.approx(value, abs=1e-6), name
    assert "knn/top5" not in found  # of three classes


def test_the_bank_is_a_fixed_choice(folder):
    banks = []

    class Bank(KnnProbe):
        def accuracy(self, train, val):
            banks.append((train.labels.tolist(), len(val.labels)))
            return super().accuracy(train, val)

    for seed in (0, 0, 1):
        fit(classification(), image_data(folder), Bank(images=9, seed=seed), max_epochs=1)
    assert all(len(labels) == 9 and labels == sorted(labels) and images == 8 for labels, images in banks)
    assert banks[0] == banks[1] == banks[2] == banks[3] == banks[3]
    chosen = np.random.default_rng(1).choice(18, 9, replace=False)
    assert banks[-1][0] == sorted(int(place) // 6 for place in chosen)


def count_extracted(monkeypatch):
    """Calls of the backbone for a probe: how many images each."""
    calls = []

    def counted(backbone, images, **options):
        calls.append(len(images))
        return image_features(backbone, images, **options)

    monkeypatch.setattr("locat_lightning.evaluation.features.image_features", counted)
    return calls


@pytest.mark.parametrize("of_their_own", [False, True])
def test_features_are_extracted_once_for_all_probes(folder, monkeypatch, of_their_own):
    """Before training, and after each of two epochs: 18 images to train on and 8 to validate on."""
    calls, values = count_extracted(monkeypatch), []
    for probes in (1, 2):
        data = [image_data(folder) if of_their_own else None for _ in range(2)]
        several = KnnProbe(data[0]), LinearProbe(data[1], every_n_epochs=1, epochs=2)
        trainer = fit(classification(), image_data(folder), *several[-probes:])
        values.append(trainer.callback_metrics["linear/top1"])
        assert all(not probe._kept for probe in several)
        assert sum(calls) == 3 * (18 + 8)
        calls.clear()
    assert values[0] == values[1]


def test_probes_of_other_images_share_what_they_have_in_common(folder, monkeypatch):
    calls = count_extracted(monkeypatch)
    probes = KnnProbe(images=9), LinearProbe(every_n_epochs=1, epochs=2), KnnProbe(name="again", images=9)
    other = KnnProbe(image_data(folder, crop_pct=1.0), name="other", images=9)
    fit(classification(), image_data(folder), *probes, other, max_epochs=1)
    assert sum(calls) == 2 * (9 + 8 + 18 + 9 + 8)


def lines(*parts):
    return Path(*parts).read_text().splitlines()


def projected(directory):
    """The steps that TensorBoard's projector lists, each with its labels and its features."""
    listed = text_format.Parse(Path(directory, "projector_config.pbtxt").read_text(), ProjectorConfig())
    found = {}
    for each in listed.embeddings:
        rows = list(csv.DictReader(lines(directory, each.metadata_path), delimiter="\t"))
        features = np.loadtxt(Path(directory, each.tensor_path), ndmin=2)
        side, _ = each.sprite.single_image_dim
        with Image.open(Path(directory, each.sprite.image_path)) as sprite:
            assert sprite.size == (3 * side, 3 * side)
        found[each.tensor_name] = [int(row["label"]) for row in rows], features
    return found


def test_the_last_features_are_in_the_projector(folder, tmp_path):
    """Also where another probe has extracted them, and of 8 images no more than 7, evenly spaced."""
    logger = TensorBoardLogger(tmp_path, name="", version="")
    probes = LinearProbe(every_n_epochs=1, epochs=1), KnnProbe(points=7)
    data = image_data(folder)
    fit(task := classification(), data, *probes, logger=logger)
    [(name, (labels, features))] = projected(tmp_path).items()
    expected = features_of(task, data, "val", places=[0, 1, 2, 4, 5, 6, 7])
    assert name == "features:00005"
    assert labels == expected.labels.tolist()
    np.testing.assert_allclose(features, expected.features, rtol=1e-4, atol=1e-5)
    again = KnnProbe(points=0)
    fit(classification(), data, again, logger=TensorBoardLogger(tmp_path, name="none", version=""))
    assert not Path(tmp_path, "none", "projector_config.pbtxt").exists()


def test_a_resumed_run_keeps_the_projectors_points(folder, tmp_path, capsys):
    class Stop(Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 2:
                raise KeyError

    def run(*callbacks, **options):
        logger = TensorBoardLogger(tmp_path, name="", version="")
        probe = KnnProbe(points=9, project="each")
        fit(classification(), image_data(folder), probe, *callbacks, max_epochs=3, logger=logger, **options)

    with pytest.raises(KeyError):
        run(ModelCheckpoint(tmp_path / "checkpoints", filename="cut", save_top_k=-1), Stop())
    assert list(projected(tmp_path)) == ["features:00002", "features:00005"]
    first = projected(tmp_path)["features:00002"][1]
    run(resume=tmp_path / "checkpoints" / "cut.ckpt")  # after the first epoch or the second
    assert list(projected(tmp_path)) == ["features:00002", "features:00005", "features:00008"]
    np.testing.assert_array_equal(projected(tmp_path)["features:00002"][1], first)
    assert "warning" not in capsys.readouterr().out


def test_every_n_epochs_and_after_the_last(folder, tmp_path):
    def steps(**options):
        probe = KnnProbe(every_n_epochs=2)
        logger = TensorBoardLogger(tmp_path, name="")
        trainer = fit(classification(), image_data(folder), probe, logger=logger, **options)
        return [step for step, _ in points(trainer, "knn/top1")]

    assert steps(max_epochs=3) == [0, 5, 8]
    assert steps(max_epochs=-1, max_steps=8) == [0, 5, 7]


@pytest.mark.parametrize("every", [1, 3])
def test_a_checkpoint_can_monitor_it(folder, tmp_path, every):
    """With a validation, where Lightning makes a missing metric an error."""
    best = ModelCheckpoint(tmp_path / "best", monitor="knn/top1", mode="max")
    record = Record()
    fit(
        classification(),
        image_data(folder),
        best,
        KnnProbe(every_n_epochs=every),
        record,
        max_epochs=4,
        limit_val_batches=1,
        num_sanity_val_steps=0,
    )
    measured = [each["knn/top1"] for each in record.metrics if each["knn/top1"] == each["knn/top1"]]
    assert len(measured) == 5 - every
    assert best.best_model_score.item() == pytest.approx(max(measured))


@pytest.mark.parametrize("every", [1, 3])
def test_a_resumed_run_goes_on(folder, tmp_path, caplog, every):
    def run(epochs, *callbacks, **options):
        probe = KnnProbe(every_n_epochs=every)
        logger = CSVLogger(tmp_path, name="")
        options |= {"max_epochs": epochs, "logger": logger}
        task = dino()
        fit(task, multicrop(folder), probe, *callbacks, **options)
        table = Path(logger.log_dir, "metrics.csv")
        rows = list(csv.DictReader(table.read_text().splitlines()))
        return probe, task, [int(row["step"]) for row in rows if row["knn/top1"]]

    class Stop(Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 2:
                raise KeyError

    whole, task, steps = run(4)
    assert steps == ([0, 2, 5, 8, 11] if every == 1 else [0, 8, 11])
    with pytest.raises(KeyError):
        run(4, ModelCheckpoint(tmp_path / "checkpoints", filename="cut"), Stop())
    caplog.clear()
    with caplog.at_level(logging.INFO):
        resumed, again, steps = run(4, resume=tmp_path / "checkpoints" / "cut.ckpt")
    assert steps == [8, 11]
    assert (resumed.first, resumed.last) == (whole.first, whole.last)
    assert same(task.state_dict(), again.state_dict())
    assert f"k-NN top-1 (knn/top1) {whole.first:.4g} before -> {whole.last:.4g}" in caplog.text
    state = torch.load(tmp_path / "checkpoints" / "cut.ckpt", weights_only=True)["callbacks"]["KnnProbe.knn"]
    assert state["first"] == whole.first


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "32-true"])
def test_precision_follows_the_trainer(folder, precision):
    seen = []

    class Widths(KnnProbe):
        def accuracy(self, train, val):
            assert train.features.dtype == torch.float32
            seen.append(torch.equal(train.features, train.features.bfloat16().float()))
            return super().accuracy(train, val)

    fit(classification(), image_data(folder), Widths(), precision=precision, max_epochs=1)
    assert seen == [precision != "32-true"] * 2


def unlabelled(folder):
    for split in ("train", "val"):
        for path in list((folder / split).rglob("*.png")):
            path.rename(folder / split / f"{path.parent.name}{path.name}")
        for path in list((folder / split).iterdir()):
            path.rmdir() if path.is_dir() else None
    return multicrop(folder)


def without_val(folder):
    (folder / "val").rename(folder / "rest")
    return multicrop(folder)


def of_one_class(folder):
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            (folder / split / name).rename(folder.parent / f"{split}_{name}")
    return multicrop(folder)


@pytest.mark.parametrize(
    ("spoil", "obstacle"),
    [(unlabelled, "have no labels"), (without_val, "no val/"), (of_one_class, "of one class")],
)
def test_data_that_cannot_be_measured(folder, caplog, spoil, obstacle):
    """The run's own switch the probe off in a line; the probe's own are an error before anything is built."""
    data, record = spoil(folder), Record()
    with caplog.at_level(logging.INFO):
        fit(dino(), data, KnnProbe(), LinearProbe(every_n_epochs=5), record, max_epochs=1)
    lines = [line.getMessage() for line in caplog.records if "not measured" in line.getMessage()]
    assert len(lines) == 2
    assert all(obstacle in line for line in lines)
    assert not any("top1" in name for name in record.metrics[-1])
    assert "top-1" not in caplog.text
    task = dino()
    with pytest.raises(InputError, match=f"knn: .*{obstacle}"):
        fit(task, data, KnnProbe(multicrop(folder)))
    assert not hasattr(task, "student")


def test_a_bank_of_one_class(folder):
    own = image_data(folder)
    with pytest.raises(InputError, match="1 training images chosen are of one class: raise images"):
        fit(classification(), own, LinearProbe(image_data(folder), images=1))


def test_nothing_in_a_fast_dev_run(folder):
    probe = KnnProbe()
    fit(classification(), image_data(folder), probe, fast_dev_run=True)
    assert probe.last is None


@pytest.mark.parametrize(
    ("probe", "wrong"),
    [
        (KnnProbe, "--k=0"),
        (KnnProbe, "--temperature=0"),
        (KnnProbe, "--every_n_epochs=-1"),
        (KnnProbe, "--images=0"),
        (LinearProbe, "--epochs=0"),
        (LinearProbe, "--batch_size=0"),
        (LinearProbe, "--learning_rates=[0]"),
        (RetrievalProbe, "--image_size=0"),
        (RetrievalProbe, "--memory_size=-1"),
        (RetrievalProbe, "--neighbours=0"),
    ],
)
def test_numbers_out_of_range_are_refused_by_their_type(probe, wrong):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(probe, skip={"data"})
    with pytest.raises(ArgumentError, match=wrong.partition("=")[0].removeprefix("--")):
        parser.parse_args([wrong])


def test_a_model_without_a_backbone_switches_it_off_in_a_line(folder, caplog):
    class Own(LightningModule):
        def __init__(self):
            super().__init__()
            self.model = torch.nn.Linear(3 * 16 * 16, 3)

        def training_step(self, batch, batch_idx):
            return cross_entropy(self.model(batch.images.flatten(1)), batch.labels)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    probe = KnnProbe()
    with caplog.at_level(logging.INFO), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You passed in a `val_dataloader`")
        fit(Own(), image_data(folder), probe)
    assert "k-NN is not measured: Own has no backbone" in caplog.text
    assert probe.last is None


def of_digits(folder, **options):
    """What is measured on the folder, and on digits whose numbers are odd: processes have unequal shares."""
    linear = LinearProbe(image_data("", dataset="digits"), images=101, epochs=2, every_n_epochs=1)
    best = ModelCheckpoint(folder.parent / str(options.get("devices")), monitor="knn/top1", mode="max")
    record = Record()
    data = multicrop(folder, batch_size=6 // options.get("devices", 1))
    fit(dino(), data, KnnProbe(k=3), linear, best, record, max_epochs=1, **options)
    return record.metrics[-1]


def one_of_two(rank, folder):
    torch.save(of_digits(folder, devices=2, strategy="ddp"), folder.parent / f"{rank}.pt")


@pytest.mark.slow
def test_two_processes_measure_what_one_does(folder, two_processes):
    two_processes(one_of_two, folder)
    first, second = (torch.load(folder.parent / f"{rank}.pt", weights_only=True) for rank in range(2))
    alone = of_digits(folder)
    for name in ("knn/top1", "linear/top1", "linear/top5", "linear/rate"):
        assert first[name] == second[name]
        assert first[name] == pytest.approx(alone[name], abs=0.01)


def test_never(folder):
    probe = KnnProbe(every_n_epochs=0)
    trainer = fit(classification(), image_data(folder), probe)
    assert probe.last is None
    assert not any(name.startswith("knn/") for name in trainer.callback_metrics)
