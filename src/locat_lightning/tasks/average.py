"""A moving average of all weights, on their device, which is validated and saved in their place."""

from itertools import chain
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn

from locat_lightning.tasks.sharding import ShardedStrategy, gather, part_of, release


class WeightAverage(EMAWeightAveraging):
    """Lightning's `EMAWeightAveraging` that never waits for a GPU, and whose validation may be interrupted.

    Lightning's makes the average before the weights have moved to their device, so that each step copies all
    of them to the CPU, and reads a counter on the device. For a validation it exchanges weights and average,
    and an interrupted run would save them exchanged: here the weights come back from a copy.
    """

    _trained: list[Tensor] = []  # noqa: RUF012 - the copy during a validation; never changed in place

    def __init__(self, decay: float) -> None:
        super().__init__(decay=decay)
        self.decay = decay

    @property
    def state_key(self) -> str:  # as in the checkpoints of earlier versions
        return EMAWeightAveraging.__qualname__

    # Private, below: the attributes in which Lightning keeps the average, and how far it is.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)
        average, network = self._average_model, frozen_in(pl_module)
        if average is not None and network is not None and not isinstance(trainer.strategy, ShardedStrategy):
            setattr(average.module, str(pl_module.frozen), network)  # instead of a copy

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(trainer.strategy, ShardedStrategy) and self._average_model is not None:
            trainer.strategy.shard(self._average_model.module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step, average = trainer.global_step, self._average_model
        assert average is not None
        if step > self._latest_update_step and self.should_update(step_idx=step - 1):
            move(average.module, pl_module, 1 - self.decay if self._latest_update_step else 1.0)
            average.n_averaged += 1
            self._latest_update_step = step

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._average_model is not None:
            self._trained = [each.detach().clone() for each in tensors_of(pl_module)]
            self._copy_average_to_current(pl_module)
            gather(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._take_back(pl_module)
        gather(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._take_back(pl_module)

    def _take_back(self, module: LightningModule) -> None:
        if self._trained:
            for tensor, trained in zip(tensors_of(module), self._trained, strict=True):
                tensor.data.copy_(trained)
        self._trained = []

    def _copy_average_to_current(self, pl_module: LightningModule) -> None:
        assert self._average_model is not None
        move(pl_module, self._average_model.module, 1.0)


def frozen_in(module: nn.Module) -> nn.Module | None:
    """Return the network of a task that is frozen; None if it has none."""
    network = getattr(module, getattr(module, "frozen", ""), None)
    trained = network is None or any(parameter.requires_grad for parameter in network.parameters())
    return None if trained else network


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Return parameters and buffers, without a frozen network's; of a sharded module, a process's parts."""
    release(module)
    network = frozen_in(module) or nn.Module()
    frozen = {id(each) for each in chain(network.parameters(), network.buffers())}
    own = chain(module.parameters(), module.buffers())
    return [part_of(each.detach()) for each in own if id(each) not in frozen]


@torch.no_grad()
def move(average: nn.Module, module: nn.Module, weight: float) -> None:
    """Move parameters and buffers of an average by a share of the way to those of a module: 1 copies them."""
    own: list[Tensor] = []
    new: list[Tensor] = []
    for a, b in zip(tensors_of(average), tensors_of(module), strict=True):
        if a.is_floating_point():
            own.append(a)
            new.append(b)
        else:
            a.copy_(b)
    torch._foreach_lerp_(own, new, weight)  # private: torch has no other with all tensors in one kernel
