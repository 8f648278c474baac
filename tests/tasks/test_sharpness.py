"""Sharpness-aware steps, against a loop of two steps in plain torch."""

import math
from types import SimpleNamespace

import pytest
import timm
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch.nn import functional as F

from locat_lightning.errors import InputError
from locat_lightning.tasks import Classification
from locat_lightning.tasks.sharding import ShardedStrategy
from tests.tasks.test_classification import BACKBONE, Batches, Taken, fit, task, trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
PLAIN = {"mixup": 0, "cutmix": 0, "optimizer": "sgd", "lr": 0.1, "weight_decay": 0.0}


def two_steps(model, batches, rates, *, rho, accumulate=1, clip=None):
    """SAM as the paper has it: climb by rho · g / ‖g‖, take the gradient there, step back, descend."""
    model = model.train()
    weights = list(model.parameters())
    optimizer = torch.optim.SGD(weights, momentum=0.9, nesterov=True)  # timm's sgd
    for number, rate in enumerate(rates):
        total = [torch.zeros_like(weight) for weight in weights]
        for images, labels, _ in batches[number * accumulate : (number + 1) * accumulate]:
            before = [weight.detach().clone() for weight in weights]
            loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
            first = torch.autograd.grad(loss, weights)
            norm = math.sqrt(sum(float(each.square().sum()) for each in first))
            with torch.no_grad():
                for weight, each in zip(weights, first, strict=True):
                    weight += rho * each / norm
            loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
            for of_all, each in zip(total, torch.autograd.grad(loss, weights), strict=True):
                of_all += each / accumulate
            with torch.no_grad():
                for weight, own in zip(weights, before, strict=True):
                    weight.copy_(own)
        norm = math.sqrt(sum(float(each.square().sum()) for each in total))
        for weight, each in zip(weights, total, strict=True):
            weight.grad = each * (min(1.0, clip / norm) if clip else 1.0)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    return model


def weights_of(module):
    return {name: value.clone() for name, value in module.backbone.state_dict().items()}


@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (2, None), (1, 0.05), (2, 0.05)])
def test_a_step_is_the_papers(tmp_path, accumulate, clip):
    data = Batches(batches=4)
    module = task(Taken, sam=0.5, **PLAIN)
    start = {}

    class Start(Callback):
        def on_train_start(self, trainer, module):
            start.update(weights_of(module))

    run = trainer(tmp_path, max_epochs=1, accumulate_grad_batches=accumulate, gradient_clip_val=clip)
    run.callbacks.append(Start())
    run.fit(module, datamodule=data)
    reference = timm.create_model("locatvit_tiny", num_classes=6, **BACKBONE)
    reference.load_state_dict(start)
    two_steps(reference, data.items, module.rates, rho=0.5, accumulate=accumulate, clip=clip)
    found = weights_of(module)
    for name, expected in reference.state_dict().items():
        torch.testing.assert_close(found[name], expected, atol=2e-6, rtol=1e-5, msg=name)
    assert any(not torch.equal(found[name], start[name]) for name in start)


class Looks(Callback):
    """Notes the weights where others look at them or save them."""

    def __init__(self):
        self.disturbed, self.after = [], []

    def on_train_batch_start(self, trainer, module, *_):
        self.before = weights_of(module)

    def on_before_backward(self, trainer, module, loss):
        self.disturbed.append(distance(weights_of(module), self.before))

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.after.append(distance(weights_of(module), self.before))


def distance(one, other):
    return math.sqrt(sum(float((one[name] - other[name]).double().square().sum()) for name in one))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_weights_are_as_far_away_as_told_in_the_backward_pass_and_back_before_the_step(tmp_path, precision):
    looks = Looks()
    # Lightning has float16 on CUDA alone, but its plugin works on a CPU, too.
    own = {"plugins": [MixedPrecision("16-mixed", "cpu")]} if precision == "16-mixed" else {}
    run = trainer(tmp_path, max_epochs=1, callbacks=[looks], **(own or {"precision": precision}))
    module = task(Classification, sam=0.25)
    run.fit(module, datamodule=Batches())
    assert looks.disturbed == pytest.approx([0.25] * 4, rel=1e-3)
    assert looks.after == [0.0] * 4
    assert math.isfinite(run.callback_metrics["train/loss"])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_both_passes_draw_the_same_numbers_and_see_the_weights_of_their_own(tmp_path, precision):
    """A tiny disturbance leaves the loss as it is; a large one does not, in half precision either."""
    losses = {}

    class Losses(Callback):
        def on_train_batch_end(self, trainer, module, outputs, *_):
            logged = trainer.callback_metrics["train/loss"].item()
            losses.setdefault(module.hp.sam, []).append((outputs["loss"].item(), logged))

    options = {"backbone_args": BACKBONE | {"drop_path_rate": 0.5}, "mixing": "transmix", "mixing_prob": 1.0}
    for rho in (1e-9, 1.0):
        run = trainer(tmp_path, max_epochs=1, precision=precision, callbacks=[Losses()])
        run.fit(task(Classification, sam=rho, lr=0.0, warmup_lr=0.0, min_lr=0.0, **options), Batches())
    for trained_with, logged in losses[1e-9]:
        assert trained_with == pytest.approx(logged, rel=1e-6)
    for (trained_with, logged), (_, same) in zip(losses[1.0], losses[1e-9], strict=True):
        assert trained_with > logged + 1e-3
        assert logged == pytest.approx(same)


def test_without_it_the_first_pass_is_the_same_and_so_are_the_random_numbers_after(tmp_path):
    found = []
    for rho in (None, 1e-9):
        module = task(Classification, sam=rho, backbone_args=BACKBONE | {"drop_path_rate": 0.5})
        fit(tmp_path, module, max_epochs=1)
        found.append(weights_of(module))
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, atol=1e-5, rtol=1e-4)


def test_a_gradient_that_is_not_finite_disturbs_nothing(tmp_path):
    module = task(Classification, sam=0.1, num_classes=6, **PLAIN)
    module.configure_model()
    module.trainer = trainer(tmp_path)
    before = weights_of(module)
    loss = next(iter(module.parameters())).sum() * math.inf
    module._disturb(loss)
    assert distance(weights_of(module), before) == 0


@pytest.mark.parametrize("hook", ["on_before_backward", "on_after_backward"])
def test_what_is_saved_when_a_step_fails_are_the_undisturbed_weights(tmp_path, hook):
    def fail(self, trainer, module, *_):
        if trainer.global_step == 2:
            raise KeyError("failed")

    looks = Looks()
    fails = type("Fails", (Callback,), {hook: fail})()
    run = trainer(tmp_path, callbacks=[looks, fails])
    module = task(Classification, sam=0.25)
    with pytest.raises(KeyError):
        run.fit(module, datamodule=Batches())
    assert distance(weights_of(module), looks.before) == pytest.approx(0.25, rel=1e-3)
    run.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(saved[f"backbone.{name}"], value) for name, value in looks.before.items())


def test_running_statistics_are_of_the_first_pass_alone(tmp_path):
    found = {}
    for rho in (None, 0.5):
        module = task(Classification, sam=rho, lr=0.0, warmup_lr=0.0, min_lr=0.0)
        module.hp.backbone, module.hp.backbone_args = "test_resnet", None
        run = trainer(tmp_path, max_epochs=1)
        run.fit(module, Batches())
        found[rho] = {name: value for name, value in weights_of(module).items() if "running" in name}
        tracked = [value for name, value in module.state_dict().items() if "num_batches" in name]
        assert tracked
        assert all(value == 4 for value in tracked)
    for name, value in found[None].items():
        torch.testing.assert_close(found[0.5][name], value)


@pytest.mark.parametrize(
    ("options", "run", "expected"),
    [
        ({}, {"precision": "bf16-true"}, r"trainer\.precision \(bf16-true\) rounds .* away: use bf16-mixed"),
        ({}, {"strategy": "fsdp"}, r"fsdp may divide weights .*: use --trainer\.strategy ddp"),
        ({"compile": "reduce-overhead"}, {}, r"model\.sam: .*: use --model\.compile true"),
    ],
)
def test_what_it_does_not_go_with_is_said(tmp_path, options, run, expected):
    if "strategy" in run:
        module, given = task(Classification, sam=0.1), SimpleNamespace(**vars(trainer(tmp_path)))
        given.strategy, given.callbacks, given.max_steps, given.max_epochs = ShardedStrategy(), [], -1, 2
    else:
        module, given = task(Classification, sam=0.1, **options), trainer(tmp_path, **run)
    with pytest.raises(InputError, match=expected):
        module.check(given, training=True)
    module.hp.sam = None
    module.check(given, training=True)
