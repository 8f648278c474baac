"""What the trainer costs: a step of each self-supervised method in Lightning, beside a bare loop.

    python benchmarks/methods.py [--methods Dino Ibot …] [--embed 192] [--depth 12] [--size 96] [--batch 8]
        [--out-dim 65536] [--steps 20] [--threads N]

Both sides take the same batches from memory, with the same networks, loss, clipping per parameter, AdamW and
moving average, and their steps alternate in one process: the machines are shared. Ours is a run with
TensorBoard's log and the callback that measures throughput, without a progress bar. Medians, and the median
ratio of neighbouring steps. Below that, what the objectives of patches cost alone: targets for masked patches
beside lightly's loss that centres them, the loss of patches by their number, and MAE's encoder by the
share that is visible.
"""

import argparse
import logging
import warnings
from collections.abc import Callable, Iterator
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import timm
import torch
from alternating import DEVICE, compare
from lightly.loss import IBOTPatchLoss
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger

import locat_lightning  # noqa: F401 - registers the models
from locat_lightning import methods
from locat_lightning.callbacks.throughput import Throughput
from locat_lightning.data.views import ViewBatch, Views
from locat_lightning.methods.base import Pretraining
from locat_lightning.methods.targets import Centering, Targets, masked_patch_loss

PATCH = 16
WARMUP = 3  # steps that are not counted
BATCHES = 4  # different ones, over and over
# Options of each method, with nothing that is drawn in a step, so that the losses agree.
METHODS: dict[str, dict[str, Any]] = {
    "Dino": {},
    "SelfPatch": {},
    "Ibot": {"warmup_teacher_temp_epochs": 0},
    "Dinov2": {"warmup_teacher_temp_epochs": 0, "sample_drop": 0.0},
    "Mae": {"decoder_dim": 256, "decoder_depth": 4, "decoder_heads": 8},
    "SimMim": {},
    "Distillation": {"teacher_backbone": "vit_tiny_patch16_224"},
}
WITHOUT_PROTOTYPES = {"Mae", "SimMim", "Distillation"}


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
    grid = args.size // PATCH
    masks = torch.rand(2, args.batch, grid, grid, generator=generator) < 0.3
    masks[:, ::2] = False  # half of the images
    places = masks.flatten().nonzero().flatten()
    labels = torch.full((args.batch,), -1)
    return ViewBatch(views, labels, torch.arange(args.batch), masks.to(DEVICE), places.to(DEVICE))


def build(name: str, args: argparse.Namespace) -> Pretraining:
    seed_everything(0, verbose=False)
    size = {"img_size": args.size, "patch_size": PATCH, "embed_dim": args.embed, "depth": args.depth}
    prototypes = {} if name in WITHOUT_PROTOTYPES else {"out_dim": args.out_dim}
    options = {"lr": 1e-4, "warmup_epochs": 0} | prototypes | METHODS[name]
    with TemporaryDirectory() as folder:
        if name == "Distillation":
            options |= {"teacher_args": size, "teacher": f"{folder}/teacher.pt"}
            teacher = timm.create_model(options["teacher_backbone"], **size)
            torch.save(teacher.state_dict(), options["teacher"])
        task: Pretraining = getattr(methods, name)("locatvit_tiny", backbone_args=size, **options)
        task.configure_model()
    return task


def bare_step(task: Pretraining, trainer: Trainer) -> Callable[[ViewBatch], float]:
    """The task's own loss and schedules in a bare loop; of the trainer it takes how far the run is."""
    task.to(DEVICE)
    task.trainer = trainer
    optimizer = task.configure_optimizers()
    task.on_fit_start()
    trained = [parameter for parameter in task.trained() if parameter.requires_grad]
    together = [group for group in task.clipped_together() if len(group) > 1]
    heads = getattr(getattr(task, "student", None), "heads", [])

    def step(batch: ViewBatch) -> float:
        loss = task.compute_loss(batch).loss
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        if together:
            for group in together:
                torch.nn.utils.clip_grad_norm_(group, 3.0)
        else:
            gradients = [p.grad for p in trained if p.grad is not None]
            norms = torch.stack(torch._foreach_norm(gradients))
            torch._foreach_mul_(gradients, (3.0 / (norms + 1e-6)).clamp(max=1).unbind())
        for head in heads:
            head.cancel_last_layer_gradients(0)
        task.set_rates(optimizer.param_groups)
        optimizer.step()
        task.after_step(task.step)
        return float(loss.detach())

    return step


class Alternating(LightningDataModule):
    """Batches for the trainer; before it gets one, the bare loop takes a step with it.

    Attributes:
        ours: seconds from handing out a batch until the next one is asked for.
        bare: seconds of the bare steps.
        losses: of the bare steps.
    """

    def __init__(self, batches: list[ViewBatch], steps: int, task: Pretraining) -> None:
        super().__init__()
        self.batches, self.steps, self.task = batches, steps, task
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
        assert self.trainer is not None
        step = bare_step(self.task, self.trainer)
        for number in range(self.steps):
            batch = self.batches[number % len(self.batches)]
            start = now()
            self.losses.append(step(batch))
            middle = now()
            yield batch
            self.bare.append(middle - start)
            self.ours.append(now() - middle)


def measure_step(name: str, args: argparse.Namespace) -> str:
    """Return a row of the first table."""
    steps = args.steps + WARMUP + 1  # with the last one the epoch ends too: it is not counted
    data = Alternating([random_batch(args, seed) for seed in range(BATCHES)], steps, build(name, args))
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
        trainer.fit(build(name, args), data)
    bare, ours = (times[WARMUP : WARMUP + args.steps] for times in (data.bare, data.ours))
    ratio = median(b / a for a, b in zip(bare, ours, strict=True))
    losses = f"{data.losses[-1]:.5f} | {trainer.callback_metrics['train/loss'].item():.5f}"
    times = f"{1e3 * median(bare):.1f} ms | {1e3 * median(ours):.1f} ms"
    return f"| {name} | {losses} | {times} | {100 * (ratio - 1):.1f} % |"


def patches_loss(centering: Centering, masked: int, prototypes: int) -> Callable[[], object]:
    """The loss of masked patches from the teacher's and the student's logits, forward and backward."""
    taught, learnt = (torch.randn(masked, prototypes, device=DEVICE) for _ in range(2))
    targets = Targets(prototypes, centering, 0.9).to(DEVICE)
    weights = torch.full((masked,), 1 / masked, device=DEVICE)

    def run() -> object:
        logits = learnt.detach().requires_grad_()
        torch.autograd.backward(masked_patch_loss(targets(taught, 0.07), logits / 0.1, weights, 1))
        if centering == "centering":
            targets.add_to_center(taught.sum(0), masked)
            targets.move_center()
        return logits.grad

    return run


def patch_head(masked: int, args: argparse.Namespace) -> Callable[[], torch.Tensor]:
    """The loss of masked patches from their features, forward: the student's head and the prototypes."""
    task: Any = build("Ibot", args).to(DEVICE)
    patches = torch.randn(masked, args.embed, device=DEVICE, requires_grad=True)
    p = torch.full((masked, args.out_dim), 1 / args.out_dim, device=DEVICE)
    weights = torch.full((masked,), 1 / masked, device=DEVICE)
    return lambda: masked_patch_loss(p, task.student.patch_logits(patches) / 0.1, weights, 1)


def lightlys_loss(masked: int, prototypes: int) -> Callable[[], object]:
    taught, learnt = (torch.randn(masked, prototypes, device=DEVICE) for _ in range(2))
    loss = IBOTPatchLoss(output_dim=prototypes).to(DEVICE)
    mask = torch.ones(1, masked, 1, dtype=torch.bool, device=DEVICE)

    def run() -> object:
        logits = learnt.detach().requires_grad_()
        torch.autograd.backward(loss(taught, logits, mask))
        return logits.grad

    return run


def measure_parts(args: argparse.Namespace) -> Iterator[str]:
    """Yield the rows of the second table."""
    masked, prototypes, rounds = 512, 8192, max(3, args.steps // 2)
    plain = lightlys_loss(masked, prototypes)
    kinds: tuple[Centering, ...] = ("centering", "sinkhorn_knopp")
    for kind in kinds:
        what = f"{masked} masked patches, {prototypes} prototypes: {kind}, beside lightly's centring"
        yield part(what, *compare(plain, patches_loss(kind, masked, prototypes), rounds))
    few, many = (patches_loss("centering", count, prototypes) for count in (masked // 4, masked))
    yield part(f"centring of {masked} masked patches, beside {masked // 4}", *compare(few, many, rounds))
    task: Any = build("Mae", args).to(DEVICE)
    images = random_batch(args, 0).views[0].crops.flatten(0, 1)
    order = torch.rand(len(images), task.places, device=DEVICE).argsort(1)

    def encoder(visible: float) -> Callable[[], object]:
        kept = order[:, : int(task.places * visible)]
        return lambda: torch.autograd.backward(task._encode(task.backbone, images, kept).sum())

    def of_all() -> None:
        torch.autograd.backward(task.backbone.forward_features(images).sum())

    for visible in (0.5, 0.25):
        what = f"MAE's encoder, {visible:.0%} of the patches visible, beside a plain pass over all"
        yield part(what, *compare(of_all, encoder(visible), rounds))
    few_mib, many_mib = (kept(patch_head(count, args)) / 2**20 for count in (masked // 4, masked))
    what = f"memory of the patch head: {masked} masked patches, beside {masked // 4}"
    yield f"| {what} | {few_mib:.1f} MiB | {many_mib:.1f} MiB | {many_mib / few_mib:.2f} |"


def kept(run: Callable[[], torch.Tensor]) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, each tensor counted once."""
    sizes: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = run()  # keeps them alive
    assert loss.requires_grad
    return sum(sizes.values())


def part(what: str, plain: float, ours: float, ratio: float) -> str:
    return f"| {what} | {1e3 * plain:.1f} ms | {1e3 * ours:.1f} ms | {ratio:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    sizes = {"embed": 192, "depth": 12, "size": 96, "batch": 8, "out-dim": 65536, "steps": 20}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {args.threads} threads"
    print(f"torch {torch.__version__}, {device}; embed {args.embed}, depth {args.depth}, ", end="")
    print(f"{args.size} and {args.size // 2} px, batch {args.batch}, {args.out_dim} prototypes\n")
    print("| step | loss, bare | loss, ours | bare loop | Lightning | overhead |\n|---|---|---|---|---|---|")
    for name in args.methods:
        print(measure_step(name, args), flush=True)
    print("\n| part | plain | ours | ratio |\n|---|---|---|---|")
    for row in measure_parts(args):
        print(row, flush=True)


if __name__ == "__main__":
    main()
