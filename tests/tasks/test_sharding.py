"""Sharded training: two processes are one, and their checkpoints are anyone's."""

import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.tensor import DTensor

from locat_lightning.backbones.weights import read_checkpoint
from locat_lightning.callbacks.checkpoints import CheckpointFiles
from locat_lightning.callbacks.kernels import KernelWidths
from locat_lightning.callbacks.signs import FeatureSigns
from locat_lightning.data.dataset import ImageBatch
from locat_lightning.data.segmentation import MaskBatch
from locat_lightning.errors import InputError
from locat_lightning.tasks import Classification
from locat_lightning.tasks.sharding import ShardedStrategy, units
from tests.methods import runs
from tests.tasks import test_classification, test_segmentation

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start"),
    pytest.mark.filterwarnings("ignore:.*using the WeightAveraging callback"),
    pytest.mark.filterwarnings("ignore:.*is deprecated, use:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]

BATCHES = 2  # of an epoch
# Uneven parts everywhere: no dimension of a bias or a token is even in all of them.
GATED = {"locat": {"start": "identity", "prr": True}}


def classification(folder):
    seed_everything(0)
    options = {"mixup": 0.0, "cutmix": 0.0, "lr": 1e-3, "warmup_epochs": 0, "ema": 0.5}
    return Classification(
        "vit_tiny_patch16_224", backbone_args=test_classification.BACKBONE, **GATED, **options
    )


def segmentation(folder):
    return test_segmentation.task(folder / "backbone.pt", checkpoint_blocks=False)


def method(name):
    return lambda folder: runs.small(name, checkpoint_blocks=name == "Dinov2")


def classes(rank, processes):
    data = test_classification.Batches(batches=BATCHES)
    data.items = [ImageBatch(*(part[rank::processes] for part in batch)) for batch in data.items]
    data.batch_size //= processes
    return data


def masks(rank, processes):
    data = test_segmentation.Batches(batches=BATCHES, size=4)
    data.items = [MaskBatch(*(part[rank::processes] for part in batch)) for batch in data.items]
    data.batch_size //= processes
    return data


def views(rank, processes):
    whole = [runs.random_batch(6, seed) for seed in range(BATCHES)]
    return runs.Batches([runs.part_of(batch, torch.arange(rank, 6, processes)) for batch in whole])


VALUE = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}
CASES = {
    "Classification": (classification, classes, {"gradient_clip_val": 0.5}),
    "Segmentation": (segmentation, masks, VALUE),
    "Dino": (method("Dino"), views, {}),
    "Mae": (method("Mae"), views, {}),
    "Dinov2": (method("Dinov2"), views, {"accumulate_grad_batches": 2}),
    "LocalityAdaptation": (method("LocalityAdaptation"), views, {}),
}
every_case = pytest.mark.parametrize("name", CASES)


class Norms(Callback):
    """The norm of the gradients of each step, as it is logged."""

    def __init__(self):
        self.found = {}

    def on_train_batch_end(self, trainer, module, *_):
        if "train/grad_norm" in trainer.callback_metrics:  # a batch that is resumed between may have none
            self.found[trainer.global_step] = float(trainer.callback_metrics["train/grad_norm"])


def scale():
    """The module of `benchmarks/`, which is no package."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    try:
        return import_module("scale")
    finally:
        del sys.path[0]


def whole(module):
    """The weights of a module, of which each process may have a part."""
    return {
        key: (value.full_tensor() if isinstance(value, DTensor) else value).clone()
        for key, value in module.state_dict().items()
    }


def run(name, folder, saved, rank=0, processes=1, **how):
    """Train for two epochs, or resume after the first; return norms, and all weights."""
    make, batches, options = CASES[name]
    module, norms = make(folder), Norms()
    saving = ModelCheckpoint(saved / name, filename="{epoch}", save_on_train_epoch_end=True, save_top_k=-1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"accelerator": "cpu", "log_every_n_steps": 3, "use_distributed_sampler": False}
    trainer = Trainer(
        default_root_dir=folder,
        callbacks=[norms, saving, FeatureSigns(), KernelWidths(), count := scale().Count()],
        plugins=[CheckpointFiles()],
        **(quiet | {"max_epochs": 2} | options),
        **({"devices": 2, "strategy": ShardedStrategy()} if processes == 2 else {}),
    )
    with count.counting():
        trainer.fit(module, datamodule=batches(rank, processes), weights_only=True, **how)
    own = [p.to_local() if isinstance(p, DTensor) else p for p in module.parameters()]
    return {
        "norms": list(norms.found.values()),
        "weights": whole(module),
        "numbers": sum(each.numel() for each in own),
        "sent": dict(count.of_step),
    }


def of_experts(folder, rank=0, processes=1, **how):
    """Weights after one step, which leaves all experts alike, whichever tokens each of them had."""
    seed_everything(rank)  # tokens are shared out differently in each process
    data, options = classes(rank, processes), {"experts": 2, "expert_share": 0.5, "optimizer": "sgd"}
    options |= {"mixup": 0.0, "cutmix": 0.0, "lr": 0.1, "warmup_epochs": 0, "weight_decay": 0.0}
    module = Classification(
        "vit_tiny_patch16_224", backbone_args=test_classification.BACKBONE, **GATED, **options
    )
    test_classification.fit(folder, module, data, max_steps=1, use_distributed_sampler=False, **how)
    return whole(module.backbone)


def in_two_processes(rank, folder):
    """Runs, and runs that resume from checkpoints of one process: all in one launch, which takes long."""
    found = {
        name: of_experts(folder, rank, 2, devices=2, strategy=strategy)
        for name, strategy in {"ddp": "ddp", "fsdp": ShardedStrategy()}.items()
    }
    for name in CASES:
        uninterrupted = run(name, folder, folder / "two", rank, 2)
        resumed = run(
            name, folder, folder / "none", rank, 2, ckpt_path=folder / "one" / name / "epoch=0.ckpt"
        )
        found[name] = {"whole": uninterrupted, "resumed": resumed}
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def of_one_and_two(tmp_path_factory, two_processes):
    """What one process found, what two, and the folder of their checkpoints."""
    folder = tmp_path_factory.mktemp("sharded")
    test_segmentation.weights_in(folder)
    one = {name: run(name, folder, folder / "one") for name in CASES}
    two_processes(in_two_processes, folder)
    return folder, one, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def close(found, expected):
    for key, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][key], value, atol=1e-4, rtol=0, msg=key)


@every_case
def test_two_processes_are_one_with_half_of_the_weights_each(of_one_and_two, name):
    _, one, (first, second) = of_one_and_two
    close(first[name]["whole"], one[name])
    found, expected = (torch.tensor(each["norms"]) for each in (first[name]["whole"], one[name]))
    torch.testing.assert_close(found, expected, atol=0, rtol=1e-4)
    assert all(
        torch.equal(a, second[name]["whole"]["weights"][key])
        for key, a in first[name]["whole"]["weights"].items()
    )
    most = one[name]["numbers"]
    assert first[name]["whole"]["numbers"] + second[name]["whole"]["numbers"] < 1.001 * most + 2
    assert first[name]["whole"]["numbers"] < 0.6 * most


@every_case
def test_a_run_resumes_on_another_number_of_processes(of_one_and_two, name, tmp_path):
    folder, one, (first, _) = of_one_and_two
    close(first[name]["resumed"], one[name])  # 1 -> 2
    close(run(name, folder, tmp_path, ckpt_path=folder / "two" / name / "epoch=0.ckpt"), one[name])  # 2 -> 1
    assert len(list((folder / "two" / name / "epoch=0.parts" / "0").iterdir())) == 2


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_experts_learn_from_each_other_over_two_processes(of_one_and_two, strategy, tmp_path):
    """Their mean has the mean gradient over all tokens; by a share of ½, both become that mean."""
    one = of_experts(tmp_path)
    for each in of_one_and_two[2]:
        torch.testing.assert_close(each[strategy], one, atol=1e-5, rtol=0)
    first, second = (one[f"blocks.1.mlp.experts.{number}.fc1.weight"] for number in (0, 1))
    torch.testing.assert_close(first, second)


def test_a_checkpoint_without_one_of_its_parts(of_one_and_two, tmp_path):
    file = of_one_and_two[0] / "two" / "Mae" / "epoch=0.ckpt"
    alone = tmp_path / "alone.ckpt"
    alone.write_bytes(file.read_bytes())
    with pytest.raises(
        InputError, match=r"alone\.ckpt is in parts, and .*0\.pt is missing: copy .*alone\.parts"
    ):
        read_checkpoint(alone)
    part = tmp_path / "alone.parts" / "0" / "1.pt"
    part.parent.mkdir(parents=True)
    for rank in range(2):
        part.with_name(f"{rank}.pt").write_bytes((file.with_suffix(".parts") / "0" / "0.pt").read_bytes())
    with pytest.raises(InputError, match="do not fit"):
        read_checkpoint(alone)


def test_what_is_sharded_one_by_one():
    task = runs.small("Mae")
    found = {name for name, module in task.named_modules() if any(module is each for each in units(task))}
    assert {"backbone.blocks.0", "backbone.blocks.1"} <= found
    assert all(name.rpartition(".")[2].isdigit() for name in found)


@pytest.mark.parametrize(("name", "config", "in_vain"), [("Mae", "mae_small", 0), ("Dino", "dino_small", 1)])
def test_what_is_sent_is_what_make_scale_says(of_one_and_two, name, config, in_vain):
    """But for padding, and for a block that is gathered ahead of a backward pass that it has no part in."""
    found = of_one_and_two[2][0][name]["whole"]["sent"]
    model = scale().measured(runs.small(name), scale().calls(config))
    expected = scale().collectives(model)["fsdp"]
    ahead = in_vain * model.parts[-1].whole
    assert found["all_gather_single"] == pytest.approx(expected["all_gather_single"] + ahead, rel=0.03)
    assert found["reduce_scatter_single"] == pytest.approx(expected["reduce_scatter_single"], rel=0.03)
    assert found["all_reduce"] == expected["all_reduce"] + 4  # a CPU looks at each loss
