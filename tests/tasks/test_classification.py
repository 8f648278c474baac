"""The classifier's loss, optimizer and schedule, against values worked out by hand."""

import math

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from locat_lightning.data.dataset import ImageBatch
from locat_lightning.errors import InputError
from locat_lightning.tasks import Classification

BACKBONE = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers:UserWarning",  # nothing is read from disk here
)


class Batches(LightningDataModule):
    """As many batches of noise as told, with labels 0, 1, 2, …"""

    def __init__(self, batches=4, size=6, classes=6, last=None):
        super().__init__()
        self.batch_size, self.img_size = size, 16
        self.class_names = [f"class {i}" for i in range(classes)]
        generator = torch.Generator().manual_seed(0)
        sizes = [size] * (batches - 1) + [last or size]
        self.items = [
            ImageBatch(
                torch.randn(n, 3, 16, 16, generator=generator),
                torch.arange(n) % max(1, classes),
                torch.arange(n),
            )
            for n in sizes
        ]

    def train_dataloader(self):
        return DataLoader(self.items, batch_size=None)

    val_dataloader = test_dataloader = train_dataloader


class Taken(Classification):
    """Notes the learning rate and the clipped norm of each optimizer step."""

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        self.rates = [*getattr(self, "rates", []), optimizer.param_groups[0]["lr"]]

    def configure_gradient_clipping(self, *arguments, **options):
        super().configure_gradient_clipping(*arguments, **options)
        norms = [p.grad.norm() for p in self.parameters() if p.grad is not None]
        self.norms = [*getattr(self, "norms", []), torch.stack(norms).norm().item()]


def task(cls=Taken, backbone_args=BACKBONE, **options):
    seed_everything(0)
    return cls("locatvit_tiny", backbone_args=backbone_args, **({"warmup_epochs": 0} | options))


def trainer(tmp_path, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    small = {"accelerator": "cpu", "max_epochs": 2, "logger": False, "num_sanity_val_steps": 0}
    return Trainer(default_root_dir=tmp_path, log_every_n_steps=1, **(quiet | small | options))


def fit(tmp_path, module, data=None, **options):
    run = trainer(tmp_path, **options)
    run.fit(module, datamodule=data or Batches())
    return run


def test_matrices_alone_decay(tmp_path):
    module = task(backbone_args=BACKBONE | {"reg_tokens": 2}, weight_decay=0.3)
    run = fit(tmp_path, module)
    decay = {
        id(parameter): group["weight_decay"]
        for group in run.optimizers[0].param_groups
        for parameter in group["params"]
    }
    by_name = {name: decay[id(p)] for name, p in module.backbone.named_parameters()}
    assert len(by_name) == len(decay)
    for name, value in by_name.items():
        token = name in ("cls_token", "pos_embed", "reg_token")
        matrix = name.endswith("weight") and "norm" not in name and not token
        assert value == (0.3 if matrix else 0), name
    assert by_name["blocks.0.attn.gaug.log_var.weight"] == 0.3
    assert by_name["blocks.0.attn.gaug.log_var.bias"] == 0


def test_the_rate_follows_the_global_batch_and_the_schedule(tmp_path):
    module = task(warmup_epochs=1)
    fit(tmp_path, module, Batches(batches=4, size=6), max_epochs=3)
    peak, low = 5e-4 * 6 / 512, 1e-7
    up = [low + (peak - low) * step / 4 for step in range(4)]
    down = [peak - (peak - low) * step / 7 for step in range(8)]
    assert module.rates == pytest.approx(up + down)


def test_accumulated_batches_are_one_step(tmp_path):
    module = task(warmup_epochs=1)
    run = fit(tmp_path, module, Batches(batches=5, size=6), max_epochs=2, accumulate_grad_batches=2)
    assert run.global_step == len(module.rates) == 6  # three an epoch, of 2, 2 and 1 batches
    peak, low = 5e-4 * 12 / 512, 1e-7
    assert module.rates[3] == pytest.approx(peak)
    assert module.rates[0] == pytest.approx(low)
    assert module.rates[-1] == pytest.approx(low)


def test_a_given_rate_is_taken(tmp_path):
    module = task(lr=0.25)
    fit(tmp_path, module, max_epochs=1)
    assert module.rates[0] == 0.25


def test_plain_loaders_of_tuples_will_do(tmp_path):
    images, labels = torch.randn(12, 3, 16, 16), torch.arange(12) % 6
    loader = DataLoader(TensorDataset(images, labels), batch_size=6)
    module = task(num_classes=6)
    run = trainer(tmp_path)
    run.fit(module, loader, loader)
    assert module.rates[0] == pytest.approx(5e-4 * 6 / 512)
    assert 0 <= run.callback_metrics["val/top1"] <= 1
    unknown = DataLoader(Batches().items, batch_size=None)
    with pytest.raises(InputError, match="how large a batch is: give the data module a batch_size"):
        trainer(tmp_path).fit(task(num_classes=6), unknown, unknown)


@pytest.mark.parametrize(("clip", "clipped"), [(None, False), (1e-3, True)])
def test_the_norm_is_logged_before_clipping(tmp_path, clip, clipped):
    module = task(lr=0.0)
    run = fit(tmp_path, module, Batches(batches=1), max_epochs=1, gradient_clip_val=clip)
    logged = run.callback_metrics["train/grad_norm"].item()
    assert logged > 0.01
    assert module.norms[0] == pytest.approx(1e-3 if clipped else logged, rel=1e-3)


def test_clipping_by_value_is_lightning_s(tmp_path):
    module = task(lr=0.0)
    options = {"gradient_clip_val": 1e-6, "gradient_clip_algorithm": "value"}
    fit(tmp_path, module, Batches(batches=1), max_epochs=1, **options)
    elements = sum(p.numel() for p in module.parameters())
    assert 0 < module.norms[0] <= 1e-6 * math.sqrt(elements)


def losses(module, batch):
    """Loss of the module, logits of the images that it saw."""
    seen = []
    hook = module.backbone.register_forward_hook(lambda _, images, logits: seen.append((images[0], logits)))
    module.log = module.log_dict = lambda *_, **__: None
    loss = module.training_step(batch, 0)
    hook.remove()
    return loss, *seen[0]


def built(**options):
    module = task(num_classes=6, **options)
    module.configure_model()
    return module


def test_smoothed_cross_entropy():
    module = built(mixup=0, cutmix=0, label_smoothing=0.1)
    batch = Batches().items[0]
    loss, images, logits = losses(module, batch)
    assert torch.equal(images, batch.images)
    targets = torch.full((6, 6), 0.1 / 6) + 0.9 * torch.eye(6)
    torch.testing.assert_close(loss, -(targets * logits.log_softmax(-1)).sum(-1).mean())


def test_mixed_images_have_mixed_targets(monkeypatch):
    module = built(mixup=0.8, cutmix=0, label_smoothing=0.1)
    batch = Batches().items[0]
    originals, share = batch.images.clone(), 0.3
    monkeypatch.setattr("numpy.random.beta", lambda *_: share)
    loss, images, logits = losses(module, batch)
    torch.testing.assert_close(images, share * originals + (1 - share) * originals.flip(0))
    smooth = torch.full((6, 6), 0.1 / 6) + 0.9 * torch.eye(6)
    targets = share * smooth + (1 - share) * smooth.flip(0)
    torch.testing.assert_close(loss, -(targets.float() * logits.log_softmax(-1)).sum(-1).mean())


@pytest.mark.parametrize(("images", "used"), [(5, 4), (1, 1), (2, 2)])
def test_an_odd_batch_is_mixed_too(images, used):
    module = built()
    batch = ImageBatch(torch.randn(images, 3, 16, 16), torch.arange(images), torch.arange(images))
    loss, seen, _ = losses(module, batch)
    assert len(seen) == used
    assert torch.isfinite(loss)


@pytest.mark.parametrize(("classes", "tops"), [(2, {"top1"}), (5, {"top1"}), (6, {"top1", "top5"})])
def test_metrics_count_every_image_once(tmp_path, classes, tops):
    data = Batches(batches=3, size=6, classes=classes, last=2)
    module = task()
    run = fit(tmp_path, module, data, max_epochs=1)
    run.validate(module, datamodule=data, verbose=False)
    measured = run.callback_metrics
    assert {name.removeprefix("val/") for name in measured if name.startswith("val/top")} == tops
    images = torch.cat([batch.images for batch in data.items])
    labels = torch.cat([batch.labels for batch in data.items])
    module.eval()
    with torch.no_grad():
        logits = module(images)
    torch.testing.assert_close(measured["val/loss"], F.cross_entropy(logits, labels), atol=1e-5, rtol=1e-5)
    for top in tops:
        k = int(top.removeprefix("top"))
        right = (logits.topk(k).indices == labels[:, None]).any(-1).float().mean()
        torch.testing.assert_close(measured[f"val/{top}"], right)
    run.test(module, datamodule=data, verbose=False)
    torch.testing.assert_close(run.callback_metrics["test/loss"], measured["val/loss"])


def test_probabilities_are_predicted(tmp_path):
    module = built()
    batch = Batches().items[0]
    positions, probabilities = module.eval().predict_step(batch, 0)
    assert torch.equal(positions, batch.indices)
    torch.testing.assert_close(probabilities, module(batch.images).softmax(-1))


def test_a_checkpoint_says_what_it_classifies(tmp_path):
    module = task()
    run = fit(tmp_path, module, max_epochs=1)
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = Classification.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True, strict=False)
    assert again.hparams.num_classes == 6
    assert again.class_names == module.class_names == [f"class {i}" for i in range(6)]
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(again.eval()(images), module.eval()(images))


@pytest.mark.parametrize(
    ("options", "data", "expected"),
    [
        ({"num_classes": 4}, Batches(classes=3), r"is 4, but the data have 3 classes \(class 0, class 1"),
        ({}, Batches(classes=1), "nothing to classify"),
        ({}, Batches(classes=0), "the data do not name their classes: set model.num_classes"),
        (
            {"backbone_args": {"img_size": 24, "patch_size": 8}},
            Batches(),
            "data.img_size is 16, but locatvit",
        ),
    ],
)
def test_model_and_data_have_to_agree(tmp_path, options, data, expected):
    with pytest.raises(InputError, match=expected):
        fit(tmp_path, task(**options), data)


def test_a_model_of_any_image_size_takes_any(tmp_path):
    fit(tmp_path, task(backbone_args=BACKBONE | {"img_size": 24, "dynamic_img_size": True}), max_epochs=1)


@pytest.mark.parametrize(
    ("warmup", "options", "expected"),
    [
        (2, {"max_epochs": 2}, r"is 8 optimizer steps, but the whole run has only 8"),
        (2, {"max_steps": 6, "max_epochs": -1}, r"is 8 optimizer steps, but the whole run has only 6"),
        (1, {"max_steps": 3, "max_epochs": 100}, r"is 4 optimizer steps, but the whole run has only 3"),
        (1, {"max_epochs": -1}, "the schedule needs an end"),
    ],
)
def test_the_warm_up_fits_into_the_run(tmp_path, warmup, options, expected):
    with pytest.raises(InputError, match=expected):
        fit(tmp_path, task(warmup_epochs=warmup), **options)


def test_a_trial_run_of_one_batch_has_no_warm_up(tmp_path):
    module = task(warmup_epochs=20)
    fit(tmp_path, module, fast_dev_run=True)
    assert len(module.rates) == 1


def test_the_metrics_that_training_logs(tmp_path):
    of_steps = {"loss", "lr", "weight_decay", "grad_norm", "top1", "top5"}  # top-5 of more than five classes
    run = fit(tmp_path, task(), max_epochs=1)
    expected = {"val/loss", "val/top1", "val/top5"} | {f"train/{name}" for name in of_steps}
    assert set(run.callback_metrics) == expected


def other_classes(number=12):
    data = Batches(classes=number)
    data.class_names = [f"other {i:02}" for i in range(number)]
    return data


def test_data_of_other_classes_are_not_scored(tmp_path):
    module = task()
    run = fit(tmp_path, module, Batches(classes=12), max_epochs=1)
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = Classification.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    from_weights = task(weights=str(tmp_path / "a.ckpt"))
    for trained in (module, again, from_weights):
        with pytest.raises(
            InputError, match=r"only the weights have class 0, class 1, class 10, .*; only the da"
        ) as no:
            trainer(tmp_path).validate(trained, datamodule=other_classes(), verbose=False)
        assert no.value.args[0].count("other 0") == 10  # of twelve
    swapped = Batches(classes=12)
    swapped.class_names.reverse()
    with pytest.raises(InputError, match="data have: another order"):
        trainer(tmp_path).validate(again, datamodule=swapped, verbose=False)
    trainer(tmp_path).validate(again, datamodule=Batches(classes=12), verbose=False)


@pytest.mark.parametrize("number", [6, 7])
def test_a_run_does_not_go_on_with_other_classes(tmp_path, number):
    fit(tmp_path, task(), max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(InputError, match=r"only the weights have class 0, .*; only the data have other 00, "):
        trainer(tmp_path).fit(
            task(), datamodule=other_classes(number), ckpt_path=tmp_path / "a.ckpt", weights_only=True
        )


def test_a_file_of_weights_is_read_once(tmp_path, monkeypatch):
    fit(tmp_path, task(), max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    load, read = torch.load, []
    monkeypatch.setattr("torch.load", lambda path, **options: read.append(path) or load(path, **options))
    trainer(tmp_path).validate(task(weights=str(tmp_path / "a.ckpt")), datamodule=Batches(), verbose=False)
    assert read == [tmp_path / "a.ckpt"]


def test_an_image_is_hard_as_far_as_it_is_surely_taken_for_a_wrong_class():
    logits, labels = (
        torch.tensor([[3.0, 0, 0], [0, 3, 0], [0, 0.1, 0], [0, 0, 0]]),
        torch.tensor([0, 2, 0, 1]),
    )
    shares = [[math.exp(each) / sum(map(math.exp, row)) for each in row] for row in logits.tolist()]
    expected = [max(row) - row[label] for row, label in zip(shares, labels.tolist(), strict=True)]
    batch = ImageBatch(torch.empty(4), labels, torch.arange(4))
    assert task().hardness(logits, batch).tolist() == pytest.approx(expected)
    assert expected[0] == 0 < expected[2] < expected[1]
