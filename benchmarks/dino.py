"""What the trainer costs: a step of the DINO task in Lightning, beside a bare loop of the same modules.

    python benchmarks/dino.py [--embed 192] [--depth 12] [--patch 16] [--size 96] [--batch 8]
        [--out-dim 65536] [--steps 20] [--threads N]

Both sides take the same batches from memory, with the same student, teacher, loss, clipping per parameter,
AdamW and moving average, and their steps alternate in one process: the machines are shared. Ours is a run
with TensorBoard's log and the callback that measures throughput, without a progress bar. Medians, and the
median ratio of neighbouring steps.
"""

import argparse
import logging
import warnings
from collections.abc import Callable, Iterator
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch.optim import AdamW

import locat_lightning  # noqa: F401 - registers the models
from locat_lightning.callbacks.throughput import Throughput
from locat_lightning.data.views import ViewBatch, Views
from locat_lightning.methods import Dino

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WARMUP = 3  # steps that are not counted
BATCHES = 4  # different ones, over and over


def now() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return perf_counter()


def random_batch(args: argparse.Namespace, seed: int) -> ViewBatch:
    generator = torch.Generator().manual_seed(seed)
    views = [
        Views(torch.randn(count, args.batch, 3, size, size, generator=generator).to(DEVICE), None)
        for count, size in ((2, args.size), (8, args.size // 2))
    ]
    return ViewBatch(views, torch.full((args.batch,), -1), torch.arange(args.batch))


def build(args: argparse.Namespace) -> Dino:
    seed_everything(0, verbose=False)
    size = {"img_size": args.size, "patch_size": args.patch, "embed_dim": args.embed, "depth": args.depth}
    task = Dino("locatvit_tiny", backbone_args=size, out_dim=args.out_dim, lr=1e-4, warmup_epochs=0)
    task.configure_model()
    return task


def bare_step(task: Dino, steps: int) -> Callable[[ViewBatch], float]:
    """A step as one writes it without a trainer: it takes only modules and schedule from the task."""
    task.to(DEVICE)
    student, teacher, loss = task.student, task.teacher, task.loss
    trained = [p for p in student.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim > 1]},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = AdamW(groups, lr=1e-4, weight_decay=0.04)
    task.peak_lr, task.steps, task.warmup = 1e-4, steps, 0
    done = 0

    def step(batch: ViewBatch) -> float:
        nonlocal done
        lr, weight_decay = task.rates(done)
        matrices, others = optimizer.param_groups
        matrices["lr"] = others["lr"] = lr
        matrices["weight_decay"] = weight_decay
        views = [each.crops for each in batch.views]
        with torch.no_grad():
            _, taught = teacher(views[:1])
        _, learnt = student(views)
        value = loss(loss.teacher_probabilities(taught, 0.04), learnt)
        optimizer.zero_grad()
        value.backward()
        gradients = [p.grad for p in student.parameters() if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients))
        torch._foreach_mul_(gradients, (3.0 / (norms + 1e-6)).clamp(max=1).unbind())
        student.head.cancel_last_layer_gradients(0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(
                list(teacher.parameters()), list(student.parameters()), 1 - task.momentum(done)
            )
        loss.move_center()
        done += 1
        return float(value.detach())

    return step


class Alternating(LightningDataModule):
    """Batches for the trainer; before it gets one, the bare loop takes a step with it.

    Attributes:
        ours: seconds from handing out a batch until the next one is asked for.
        bare: seconds of the bare steps.
        losses: of the bare steps.
    """

    def __init__(self, batches: list[ViewBatch], steps: int, step: Callable[[Any], float]) -> None:
        super().__init__()
        self.batches, self.steps, self.step = batches, steps, step
        self.batch_size = len(batches[0].labels)
        self.ours: list[float] = []
        self.bare: list[float] = []
        self.losses: list[float] = []

    def train_dataloader(self) -> "Alternating":
        """Itself."""
        return self

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[ViewBatch]:
        for number in range(self.steps):
            batch = self.batches[number % len(self.batches)]
            start = now()
            self.losses.append(self.step(batch))
            middle = now()
            yield batch
            self.bare.append(middle - start)
            self.ours.append(now() - middle)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = {"embed": 192, "depth": 12, "patch": 16, "size": 96, "batch": 8, "out-dim": 65536, "steps": 20}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    steps = args.steps + WARMUP + 1  # with the last one the epoch ends too: it is not counted
    batches = [random_batch(args, seed) for seed in range(BATCHES)]
    data = Alternating(batches, steps, bare_step(build(args), steps))
    task = build(args)
    with TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator=DEVICE.type,
            devices=1,
            max_epochs=1,
            logger=TensorBoardLogger(folder),
            callbacks=[Throughput()],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        trainer.fit(task, data)
    bare, ours = (times[WARMUP : WARMUP + args.steps] for times in (data.bare, data.ours))
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {args.threads} threads"
    print(f"torch {torch.__version__}, {device}; a loss of {data.losses[-1]:.6f} bare, ", end="")
    print(f"{trainer.callback_metrics['train/loss'].item():.6f} ours\n")
    what = f"DINO step, embed {args.embed}, depth {args.depth}, {args.size} and {args.size // 2} px, batch"
    print(f"| {'':58} | {'bare loop':>10} | {'Lightning':>10} | overhead |")
    print("|".join(["", *("-" * width for width in (60, 12, 12, 10)), ""]))
    ratio = median(b / a for a, b in zip(bare, ours, strict=True))
    print(
        f"| {f'{what} {args.batch}':58} | {1e3 * median(bare):7.1f} ms | {1e3 * median(ours):7.1f} ms "
        f"| {100 * (ratio - 1):6.1f} % |"
    )


if __name__ == "__main__":
    main()
