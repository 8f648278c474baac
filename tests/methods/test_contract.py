"""What every method keeps: they are found in `locat_lightning.methods`, so that new ones are tested, too."""

import contextlib
import math

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from locat import configs
from locat_lightning.callbacks.checkpoints import Checkpoints
from locat_lightning.callbacks.pictures import Pictures
from locat_lightning.data import MultiViewData
from locat_lightning.errors import InputError
from locat_lightning.methods.base import Pretraining
from tests.methods.runs import (
    METHODS,
    Batches,
    Record,
    Seen,
    Spoil,
    Stop,
    copied,
    couples_images,
    fit,
    images,
    masked_views,
    of_folder,
    part_of,
    random_batch,
    same,
    small,
    spoil,
    trainer,
)

every_method = pytest.mark.parametrize("name", METHODS)
LOOKS = ["at every step", "when it saves"]
# The base decides for all alike when a loss is looked at: one method shows that a later look finds it, too.
every_method_looks = pytest.mark.parametrize(
    ("name", "looks"), [*((name, LOOKS[0]) for name in METHODS), ("Dino", LOOKS[1])]
)
pytestmark = pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start")  # a frozen teacher's
resuming = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return images(tmp_path_factory.mktemp("contract") / "images", 10)


@every_method
def test_a_step(name):
    task = small(name)
    before = copied(task)
    record = fit(task, [random_batch(4)], log_every_n_steps=1)
    assert isinstance(task, Pretraining)
    assert math.isfinite(record.losses[0])
    trained = {id(p) for p in task.trained()}
    for key, parameter in task.named_parameters():
        if id(parameter) in trained and parameter.grad is not None and parameter.grad.any():
            assert not torch.equal(parameter, before[key]), key
    in_optimizer = {id(p) for group in task.optimizers().param_groups for p in group["params"]}
    assert in_optimizer == {id(p) for p in task.trained() if p.requires_grad}
    logged = {"loss", "lr", "weight_decay", "grad_norm", "feature_std"}
    assert {f"train/{key}" for key in logged} <= record.metrics[-1].keys()


@every_method
def test_its_networks_and_features(name):
    task = small(name)
    assert any(network is task.backbone for network in task.networks().values())
    assert task(torch.randn(2, 3, 32, 32)).shape == (2, 24)
    assert {"crops"} == task.input_pictures(random_batch(5), 32).keys()


@every_method
def test_it_has_a_config(name):
    shipped = [yaml.safe_load(path.read_text()) for path in configs.config_directory().glob("*.yaml")]
    models = [config["model"] for config in shipped if "model" in config]
    own = [model for model in models if model["class_path"].rpartition(".")[2] == name]
    assert own
    for config in own:
        assert METHODS[name](**config["init_args"]).hparams.items() >= config["init_args"].items()


@every_method
def test_it_only_trains(name):
    with pytest.raises(InputError, match=rf"{name} trains without classes, .*: measure its features with"):
        small(name).check(trainer(), training=False)


@every_method
def test_accumulated_batches_are_one_large_batch(name):
    whole = [random_batch(6, seed) for seed in range(3)]
    parts = [part_of(batch, torch.arange(i, i + 2)) for batch in whole for i in range(0, 6, 2)]
    large, accumulating = small(name), small(name)
    if couples_images(large):
        pytest.skip("it normalises by batch")
    one = fit(large, whole)
    many = fit(accumulating, parts, accumulate_grad_batches=3)
    of_steps = torch.tensor(many.losses).view(3, 3).mean(1)
    torch.testing.assert_close(of_steps, torch.tensor(one.losses), atol=1e-6, rtol=1e-6)
    assert many.steps == one.steps
    norms = [
        torch.tensor([each["train/grad_norm"] for each in steps])
        for steps in (one.metrics, many.metrics[2::3])
    ]
    torch.testing.assert_close(*norms, atol=0, rtol=1e-3)
    trained = {key for key, parameter in large.named_parameters() if parameter.requires_grad}
    for key, value in large.state_dict().items():
        if key not in trained:  # where a gradient is 0 but for rounding, AdamW makes a whole step of it
            torch.testing.assert_close(accumulating.state_dict()[key], value, atol=1e-6, rtol=0, msg=key)


@every_method
def test_mixed_precision_is_near_full_precision(name):
    """As far as bfloat16 goes: matrices are multiplied in it, weights and losses stay in float32."""
    batch = random_batch(4)
    task = small(name)
    [half], [full] = (
        fit(each, [batch], precision=precision).losses
        for each, precision in ((task, "bf16-mixed"), (small(name), "32-true"))
    )
    assert half == pytest.approx(full, rel=0.02)
    assert half != full
    assert {parameter.dtype for parameter in task.parameters()} == {torch.float32}
    assert all(parameter.isfinite().all() for parameter in task.parameters())


@every_method
def test_what_is_logged_of_accumulated_batches_is_their_mean(name):
    """5 batches: the last step of an epoch has two of them, and the next epoch begins anew."""
    batches = [random_batch(2, seed) for seed in range(5)]
    record = fit(small(name), batches, accumulate_grad_batches=3, max_epochs=2)
    for step in (slice(0, 3), slice(3, 5), slice(5, 8), slice(8, 10)):
        logged = record.metrics[step][-1]
        assert logged["train/loss"] == pytest.approx(sum(losses := record.losses[step]) / len(losses))
    alone = [fit(small(name), [batch]).metrics[0]["train/feature_std"] for batch in batches[:3]]
    assert record.metrics[2]["train/feature_std"] == pytest.approx(sum(alone) / 3)


@every_method
def test_sharpness_aware_steps(name):
    """Both passes draw the same numbers, and what a step gathers, as a centre's mean, is as without."""
    batches = [random_batch(4, seed) for seed in range(2)]
    found = {}
    for rho in (None, 1e-9, 1.0):
        task = small(name, sam=rho, backbone_args={"drop_path_rate": 0.3})
        record = fit(task, batches, accumulate_grad_batches=2)
        found[rho] = record.metrics[-1]["train/loss"], sum(record.losses) / 2, copied(task)
    logged, loss, state = found[None]
    assert loss == pytest.approx(logged)
    for rho in (1e-9, 1.0):
        assert found[rho][0] == pytest.approx(logged)
        for key, value in state.items():
            if key.endswith(".center"):
                torch.testing.assert_close(found[rho][2][key], value, msg=key)
    assert found[1e-9][1] == pytest.approx(loss, abs=1e-5)
    assert found[1.0][1] > loss + 1e-3


@every_method
def test_options_of_the_trainer_that_do_not_fit(name):
    with pytest.raises(InputError, match=r"model\.clip_grad"):
        fit(small(name), [random_batch(2)], gradient_clip_val=1.0)
    for precision in ("bf16-true", "16-true", "64-true"):
        with pytest.raises(InputError, match=rf"trainer\.precision \({precision}\).*use bf16-mixed"):
            fit(small(name), [random_batch(2)], precision=precision)
    with pytest.raises(InputError, match="the whole run has only"):
        fit(small(name, warmup_epochs=3), [random_batch(2)] * 2, max_epochs=2)


@every_method
def test_the_learning_rate_follows_the_global_batch(name):
    record = fit(small(name, lr=None, base_lr=0.5), [random_batch(4)] * 2, accumulate_grad_batches=2)
    expected = {"Dinov2": 0.5 * math.sqrt(8 / 1024)}.get(name, 0.5 * 8 / 256)
    assert record.steps[0][0][0] == expected


@every_method
def test_gradients_are_clipped_by_parameter_or_by_what_is_clipped_together(name):
    class Norms(Callback):
        def on_before_zero_grad(self, trainer, module, optimizer):
            parts = [[p.grad for p in part if p.grad is not None] for part in module.clipped_together()]
            found.extend(torch.nn.utils.get_total_norm(part).item() for part in parts if part)

    found = []
    fit(small(name, clip_grad=1e-3), [random_batch(4)] * 3, Norms())
    assert 0.9e-3 < max(found) < 1.001e-3
    assert sum(norm > 0.9e-3 for norm in found) > min(10, len(found) / 2)


@every_method
def test_it_trains_the_same_with_pictures(folder, tmp_path, name):
    outcomes = []
    for number, callbacks in enumerate(([], [Pictures(images=2, side=32)])):
        task, seen = small(name, backbone_args={"drop_path_rate": 0.3}, lr=1e-2), Seen()
        logger = TensorBoardLogger(tmp_path, name="", version=str(number))
        options = {"logger": logger, "log_every_n_steps": 1, "limit_train_batches": 2, "max_epochs": 2}
        trainer(seen, *callbacks, **options).fit(task, of_folder(folder))
        outcomes.append((copied(task), seen.batches, torch.get_rng_state()))
    drawn = EventAccumulator(logger.log_dir).Reload()
    assert {"pictures/crops", "pictures/validation"} <= {*drawn.Tags()["images"]}
    assert [image.step for image in drawn.Images("pictures/validation")] == [1, 3]
    (weights, batches, state), (weights_with, batches_with, state_with) = outcomes
    assert same(weights, weights_with)
    assert batches == batches_with
    assert torch.equal(state, state_with)


@pytest.mark.slow
@resuming
@every_method
def test_an_interrupted_run_resumes_as_if_it_had_not_been(folder, tmp_path, name):
    """5 batches an epoch; the last checkpoint is of epoch 1, and the run dies some batches later."""

    def run(*callbacks, **options):
        seen = Seen()
        task = small(name, backbone_args={"drop_path_rate": 0.3}, warmup_epochs=1)
        run = trainer(seen, *callbacks, max_epochs=3, accumulate_grad_batches=2)
        with contextlib.suppress(KeyError):
            run.fit(task, of_folder(folder, num_workers=2), **options)
        return task, seen.batches

    whole, expected = run()
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    _, cut = run(saving, Stop(1, 4))
    assert len(cut) == 10
    checkpoint = tmp_path / "step=4.ckpt"  # of three steps in the first epoch, and one of two batches
    resumed, seen = run(ckpt_path=str(checkpoint), weights_only=True)
    assert seen == expected[7:]
    assert same(resumed.state_dict(), whole.state_dict())


@resuming
@every_method
def test_a_run_interrupted_between_accumulated_batches_repeats_them(folder, tmp_path, name):
    def run(*callbacks, **options):
        task = small(name, backbone_args={"drop_path_rate": 0.3})
        run = trainer(*callbacks, accumulate_grad_batches=3, max_epochs=2)
        with contextlib.suppress(KeyError):
            run.fit(task, of_folder(folder), **options)
        return task

    whole = run()
    run(Checkpoints(tmp_path, save_last=True, save_on_exception=True), Stop(0, 4))
    resumed = run(ckpt_path=str(tmp_path / "last.ckpt"), weights_only=True)
    # Running statistics have counted the batches that are repeated; training reads none of them.
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    states = [
        {key: value for key, value in task.state_dict().items() if not key.endswith(statistics)}
        for task in (resumed, whole)
    ]
    assert same(*states)


@resuming
@every_method
def test_the_first_step_after_a_resume_has_its_own_schedule(tmp_path, name):
    batches = [random_batch(2, seed) for seed in range(2)]
    whole = fit(small(name), batches, max_epochs=2)
    with pytest.raises(KeyError):
        fit(small(name), batches, ModelCheckpoint(tmp_path, save_last=True), Stop(1, 0), max_epochs=2)
    record = Record()
    run = trainer(record, max_epochs=2)
    run.fit(small(name), Batches(batches), ckpt_path=str(tmp_path / "last.ckpt"), weights_only=True)
    assert record.steps == whole.steps[2:]
    assert record.losses == whole.losses[2:]


@every_method_looks
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, looks, name):
    """On a GPU nobody looks at each loss; it comes out when a checkpoint is about to be written."""
    if looks == "when it saves":
        monkeypatch.setattr(Pretraining, "_has_to_look", lambda self: False)
    batches = [random_batch(4, seed) for seed in range(4)]
    spoil(batches[2])
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_last=True, save_on_exception=True)
    with pytest.raises(InputError, match=r"loss is nan at optimizer step 2 .*model\.lr.*last\.ckpt") as error:
        fit(small(name), batches, saving)
    assert "\n" not in str(error.value)
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert last["global_step"] == 2
    assert all(value.isfinite().all() for value in last["state_dict"].values())


@pytest.mark.parametrize(
    ("name", "when"),
    [
        *((name, {"every_n_train_steps": 1}) for name in METHODS),
        # When it is due, the callback decides, which knows no method.
        ("Dino", {"every_n_train_steps": 3}),
        ("Dino", {"every_n_epochs": 1}),
    ],
)
def test_weights_that_are_not_finite_are_not_saved(tmp_path, when, name):
    """Though no loss has shown it yet, and nothing is saved on the exception either."""
    saving = Checkpoints(tmp_path, save_top_k=-1, save_last=True, save_on_exception=True, **when)
    with pytest.raises(
        InputError, match=r"a weight is not finite at optimizer step 3 .*last good checkpoint"
    ):
        fit(small(name), [random_batch(4, seed) for seed in range(3)], saving, Spoil())
    saved = [torch.load(path, weights_only=True) for path in tmp_path.iterdir()]
    expected = {1, 2} if when == {"every_n_train_steps": 1} else set()
    assert {checkpoint["global_step"] for checkpoint in saved} == expected
    assert all(value.isfinite().all() for each in saved for value in each["state_dict"].values())


@every_method
def test_a_run_interrupted_after_a_loss_that_is_not_finite_saves_nothing(tmp_path, monkeypatch, name):
    monkeypatch.setattr(Pretraining, "_has_to_look", lambda self: False)
    batches = [random_batch(4, seed) for seed in range(4)]
    spoil(batches[1])
    saving = Checkpoints(tmp_path, save_last=True, save_on_exception=True)
    with pytest.raises(InputError, match=r"loss is nan at optimizer step 1 .*last good checkpoint: none yet"):
        fit(small(name), batches, saving, Stop(0, 3))
    assert list(tmp_path.iterdir()) == []


def of_digits(name, world_size=1, **options):
    """Losses and all weights but the student's, which no average smooths, after ten steps."""
    record = Record()
    data = MultiViewData(dataset="digits", views=masked_views(), num_workers=0, batch_size=8 // world_size)
    run = trainer(record, max_steps=10, **options)
    task = small(name, lr=1e-2)
    run.fit(task, data)
    return record.losses, copied(task)


def train_until_nan(name, rank, folder, looks):
    """Train until one process has a loss that is not finite; return what each said."""
    batches = [random_batch(4, seed) for seed in range(4)]
    if rank == 1:
        spoil(batches[2])
    saving = Checkpoints(folder, every_n_train_steps=1, save_last=True, save_on_exception=True)
    usual = Pretraining._has_to_look
    if looks == "when it saves":
        Pretraining._has_to_look = lambda self: False
    try:
        fit(small(name), batches, saving, devices=2, strategy="ddp", use_distributed_sampler=False)
    except InputError as error:
        return str(error)
    finally:
        Pretraining._has_to_look = usual
    return ""


def with_sinkhorn(batch, **options):
    """The loss of a step whose targets are balanced over all processes."""
    return fit(small("Ibot", centering="sinkhorn_knopp"), [batch], **options).losses[0]


def sharpness_aware(batches, **options):
    """The weights after a step of SAM."""
    task = small("Dino", sam=0.5)
    fit(task, batches, **options)
    return copied(task)


def in_two_processes(rank, folder):
    """All that is tested of two processes: they take long to start."""
    found = {
        name: {
            "digits": of_digits(name, 2, devices=2, strategy="ddp"),
            "nan": {
                looks: train_until_nan(name, rank, folder / f"{name} {looks}", looks)
                for looks in (LOOKS if name == "Dino" else LOOKS[:1])
            },
        }
        for name in METHODS
    }
    own_part = part_of(random_batch(6), torch.arange(3 * rank, 3 * rank + 3))
    found["sinkhorn"] = with_sinkhorn(own_part, devices=2, strategy="ddp")
    found["sam"] = sharpness_aware([own_part], devices=2, strategy="ddp")
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def of_two(tmp_path_factory, two_processes):
    """What two processes found, and the folder of their checkpoints."""
    folder = tmp_path_factory.mktemp("two")
    images(folder / "images", 20)
    two_processes(in_two_processes, folder)
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
@every_method
def test_two_processes_are_one(of_two, name):
    if couples_images(small(name)):
        pytest.skip("it normalises by batch, of one process")
    losses, weights = of_digits(name)
    halves = [found[name]["digits"] for found in of_two[1]]
    mean = torch.tensor([half for half, _ in halves]).mean(0)
    torch.testing.assert_close(mean, torch.tensor(losses), atol=1e-4, rtol=0)
    assert same(halves[0][1], halves[1][1])
    for key in weights:
        if key.endswith(".center"):
            torch.testing.assert_close(halves[0][1][key], weights[key], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_sinkhorn_knopp_balances_over_processes(of_two):
    halves = [found["sinkhorn"] for found in of_two[1]]
    assert halves[0] != halves[1]
    assert sum(halves) / 2 == pytest.approx(with_sinkhorn(random_batch(6)), abs=1e-5)


@pytest.mark.slow
def test_each_process_disturbs_the_weights_by_its_own_gradient(of_two):
    """As accumulated batches do."""
    halves = [found["sam"] for found in of_two[1]]
    assert same(*halves)
    parts = [part_of(random_batch(6), torch.arange(first, first + 3)) for first in (0, 3)]
    expected = sharpness_aware(parts, accumulate_grad_batches=2)
    synchronised = sharpness_aware([random_batch(6)])
    errors = [
        sum((halves[0][key] - value).double().square().sum().item() for key, value in each.items())
        for each in (expected, synchronised)
    ]
    assert errors[0] < 0.1 * errors[1]


@pytest.mark.slow
@every_method_looks
def test_a_loss_that_is_not_finite_in_one_process_stops_all(of_two, name, looks):
    folder, (one, other) = of_two
    assert one[name]["nan"][looks] == other[name]["nan"][looks]
    assert "the loss is nan at optimizer step 2" in one[name]["nan"][looks]
    assert not list(folder.rglob("*.part"))
    last = torch.load(folder / f"{name} {looks}" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 2
