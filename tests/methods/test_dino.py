import contextlib
import json
import math
import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from safetensors import safe_open
from torch.utils.data import DataLoader

from locat_lightning.callbacks.checkpoints import Checkpoints
from locat_lightning.data import MultiViewData
from locat_lightning.data.views import MultiCrop, ViewBatch, Views
from locat_lightning.errors import InputError
from locat_lightning.methods import Dino
from locat_lightning.schedules import cosine, linear_warmup, warmup_then_cosine

GOLDEN = Path(__file__).parents[1] / "golden" / "dino_steps.safetensors"
AS_THEY_ARE = (
    "out_dim",
    "hidden_dim",
    "bottleneck_dim",
    "norm_last_layer",
    "lr",
    "min_lr",
    "warmup_epochs",
    "warmup_teacher_temp_epochs",
    "freeze_last_layer_epochs",
)
BACKBONE = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


def small(seed=0, backbone_args=None, **options):
    seed_everything(seed)
    plain = {"out_dim": 64, "hidden_dim": 32, "bottleneck_dim": 16, "warmup_epochs": 0, "lr": 1e-3}
    task = Dino("locatvit_tiny", backbone_args=BACKBONE | (backbone_args or {}), **(plain | options))
    task.configure_model()
    return task


def random_batch(images, seed=0):
    generator = torch.Generator().manual_seed(seed)
    views = [
        Views(torch.randn(count, images, 3, size, size, generator=generator), None)
        for count, size in ((2, 32), (3, 16))
    ]
    return ViewBatch(views, torch.full((images,), -1), torch.arange(images))


def part_of(batch, images):
    views = [Views(each.crops[:, images], None) for each in batch.views]
    return ViewBatch(views, batch.labels[images], batch.indices[images])


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


def trainer(*callbacks, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    plain = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "enable_checkpointing": checkpoints,
        "limit_val_batches": 0,
    }
    return Trainer(callbacks=list(callbacks), **(quiet | plain | options))


def fit(task, batches, *callbacks, **options):
    record = Record()
    trainer(record, *callbacks, **options).fit(task, Batches(batches))
    return record


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def copied(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def test_eight_steps_are_those_of_the_original_code():
    with safe_open(GOLDEN, "pt") as file:
        settings = json.loads(file.metadata()["settings"])
        golden = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dict

    def beneath(prefix):
        names = (key for key in golden if key.startswith(prefix))
        return {k.removeprefix(prefix).replace("head.mlp.", "head.layers."): golden[k] for k in names}

    low, high = settings["teacher_temp"]
    start, end = settings["weight_decay"]
    task = Dino(
        "locatvit_tiny",
        backbone_args={k: settings[k] for k in ("img_size", "patch_size", "embed_dim", "num_heads", "depth")},
        warmup_teacher_temp=low,
        teacher_temp=high,
        weight_decay=start,
        weight_decay_end=end,
        momentum=settings["momentum_teacher"],
        clip_grad=settings["clip_grad_per_parameter"],
        **{key: settings[key] for key in AS_THEY_ARE},
    )
    task.configure_model()
    for network in (task.student, task.teacher):
        network.load_state_dict(beneath("init."))
    batches = [
        ViewBatch(
            [Views(views[:2], None), Views(views[2:], None)],
            torch.full((settings["batch_size"],), -1),
            torch.arange(settings["batch_size"]),
        )
        for views in (golden[f"views.{step}"] for step in range(settings["steps"]))
    ]
    epochs = settings["epochs"]

    class InTurn(Batches):
        def train_dataloader(self):
            two = settings["steps_per_epoch"]
            return DataLoader(batches[two * self.trainer.current_epoch :][:two], batch_size=None)

    record = Record()
    trainer(record, max_epochs=epochs, reload_dataloaders_every_n_epochs=1).fit(task, InTurn(batches))

    torch.testing.assert_close(torch.tensor(record.losses), golden["losses"], atol=1e-5, rtol=0)
    torch.testing.assert_close(task.loss.center[0], golden["center"], atol=1e-5, rtol=0)
    for key, value in beneath("teacher.").items():
        torch.testing.assert_close(task.teacher.state_dict()[key], value, atol=1e-3, rtol=0)
    exactly = {"atol": 0, "rtol": 0}
    assert all(matrices[0] == others[0] and others[1] == 0 for matrices, others in record.steps)
    lr, weight_decay = torch.tensor([matrices for matrices, _ in record.steps]).T
    momentum = torch.tensor([metrics["train/momentum"] for metrics in record.metrics])
    torch.testing.assert_close(lr, golden["lr"], **exactly)
    torch.testing.assert_close(weight_decay, golden["weight_decay"], **exactly)
    torch.testing.assert_close(momentum, golden["momentum"], **exactly)


def test_schedules_begin_and_end_as_they_say():
    ramp = [warmup_then_cosine(step, steps=14, warmup=5, peak=4.0, end=1.0) for step in range(15)]
    assert ramp[:6] == [0, 1, 2, 3, 4, 4]
    assert ramp[-1] == 1
    assert all(a > b for a, b in pairwise(ramp[5:]))
    assert warmup_then_cosine(0, steps=3, warmup=0, peak=4.0, end=1.0) == 4
    assert [cosine(step, steps=4, start=0.0, end=1.0) for step in (0, 2, 4)] == pytest.approx([0, 0.5, 1])
    temperatures = [linear_warmup(epoch, warmup=3, start=0.04, end=0.08) for epoch in range(5)]
    assert temperatures == pytest.approx([0.04, 0.06, 0.08, 0.08, 0.08])
    for none in (0, 1):
        assert linear_warmup(0, warmup=none, start=0.04, end=0.08) == 0.08


def test_accumulated_batches_are_one_large_batch():
    whole = [random_batch(8, seed) for seed in range(4)]
    parts = [part_of(batch, torch.arange(i, i + 2)) for batch in whole for i in range(0, 8, 2)]
    large, accumulating = small(), small()
    one = fit(large, whole)
    many = fit(accumulating, parts, accumulate_grad_batches=4)
    of_steps = torch.tensor(many.losses).view(4, 4).mean(1)
    torch.testing.assert_close(of_steps, torch.tensor(one.losses), atol=1e-6, rtol=1e-6)
    assert many.steps == one.steps
    torch.testing.assert_close(accumulating.loss.center, large.loss.center, atol=1e-6, rtol=0)
    for a, b in zip(accumulating.teacher.parameters(), large.teacher.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_what_is_logged_of_accumulated_batches_is_their_mean():
    """11 batches: the last step of an epoch has two of them, and the next epoch begins anew."""
    batches = [random_batch(2, seed) for seed in range(11)]
    record = fit(small(), batches, accumulate_grad_batches=3, max_epochs=2)
    steps = [slice(i, min(i + 3, 11)) for i in (0, 3, 6, 9)]
    steps += [slice(step.start + 11, step.stop + 11) for step in steps]
    for step in steps:
        logged = record.metrics[step][-1]
        assert logged["train/loss"] == pytest.approx(sum(losses := record.losses[step]) / len(losses))
        assert logged["train/teacher_entropy"] + logged["train/kl"] == pytest.approx(logged["train/loss"])
    alone = [fit(small(), [batch]).metrics[0]["train/teacher_entropy"] for batch in batches[:3]]
    assert record.metrics[2]["train/teacher_entropy"] == pytest.approx(sum(alone) / 3)


def test_the_learning_rate_follows_the_global_batch():
    record = fit(small(lr=None, base_lr=0.5), [random_batch(4)] * 2, accumulate_grad_batches=2)
    assert record.steps[0][0][0] == 0.5 * 8 / 256


def test_the_last_layer_is_frozen_in_the_first_epoch():
    class Watch(Callback):
        def on_train_epoch_end(self, trainer, module):
            states.append(module.student.head.last_layer.weight_v.detach().clone())

    task, states = small(norm_last_layer=False), []
    before = task.student.head.last_layer.weight_v.detach().clone()
    record = fit(task, [random_batch(4)] * 2, Watch(), max_epochs=2)
    assert torch.equal(states[0], before)
    assert not torch.equal(states[1], before)
    frozen = [metrics["train/last_layer_frozen"] for metrics in record.metrics]
    assert frozen == [1, 1, 0, 0]


def test_gradients_are_clipped_by_parameter():
    class Norms(Callback):
        def on_before_zero_grad(self, trainer, module, optimizer):
            found.extend(p.grad.norm().item() for p in module.student.parameters() if p.grad is not None)

    found = []
    fit(small(clip_grad=1e-3), [random_batch(4)] * 3, Norms())
    assert 0.9e-3 < max(found) < 1.001e-3
    assert sum(norm > 0.9e-3 for norm in found) > 10


def test_the_teacher_is_an_average_and_never_trained():
    class Watch(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            before.append(copied(module.teacher))

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            momentum = module.momentum(trainer.global_step - 1)
            for key, value in module.teacher.state_dict().items():
                mixed = momentum * before[-1][key] + (1 - momentum) * module.student.state_dict()[key]
                torch.testing.assert_close(value, mixed)

    task, before = small(backbone_args={"drop_path_rate": 0.5}, momentum=0.5), []
    fit(task, [random_batch(4)] * 3, Watch())
    assert task.backbone is task.teacher.backbone
    assert not any(p.requires_grad or p.grad is not None for p in task.teacher.parameters())
    trained = {id(p) for group in task.optimizers().param_groups for p in group["params"]}
    assert not trained & set(map(id, task.teacher.parameters()))
    assert task.teacher.training


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("locatvit_tiny", BACKBONE | {"drop_path_rate": 0.5}),
        ("swin_tiny_patch4_window7_224", {"img_size": 32, "embed_dim": 24}),  # which has some unasked
    ],
)
def test_drop_path_is_the_students(name, arguments):
    task = Dino(name, backbone_args=arguments, out_dim=16, hidden_dim=8, bottleneck_dim=8)
    task.configure_model()
    dropped = [
        {module.drop_prob for module in network.modules() if hasattr(module, "drop_prob")}
        for network in (task.student, task.teacher)
    ]
    assert max(dropped[0]) > 0
    assert dropped[1] == {0}


def test_weights_start_both_backbones(tmp_path):
    source = small(1)
    torch.save(source.student.backbone.state_dict(), tmp_path / "weights.pt")
    task = small(2, weights=str(tmp_path / "weights.pt"))
    for network in (task.student, task.teacher):
        assert same(network.backbone.state_dict(), source.student.backbone.state_dict())
    assert same(task.teacher.head.state_dict(), task.student.head.state_dict())


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_any_timm_model_takes_both_sizes(name):
    seed_everything(0)
    task = Dino(name, out_dim=16, hidden_dim=8, bottleneck_dim=8, warmup_epochs=0)
    arguments = {"img_size": 32, "embed_dim": 24, "depth": 1} if name.startswith("vit") else {}
    task.hp.backbone_args = arguments
    assert math.isfinite(fit(task, [random_batch(2)]).losses[0])


@pytest.mark.parametrize(("img_size", "option", "size"), [(64, "local_size", 32), (32, "global_size", 64)])
def test_a_model_that_does_not_take_both_sizes_is_an_error(tmp_path, img_size, option, size):
    name = "mixer_s32_224"
    arguments = {"img_size": img_size}
    task = Dino(name, backbone_args=arguments, out_dim=16, hidden_dim=8, bottleneck_dim=8, warmup_epochs=0)
    with pytest.raises(
        InputError, match=rf"{name} does not take images of {size} pixels .*: set data\.views\.{option} .*"
    ) as error:
        trainer().fit(task, multicrop(images(tmp_path / "images"), MultiCrop(64, 32)))
    assert "\n" not in str(error.value)


def test_mixed_precision_keeps_head_and_loss_in_float32():
    plain = fit(small(), [random_batch(4)] * 2)
    mixed = fit(small(), [random_batch(4)] * 2, precision="bf16-mixed")
    assert mixed.losses == pytest.approx(plain.losses, rel=0.02)
    assert mixed.losses != plain.losses


@pytest.mark.parametrize("colour_on", ["device", "worker"])
def test_a_step_in_mixed_precision(tmp_path, colour_on):
    """The weights and the colours of the views are those of float32."""

    class Watch(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            seen.append([each.crops for each in batch.views])
            before.extend(p.detach().clone() for p in module.student.parameters())

    folder, losses = images(tmp_path / "images"), {}
    for precision in ("32-true", "bf16-mixed"):
        task, record, seen, before = small(lr=0.1), Record(), [], []
        run = trainer(record, Watch(), precision=precision, max_steps=1)
        run.fit(task, multicrop(folder, MultiCrop(32, 16, 2, colour_on=colour_on)))
        losses[precision] = [*record.losses, seen[0]]
        assert {p.dtype for p in task.parameters()} == {torch.float32}
        assert any(not torch.equal(a, b) for a, b in zip(before, task.student.parameters(), strict=True))
        assert all(p.isfinite().all() for p in task.parameters())
    assert losses["bf16-mixed"][0] == pytest.approx(losses["32-true"][0], rel=0.05)
    for mixed, whole in zip(losses["bf16-mixed"][1], losses["32-true"][1], strict=True):
        assert torch.equal(mixed, whole)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_weights_in_another_precision_are_an_error(precision):
    """Half precision would round away what the teacher takes: 0.4 % of its difference from the student."""
    with pytest.raises(InputError, match=rf"trainer\.precision \({precision}\).*use bf16-mixed"):
        fit(small(), [random_batch(2)], precision=precision)


def test_what_is_logged_adds_up():
    [metrics] = fit(small(), [random_batch(4)]).metrics
    assert metrics["train/teacher_entropy"] + metrics["train/kl"] == pytest.approx(metrics["train/loss"])
    assert metrics["train/teacher_entropy"] < math.log(64)
    assert metrics["train/teacher_temp"] == pytest.approx(0.04)
    assert metrics["train/momentum"] == pytest.approx(0.996)
    assert metrics["train/centre_norm"] == 0
    assert 0 < metrics["train/feature_std"] < 1
    assert {"train/lr", "train/weight_decay", "train/grad_norm"} < metrics.keys()


def test_collapse_is_said_in_words():
    class Collapse(Callback):
        def on_train_start(self, trainer, module):
            for network in (module.student, module.teacher):
                network.head.last_layer.weight_v.data[:] = 1.0
                if self.constant:
                    network.head.last_layer.weight_g.data[:2] = torch.tensor([[100.0], [-100.0]])

    uniform, constant = Collapse(), Collapse()
    uniform.constant, constant.constant = False, True
    with pytest.warns(UserWarning, match=r"collapsed at step 0, uniform: .*teacher_temp"):
        fit(small(lr=0.0, base_lr=0.0, min_lr=0.0), [random_batch(4)], uniform)
    with pytest.warns(UserWarning, match=r"collapsed at step 0, constant: .*single prototype"):
        fit(small(), [random_batch(4)], constant)


def test_a_teacher_that_is_certain_of_each_image_has_not_collapsed():
    class Centre(Callback):
        def on_train_start(self, trainer, module):
            logits = module.teacher([batch.views[0].crops])[1]
            module.loss.center.copy_(torch.cat(logits).mean(0))

    task, batch = small(teacher_temp=1e-6), random_batch(8)
    [metrics] = fit(task, [batch], Centre()).metrics
    assert metrics["train/teacher_entropy"] < 0.01 * math.log(64)
    assert task.collapse == ""


@pytest.mark.parametrize("looks", ["at every step", "when it saves"])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, looks):
    """On a GPU nobody looks at each loss; it comes out when a checkpoint is about to be written."""
    if looks == "when it saves":
        monkeypatch.setattr(Dino, "_has_to_look", lambda self, batch_idx: False)
    batches = [random_batch(4, seed) for seed in range(4)]
    batches[2].views[1].crops.fill_(float("nan"))
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_last=True, save_on_exception=True)
    with pytest.raises(InputError, match=r"loss is nan at optimizer step 2 .*model\.lr.*last\.ckpt") as error:
        fit(small(), batches, saving)
    assert "\n" not in str(error.value)
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert last["global_step"] == 2
    assert all(value.isfinite().all() for value in last["state_dict"].values())


class Spoil(Callback):
    """Makes a gradient infinite at a step whose loss is finite."""

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_step == 2:
            next(module.student.parameters()).grad.fill_(math.inf)


@pytest.mark.parametrize(
    "when", [{"every_n_train_steps": 1}, {"every_n_train_steps": 3}, {"every_n_epochs": 1}]
)
def test_weights_that_are_not_finite_are_not_saved(tmp_path, when):
    """Though no loss has shown it yet, and nothing is saved on the exception either."""
    saving = Checkpoints(tmp_path, save_top_k=-1, save_last=True, save_on_exception=True, **when)
    with pytest.raises(
        InputError, match=r"a weight is not finite at optimizer step 3 .*last good checkpoint"
    ):
        fit(small(), [random_batch(4, seed) for seed in range(3)], saving, Spoil())
    saved = [torch.load(path, weights_only=True) for path in tmp_path.iterdir()]
    expected = {1, 2} if when == {"every_n_train_steps": 1} else set()
    assert {checkpoint["global_step"] for checkpoint in saved} == expected
    assert all(value.isfinite().all() for each in saved for value in each["state_dict"].values())


def test_a_run_cut_off_after_a_loss_that_is_not_finite_saves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(Dino, "_has_to_look", lambda self, batch_idx: False)
    batches = [random_batch(4, seed) for seed in range(4)]
    batches[1].views[1].crops.fill_(float("nan"))
    saving = Checkpoints(tmp_path, save_last=True, save_on_exception=True)
    with pytest.raises(InputError, match=r"loss is nan at optimizer step 1 .*last good checkpoint: none yet"):
        fit(small(), batches, saving, Stop(0, 3))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_epochs": 3}, "the whole run has only"),
        ({"warmup_teacher_temp_epochs": 3}, r"warmup_teacher_temp_epochs \(3\).*max_epochs \(2\)"),
        ({"student_temp": 0}, r"student_temp \(0\)"),
        ({"momentum": 1.5}, r"model.momentum \(1.5\) must be from 0 to 1"),
        ({"teacher_temp": -0.1}, r"model.teacher_temp \(-0.1\) must be above 0"),
    ],
)
def test_what_cannot_be_is_an_error(options, message):
    with pytest.raises(InputError, match=message):
        fit(small(**options), [random_batch(2)] * 2, max_epochs=2)


def test_the_metrics_that_training_logs():
    run = trainer(Record(), log_every_n_steps=1)
    run.fit(small(), Batches([random_batch(4)]))
    names = {"loss", "lr", "weight_decay", "grad_norm", "teacher_temp", "momentum", "last_layer_frozen"}
    names |= {"teacher_entropy", "kl", "centre_norm", "feature_std", "effective_rank"}
    assert set(run.callback_metrics) == {f"train/{name}" for name in names}


def test_the_trainers_clipping_is_an_error():
    with pytest.raises(InputError, match=r"model\.clip_grad"):
        fit(small(), [random_batch(2)], gradient_clip_val=1.0)


resuming = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


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


def images(folder, number=22):
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    for index in range(number):
        pixels = torch.randint(256, (40, 40, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{index:02}.png")
    return folder


def multicrop(folder, views=None, **options):
    plain = {"views": views or MultiCrop(32, 16, 2), "batch_size": 2, "num_workers": 0}
    return MultiViewData(root=str(folder), **(plain | options))


@resuming
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_cut_off_goes_on_as_if_it_had_not_been(tmp_path, accumulate, workers):
    """11 batches an epoch; the last checkpoint is of epoch 1, and the run dies some batches later."""
    folder = images(tmp_path / "images")

    def run(*callbacks, **options):
        seen = Seen()
        task = small(backbone_args={"drop_path_rate": 0.3}, warmup_epochs=1)
        data = multicrop(folder, num_workers=workers)
        run = trainer(
            seen,
            *callbacks,
            max_epochs=3,
            accumulate_grad_batches=accumulate,
        )
        try:
            run.fit(task, data, **options)
        except KeyError:
            assert any(isinstance(callback, Stop) for callback in callbacks)
        return task, seen.batches

    whole, expected = run()
    saving = ModelCheckpoint(
        tmp_path / "run", every_n_train_steps=6 // accumulate, save_top_k=-1, filename="{step}"
    )
    run(saving, Stop(1, 9))
    seed_everything(5)  # another process has other random numbers
    checkpoint = sorted((tmp_path / "run").glob("*.ckpt"), key=os.path.getmtime)[-1]
    step = torch.load(checkpoint, weights_only=True)["global_step"]
    resumed, seen = run(ckpt_path=str(checkpoint), weights_only=True)
    before = {1: step, 3: 11 + 3 * (step - 4)}[accumulate]
    assert 11 < before < 20
    assert seen == expected[before:]
    assert same(resumed.state_dict(), whole.state_dict())


@resuming
def test_a_run_cut_off_between_accumulated_batches_repeats_them(tmp_path):
    folder = images(tmp_path / "images")

    def run(*callbacks, **options):
        task = small(backbone_args={"drop_path_rate": 0.3})
        run = trainer(*callbacks, accumulate_grad_batches=4, max_epochs=2)
        with contextlib.suppress(KeyError):
            run.fit(task, multicrop(folder), **options)
        return task

    whole = run()
    saving = Checkpoints(tmp_path / "run", save_last=True, save_on_exception=True)
    run(saving, Stop(0, 6))
    resumed = run(ckpt_path=str(tmp_path / "run" / "last.ckpt"), weights_only=True)
    assert same(resumed.state_dict(), whole.state_dict())


@resuming
def test_the_first_step_after_a_resume_has_its_own_schedule(tmp_path):
    batches = [random_batch(2, seed) for seed in range(4)]
    whole = fit(small(), batches, max_epochs=2)
    saving = ModelCheckpoint(tmp_path, save_last=True)
    with pytest.raises(KeyError):
        fit(small(), batches, saving, Stop(1, 0), max_epochs=2)
    record = Record()
    run = trainer(record, max_epochs=2)
    run.fit(small(), Batches(batches), ckpt_path=str(tmp_path / "last.ckpt"), weights_only=True)
    assert record.steps == whole.steps[4:]
    assert record.losses == whole.losses[4:]


def of_digits(world_size=1, **options):
    record = Record()
    data = MultiViewData(
        dataset="digits",
        views=MultiCrop(32, 16, 2),
        num_workers=0,
        batch_size=8 // world_size,
    )
    run = trainer(record, max_steps=10, **options)
    task = small(lr=1e-2)
    run.fit(task, data)
    return record.losses, copied(task.loss)["center"]


def train_on_digits(rank, folder):
    torch.save(of_digits(2, devices=2, strategy="ddp"), folder / f"{rank}.pt")


@pytest.mark.slow
def test_two_processes_are_one(tmp_path, two_processes):
    two_processes(train_on_digits, tmp_path)
    losses, center = of_digits()
    halves = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    mean = torch.tensor([half for half, _ in halves]).mean(0)
    torch.testing.assert_close(mean, torch.tensor(losses), atol=1e-4, rtol=0)
    assert torch.equal(halves[0][1], halves[1][1])
    torch.testing.assert_close(halves[0][1], center, atol=1e-5, rtol=0)


def train_until_nan(rank, folder, looks):
    if looks == "when it saves":
        Dino._has_to_look = lambda self, batch_idx: False
    batches = [random_batch(4, seed) for seed in range(4)]
    if rank == 1:
        batches[2].views[1].crops.fill_(float("nan"))
    saving = Checkpoints(folder / "run", every_n_train_steps=1, save_last=True, save_on_exception=True)
    with pytest.raises(InputError) as error:
        fit(small(), batches, saving, devices=2, strategy="ddp", use_distributed_sampler=False)
    (folder / f"{rank}.txt").write_text(str(error.value))


@pytest.mark.slow
@pytest.mark.parametrize("looks", ["at every step", "when it saves"])
def test_a_loss_that_is_not_finite_in_one_process_stops_all(tmp_path, looks, two_processes):
    two_processes(train_until_nan, tmp_path, looks)
    one, other = ((tmp_path / f"{rank}.txt").read_text() for rank in range(2))
    assert one == other
    assert "the loss is nan at optimizer step 2" in one
    assert not list(tmp_path.rglob("*.part"))
    last = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 2
