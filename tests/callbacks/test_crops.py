"""Pictures of the crops: each in its place, once a run, and training as without them."""

import io

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms.functional import pil_to_tensor

from locat_lightning.callbacks.crops import CropPictures, draw_crops
from locat_lightning.callbacks.pictures import Column, table
from locat_lightning.data import MultiCropData
from locat_lightning.data.classification import ImageData
from locat_lightning.data.multiview import MultiCropBatch
from locat_lightning.data.views import Views
from locat_lightning.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")

SIDE, GAP = 40, 4
HEADER = round(SIDE / 13 + SIDE / 18) + 2 * GAP


def plain_views(colours, sizes):
    """Views [V, B, 3, size, size] of one colour each, normalised; `colours` are [all V, B, 3]."""
    mean, std = torch.tensor(IMAGENET_DEFAULT_MEAN), torch.tensor(IMAGENET_DEFAULT_STD)
    normalised = ((colours - mean) / std)[..., None, None]
    counts = [count for count, _ in sizes]
    return [
        Views(part.expand(-1, -1, 3, size, size), None)
        for part, (_, size) in zip(normalised.split(counts), sizes, strict=True)
    ]


@pytest.mark.parametrize("sizes", [[(2, 16), (3, 8)], [(2, 64), (1, 16)], [(2, 16)]])
def test_a_row_for_each_image_and_the_global_views_first(sizes):
    columns = sum(count for count, _ in sizes)
    colours = torch.rand(columns, 5, 3, generator=torch.Generator().manual_seed(0))
    drawn = draw_crops(plain_views(colours, sizes), images=2, side=SIDE)
    assert drawn.dtype == torch.uint8
    assert drawn.shape == (3, HEADER + 2 * (SIDE + GAP), GAP + columns * (SIDE + GAP))
    for view in range(columns):
        for image in range(2):
            top, left = HEADER + image * (SIDE + GAP), GAP + view * (SIDE + GAP)
            tile = drawn[:, top : top + SIDE, left : left + SIDE] / 255
            expected = colours[view, image].view(3, 1, 1).expand_as(tile)
            torch.testing.assert_close(tile, expected, atol=1 / 255, rtol=0)
    tile = [Image.new("RGB", (SIDE, SIDE))]
    titles = [
        (kind, number, size)
        for kind, (count, size) in zip(("global", "local"), sizes, strict=False)
        for number in range(1, count + 1)
    ]
    headers = [Column(f"{kind} {number}", f"{size} px", tile) for kind, number, size in titles]
    assert torch.equal(drawn[:, :HEADER], pil_to_tensor(table(headers, SIDE))[:, :HEADER])


def test_fewer_images_than_asked_for_half_precision_and_values_beyond_the_range():
    views = [Views(torch.full((2, 1, 3, 8, 8), 99.0, dtype=torch.bfloat16), None)]
    drawn = draw_crops(views, images=4, side=SIDE)
    assert drawn.shape == (3, HEADER + SIDE + GAP, GAP + 2 * (SIDE + GAP))
    assert (drawn[:, HEADER:] == 255).all()


class Model(LightningModule):
    """Trains one number by all views, with some randomness, and keeps the first batch it gets."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.first = None

    def training_step(self, batch, batch_idx):
        if self.first is None:
            self.first = batch
        images = batch.views[0].crops if isinstance(batch, MultiCropBatch) else batch.images
        return (self.weight * images).mean() * torch.rand(()) * float(np.random.rand())  # noqa: NPY002

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class StopInMidEpoch(Callback):
    def on_train_start(self, trainer, pl_module):
        trainer.save_checkpoint(trainer.default_root_dir + "/start.ckpt")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.save_checkpoint(trainer.default_root_dir + "/cut.ckpt")
        trainer.should_stop = True


def fit(folder, *callbacks, data=None, logger=True, epochs=2, ckpt_path=None):
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    module = Model()
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=epochs,
        limit_train_batches=2,
        limit_val_batches=0,
        accumulate_grad_batches=2,
        log_every_n_steps=1,
        logger=logger and TensorBoardLogger(folder, name="", version=""),
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data or crops(), ckpt_path=ckpt_path)
    return module


def crops(**options):
    plain = {"dataset": "digits", "global_size": 16, "local_size": 8, "local_views": 2, "num_workers": 0}
    return MultiCropData(**(plain | {"batch_size": 4} | options))


def drawn_in(folder):
    events = EventAccumulator(str(folder)).Reload()
    return events.Images("pictures/crops") if "pictures/crops" in events.Tags()["images"] else []


@pytest.mark.parametrize("colour_on", ["device", "worker"])
def test_the_first_batch_is_drawn_as_the_model_gets_it_and_nothing_changes(tmp_path, colour_on):
    data = {"colour_on": colour_on}
    with_pictures = fit(tmp_path / "with", CropPictures(images=3, side=SIDE), data=crops(**data))
    without = fit(tmp_path / "without", data=crops(**data))
    assert torch.equal(with_pictures.weight, without.weight)
    for ours, plain in zip(with_pictures.first.views, without.first.views, strict=True):
        assert torch.equal(ours.crops, plain.crops)

    [event] = drawn_in(tmp_path / "with")
    assert event.step == 0
    picture = pil_to_tensor(Image.open(io.BytesIO(event.encoded_image_string)))
    assert torch.equal(picture, draw_crops(without.first.views, images=3, side=SIDE))
    assert drawn_in(tmp_path / "without") == []


@pytest.mark.parametrize("checkpoint", ["start", "cut"])
def test_a_resumed_run_is_not_drawn_again(tmp_path, checkpoint):
    fit(tmp_path, CropPictures(side=SIDE), StopInMidEpoch())
    assert len(drawn_in(tmp_path)) == 1
    fit(tmp_path / "resumed", CropPictures(side=SIDE), ckpt_path=tmp_path / f"{checkpoint}.ckpt")
    assert drawn_in(tmp_path / "resumed") == []


def test_other_batches_and_other_loggers(tmp_path):
    labelled = ImageData(dataset="digits", img_size=16, batch_size=4, num_workers=0)
    fit(tmp_path, CropPictures(), data=labelled, epochs=1)
    assert drawn_in(tmp_path) == []
    fit(tmp_path / "unlogged", CropPictures(), logger=False, epochs=1)
    assert not (tmp_path / "unlogged").exists()


@pytest.mark.parametrize("name", ["images", "side"])
def test_arguments_out_of_range(name):
    with pytest.raises(InputError, match=rf"{name} \(0\) must be at least 1"):
        CropPictures(**{name: 0})
