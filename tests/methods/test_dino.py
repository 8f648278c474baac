"""DINO: the steps of the original code, its schedules, its teacher, and its words on a collapse."""

import json
import math
import weakref
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from lightly.loss import DINOLoss
from lightning.pytorch import Callback, seed_everything
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from locat_lightning.data.views import ViewBatch, Views
from locat_lightning.errors import InputError
from locat_lightning.methods import Dino
from locat_lightning.methods.dino import Loss
from locat_lightning.schedules import cosine, linear_warmup, warmup_then_cosine
from tests.methods.runs import (
    BACKBONE,
    Batches,
    Record,
    copied,
    fit,
    images,
    of_folder,
    random_batch,
    same,
    small,
    trainer,
)

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


@pytest.mark.parametrize(("taught", "learnt"), [(2, 2), (2, 5), (1, 3)])
@pytest.mark.parametrize("scale", [1, 100])
def test_the_loss_and_its_gradient_are_lightlys(taught, learnt, scale):
    """In float64, with sharp and flat distributions; the distributions are the teacher's."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(taught, 3, 17, generator=generator, dtype=torch.float64) * scale / 25
    student = torch.randn(learnt, 3, 17, generator=generator, dtype=torch.float64) * scale / 10
    theirs, ours = student.clone().requires_grad_(), student.clone().requires_grad_()
    expected, loss = DINOLoss(17).double(), Loss(17).double()
    for each in (expected, loss):
        each.center.copy_(torch.randn(17, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    p = loss.teacher_probabilities(teacher, 0.07)
    found = loss(p, ours)
    reference = expected(list(teacher), list(theirs), teacher_temp=0.07)
    torch.testing.assert_close(found, reference, atol=1e-12, rtol=1e-6)  # lightly's temperature is float32
    (3 * found).backward()
    (3 * reference).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-8, rtol=1e-6)
    assert torch.autograd.gradcheck(lambda z: loss(p, z), ours)


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are made, while they live."""

    def __init__(self):
        super().__init__()
        self.known, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if (
                isinstance(each, torch.Tensor)
                and (storage := each.untyped_storage())._cdata not in self.known
            ):
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        return out

    def forget(self, key, size):
        self.known.remove(key)
        self.now -= size


def test_the_loss_takes_little_memory_beside_logits_and_their_gradient():
    """Measured in the logits of one view: those of ten come in, and as much goes out; lightly's takes 46."""
    images, prototypes = 4, 512
    x, weight = torch.randn(10, images, 8), torch.randn(8, prototypes, requires_grad=True)
    taught, loss = torch.randn(2, images, prototypes), Loss(prototypes)
    with Live() as live:
        logits = x @ weight
        loss(loss.teacher_probabilities(taught, 0.04), logits).backward()
    assert live.peak < 26 * 4 * images * prototypes


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
    source = small(seed=1)
    torch.save(source.student.backbone.state_dict(), tmp_path / "weights.pt")
    task = small(seed=2, weights=str(tmp_path / "weights.pt"))
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
        trainer().fit(
            task, of_folder(images(tmp_path / "images"), global_size=64, local_size=32, local_views=8)
        )
    assert "\n" not in str(error.value)


def test_mixed_precision_keeps_head_and_loss_in_float32():
    plain = fit(small(), [random_batch(4)] * 2)
    mixed = fit(small(), [random_batch(4)] * 2, precision="bf16-mixed")
    assert mixed.losses == pytest.approx(plain.losses, rel=0.02)
    assert mixed.losses != plain.losses


def test_tf32_is_for_the_steps_alone(monkeypatch):
    class Watch(Callback):
        def on_before_zero_grad(self, trainer, module, optimizer):
            seen.append(torch.backends.cuda.matmul.fp32_precision)

    seen, before = [], torch.backends.cuda.matmul.fp32_precision
    for tf32 in (False, True):
        monkeypatch.setattr(Dino, "tf32", tf32)
        fit(small(), [random_batch(2)], Watch())
    assert seen == [before, "tf32"]
    assert torch.backends.cuda.matmul.fp32_precision == before


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
        run.fit(task, of_folder(folder, colour_on=colour_on))
        losses[precision] = [*record.losses, seen[0]]
        assert {p.dtype for p in task.parameters()} == {torch.float32}
        assert any(not torch.equal(a, b) for a, b in zip(before, task.student.parameters(), strict=True))
        assert all(p.isfinite().all() for p in task.parameters())
    assert losses["bf16-mixed"][0] == pytest.approx(losses["32-true"][0], rel=0.05)
    for mixed, whole in zip(losses["bf16-mixed"][1], losses["32-true"][1], strict=True):
        assert torch.equal(mixed, whole)


def test_entropy_and_kl_of_accumulated_batches_are_means():
    batches = [random_batch(2, seed) for seed in range(3)]
    logged = fit(small(), batches, accumulate_grad_batches=3).metrics[-1]
    assert logged["train/teacher_entropy"] + logged["train/kl"] == pytest.approx(logged["train/loss"])
    alone = [fit(small(), [batch]).metrics[0]["train/teacher_entropy"] for batch in batches]
    assert logged["train/teacher_entropy"] == pytest.approx(sum(alone) / 3)


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
        fit(small(lr=0.0, base_lr=0.0, min_lr=0.0), [random_batch(4)], uniform, log_every_n_steps=1)
    with pytest.warns(UserWarning, match=r"collapsed at step 0, constant: .*single prototype"):
        fit(small(), [random_batch(4)], constant, log_every_n_steps=1)


def test_a_teacher_that_is_certain_of_each_image_has_not_collapsed():
    class Centre(Callback):
        def on_train_start(self, trainer, module):
            logits = module.teacher([batch.views[0].crops])[1]
            module.loss.center.copy_(logits.mean((0, 1)))

    task, batch = small(teacher_temp=1e-6), random_batch(8)
    [metrics] = fit(task, [batch], Centre(), log_every_n_steps=1).metrics
    assert metrics["train/teacher_entropy"] < 0.01 * math.log(64)
    assert task.collapse == {"image": ""}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_teacher_temp_epochs": 3}, r"warmup_teacher_temp_epochs \(3\).*max_epochs \(2\)"),
        ({"student_temp": 0}, r"student_temp \(0\)"),
        ({"momentum": 1.5}, r"model.momentum \(1.5\) must be from 0 to 1"),
        ({"teacher_temp": -0.1}, r"model.teacher_temp \(-0.1\) must be above 0"),
        ({"teacher_temp": float("inf")}, r"model.teacher_temp \(inf\) must be a finite number"),
        ({"lr": float("inf")}, r"model.lr \(inf\) must be a finite number"),
        ({"weight_decay_end": float("nan")}, r"model.weight_decay_end \(nan\) must be a finite number"),
    ],
)
def test_what_cannot_be_is_an_error(options, message):
    with pytest.raises(InputError, match=message):
        fit(small(**options), [random_batch(2)] * 2, max_epochs=2)


def test_the_metrics_that_training_logs():
    run = trainer(Record(), log_every_n_steps=1)
    run.fit(small(), Batches([random_batch(4)]))
    names = {"loss", "lr", "weight_decay", "grad_norm", "teacher_temp", "momentum", "last_layer_frozen"}
    names |= {"teacher_entropy", "kl", "centre_norm", "feature_std"}
    assert set(run.callback_metrics) == {f"train/{name}" for name in names}
