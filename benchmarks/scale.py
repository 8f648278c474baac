"""What a run on 1 to 1,024 GPUs needs, on paper, from figures of one process: `make scale`.

    python benchmarks/scale.py [--config dino_small] [--rate 500] [--image-bytes 110000] [--write-speed BYTES]

Bytes follow from the model that a config builds (on the meta device) and from how often a step calls each
part that is sharded, which is counted in a step of a model of two blocks. How fast a checkpoint is written
is measured here, in one process. What this machine cannot show is an option: the images a GPU trains on in a
second, and the size of an image on disk. `tests/tasks/test_sharding.py` compares `collectives` with what two
processes send. The tables of docs/scaling.md are between `<!-- scale -->` and `<!-- /scale -->`.
"""

import argparse
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import yaml
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils.data import DataLoader

from locat.configs import config_directory
from locat_lightning import tasks
from locat_lightning.callbacks.checkpoints import CheckpointFiles
from locat_lightning.data.dataset import ImageBatch
from locat_lightning.data.views import ViewBatch, Views
from locat_lightning.tasks.sharding import units

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
GPUS = (1, 8, 64, 256, 1024)
# Configs, and one of the size that sharding is for.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "classify_base": ("classify_base", {}),
    "mae_small": ("mae_small", {}),
    "dino_small": ("dino_small", {}),
    "ibot_small": ("ibot_small", {}),
    "dinov2_small": ("dinov2_small", {}),
    "dinov2_small, ViT-g/14": ("dinov2_small", {"backbone": "vit_giant_patch14_dinov2", "backbone_args": {}}),
}
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
HEADS: dict[str, float] = {
    "out_dim": 64,
    "hidden_dim": 32,
    "bottleneck_dim": 16,
    "decoder_dim": 16,
    "decoder_depth": 2,
}
HEADS |= {
    "decoder_heads": 2,
    "warmup_epochs": 0,
    "warmup_teacher_temp_epochs": 0,
    "lr": 1e-4,
    "num_classes": 9,
}
KINDS = {"all_reduce": 0, "broadcast": 0, "all_gather_single": 0, "reduce_scatter_single": 1}


class Part(NamedTuple):
    """What is sharded as one: its bytes, those that are trained, and how often a step calls it."""

    whole: int
    trained: int
    calls: int


class Model(NamedTuple):
    """What of a model decides what a run needs: bytes of float32 weights, and its parts."""

    whole: int
    trained: int
    tensors: int
    parts: list[Part]
    rest: Part
    reduced: int  # bytes that the method itself reduces in a step, as for its centre


class Count(Callback):
    """Bytes of each kind of collective in the last batch: of what is reduced, or of what is gathered."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        self.of_step: Counter[str] = Counter()

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        model: Any = trainer.strategy.model
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model.register_comm_hook(None, self._reduce)  # DDP's own reduction is not Python

    def _reduce(self, state: Any, bucket: Any) -> Any:
        self.found["gradients"] += bucket.buffer().nbytes
        return allreduce_hook(state, bucket)

    def on_train_batch_start(self, *_: Any) -> None:
        self.found.clear()

    def on_train_batch_end(self, *_: Any) -> None:
        self.of_step = self.found.copy()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is called by its name in torch.distributed."""
        own = {name: getattr(dist, name) for name in KINDS}

        def counted(name: str) -> Any:
            def call(*arguments: Any, **options: Any) -> Any:
                given = [
                    *arguments,
                    *(value for value in options.values() if isinstance(value, torch.Tensor)),
                ]
                self.found[name] += given[KINDS[name]].nbytes
                return own[name](*arguments, **options)

            return call

        for name in own:
            setattr(dist, name, counted(name))
        try:
            yield
        finally:
            for name, function in own.items():
                setattr(dist, name, function)


class Batches(LightningDataModule):
    """One batch of two images, as views or with labels."""

    batch_size, crop_size, class_names = 2, 32, [str(label) for label in range(9)]

    def train_dataloader(self) -> Any:
        images = torch.randn(2, 3, 32, 32)
        views = [Views(torch.randn(2, 2, 3, 32, 32), None), Views(torch.randn(3, 2, 3, 16, 16), None)]
        masks = torch.zeros(2, 2, 4, 4, dtype=torch.bool)
        masks[:, :, 1] = True
        batch = {
            True: ViewBatch(views, torch.full((2,), -1), torch.arange(2), masks),
            False: ImageBatch(images, torch.arange(2), torch.arange(2)),
        }
        return DataLoader([batch[self.of_views]], batch_size=None)  # type: ignore[arg-type]

    of_views = True


def task_of(config: str, options: Mapping[str, Any]) -> Any:
    """Build the task of a shipped config with other options."""
    spec = yaml.safe_load((config_directory() / f"{config}.yaml").read_text())["model"]
    name = spec["class_path"].rpartition(".")[2]
    room = tasks if hasattr(tasks, name) else import_module(f"locat_lightning.methods.{name.lower()}")
    return getattr(room, name)(**{**spec["init_args"], **options})


def calls(config: str) -> Counter[str]:
    """Count how often a step calls each kind of part, in a step of a model of two blocks."""
    task = task_of(config, {})
    known = {key: value for key, value in HEADS.items() if key in task.hp}
    task = task_of(config, known | {"backbone": "locatvit_tiny", "backbone_args": TINY})
    found: Counter[str] = Counter()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", max_steps=1, enable_checkpointing=False, **quiet)  # type: ignore[arg-type]
    data = Batches()
    data.of_views = "num_classes" not in known
    task.trainer = trainer
    task.configure_model()
    names = {module: kind(name) for name, module in task.named_modules()}
    for part in units(task):
        part.register_forward_pre_hook(lambda module, _: found.update([names[module]]))
    trainer.fit(task, datamodule=data)
    numbers = Counter(names[part] for part in units(task))
    return Counter({name: found[name] // number for name, number in numbers.items()})


def kind(name: str) -> str:
    """Return the name of a module without its places in lists."""
    return re.sub(r"\.\d+", ".*", name)


def measured(task: nn.Module, called: Mapping[str, int]) -> Model:
    """Return what decides what a run of a task needs; `called` is what `calls` returns."""
    names = {module: kind(name) for name, module in task.named_modules()}
    seen: set[int] = set()
    parts = []
    for unit in units(task):
        own = [p for p in unit.parameters() if id(p) not in seen and p.ndim]
        seen |= {id(p) for p in own}
        trained = sum(p.nbytes for p in own if p.requires_grad)
        parts.append(Part(sum(p.nbytes for p in own), trained, called[names[unit]]))
    rest = [p for p in task.parameters() if id(p) not in seen]
    trained = sum(p.nbytes for p in rest if p.requires_grad)
    everything = list(task.parameters())
    return Model(
        sum(p.nbytes for p in everything),
        sum(p.nbytes for p in everything if p.requires_grad),
        sum(p.requires_grad for p in everything),
        parts,
        Part(sum(p.nbytes for p in rest), trained, 1),
        sum(4 + b.nbytes for name, b in task.named_buffers() if name.endswith("center")),
    )


def collectives(model: Model) -> dict[str, dict[str, int]]:
    """Return the bytes of a step's collectives by strategy and kind, as `Count` does, without padding."""
    gathered = model.rest.whole + sum(p.whole * p.calls * (2 if p.trained else 1) for p in model.parts)
    return {
        "ddp": {"gradients": model.trained, "all_reduce": model.reduced},
        "fsdp": {
            "all_gather_single": gathered,
            "reduce_scatter_single": model.trained,
            "all_reduce": model.reduced + 4 * model.tensors,  # norms, to clip by
        },
    }


def sent(model: Model, strategy: str, gpus: int) -> float:
    """Return the bytes that a GPU sends in a step, with rings: a reduction is two rounds, the others one."""
    rounds = {"gradients": 2, "all_reduce": 2, "all_gather_single": 1, "reduce_scatter_single": 1}
    return sum(rounds[kind] * size * (gpus - 1) / gpus for kind, size in collectives(model)[strategy].items())


def state(model: Model, gpus: int) -> float:
    """Return the bytes of weights, gradients and AdamW's moments of a GPU in a sharded step, at its peak.

    The rest is whole in a step, with its gradients, and so are two parts: one computes, the next arrives.
    """
    whole = model.rest.whole + model.rest.trained + 2 * max(p.whole for p in model.parts)
    return (model.whole + 3 * model.trained) / gpus + (whole if gpus > 1 else 0)


def write_speed(size: int = 256 * 2**20) -> float:
    """Measure the bytes that a process writes of a checkpoint in a second, into the temporary folder.

    The best of three: the machines are shared.
    """
    weights = {"state_dict": {str(each): torch.rand(size // 4 // 16) for each in range(16)}}
    seconds = []
    with TemporaryDirectory() as folder:
        for _ in range(3):
            begun = time.perf_counter()
            CheckpointFiles().save_checkpoint(weights, Path(folder) / "last.ckpt")
            seconds.append(time.perf_counter() - begun)
    return size / min(seconds)


def models(called: Mapping[str, Mapping[str, int]]) -> dict[str, Model]:
    found = {}
    for name, (config, options) in MODELS.items():
        options = options | ({"num_classes": 1000} if config.startswith("classify") else {})
        with torch.device("meta"):
            task = task_of(config, options)
            task.configure_model()
        found[name] = measured(task, called[config])
    return found


def table_of_models(found: Mapping[str, Model]) -> list[str]:
    lines = [
        "| | weights, trained | checkpoint | DDP: reduced a step | state "
        "| FSDP: gathered + scattered a step | state on 8 GPUs | on 64 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, model in found.items():
        bytes_of = collectives(model)
        both = [bytes_of["fsdp"][kind] for kind in ("all_gather_single", "reduce_scatter_single")]
        cells = [
            f"{model.whole / 4e6:,.1f} M, {model.trained / 4e6:,.1f} M",
            f"{(model.whole + 2 * model.trained) / 1e9:.2f} GB",
            f"{sum(bytes_of['ddp'].values()) / 1e6:,.0f} MB",
            f"{(model.whole + 3 * model.trained) / 1e9:.2f} GB",
            " + ".join(f"{each / 1e6:,.0f}" for each in both) + " MB",
            *(f"{state(model, gpus) / 1e9:.2f} GB" for gpus in (8, 64)),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def table_of_gpus(model: Model, batch: int, args: argparse.Namespace) -> list[str]:
    lines = [
        "| GPUs | batch | a GPU sends a step: DDP | FSDP | in the time of a step: DDP | FSDP "
        "| images read | bytes read | checkpoint by one process | in parts |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    size, seconds = model.whole + 2 * model.trained, batch / args.rate
    for gpus in GPUS:
        both = [sent(model, strategy, gpus) for strategy in ("ddp", "fsdp")]
        read = gpus * args.rate
        cells = [
            f"{gpus * batch:,}",
            *(f"{each / 1e6:,.0f} MB" for each in both),
            *(f"{each * 8 / seconds / 1e9:.1f} Gbit/s" for each in both),
            f"{read:,.0f}/s",
            f"{read * args.image_bytes / 1e9:.2f} GB/s",
            f"{size / args.write_speed:.1f} s",
            f"{size / gpus / args.write_speed:.2f} s",
        ]
        lines.append(f"| {gpus:,} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="dino_small", choices=MODELS)
    parser.add_argument("--rate", type=float, default=500, help="images that a GPU trains on in a second")
    parser.add_argument("--image-bytes", type=float, default=110e3, help="of an image on disk")
    parser.add_argument("--write-speed", type=float, help="bytes a second; measured by default")
    args = parser.parse_args()
    args.write_speed = args.write_speed or write_speed()
    found = models({config: calls(config) for config, _ in MODELS.values()})
    config = yaml.safe_load((config_directory() / f"{MODELS[args.config][0]}.yaml").read_text())
    batch = config["data"]["init_args"]["batch_size"]
    text = "\n".join(
        [
            *table_of_models(found),
            "",
            f"`{args.config}` with {batch} images a GPU, if a GPU trains on {args.rate:,.0f} a second (not",
            f"measured: an assumption), an image has {args.image_bytes / 1e3:.0f} kB (about ImageNet-1K's",
            f"mean), and a process writes {args.write_speed / 1e9:.2f} GB/s (measured on a busy CPU):",
            "",
            *table_of_gpus(found[args.config], batch, args),
        ]
    )
    print(text)
    page = PAGE.read_text()
    inside = r"(<!-- scale -->\n).*?(\n<!-- /scale -->)"
    PAGE.write_text(re.sub(inside, lambda found: f"{found[1]}{text}{found[2]}", page, flags=re.DOTALL))


if __name__ == "__main__":
    main()
