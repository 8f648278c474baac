"""Small runs of every method, on batches in memory and on a folder of images."""

import math
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

import locat_lightning.methods  # noqa: F401 - all methods, by way of their base
from locat_lightning.backbones.create import create_for_any_size
from locat_lightning.data import MultiViewData
from locat_lightning.data.masked_views import MaskedMultiCrop
from locat_lightning.data.views import ViewBatch, Views
from locat_lightning.methods.base import Pretraining

BACKBONE = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
TEACHER = BACKBONE | {"embed_dim": 32, "num_heads": 2, "patch_size": 4}


def subclasses(of):
    """Return all classes that derive from a class, at any depth."""
    return {each for own in of.__subclasses__() for each in (own, *subclasses(own))}


# Every method in `locat_lightning.methods`: a class that says what its loss is.
METHODS = {
    each.__name__: each
    for each in sorted(subclasses(Pretraining), key=lambda each: each.__name__)
    if each.__module__.startswith("locat_lightning.methods.")
    and each.compute_loss is not Pretraining.compute_loss
}
# What makes each method small; beside that a teacher is needed where `teacher` is an option.
HEAD = {"out_dim": 64, "hidden_dim": 32, "bottleneck_dim": 16}
TINY = {
    "Dino": HEAD,
    "SelfPatch": HEAD | {"patch_out_dim": 48},
    "Ibot": HEAD | {"warmup_teacher_temp_epochs": 0},
    # KoLeo compares the images of a batch; a learning rate of 0 leaves the last layer as it is.
    "Dinov2": HEAD
    | {"warmup_teacher_temp_epochs": 0, "sample_drop": 0.0, "koleo_weight": 0.0}
    | {"freeze_last_layer_epochs": 0},
    "Distillation": {"teacher_backbone": "vit_tiny_patch16_224", "teacher_args": TEACHER},
    # Everything that it can train; in a ViT that has neither GAug nor PRR.
    "LocalityAdaptation": {"backbone": "vit_tiny_patch16_224", "locat": {"start": "identity"}}
    | {"trained": "all", "masked_weight": 1.0, "decoder_depth": 1, "versions": 2},
    "Mae": {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2},
    "SimMim": {"mask_size": 8},
}


@cache
def teacher(arguments=None):
    """Write the weights of a ViT: by default a teacher of other width and patches than the student."""
    file = Path(mkdtemp()) / "teacher.pt"
    seed_everything(1, verbose=False)
    torch.save(create_for_any_size("vit_tiny_patch16_224", dict(arguments or TEACHER)).state_dict(), file)
    return str(file)


def small(name="Dino", seed=0, backbone_args=None, **options):
    plain = {"warmup_epochs": 0, "lr": 1e-3} | TINY.get(name, {})
    if name == "Distillation":
        plain["teacher"] = teacher()
    if name == "LocalityAdaptation":
        plain["weights"] = teacher(tuple(BACKBONE.items()))
    seed_everything(seed, verbose=False)
    arguments = BACKBONE | (backbone_args or {})
    task = METHODS[name](**({"backbone": "locatvit_tiny", "backbone_args": arguments} | plain | options))
    task.configure_model()
    return task


def random_batch(images, seed=0):
    generator = torch.Generator().manual_seed(seed)
    views = [
        Views(torch.randn(count, images, 3, size, size, generator=generator), None)
        for count, size in ((2, 32), (3, 16))
    ]
    masks = (
        torch.rand(2, images, 4, 4, generator=generator)
        < torch.rand(2, images, 1, 1, generator=generator) - 0.4
    )
    return ViewBatch(views, torch.full((images,), -1), torch.arange(images), masks)


def spoil(batch):
    """Make every view of a batch not a number."""
    for each in batch.views:
        each.crops.fill_(float("nan"))


def couples_images(task):
    """Return whether what a network makes of an image depends on the others of its batch."""
    return any(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in task.modules())


def part_of(batch, images):
    views = [Views(each.crops[:, images], None) for each in batch.views]
    return ViewBatch(views, batch.labels[images], batch.indices[images], batch.masks[:, images])


class Batches(LightningDataModule):
    """The same batches in each epoch."""

    def __init__(self, batches):
        super().__init__()
        self.batches, self.batch_size = batches, len(batches[0].labels)

    def train_dataloader(self):
        return DataLoader(self.batches, batch_size=None)


class Record(Callback):
    """Losses, and what each step is taken with."""

    def __init__(self):
        self.losses, self.steps, self.metrics = [], [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.steps.append([(group["lr"], group["weight_decay"]) for group in optimizer.param_groups])

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item() * trainer.accumulate_grad_batches)
        self.metrics.append({k: float(v) for k, v in trainer.callback_metrics.items()})


class Stop(Callback):
    """Cuts a run off before a batch."""

    def __init__(self, epoch, batch):
        self.at = (epoch, batch)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.at:
            raise KeyError("killed")


class Seen(Callback):
    """Epoch, images, and one number that stands for the views, of each batch."""

    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        views = sum(each.crops.double().sum().item() for each in batch.views)
        self.batches.append((trainer.current_epoch, batch_idx, *batch.indices.tolist(), views))


class Spoil(Callback):
    """Makes a gradient infinite at a step whose loss is finite."""

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_step == 2:
            next(p for p in module.trained() if p.grad is not None).grad.fill_(math.inf)


def trainer(*callbacks, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    plain = {"accelerator": "cpu", "max_epochs": 1, "limit_val_batches": 0}
    plain["enable_checkpointing"] = checkpoints
    return Trainer(callbacks=list(callbacks), **(quiet | plain | options))


def fit(task, batches, *callbacks, **options):
    record = Record()
    trainer(record, *callbacks, **options).fit(task, Batches(batches))
    return record


def images(folder, number=22):
    """Make a folder of images of noise."""
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    for index in range(number):
        pixels = torch.randint(256, (40, 40, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{index:02}.png")
    return folder


def of_folder(folder: Path, batch_size=2, num_workers=0, **views):
    return MultiViewData(
        root=str(folder), views=masked_views(**views), batch_size=batch_size, num_workers=num_workers
    )


def masked_views(**options):
    """Small views, masked image by image: the batches in which they come do not matter."""
    small = {"global_size": 32, "local_size": 16, "local_views": 2, "patch_size": 8, "stratified": False}
    return MaskedMultiCrop(**(small | options))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def copied(module):
    return {key: value.clone() for key, value in module.state_dict().items()}
