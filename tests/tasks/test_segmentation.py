"""The segmentation task: what is frozen, what is kept, what is predicted, against plain expressions."""

import copy

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from torch.nn import functional as F
from torch.utils.data import DataLoader

from locat_lightning.backbones.create import create_backbone, load_backbone
from locat_lightning.backbones.weights import DECODER_OF, check_here
from locat_lightning.data.segmentation import MaskBatch, SegmentationData
from locat_lightning.errors import InputError
from locat_lightning.labels import IGNORE
from locat_lightning.tasks import Segmentation

BACKBONE = {
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 3,
    "drop_path_rate": 0.5,
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # nothing is read from disk here
    pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start"),  # a frozen backbone's
]


class Batches(LightningDataModule):
    """Batches of noise whose classes follow from the brightness of their quarters."""

    def __init__(self, batches=4, size=3, side=18, classes=3):
        super().__init__()
        self.batch_size, self.scale, self.crop_size = size, (side, side), side - side % 4
        self.class_names = [f"class {i}" for i in range(classes)]
        generator = torch.Generator().manual_seed(0)
        self.items = []
        for number in range(batches):
            labels = torch.randint(classes, (size, 2, 2), generator=generator)
            masks = F.interpolate(labels[:, None].float(), (side, side), mode="nearest-exact")[:, 0].byte()
            images = torch.randn(size, 3, side, side, generator=generator) * 0.3 + masks[:, None]
            masks[:, :2] = IGNORE
            self.items.append(MaskBatch(images, masks, torch.arange(size) + number * size))

    def train_dataloader(self):
        return DataLoader(self.items, batch_size=None)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def weights_in(tmp_path):
    """A file with the weights of a backbone."""
    seed_everything(1)
    path = tmp_path / "backbone.pt"
    model = create_backbone("locatvit_tiny", BACKBONE, num_classes=0)
    torch.save(
        {
            "state_dict": {f"backbone.{name}": value for name, value in model.state_dict().items()},
            "hyper_parameters": {"backbone": "locatvit_tiny", "backbone_args": BACKBONE},
        },
        path,
    )
    return str(path)


@pytest.fixture
def weights(tmp_path):
    return weights_in(tmp_path)


def trainer(tmp_path, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    small = {"accelerator": "cpu", "max_epochs": 2, "num_sanity_val_steps": 0, "enable_checkpointing": False}
    return Trainer(default_root_dir=tmp_path, log_every_n_steps=1, **(quiet | small | options))


def task(weights, **options):
    seed_everything(0)
    return Segmentation(weights=weights, **({"hidden_dim": 16, "lr": 0.03} | options))


def fit(tmp_path, module, data=None, ckpt_path=None, **options):
    run = trainer(tmp_path, **options)
    run.fit(module, datamodule=data or Batches(), ckpt_path=ckpt_path, weights_only=True)
    return run


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def saved(run, path):
    run.save_checkpoint(path)
    return torch.load(path, weights_only=True)


def test_a_frozen_backbone_is_frozen(tmp_path, weights):
    class Watched(Segmentation):
        def training_step(self, batch, batch_idx):
            assert not any(module.training for module in self.backbone.modules())
            assert self.decoder.training
            return super().training_step(batch, batch_idx)

    module = Watched(weights=weights, hidden_dim=16)
    run = fit(tmp_path, module)
    given = torch.load(weights, weights_only=True)["state_dict"]
    for name, value in given.items():
        assert torch.equal(module.state_dict()[name], value), name
    assert not any(p.requires_grad or p.grad is not None for p in module.backbone.parameters())
    in_optimizer = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert in_optimizer == {id(p) for p in module.decoder.parameters()}


def test_it_learns(tmp_path, weights):
    module = task(weights)
    fit(tmp_path, module, max_epochs=30)
    assert module.iou.miou > 0.8


def test_the_loss_is_the_plain_one_of_padded_images(tmp_path, weights):
    data = Batches(batches=1)
    module = task(weights, lr=0.0)
    run = fit(tmp_path, module, data, max_epochs=1)
    images, masks, _ = data.items[0]
    tokens = module.backbone.forward_intermediates(
        F.pad(images, (0, 2, 0, 2)), indices=1, norm=False, intermediates_only=True
    )[0]
    logits = F.interpolate(module.decoder(tokens), (20, 20), mode="bilinear", align_corners=False)
    plain = F.cross_entropy(logits[..., :18, :18], masks.long(), ignore_index=IGNORE)
    torch.testing.assert_close(run.callback_metrics["train/loss"], plain.detach())


def test_a_checkpoint_holds_the_decoder_and_says_where_the_backbone_is(tmp_path, weights):
    run = fit(tmp_path, task(weights))
    checkpoint = saved(run, tmp_path / "a.ckpt")
    assert {name.partition(".")[0] for name in checkpoint["state_dict"]} == {"decoder"}
    assert checkpoint[DECODER_OF]["weights"] == weights
    assert checkpoint["hyper_parameters"]["backbone"] == "locatvit_tiny"

    full = saved(fit(tmp_path, task(weights, save_backbone=True)), tmp_path / "b.ckpt")
    assert {name.partition(".")[0] for name in full["state_dict"]} == {"decoder", "backbone"}
    assert DECODER_OF not in full


@pytest.mark.parametrize("options", [{}, {"save_backbone": True}, {"train_backbone": True}])
def test_a_checkpoint_measures_the_same(tmp_path, weights, options):
    module = task(weights, **options)
    saved(fit(tmp_path, module), tmp_path / "a.ckpt")
    again = task(str(tmp_path / "a.ckpt"))
    [metrics] = trainer(tmp_path).validate(again, datamodule=Batches(), verbose=False)
    assert metrics["val/miou"] == pytest.approx(float(module.iou.miou), abs=1e-6)
    torch.testing.assert_close(again.iou.per_class, module.iou.per_class)


@pytest.mark.filterwarnings("ignore:.*the model has not been trained")
def test_random_weights_are_kept(tmp_path):
    module = task("random", backbone="locatvit_tiny", backbone_args=BACKBONE)
    saved(fit(tmp_path, module), tmp_path / "a.ckpt")
    again = task(str(tmp_path / "a.ckpt"))
    trainer(tmp_path).validate(again, datamodule=Batches(), verbose=False)
    torch.testing.assert_close(again.iou.per_class, module.iou.per_class)


def test_each_file_is_read_once(tmp_path, weights, monkeypatch):
    decoder = tmp_path / "a.ckpt"
    saved(fit(tmp_path, task(weights)), decoder)
    read, load = [], torch.load
    monkeypatch.setattr(
        torch, "load", lambda path, **options: read.append(str(path)) or load(path, **options)
    )
    trainer(tmp_path).validate(task(str(decoder)), datamodule=Batches(), verbose=False)
    assert read == [str(decoder), weights]


@pytest.mark.parametrize("options", [{"save_backbone": True}, {"train_backbone": True}])
def test_a_backbone_that_checkpoints_hold_is_known_without_its_digest(
    tmp_path, weights, options, monkeypatch
):
    monkeypatch.setattr("locat_lightning.tasks.dense.reference_to", None)
    fit(tmp_path, task(weights, **options))


def test_a_moved_backbone_is_said(tmp_path, weights):
    module = task(weights)
    saved(fit(tmp_path, module), tmp_path / "a.ckpt")
    moved = tmp_path / "moved.pt"
    (tmp_path / "backbone.pt").rename(moved)
    with pytest.raises(InputError, match=r"backbone\.pt', which are not on this machine: set"):
        trainer(tmp_path).validate(task(str(tmp_path / "a.ckpt")), datamodule=Batches())
    again = task(str(tmp_path / "a.ckpt"), backbone_weights=str(moved))
    trainer(tmp_path).validate(again, datamodule=Batches(), verbose=False)
    torch.testing.assert_close(again.iou.per_class, module.iou.per_class)


@pytest.mark.parametrize(
    "name", ["hf-hub:evil/model", "vit_tiny_patch16_224.augreg_in21k", "../none.pt", 3, None]
)
def test_a_name_in_a_checkpoint_is_not_downloaded(tmp_path, weights, name, monkeypatch):
    monkeypatch.setattr("locat_lightning.backbones.create.pretrained", None)  # which would download it
    monkeypatch.setattr("locat_lightning.backbones.weights.HF_HUB_CACHE", str(tmp_path))
    decoder = tmp_path / "a.ckpt"
    saved(fit(tmp_path, task(weights)), decoder)
    contents = torch.load(decoder, weights_only=True)
    torch.save(contents | {DECODER_OF: {"weights": name}}, decoder)
    with pytest.raises(InputError, match=r"not on this machine: set model\.backbone_weights"):
        trainer(tmp_path).validate(task(str(decoder)), datamodule=Batches())
    with pytest.raises(InputError, match=r"not on this machine: set model\.backbone_weights"):
        load_backbone(str(decoder))
    resumed = task(None)
    with pytest.raises(InputError, match=r"not on this machine: set model\.backbone_weights"):
        resumed.resume(torch.load(decoder, weights_only=True))
    check_here(weights, decoder, "")
    check_here("random", decoder, "")
    (tmp_path / "models--evil--model").mkdir()
    check_here("hf-hub:evil/model@main", decoder, "")  # which this user has downloaded before


def test_another_backbone_is_refused(tmp_path, weights):
    saved(fit(tmp_path, task(weights)), tmp_path / "a.ckpt")
    contents = torch.load(weights, weights_only=True)
    contents["state_dict"]["backbone.norm.bias"] += 1
    torch.save(contents, weights)
    with pytest.raises(InputError, match=r"is not the backbone that the decoder in .* was trained on"):
        trainer(tmp_path).validate(task(str(tmp_path / "a.ckpt")), datamodule=Batches())


@pytest.mark.parametrize("options", [{}, {"train_backbone": True}])
def test_a_run_that_goes_on_is_the_uninterrupted_one(tmp_path, weights, options):
    whole = task(weights, **options)
    fit(tmp_path, whole, max_epochs=3)
    begun = task(weights, **options)
    run = trainer(tmp_path, max_epochs=3)
    begun.on_train_epoch_end = lambda: setattr(run, "should_stop", run.current_epoch == 1)
    run.fit(begun, datamodule=Batches())
    checkpoint = saved(run, tmp_path / "cut.ckpt")
    assert checkpoint["global_step"] == 8

    resumed = task(None, **options)
    resumed.resume(checkpoint)
    fit(tmp_path, resumed, max_epochs=3, ckpt_path=tmp_path / "cut.ckpt")
    for name, value in state(whole).items():
        if name.startswith(("backbone.", "decoder.")):
            assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_trained_backbone_learns_less_at_its_earlier_layers(tmp_path, weights):
    module = task(weights, train_backbone=True, layer_decay=0.5, weight_decay=0.2)
    before = torch.load(weights, weights_only=True)["state_dict"]
    run = fit(tmp_path, module)
    group_of = {id(p): group for group in run.optimizers[0].param_groups for p in group["params"]}
    rate = {name: group_of[id(p)]["lr"] for name, p in module.named_parameters() if p.requires_grad}
    top = rate["decoder.0.weight"]
    assert rate["backbone.blocks.1.attn.qkv.weight"] / top == pytest.approx(1)
    assert rate["backbone.blocks.0.attn.qkv.weight"] / top == pytest.approx(0.5)
    assert rate["backbone.patch_embed.proj.weight"] / top == pytest.approx(0.25)
    assert group_of[id(module.backbone.blocks[0].norm1.weight)]["weight_decay"] == 0
    assert group_of[id(module.backbone.blocks[0].attn.qkv.weight)]["weight_decay"] == 0.2
    assert not torch.equal(
        module.backbone.blocks[0].mlp.fc1.weight, before["backbone.blocks.0.mlp.fc1.weight"]
    )
    a, b = (module.train().features(Batches().items[0].images) for _ in range(2))
    assert not torch.equal(a, b)  # drop path is at work


def test_windows_are_averaged_where_they_overlap(tmp_path, weights):
    module = task(weights, protocol="slide", window=8, stride=5)
    fit(tmp_path, module)
    module.eval()
    images = torch.randn(2, 3, 18, 13)
    with torch.no_grad():
        found = module(images)
        total, times = torch.zeros(2, 3, 18, 13), torch.zeros(18, 13)
        for top in (0, 5, 10):
            for left in (0, 5):
                tokens = module.features(images[..., top : top + 8, left : left + 8])
                total[..., top : top + 8, left : left + 8] += F.interpolate(
                    module.decoder(tokens), (8, 8), mode="bilinear", align_corners=False
                )
                times[top : top + 8, left : left + 8] += 1
    assert times.min() == 1
    torch.testing.assert_close(found, total / times)


def test_a_window_larger_than_the_image_is_the_whole_image(tmp_path, weights):
    module = task(weights, protocol="slide", window=64, stride=32)
    fit(tmp_path, module)
    images = torch.randn(1, 3, 10, 18)
    with torch.no_grad():
        torch.testing.assert_close(module(images), module._whole(images))


def test_predictions_have_the_size_of_the_annotation(tmp_path, weights):
    module = task(weights)
    run = fit(tmp_path, module)
    batch = Batches(batches=1).items[0]
    batch = batch._replace(masks=torch.full((3, 31, 27), IGNORE, dtype=torch.uint8))
    data = Batches()
    data.items = [batch]
    [(indices, maps)] = run.predict(module, datamodule=data)
    assert indices.tolist() == [0, 1, 2]
    assert maps.shape == (3, 31, 27)
    assert maps.dtype == torch.uint8
    with torch.no_grad():
        plain = F.interpolate(module(batch.images), (31, 27), mode="bilinear", align_corners=False).argmax(1)
    assert torch.equal(maps.long(), plain)


def test_mixed_precision_computes_the_backbone_in_it(tmp_path, weights, monkeypatch):
    asked = []
    from locat_lightning.tasks import dense

    def watched(backbone, images, *, autocast_dtype, **options):
        asked.append(autocast_dtype)
        return original(backbone, images, autocast_dtype=autocast_dtype, **options)

    original = dense.patch_features
    monkeypatch.setattr(dense, "patch_features", watched)
    fit(tmp_path, task(weights), precision="bf16-mixed", max_epochs=1)
    fit(tmp_path, task(weights), max_epochs=1)
    assert set(asked[: len(asked) // 2]) == {torch.bfloat16}
    assert set(asked[len(asked) // 2 :]) == {None}


def test_windows_that_would_leave_pixels_out():
    with pytest.raises(InputError, match=r"model.stride \(600\) must be at most model.window \(512\)"):
        Segmentation(stride=600)


def test_a_frozen_backbone_needs_weights(tmp_path):
    with pytest.raises(InputError, match="a frozen backbone needs --weights"):
        Segmentation("locatvit_tiny").check(trainer(tmp_path), training=True)
    with pytest.raises(InputError, match=r"give --weights, or --model\.backbone"):
        Segmentation(train_backbone=True).check(trainer(tmp_path), training=True)


def test_a_run_that_would_end_before_it_is_measured(tmp_path, weights):
    run = trainer(tmp_path, max_epochs=-1, max_steps=4, val_check_interval=2000, check_val_every_n_epoch=None)
    with pytest.raises(
        InputError, match=r"\(2000\) is more than trainer.max_steps \(4\), so nothing would be"
    ):
        task(weights).check(run, training=True)


def test_an_untrained_decoder_is_no_result(tmp_path, weights):
    module = task(weights)
    fit(tmp_path, module, num_sanity_val_steps=2, limit_val_batches=0.5, check_val_every_n_epoch=5)
    assert module.iou is None


def test_a_backbone_with_batch_norm(tmp_path):
    seed_everything(1)
    model = create_backbone("resnet10t", {}, num_classes=0)
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    module = task(str(tmp_path / "bare.pt"), backbone="resnet10t")
    saved(fit(tmp_path, module, Batches(side=64), max_epochs=1), tmp_path / "a.ckpt")
    again = task(str(tmp_path / "a.ckpt"))  # knows of which model the bare weights are
    trainer(tmp_path).validate(again, datamodule=Batches(side=64), verbose=False)
    torch.testing.assert_close(again.iou.per_class, module.iou.per_class)


@pytest.mark.parametrize("options", [{}, {"train_backbone": True}])
def test_half_precision(tmp_path, weights, options):
    module = task(weights, **options)
    fit(tmp_path, module, precision="bf16-true", max_epochs=1)
    assert module.decoder[0].weight.dtype == torch.bfloat16
    assert module.decoder[0].weight.isfinite().all()


def test_of_a_trained_backbone_only_what_is_read_is_trained(tmp_path, weights):
    module = task(weights, train_backbone=True)
    fit(tmp_path, module, max_epochs=1)
    left = {name for name, p in module.backbone.named_parameters() if not p.requires_grad}
    assert left == {"norm.weight", "norm.bias"}


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
def test_averaged_weights_leave_the_backbone_out_and_go_on(tmp_path, weights):
    from lightning.pytorch.callbacks import EMAWeightAveraging

    def averaged(module, **options):
        return fit(tmp_path, module, callbacks=[EMAWeightAveraging()], **options)

    checkpoint = saved(averaged(task(weights), max_epochs=2), tmp_path / "cut.ckpt")
    for key in ("state_dict", "current_model_state"):
        assert not any("backbone." in name for name in checkpoint[key]), key


def test_weights_without_a_decoder_are_not_measured(tmp_path, weights):
    with pytest.raises(InputError, match="it holds no decoder; train a decoder with locat fit"):
        trainer(tmp_path).validate(task(weights), datamodule=Batches())


def test_another_number_of_classes_is_refused_in_evaluation_and_begun_anew_in_training(tmp_path, weights):
    saved(fit(tmp_path, task(weights)), tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="its decoder has other features or classes"):
        trainer(tmp_path).validate(task(str(tmp_path / "a.ckpt")), datamodule=Batches(classes=4))
    module = task(str(tmp_path / "a.ckpt"))
    fit(tmp_path, module, Batches(classes=4))
    assert module.decoder[-1].out_channels == 4


@pytest.mark.parametrize(
    ("told", "classes", "expected"),
    [
        (
            4,
            3,
            r"is 4, but the data have 3 classes \(class 0, class 1, class 2\): .* or correct data\.classes",
        ),
        (None, 0, "the data do not name their classes"),
        (None, 1, "from 2 to 255 classes, not 1"),
    ],
)
def test_model_and_data_have_to_agree(tmp_path, weights, told, classes, expected):
    data = Batches()
    data.class_names = data.class_names[:classes]
    with pytest.raises(InputError, match=expected):
        fit(tmp_path, task(weights, num_classes=told), data)


def test_a_copy_is_as_good(tmp_path, weights):
    module = task(weights)
    fit(tmp_path, module)
    images = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(copy.deepcopy(module)(images), module(images))


def of_folder(folder, weights, **options):
    """mIoU and weights after two steps on 5 images; 2 processes have unequal shares of the 3 to evaluate."""
    data = SegmentationData(
        root=str(folder),
        classes=["a", "b", "c"],
        crop_size=24,  # all of an image: DDP averages losses, which are of as many annotated pixels then
        ratio=(1.0, 1.0),
        scale=(24, 20),
        batch_size=6 // options.get("devices", 1),
        num_workers=0,
    )
    module = task(weights, lr=0.01)
    fit(folder, module, data, max_epochs=2, **options)
    return module.iou.confusion, dict(module.decoder.state_dict())


def one_of_two(rank, folder, weights):
    torch.save(of_folder(folder, weights, devices=2, strategy="ddp"), folder / f"{rank}.pt")


@pytest.mark.slow
def test_two_processes_count_every_pixel_once(scenes, weights, two_processes):
    folder = scenes("folder")
    two_processes(one_of_two, folder, weights)
    confusion, decoder = of_folder(folder, weights)
    for rank in range(2):
        of_both, same = torch.load(folder / f"{rank}.pt", weights_only=True)
        assert of_both.sum() == confusion.sum() == 3 * 48 * 30
        for name, value in decoder.items():
            torch.testing.assert_close(same[name], value, atol=1e-5, rtol=0)


def test_an_image_is_hard_as_far_as_its_own_classes_are_missed(tmp_path, weights):
    module = task(weights)
    fit(tmp_path, module, limit_train_batches=1, limit_val_batches=0, max_epochs=1)
    masks = torch.tensor([[[0, 0, 1, IGNORE]], [[0, 0, 1, 1]], [[IGNORE] * 4]], dtype=torch.uint8)
    predicted = torch.tensor([[[0, 0, 1, 2]], [[0, 0, 1, 2]], [[0] * 4]])
    batch = MaskBatch(torch.empty(3), masks, torch.arange(3))
    module.counts[0].update(predicted, masks, batch.indices)
    found = module.hardness(predicted, batch)
    assert found[:2].tolist() == pytest.approx([0, 1 - (1 + 1 / 2 + 0) / 3])
    assert found[2].isnan()
