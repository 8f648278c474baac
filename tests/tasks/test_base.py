"""Options of every task: compiled backbones, recomputed blocks, averaged weights; ranges of numbers."""

from functools import partial, partialmethod

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BatchSizeFinder,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from locat_lightning.callbacks.checkpoints import Checkpoints
from locat_lightning.data.views import MultiCrop
from locat_lightning.errors import InputError
from locat_lightning.methods import Dino, Distillation
from locat_lightning.tasks import Classification, Segmentation
from locat_lightning.tasks.average import move
from tests.methods.runs import Batches as InMemory
from tests.methods.runs import fit as pretrain
from tests.methods.runs import random_batch, small, trainer
from tests.tasks import test_segmentation
from tests.tasks.test_classification import BACKBONE, Batches, fit, task
from tests.tasks.test_classification import trainer as of_classification

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start"),
    pytest.mark.filterwarnings("ignore:.*eval mode at the start"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback"),
]


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def trained(tmp_path, **options):
    """A task after two steps; mixup would change the batches in memory."""
    module = task(mixup=0, cutmix=0, **options)
    fit(tmp_path, module, Batches(batches=2), max_epochs=1)
    return module


def test_a_compiled_backbone_keeps_its_names_and_figures(tmp_path, monkeypatch):
    compile_module = torch.nn.Module.compile
    without_compiler = partialmethod(compile_module, backend="eager")
    monkeypatch.setattr(torch.nn.Module, "compile", without_compiler)
    one_block = BACKBONE | {"depth": 1}
    plain, fast = (trained(tmp_path, compile=each, backbone_args=one_block) for each in (False, True))
    assert fast.backbone._compiled_call_impl is not None
    assert plain.backbone._compiled_call_impl is None
    assert plain.state_dict().keys() == fast.state_dict().keys()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(fast.state_dict()[name], value, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("name", ["Dino", "Ibot", "SelfPatch"])
def test_both_networks_of_self_distillation_are_compiled(monkeypatch, name):
    compiled = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda *each, **options: compiled.append((*each, options))
    )
    for choice, mode in ((True, None), ("reduce-overhead", "reduce-overhead")):
        module = small(name, compile=choice)
        pretrain(module, [random_batch(2)])
        options = {"dynamic": False, "mode": mode}
        assert compiled == [(module.student, options), (module.teacher, options)]
        compiled.clear()


class Graphs(Callback):
    """A compiler that only counts the graphs that it is given, by batch."""

    def __init__(self):
        self.of_batch = []

    def __call__(self, graph, inputs):
        self.of_batch[-1] += 1
        return graph.forward

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.of_batch.append(0)


@pytest.mark.compilers
@pytest.mark.parametrize(
    ("name", "graphs"),
    [
        ("Dino", [2, 0, 0]),  # student and teacher, with backbone and head; the student's has two sizes
        ("SelfPatch", [2, 0, 0]),
        ("Ibot", [3, 0, 0]),  # the student's masked global views are a graph of their own
        ("Mae", [1, 1, 0]),  # the subset of its patches is noted in the first step
        ("SimMim", [1, 0, 0]),
        ("Distillation", [4, 0, 0]),  # two sizes of two networks
        ("Classification", [1, 0, 0]),
        ("Segmentation", [1, 1, 0]),  # the grid of its crops is noted in the first step
    ],
)
def test_nothing_is_compiled_after_the_second_step(tmp_path, monkeypatch, name, graphs):
    torch._dynamo.reset()  # its limit is by function, over all tests
    counted = Graphs()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counted))
    if name == "Classification":
        module, data = (
            task(mixup=0, cutmix=0, compile=True, backbone_args=BACKBONE | {"depth": 1}),
            Batches(3),
        )
    elif name == "Segmentation":
        module = test_segmentation.task(test_segmentation.weights_in(tmp_path), compile=True)
        data = test_segmentation.Batches(3)
    else:
        module = small(name, compile=True, backbone_args={"depth": 1})
        data = InMemory([random_batch(2)] * 3)
        data.views = MultiCrop(32, 16, 3)
    trainer(counted).fit(module, data)
    assert counted.of_batch == graphs


@pytest.mark.parametrize("name", ["Dino", "Distillation"])
def test_recomputed_blocks_train_the_same(name):
    plain, lean = (small(name, checkpoint_blocks=lean) for lean in (False, True))
    losses = [pretrain(module, [random_batch(4)] * 2).losses for module in (plain, lean)]
    assert losses[0] == losses[1]
    assert lean.networks()["student"].grad_checkpointing
    assert not lean.networks()["teacher"].grad_checkpointing


def test_recomputed_blocks_classify_the_same(tmp_path):
    plain, lean = (trained(tmp_path, checkpoint_blocks=lean) for lean in (False, True))
    assert lean.backbone.grad_checkpointing
    for name, value in plain.state_dict().items():
        assert torch.equal(value, lean.state_dict()[name]), name


def test_a_run_that_is_interrupted_in_a_validation_keeps_weights_and_average_apart(tmp_path):
    """Validated are the average weights."""

    class Interrupted(Classification):
        def validation_step(self, batch, batch_idx):
            self.trained, self.validated = steps[-1], state(self.backbone)
            raise InputError("stop")

        def on_train_batch_end(self, outputs, batch, batch_idx):
            steps.append(state(self.backbone))

    steps = []
    module = task(Interrupted, lr=0.1, ema=0.5, mixup=0, cutmix=0)
    saving = Checkpoints(tmp_path, save_last=True, save_on_exception=True)
    options = {"callbacks": [saving], "enable_checkpointing": True}
    with pytest.raises(InputError, match="stop"):
        fit(tmp_path, module, max_epochs=1, **options)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    for name, value in module.trained.items():
        assert torch.equal(saved["current_model_state"][f"backbone.{name}"], value), name
        assert torch.equal(saved["state_dict"][f"backbone.{name}"], module.validated[name]), name
    assert not torch.equal(module.trained["cls_token"], module.validated["cls_token"])


def test_averaged_weights_are_saved_and_resumed(tmp_path):
    class Watched(Classification):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            steps.append(state(self.backbone))

    steps = []
    options = {"lr": 0.1, "ema": 0.5, "mixup": 0, "cutmix": 0}
    module = task(Watched, **options)
    saving = ModelCheckpoint(tmp_path, save_last=True, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    run = fit(tmp_path, module, max_epochs=2, callbacks=[saving], enable_checkpointing=True)
    assert any(isinstance(each, EMAWeightAveraging) for each in run.callbacks)
    average = steps[0]
    for step in steps[1:]:
        average = {name: 0.5 * average[name] + 0.5 * value for name, value in step.items()}
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    for name, value in average.items():
        torch.testing.assert_close(saved[f"backbone.{name}"], value, msg=name)
    again = task(Watched, **options)
    of_classification(tmp_path, max_epochs=2).fit(
        again, datamodule=Batches(), ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True
    )
    for name, value in module.backbone.state_dict().items():
        assert torch.equal(value, again.backbone.state_dict()[name]), name


def test_a_second_average_is_refused():
    with pytest.raises(InputError, match=r"model\.ema: the teacher is a moving average already"):
        Dino(ema=0.99).check(trainer(max_epochs=20), training=True)


@pytest.mark.parametrize(
    ("cls", "callback"),
    [
        (Dino, EMAWeightAveraging()),
        (Dino, StochasticWeightAveraging(1e-3)),
        (Classification, StochasticWeightAveraging(1e-3)),
        (Classification, LearningRateFinder()),
        (Classification, BatchSizeFinder()),
        (Classification, BackboneFinetuning()),
        (Classification, BaseFinetuning()),
        (Classification, GradientAccumulationScheduler({0: 2})),
        (Classification, ModelPruning("l1_unstructured", amount=0.5)),
    ],
    ids=lambda each: each.__name__ if isinstance(each, type) else type(each).__name__,
)
def test_callbacks_that_would_change_what_the_options_say_are_refused(cls, callback):
    with pytest.raises(InputError, match=f"no {type(callback).__name__} here: "):
        cls().check(trainer(callback, max_epochs=20), training=True)


def test_an_average_is_fit_for_what_has_none():
    Classification().check(trainer(EMAWeightAveraging(), max_epochs=30), training=True)


@pytest.mark.parametrize(
    ("cls", "option"),
    [
        (Classification, "--mixup=-0.1"),
        (Classification, "--cutmix=nan"),
        (Classification, "--lr=-1"),
        (Classification, "--warmup_epochs=-1"),
        (Classification, "--label_smoothing=2"),
        (Classification, "--mixup_prob=1.5"),
        (Classification, "--ema=1.5"),
        (Segmentation, "--lr=-1"),
        (Segmentation, "--layer_decay=1.5"),
        (Segmentation, "--hidden_dim=0"),
        (Segmentation, "--stride=0"),
        (Dino, "--lr=-1"),
        (Dino, "--min_lr=nan"),
        (Dino, "--weight_decay_end=-1"),
        (Dino, "--out_dim=0"),
        (Dino, "--momentum=1.5"),
        (Dino, "--clip_grad=0"),
        (Distillation, "--patch_weight=-1"),
    ],
)
def test_numbers_out_of_range_are_refused_by_their_type(cls, option):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls)
    given = [] if cls is not Distillation else ["--teacher=t"]
    parser.parse_args(given)
    with pytest.raises(Exception, match=option.partition("=")[0].removeprefix("--")):
        parser.parse_args([*given, option])


def test_the_average_is_lightnings():
    """Of weights and counts, over some updates; the first one copies them."""
    models = [torch.nn.BatchNorm1d(5) for _ in range(4)]
    for number, model in enumerate(models):
        model.num_batches_tracked.fill_(number)
        model.weight.data.normal_(generator=torch.Generator().manual_seed(number))
    expected = AveragedModel(torch.nn.BatchNorm1d(5), avg_fn=get_ema_avg_fn(0.75), use_buffers=True)
    average = torch.nn.BatchNorm1d(5)
    for number, model in enumerate(models):
        expected.update_parameters(model)
        move(average, model, 0.25 if number else 1.0)
    torch.testing.assert_close(average.weight, expected.module.weight)
    assert average.num_batches_tracked == 3  # the newest
