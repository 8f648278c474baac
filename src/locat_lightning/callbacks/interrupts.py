"""How a run ends before its time: told to by a signal, or because one of its processes was lost."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from subprocess import Popen
from typing import Any, NoReturn, Self

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from locat import jobs
from locat_lightning.callbacks.checkpoints import AgreedEnd
from locat_lightning.callbacks.heartbeat import Heartbeat
from locat_lightning.data.workers import GRACE
from locat_lightning.tasks.sharding import ShardedStrategy

SIGNALS = (signal.SIGINT, signal.SIGTERM)
LAUNCHED_BY = "LOCAT_LAUNCHED_BY"  # environment variable: the process of the run that started this one
GRACE_AT_START = 3  # seconds, until the processes have met: there is nothing to save
PATIENCE = 1  # seconds, until a run is ended between batches, too: what is raised in a lock may be lost


class Interrupts(Callback):
    """Ends a run on SIGINT or SIGTERM, or when one of its processes was lost: after the batch under way.

    Between batches, as while images are listed, it ends after a second, or at once at a second signal. Of
    several processes, the first saves without waiting for the others, which may be anywhere, and ends
    them; they pass signals on to it. One that waits for a lost process does not react, and is ended. Those of
    a sharded run agree on the batch before which all save and end: the second after the signal. On SLURM's
    signal to requeue (USR1), the first process has the job queued again when the run has ended.

    Args:
        trainer: of the run.
        release: called before a process is ended that does not react.
    """

    def __init__(self, trainer: Trainer, release: Callable[[], None]) -> None:
        self.trainer = trainer
        self._release = release
        self._told = 0  # the signal
        self._lost = ""  # which process
        self._ended = False
        self._agreement: tuple[Tensor, Any] | None = None  # a signal that any was told, being exchanged
        self._group: Any = None  # of processes, which agree on it
        self._heartbeat: Heartbeat | None = None
        # Private: a strategy for one device does not know its environment.
        environment: Any = trainer._accelerator_connector.cluster_environment
        requeues = isinstance(environment, SLURMEnvironment) and environment.auto_requeue
        self._requeue_signal = environment.requeue_signal if requeues else None
        self._signals = (*SIGNALS, *filter(None, [self._requeue_signal]))
        self._others: list[Popen[bytes]] = []  # which this one has started
        self._process = os.getpid()
        # The process that started this one, if that is of the run: no launcher such as torchrun.
        is_launched = int(os.environ.get("LOCAL_RANK", 0)) > 0
        of_the_run = os.environ.get(LAUNCHED_BY) == str(os.getppid())
        self._parent = os.getppid() if is_launched and of_the_run else 0
        os.environ[LAUNCHED_BY] = str(self._process)

    def __enter__(self) -> Self:
        # Private: Lightning's own handler calls a collective wherever its process is.
        self.trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        self._before = {number: signal.signal(number, self._handle) for number in self._signals}
        threading.Thread(target=self._watch, daemon=True).start()
        if self.trainer.world_size > 1 and hasattr(signal, "pthread_sigmask"):
            # Processes that this one starts inherit it, and get signals when `locat.command` can handle them.
            # This process still gets them, through the watch thread.
            signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)
        return self

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._unblock()
        if dist.is_initialized() and trainer.world_size > 1 and self._heartbeat is None:
            store = dist.distributed_c10d._get_default_store().clone()  # private: the one that all have
            self._heartbeat = Heartbeat(store, trainer.global_rank, trainer.world_size)

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._ended = True
        self._unblock()
        if self._heartbeat is not None:
            self._heartbeat.stop()
        self._look()
        for other in self._others:
            if kind is not None:
                other.kill()
            other.wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.environ.pop(LAUNCHED_BY, None)
        if self._told and self.trainer.is_global_zero and not self.trainer.global_step:
            print("interrupted", file=sys.stderr)  # else it says how to resume
        self._requeue()
        if self._told and kind is not None and issubclass(kind, Exception):
            sys.exit(128 + self._told)  # a worker was told, too, and ended first

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_if_told()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(trainer.strategy, ShardedStrategy):
            self._group = dist.new_group(backend="gloo")  # of the hosts: no GPU waits

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._group is None:
            self._end_if_told()
            return
        if self._agreement is not None:
            told, exchange = self._agreement
            exchange.wait()
            if told:
                self._told = int(told)
                raise AgreedEnd(128 + self._told)
        told = torch.tensor(self._told)
        self._agreement = told, dist.all_reduce(told, dist.ReduceOp.MAX, self._group, async_op=True)

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._end_if_told()

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
    on_validation_start = on_train_epoch_end

    def _end_if_told(self) -> None:
        if self._told and self.trainer.is_global_zero and self._group is None:
            self._end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Be silent if the first process speaks for the run."""
        if self._told and not trainer.is_global_zero:
            sys.exit(128 + self._told)

    def _handle(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process and number == signal.SIGTERM:
            os._exit(0)  # a process that reads images, just forked: its run, which waits for it, is ending
        if os.getpid() != self._process or self.trainer.interrupted:
            return
        is_first = not (self._told or self._lost)
        if not self._lost:
            self._told = self._told or number
        if self._lost or self.trainer.is_global_zero:
            batches: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
            agrees = self._group is not None and not self._lost
            if not (is_first or agrees) and batches.started == batches.completed:
                self._end()
        elif os.getppid() == self._parent:
            os.kill(self._parent, number)

    def _end(self) -> NoReturn:
        if self._lost:
            raise ConnectionError(self._lost)
        sys.exit(128 + self._told)

    def _watch(self) -> None:
        """Look after the other processes; tell this one until it reacts, or end it."""
        since = 0.0
        while not self._ended and not self.trainer.interrupted:
            self._look()
            if self._told or self._lost:
                since = since or time.monotonic()
                waited = time.monotonic() - since
                grace = GRACE if dist.is_initialized() else GRACE_AT_START
                if self.trainer.world_size > 1 and waited > grace:
                    self._give_up()
                if self._lost or (self.trainer.is_global_zero and waited > PATIENCE):
                    os.kill(self._process, self._told or signal.SIGTERM)
            time.sleep(0.2)

    def _look(self) -> None:
        """Find the processes that this one has started, and which of all was lost."""
        started = getattr(self.trainer.strategy.launcher, "procs", [])
        if started and isinstance(started[0], Popen):
            self._others += started
            started.clear()  # Lightning's own observer would kill this process before it has saved
        for rank, other in enumerate(self._others, start=1):
            code = other.poll() or 0
            number = -code if code < 0 else code - 128
            if number in self._signals:  # at its start, when it could not pass it on
                self._told = self._told or number
            elif code:
                self._lost = f"process {rank} of the run has ended with code {code}"
        if self._heartbeat is not None and not self._lost:
            self._lost = self._heartbeat.lost
        if self._parent and os.getppid() != self._parent:
            self._lost = "the first process of the run has ended"

    def _give_up(self) -> None:
        for other in self._others:
            other.kill()
        self._release()
        self._requeue()
        if self._lost or self.trainer.global_step:
            said = self._lost or "another process of the run does not react"
            remedy = "resume the run with --ckpt_path last" if self.trainer.global_step else "start it again"
            print(f"locat: error: {said}: {remedy}", file=sys.stderr, flush=True)
        os._exit(128 + self._told if self._told else 1)

    def _requeue(self) -> None:
        if self._told and self._told == self._requeue_signal and self.trainer.is_global_zero:
            print(jobs.requeue(), file=sys.stderr, flush=True)

    def _unblock(self) -> None:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self._signals)
