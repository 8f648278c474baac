"""The retrieval probe: what the function gives, on a fixed choice of images, beside any training."""

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from locat_lightning.callbacks.retrieval_probe import RetrievalProbe
from locat_lightning.data import ImageData, SegmentationData
from locat_lightning.evaluation.retrieval import Retrieval, build_memories, segment_by_retrieval
from locat_lightning.tasks import Classification

BACKBONE = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


@pytest.fixture
def masks(scenes):
    root = str(scenes("folder"))
    return SegmentationData(root=root, classes=["a", "b", "c"], batch_size=4, num_workers=0)


def fit(folder, *callbacks, epochs=2):
    seed_everything(0)
    task = Classification("locatvit_tiny", backbone_args=BACKBONE, warmup_epochs=0)
    data = ImageData(root=str(folder), img_size=32, batch_size=6, num_workers=0)
    run = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=CSVLogger(folder.parent / "log"),
        callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        default_root_dir=folder.parent,
    )
    run.fit(task, datamodule=data)
    return task, run


def test_it_logs_what_the_function_gives(folder, masks, caplog):
    probe = RetrievalProbe(masks, every_n_epochs=1, image_size=32, memory_size=40, neighbours=5)
    best = ModelCheckpoint(folder.parent / "best", monitor="retrieval/miou", mode="max")
    task, run = fit(folder, probe, best)
    expected = segment_by_retrieval(
        task.backbone,
        masks.square_dataloader("train", 32),
        masks.square_dataloader("val", 32),
        "cpu",
        Retrieval(memory_size=40, neighbours=5),
        num_classes=3,
        progress=False,
    )
    assert run.callback_metrics["retrieval/miou"] == pytest.approx(float(expected.miou))
    assert probe.last == pytest.approx(float(expected.miou))
    assert float(best.best_model_score) >= probe.last
    assert (
        f"Dense retrieval mIoU (retrieval/miou) {probe.first:.4g} before -> {probe.last:.4g}" in caplog.text
    )


def test_training_is_the_same_with_it(folder, masks):
    plain, _ = fit(folder)
    watched, _ = fit(folder, RetrievalProbe(masks, every_n_epochs=1, image_size=32, images=2))
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name


def test_the_memory_is_of_the_chosen_images(folder, masks, monkeypatch):
    seen, sizes = [], []

    def watched(backbone, train, val, device, settings, **options):
        kept = {name: options[name] for name in ("num_classes", "places")}
        (memory,) = build_memories(backbone, [train], "cpu", [settings], **kept, progress=False)
        sizes.append(len(memory.features))
        seen.append([index for batch in train for index in batch.indices.tolist()])
        return segment_by_retrieval(backbone, train, val, device, settings, **options)

    monkeypatch.setattr("locat_lightning.callbacks.retrieval_probe.segment_by_retrieval", watched)
    fit(folder, RetrievalProbe(masks, every_n_epochs=1, image_size=32, images=4, memory_size=17), epochs=1)
    assert sizes == [17, 17]  # of 4 images with 12 annotated patches each
    assert len(seen) == 2  # before and after
    assert seen[0] == seen[1]
    assert len(set(seen[0])) == 4


def test_data_without_masks_switch_it_off_in_a_line(folder, caplog):
    probe = RetrievalProbe(every_n_epochs=1)
    fit(folder, probe, epochs=1)
    assert "Dense retrieval is not measured: ImageData has no masks: set retrieval.data" in caplog.text
    assert probe.last is None
