"""What a training step costs with each mixing, SAM, experts, a teacher, other patches: multiples of mixup's.

    python benchmarks/mixing.py [--backbone locatvit_tiny] [--size 224] [--batch 8] [--rounds 10]

Steps (forward and backward pass) alternate in one process with one thread, and what counts is the process's
own time: the machines are shared. Medians of the ratios of neighbouring steps.
"""

import argparse
from collections.abc import Callable
from statistics import median
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any

import timm
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.trainer import Trainer

from locat_lightning.backbones.flexible import make_flexible, use_patches
from locat_lightning.data.dataset import ImageBatch
from locat_lightning.tasks import Classification
from locat_lightning.tasks.experts import add_experts

OPTIONS: dict[str, dict[str, Any]] = {
    "mixup and CutMix": {},
    "transmix": {"mixing": "transmix"},
    "transmix, refined": {"mixing": "transmix", "mixing_attention": "refined"},
    "maskmix": {"mixing": "maskmix"},
    "mixpro": {"mixing": "mixpro"},
    "patch_mixing": {"mixing": "patch_mixing"},
    "sam": {"sam": 0.05},
    "experts": {"experts": 4},
    "teacher": {"teacher_backbone": "resnet10t"},
    "patches of 8 px": {"patch": 8},
    "patches of 28 px": {"patch": 28},
    "patches of 16 px, resized from 8": {"own": 8, "patch": 16},
}
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


def step(options: dict[str, Any], args: argparse.Namespace) -> Callable[[], None]:
    """Return a training step of a new model, without optimizer and log."""
    seed_everything(0, verbose=False)
    options = dict(options)
    patch, own = options.pop("patch", 16), options.pop("own", 16)
    backbone = args.backbone
    if teacher := options.get("teacher_backbone"):
        backbone, options["teacher"] = f"{backbone}_distilled", f"{args.folder}/teacher.pth"
        torch.save(timm.create_model(teacher, num_classes=100).state_dict(), options["teacher"])
    task = Classification(
        backbone,
        backbone_args={"img_size": args.size, "patch_size": own, "dynamic_img_size": patch != own},
        num_classes=100,
        **({"mixup": 0.0, "mixing_prob": 1.0} | options),  # every batch by patches, or by CutMix
    )
    task.configure_model()
    task.add_teacher(task.backbone, [])
    if "experts" in options:
        add_experts(task.backbone, options["experts"])
    if patch != own:
        make_flexible(task.backbone, [patch])
        use_patches(task.backbone, patch)
    task.trainer = Trainer(accelerator="cpu", **QUIET)  # type: ignore[arg-type]
    task.log = task.log_dict = lambda *_, **__: None  # type: ignore[assignment, method-assign]
    batch = ImageBatch(
        torch.randn(args.batch, 3, args.size, args.size),
        torch.randint(100, (args.batch,)),
        torch.arange(args.batch),
    )

    def run() -> None:
        torch.autograd.backward(task.training_step(batch, 0))
        task.on_after_backward()
        task.zero_grad()

    return run


def seconds(run: Callable[[], None]) -> float:
    start = process_time()
    run()
    return process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--backbone", default="locatvit_tiny")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as args.folder:
        runs = {name: step(options, args) for name, options in OPTIONS.items()}
    for run in runs.values():
        run()
    rounds = [{name: seconds(run) for name, run in runs.items()} for _ in range(args.rounds)]
    first = next(iter(OPTIONS))
    print(f"{first}: {median(each[first] for each in rounds):.2f} s")
    for name in list(OPTIONS)[1:]:
        print(f"{name}: × {median(each[name] / each[first] for each in rounds):.3f}")


if __name__ == "__main__":
    main()
