"""Training with patches of several sizes: which batch has which, and what a step computes."""

import copy
import json
from pathlib import Path

import pytest
import timm
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.nn import functional as F

from locat.command import main
from locat_lightning.backbones.create import load_backbone
from locat_lightning.backbones.flexible import make_flexible, use_patches
from locat_lightning.data import ImageData
from locat_lightning.errors import InputError
from locat_lightning.tasks.patch_sizes import size_of_batch
from tests.tasks.test_classification import BACKBONE, Batches, Taken, fit, task, trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
PLAIN = {"mixup": 0, "cutmix": 0, "optimizer": "sgd", "lr": 0.1, "weight_decay": 0.0}


class Sizes(Taken):
    """Notes the patches of each batch and forward pass, and those at its end."""

    def on_train_start(self):
        super().on_train_start()
        self.seen, self.passes, self.afterwards = [], [], set()
        self.backbone.register_forward_hook(self.note)
        self.start = copy.deepcopy(self.backbone.state_dict())

    def note(self, backbone, inputs, outputs):
        if backbone.training:
            self.passes.append(backbone.patch_embed.patch_size[0])

    def training_step(self, batch, batch_idx):
        self.seen.append(self.backbone.patch_embed.patch_size[0])
        return super().training_step(batch, batch_idx)

    def optimizer_step(self, *arguments, **options):
        super().optimizer_step(*arguments, **options)
        self.afterwards.add(self.backbone.patch_embed.patch_size[0])

    def validation_step(self, batch, batch_idx):
        self.afterwards.add(self.backbone.patch_embed.patch_size[0])
        return super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("name", ["locatvit_tiny", "vit_tiny_patch16_224"])
def test_steps_are_those_of_a_plain_loop(tmp_path, name):
    data = Batches(batches=4)
    seed_everything(0)
    module = Sizes(name, backbone_args=BACKBONE, warmup_epochs=0, patch_sizes=[4, 8], **PLAIN)
    fit(tmp_path, module, data)
    assert set(module.seen) == {4, 8}
    assert module.afterwards == {8}

    model = timm.create_model(name, num_classes=6, dynamic_img_size=True, **BACKBONE)
    model.load_state_dict(module.start)
    make_flexible(model, [4, 8])
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True)
    for (images, labels, _), size, rate in zip(data.items * 2, module.seen, module.rates, strict=True):
        use_patches(model.train(), size)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels, label_smoothing=0.1).backward()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    torch.testing.assert_close(module.backbone.state_dict(), model.state_dict(), rtol=1e-5, atol=1e-6)


def test_sizes_follow_the_seed_the_epoch_and_the_batch(tmp_path):
    drawn = [
        size_of_batch([2, 4, 8], None, 0.0, [0, epoch, batch]) for epoch in range(20) for batch in range(30)
    ]
    for size in (2, 4, 8):
        assert 150 < drawn.count(size) < 250
    assert drawn[:30] != drawn[30:60]
    again = [size_of_batch([2, 4, 8], None, 0.9, [0, 0, batch]) for batch in range(30)]
    assert again == drawn[:30]
    assert again != [size_of_batch([2, 4, 8], None, 0.9, [1, 0, batch]) for batch in range(30)]

    class Stop(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            trainer.should_stop = trainer.global_step == 4

    whole = task(Sizes, patch_sizes=[4, 8], **PLAIN)
    fit(tmp_path, whole)
    part = task(Sizes, patch_sizes=[4, 8], **PLAIN)
    run = trainer(tmp_path, callbacks=[Stop()])
    run.fit(part, datamodule=Batches())
    run.save_checkpoint(tmp_path / "a.ckpt")
    rest = task(Sizes, patch_sizes=[4, 8], **PLAIN)
    trainer(tmp_path).fit(rest, datamodule=Batches(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert part.seen + rest.seen == whole.seen
    for name, value in whole.backbone.state_dict().items():
        assert torch.equal(rest.backbone.state_dict()[name], value), name


@pytest.mark.parametrize(("accumulate", "expected"), [(1, [8] * 3 + [4] * 5), (2, [8] * 4 + [4] * 4)])
def test_coarse_patches_come_first(tmp_path, accumulate, expected):
    module = task(Sizes, BACKBONE | {"patch_size": 4}, patch_sizes=[8, 4], patch_shares=[0.3, 0.7], **PLAIN)
    fit(tmp_path, module, Batches(batches=4), accumulate_grad_batches=accumulate)
    assert module.seen == expected
    shares = [0.3, 0.3, 0.4]
    found = [size_of_batch([8, 4, 2], shares, progress, []) for progress in (0, 0.29, 0.31, 0.61, 1.0)]
    assert found == [8, 8, 4, 2, 2]


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
def test_it_goes_with_sharpness_average_checkpointing_and_mixing(tmp_path):
    def trained(**options):
        options |= {"sam": 0.05, "ema": 0.5, "mixing": "patch_mixing", "mixing_prob": 1.0}
        module = task(Sizes, patch_sizes=[2, 4, 8], **options)
        fit(tmp_path, module)
        assert set(module.seen) == {2, 4, 8}
        assert module.passes == [size for size in module.seen for _ in range(2)]  # the second at the worst
        assert module.afterwards == {8}
        return module.backbone.state_dict()

    plain = trained()
    torch.testing.assert_close(trained(checkpoint_blocks=True), plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_in_another_precision_the_resizing_stays_in_float32(tmp_path, precision):
    module = task(Sizes, patch_sizes=[4, 8], **PLAIN)
    fit(tmp_path, module, precision=precision)
    assert set(module.seen) == {4, 8}
    embedding = module.backbone.patch_embed.proj
    assert embedding.weight.dtype == {"bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    assert embedding.to_4.dtype == torch.float32


def test_without_the_option_a_model_is_as_it_was(tmp_path):
    module = task(Sizes, **PLAIN)
    fit(tmp_path, module)
    assert type(module.backbone.patch_embed.proj) is torch.nn.Conv2d
    assert not module.backbone.dynamic_img_size
    assert module.backbone.blocks[0].attn.gaug.built_with is None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"patch_sizes": [8, 3]}, "images of 16 pixels have no whole patches of 3"),
        (
            {"patch_sizes": [2, 4]},
            r"own patches \(8 pixels\), .* must be among model.patch_sizes \(\[2, 4\]\)",
        ),
        ({"patch_sizes": [8, 4], "patch_shares": [0.5, 0.5]}, r"must be the last of model.patch_sizes"),
        ({"patch_sizes": [4, 8], "patch_shares": [0.5, 0.4]}, r"\(\[0.5, 0.4\]\) must be one share for each"),
        ({"patch_sizes": [4, 8], "patch_shares": [1.0]}, "must be one share for each"),
        ({"patch_sizes": [4, 8], "backbone_args": BACKBONE | {"img_size": 32}}, "data.img_size is 16, but "),
        (
            {"patch_sizes": [4, 8], "backbone_args": BACKBONE | {"img_size": 32, "dynamic_img_size": True}},
            "data.img_size is 16, but locatvit_tiny takes 32×32: .* --model.backbone_args.img_size 16",
        ),
        (
            {"backbone": "resnet10t", "backbone_args": {}, "patch_sizes": [4]},
            "model.patch_sizes does not fit resnet10t: ResNet is no plain Vision Transformer",
        ),
    ],
)
def test_mistakes(tmp_path, options, expected):
    own = {"backbone": "locatvit_tiny", "backbone_args": BACKBONE} | options
    module = Sizes(**own, warmup_epochs=0)
    with pytest.raises(InputError, match=expected):
        fit(tmp_path, module)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"patch_sizes": []}, "model.patch_sizes is empty: name sizes, or null"),
        ({"patch_shares": [0.3, 0.7]}, r"model.patch_shares \(\[0.3, 0.7\]\) needs model.patch_sizes"),
    ],
)
def test_options_without_effect(tmp_path, options, expected):
    with pytest.raises(InputError, match=expected):
        task(**options).check(trainer(tmp_path), training=True)


def test_processes_with_seeds_of_their_own_draw_the_same_sizes(tmp_path):
    class Second(SingleDeviceStrategy):
        """The second of two processes, of which the first has the seed 7."""

        def broadcast(self, obj, src=0):
            return 7 if obj == torch.initial_seed() else obj

    first, second = (task(Sizes, patch_sizes=[4, 8], **PLAIN) for _ in range(2))
    seed_everything(7)
    fit(tmp_path, first)
    seed_everything(3)
    fit(tmp_path, second, strategy=Second("cpu"))
    assert second.seen == first.seen


def test_a_run_is_measured_with_other_patches(workplace, trained, folder):
    weights = "runs/classify_tiny/version_0/checkpoints/best.ckpt"
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
    main(["validate", "--weights", weights, *quiet, "--model.backbone_args.patch_size", "4"])
    [file] = Path("runs").glob("*validate/version_0/metrics.json")
    measured = json.loads(file.read_text())["val/top1"]

    model = load_backbone(weights, classifier=True, any_size=True)
    make_flexible(model, [4])
    use_patches(model, 4)
    data = ImageData(root=str(folder), img_size=32, num_workers=0, batch_size=8)
    data.setup("validate")
    [batch] = data.val_dataloader()
    found = (model.eval()(batch.images).argmax(-1) == batch.labels).float().mean().item()
    assert measured == pytest.approx(found)
