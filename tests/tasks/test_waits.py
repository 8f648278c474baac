"""No step of a training waits for a GPU, except where it is logged: counted on a CPU, and tried on a GPU."""

from collections import Counter
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from traceback import extract_stack

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from locat_lightning.callbacks.throughput import Throughput
from locat_lightning.data.depth import DepthBatch
from locat_lightning.tasks import Classification, Depth
from locat_lightning.tasks.base import Task
from tests.methods.runs import METHODS, Batches, random_batch, small, trainer
from tests.tasks import test_classification, test_segmentation

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start"),
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback"),
]
TORCH = str(Path(torch.__file__).parent)
LOGGED, STEPS = 2, 4  # every second step is logged
# Operators whose result the host has to know, or whose size depends on values.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "unique_consecutive", "_unique2", "bincount"}
WAITING |= {"equal", "is_nonzero", "linalg_svd", "_linalg_svd"}
# Functions that bring values to the host without an operator.
READING = {"tolist", "cpu", "numpy", "item", "__bool__", "__float__", "__int__", "__index__"}


class Operators(TorchDispatchMode):
    """Counts operators that wait, by the batch that is trained on."""

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        by_mask = name.startswith("index") and any(
            isinstance(each, torch.Tensor) and each.dtype == torch.bool
            for each in (args[1] if isinstance(args[1], list | tuple) else ())
        )
        if name in WAITING or by_mask:
            self.waits.count(name)
        return function(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    """Counts values that are read, and numbers that are copied to a device."""

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        if name in READING or (name in ("tensor", "as_tensor") and kwargs.get("device") is not None):
            self.waits.count(name)
        return function(*args, **kwargs)


class Waits(Callback):
    """What of each batch, from its start to that of the next one, would wait for a GPU."""

    def __init__(self):
        self.batch, self.of_batch = -1, Counter()

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.batch = batch_idx

    def on_train_end(self, trainer, module):
        self.batch = -1

    def count(self, name):
        if self.batch >= 0:
            calls = [each for each in extract_stack() if not each.filename.startswith((__file__, TORCH))]
            self.of_batch[self.batch, f"{name} in {calls[-1].filename}:{calls[-1].lineno}"] += 1

    def counted(self, run):
        with ExitStack() as stack:
            for mode in (Operators(self), Functions(self)):
                stack.enter_context(mode)
            run()
        return self.of_batch


def classification(tmp_path, steps, **options):
    return test_classification.task(Classification, **options), test_classification.Batches(steps)


def segmentation(tmp_path, steps, **options):
    weights = test_segmentation.weights_in(tmp_path)
    return test_segmentation.task(weights, **options), test_segmentation.Batches(steps)


def depth(tmp_path, steps, **options):
    data = test_segmentation.Batches(steps)
    data.items = [DepthBatch(images, masks.float() % 9, indices) for images, masks, indices in data.items]
    return Depth(weights=test_segmentation.weights_in(tmp_path), **options), data


def pretraining(tmp_path, steps, *, name, **options):
    batch = random_batch(4)
    indices = batch.masks.flatten().nonzero().flatten()  # as the views bring them
    return small(name, **options), Batches([batch._replace(mask_indices=indices)] * steps)


ALL_TERMS = {"koleo_weight": 0.1, "sample_drop": 0.3, "shared_head": False, "centering": "sinkhorn_knopp"}
ALL_TERMS |= {"gram_weight": 1.0, "gram_start": 1, "gram_warmup": 2, "gram_updates": [2]}
CASES = {
    "Classification": classification,
    "Classification, averaged": partial(classification, ema=0.9),
    "Classification, MixPro and SAM": partial(classification, mixing="mixpro", mixing_prob=1.0, sam=0.1),
    "Segmentation": segmentation,
    "Segmentation, whole": partial(segmentation, train_backbone=True),
    "Segmentation, a grid": partial(segmentation, head="pyramid", lrs=[0.1, 0.01]),
    "Depth": partial(depth, layers=2, steps_without_variance=2),
    **{name: partial(pretraining, name=name) for name in METHODS},
    "Dino, SAM": partial(pretraining, name="Dino", sam=0.1),
    "Dinov2, all terms": partial(pretraining, name="Dinov2", **ALL_TERMS),
}
every_task = pytest.mark.parametrize("case", CASES)


def of_gpu(monkeypatch):
    """Have a CPU look at losses, and step, as a GPU does."""
    monkeypatch.setattr(Task, "_has_to_look", Task.may_wait)
    monkeypatch.setattr(Task, "fused", True)


@every_task
def test_a_step_that_is_not_logged_never_waits(tmp_path, monkeypatch, case):
    of_gpu(monkeypatch)
    convert = LightningModule._LightningModule__to_tensor  # of numbers it makes tensors on the device

    def to_tensor(module, value, name):
        if not isinstance(value, torch.Tensor):
            waits.count(f"log {name}")
        return convert(module, value, name)

    monkeypatch.setattr(LightningModule, "_LightningModule__to_tensor", to_tensor)
    module, data = CASES[case](tmp_path, STEPS)
    waits = Waits()
    run = trainer(waits, Throughput(), log_every_n_steps=LOGGED)
    found = waits.counted(lambda: run.fit(module, data))
    assert [each for each in found if (each[0] + 1) % LOGGED] == []
    assert found  # it counts


class Strict(Callback):
    """Has torch refuse to wait for the GPU from the second step to the last but one."""

    def __init__(self, steps):
        self.modes = {1: "error", steps - 1: "default"}

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        torch.cuda.set_sync_debug_mode(self.modes.get(batch_idx, torch.cuda.get_sync_debug_mode()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_task
@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_twenty_steps_on_a_gpu_without_a_wait(tmp_path, case, precision):
    steps = 22
    module, data = CASES[case](tmp_path, steps)
    options = {"accelerator": "cuda", "devices": 1, "precision": precision, "log_every_n_steps": 1000}
    try:
        trainer(Strict(steps), Throughput(), **options).fit(module, data)
    finally:
        torch.cuda.set_sync_debug_mode("default")
