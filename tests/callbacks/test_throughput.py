"""Images per second and the share of waiting, with a clock that the test winds."""

from types import SimpleNamespace

import pytest

from locat_lightning.callbacks import throughput


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(time=100.0)
    monkeypatch.setattr(throughput, "perf_counter", lambda: now.time)
    return now


class Log(dict):
    def log(self, name, value, **_):
        self[name] = value


def step(callback, clock, log, *, wait, work, images=8, processes=1):
    trainer, batch = SimpleNamespace(world_size=processes), (None, range(images))
    clock.time += wait
    callback.on_train_batch_start(trainer, log, batch, 0)
    clock.time += work
    callback.on_train_batch_end(trainer, log, None, batch, 0)


def test_waiting_and_working(clock):
    callback, log = throughput.Throughput(), Log()
    callback.on_train_epoch_start(None, log)
    step(callback, clock, log, wait=50, work=1)
    assert log == {}  # the workers' start is no training
    step(callback, clock, log, wait=1, work=3)
    assert log == {"train/images_per_s": 2.0, "train/data_wait": 0.25}
    step(callback, clock, log, wait=0, work=0.5, images=4, processes=3)
    assert log == {"train/images_per_s": 24.0, "train/data_wait": 0.0}


def test_batches_of_another_kind_are_not_counted(clock):
    callback, log = throughput.Throughput(), Log()
    for _ in range(2):
        callback.on_train_batch_start(None, log, {}, 0)
        clock.time += 1
        callback.on_train_batch_end(None, log, None, {}, 0)
    assert log == {"train/data_wait": 0.0}


@pytest.mark.parametrize("pause", ["on_validation_end", "on_train_epoch_start"])
def test_a_validation_is_no_training(clock, pause):
    callback, log = throughput.Throughput(), Log()
    step(callback, clock, log, wait=1, work=1)
    clock.time += 1000
    getattr(callback, pause)(None, log)
    step(callback, clock, log, wait=1, work=1)
    assert log == {}
    step(callback, clock, log, wait=1, work=1)
    assert log["train/images_per_s"] == 4.0
