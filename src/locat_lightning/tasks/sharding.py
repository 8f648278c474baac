"""Fully sharded training (FSDP2): each process keeps its part of weights, gradients and optimizer states.

`--trainer.strategy fsdp` shards any task by one rule, without its help: the elements of each list of modules
of one class (blocks of backbones and decoders, the teacher's too) one by one, and the task with what is left.
A training step gathers what is left as it begins, and a block when it is called. Outside training steps the
model is whole in every process, so that each may evaluate, measure or draw on its own.

Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", VLDB 2023.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm

from locat_lightning.backbones.parts import PARTS, new_folder, split, write_part
from locat_lightning.errors import InputError


class ShardedStrategy(DDPStrategy):
    """Lightning's DDPStrategy with a model that is sharded instead of copied (see the module).

    The optimizer steps on the parts. A checkpoint has a file for each process, see `backbones.parts`.

    Args:
        options: those of `DDPStrategy` that are not of DDP itself: `timeout`, `process_group_backend`.
    """

    _synchronises = True  # in a backward pass whose gradients are averaged

    def configure_ddp(self) -> None:
        task: Any = self.lightning_module
        self.shard(task)
        register_fsdp_forward_method(task, "training_step")

    def shard(self, module: nn.Module) -> None:
        """Shard a module over all processes, after they have taken the weights of the first."""
        shard(module, init_device_mesh(self.root_device.type, (self.world_size,)))

    def setup(self, trainer: Trainer) -> None:
        if trainer.precision == "16-mixed":
            raise InputError(
                "trainer.precision (16-mixed) is not for --trainer.strategy fsdp: use bf16-mixed"
            )
        super().setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            task: Any = self.lightning_module
            events = ("on_train_start", "on_train_epoch_end", "on_validation_epoch_start")
            gather_it: dict[str, Any] = dict.fromkeys(events, lambda *_: gather(task))
            own = LambdaCallback(on_train_batch_start=lambda *_: release(task), **gather_it)
            trainer.callbacks.insert(0, own)  # type: ignore[attr-defined]

    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            if not type(optimizer).__module__.startswith("torch.optim."):
                raise InputError(
                    f"model.optimizer: {type(optimizer).__name__} does not step on parts of parameters: with "
                    "--trainer.strategy fsdp use adamw"
                )
            for group in optimizer.param_groups:
                if len({isinstance(each, DTensor) for each in group["params"]}) > 1:
                    group |= {"foreach": False, "fused": None}  # torch has no kernel for both kinds together

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Keep the gradients of a batch that is followed by others of its step; they take their full size."""
        task: Any = self.lightning_module
        task.set_requires_gradient_sync(False)
        self._synchronises = False
        try:
            yield
        finally:
            task.set_requires_gradient_sync(True)
            self._synchronises = True

    def post_backward(self, closure_loss: Tensor) -> None:
        """Average the gradients of parameters that are not sharded: those without dimensions."""
        task: Any = self.lightning_module
        gradients = [p.grad for p in task.parameters() if p.ndim == 0 and p.grad is not None]
        if self._synchronises and gradients:
            mean = torch.stack(gradients) / self.world_size
            dist.all_reduce(mean)
            torch._foreach_copy_(gradients, mean.unbind())

    def teardown(self) -> None:
        if self.lightning_module is not None:
            release(self.lightning_module)  # a whole one, as of a step that has failed, cannot be moved
        super().teardown()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write the parts of all processes, then what says how they fit together. All processes call it."""
        path = Path(filepath)
        if "://" in str(filepath):
            raise InputError(
                f"{filepath}: checkpoints of a sharded run are written to folders, no other store"
            )
        rows: dict[int, Tensor] = {}
        whole = split(checkpoint, lambda each: each.to_local() if isinstance(each, DTensor) else None, rows)
        folder: int = self.broadcast(new_folder(path) if self.is_global_zero else 0)
        failure: OSError | None = None
        try:
            write_part(path, folder, self.global_rank, rows)
        except OSError as error:
            failure = error
        if not self.reduce_boolean_decision(failure is None, all=True):
            raise failure or OSError(f"another process could not write its part of {path}")
        whole[PARTS] = {"folder": folder, "processes": self.world_size}
        super().save_checkpoint(whole, filepath, storage_options)

    def on_validation_start(self) -> None:
        """Give all processes the running statistics of the first, which a checkpoint has."""
        task: Any = self.lightning_module
        for module in task.modules():
            for statistic in module.buffers(recurse=False) if isinstance(module, _BatchNorm) else ():
                dist.broadcast(statistic, src=0)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this process's parts of the states in a checkpoint, which holds them whole."""
        for optimizer, found in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = {
                position: {name: part_like(parameters[position], value) for name, value in values.items()}
                for position, values in found["state"].items()
            }
            optimizer.load_state_dict(found | {"state": state})


def units(task: nn.Module) -> list[nn.Module]:
    """Return what is sharded one by one: modules that several others share, then the elements of lists.

    A list counts if it has more than one element, all of one class. Inner lists come before outer ones.
    """
    lists = [each for each in task.modules() if isinstance(each, nn.Sequential | nn.ModuleList)]
    repeated = [part for each in lists if len(each) > 1 and len({*map(type, each)}) == 1 for part in each]
    holders = Counter(chain.from_iterable(set(module.children()) for module in set(task.modules())))
    shared = [module for module, number in holders.items() if number > 1]
    found = [*shared, *reversed(repeated)]
    return [each for each in dict.fromkeys(found) if any(p.ndim for p in each.parameters())]


def shard(task: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a model over the processes of a mesh, after all have the weights of the first."""
    for tensor in chain(task.parameters(), task.buffers()):
        dist.broadcast(tensor.detach(), src=0)
    scalars = {parameter for parameter in task.parameters() if parameter.ndim == 0}
    for each in (*units(task), task):
        fully_shard(each, mesh=mesh, ignored_params=scalars)
    # Private: the first module to be called would be taken for the root, and a validation calls the backbone.
    task._get_fsdp_state()._lazy_init()  # type: ignore[operator]
    release(task)


def gather(module: nn.Module) -> None:
    """Make a sharded model whole in every process, until it is released. All processes call it."""
    for each in module.modules():
        if isinstance(each, FSDPModule):
            each.set_reshard_after_forward(False, recurse=False)
            each.unshard()


def release(module: nn.Module) -> None:
    """Leave to each process its part of a sharded model."""
    for each in module.modules():
        if isinstance(each, FSDPModule):
            each.set_reshard_after_forward(each is not module, recurse=False)
            each.reshard()
            # Private: the order in which a backward pass gathers, in which processes that have evaluated on
            # their own would differ.
            each._get_fsdp_state()._comm_ctx.post_forward_order.clear()


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Make a sharded model whole within a training step. All processes call it."""
    gather(module)
    yield
    release(module)


def part_of(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process has: all of it where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_like(parameter: Tensor, value: Any) -> Any:
    """Return this process's part of a value that has the shape of a parameter; another value as it is."""
    if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape:
        value = value.to(parameter.device)
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return value


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """Return the 2-norms [len(tensors)] of tensors that may be sharded. All processes call it."""
    # Private, but the only way to have all norms in one kernel; torch's own clipping does the same.
    own = torch.stack(torch._foreach_norm([part_of(each) for each in tensors]))
    sharded = [isinstance(each, DTensor) for each in tensors]
    if not any(sharded):
        return own
    squares = own.square()
    squares[[not each for each in sharded]] /= dist.get_world_size()  # which each process has whole
    dist.all_reduce(squares)
    return squares.sqrt()


def clip(gradients: Sequence[Tensor], lengths: Tensor, most: float) -> None:
    """Scale gradients that may be sharded to a length of at most `most`: by their norms, or a common one."""
    shares = (most / (lengths + 1e-6)).clamp(max=1).expand(len(gradients)).unbind()
    torch._foreach_mul_([part_of(each) for each in gradients], shares)
