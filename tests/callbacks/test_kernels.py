"""Widths and strengths of the kernels: right numbers, where they belong, and training as without them."""

import csv

import pytest
import timm
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.nn import functional as F
from torch.utils.data import DataLoader

from locat_lightning.backbones import registry  # noqa: F401 - names the models
from locat_lightning.callbacks.kernels import KernelWidths
from locat_lightning.data.classification import ImageData
from locat_lightning.inspection import kernel_widths

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.*is deprecated:FutureWarning",  # Lightning, of torch 2.15
    "ignore:.*does not have many workers:UserWarning",
)


def locatvit(**options):
    small = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 10}
    torch.manual_seed(0)
    model = timm.create_model("locatvit_tiny", **(small | options))
    for name, weight in model.named_parameters():
        if "gaug" in name:
            torch.nn.init.normal_(weight)
    return model


class Classifier(LightningModule):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def training_step(self, batch, _):
        return F.cross_entropy(self.backbone(batch.images), batch.labels)

    def validation_step(self, batch, _):
        self.backbone(batch.images)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def digits():
    return ImageData(dataset="digits", img_size=16, batch_size=8, num_workers=0)


def fit(module, callbacks, folder, data=None, **options):
    torch.manual_seed(1)
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=2,
        limit_train_batches=1,
        logger=CSVLogger(folder, name="", version=""),
        log_every_n_steps=1,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, data or digits())
    return trainer


def widths_in(folder):
    with (folder / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row.get("gaug_alpha/block_00")]


def test_each_validation_is_logged_by_block_and_training_is_as_without(tmp_path):
    with_it, without = (Classifier(locatvit()) for _ in range(2))
    trainer = fit(with_it, [KernelWidths(images=4)], tmp_path / "with", limit_val_batches=2)
    fit(without, [], tmp_path / "without", limit_val_batches=2)
    for ours, theirs in zip(with_it.parameters(), without.parameters(), strict=True):
        assert torch.equal(ours, theirs)

    rows = widths_in(tmp_path / "with")
    assert [row["epoch"] for row in rows] == ["0", "1"]
    images = next(iter(trainer.datamodule.val_dataloader())).images[:4]
    for block, (variance, alpha) in enumerate(kernel_widths(with_it.backbone, images)):
        assert float(rows[-1][f"gaug_variance/block_{block:02}"]) == pytest.approx(variance)
        assert float(rows[-1][f"gaug_alpha/block_{block:02}"]) == pytest.approx(alpha)


def test_without_validation_each_epoch_on_the_same_samples(tmp_path):
    module, data = Classifier(locatvit()), digits()
    fit(module, [KernelWidths(images=4)], tmp_path, data, limit_val_batches=0)
    rows = widths_in(tmp_path)
    assert [(row["epoch"], row["step"]) for row in rows] == [("0", "0"), ("1", "1")]
    images = data.val_dataloader().dataset
    samples = torch.stack([images[place][0] for place in (0, 120, 239, 359)])
    for block, (variance, alpha) in enumerate(kernel_widths(module.backbone, samples)):
        assert float(rows[-1][f"gaug_variance/block_{block:02}"]) == pytest.approx(variance)
        assert float(rows[-1][f"gaug_alpha/block_{block:02}"]) == pytest.approx(alpha)


def test_a_users_own_module_and_data_go_without(tmp_path):
    class Own(Classifier):
        def training_step(self, batch, _):
            return self.layer(batch["image"].flatten(1)).mean()

        validation_step = training_step

    module = Own(None)
    module.layer = torch.nn.Linear(3 * 16 * 16, 1)
    loader = DataLoader([{"image": torch.rand(3, 16, 16)}] * 2)
    options = {"fast_dev_run": True, "accelerator": "cpu", "enable_progress_bar": False}
    Trainer(callbacks=[KernelWidths()], **options).fit(module, loader, loader)
    module.backbone = locatvit()
    with pytest.warns(UserWarning, match="no more kernel widths in this run: KeyError: 0"):
        Trainer(callbacks=[KernelWidths()], **options).fit(module, loader, loader)
