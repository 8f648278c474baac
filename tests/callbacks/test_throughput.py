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


def of_trainer(processes=1, every=1, global_step=1):
    return SimpleNamespace(world_size=processes, log_every_n_steps=every, global_step=global_step)


def step(callback, clock, log, trainer=None, *, wait, work, images=8):
    trainer, batch = trainer or of_trainer(), (None, range(images))
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
    step(callback, clock, log, of_trainer(processes=3), wait=0, work=0.5, images=4)
    assert log == {"train/images_per_s": 24.0, "train/data_wait": 0.0}


def test_batches_of_another_kind_are_not_counted(clock):
    callback, log = throughput.Throughput(), Log()
    for _ in range(2):
        callback.on_train_batch_start(of_trainer(), log, {}, 0)
        clock.time += 1
        callback.on_train_batch_end(of_trainer(), log, None, {}, 0)
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


def test_they_are_means_since_the_last_logged_step(clock):
    """In the second one of three the host waits for a GPU that it had run ahead of."""
    callback, log = throughput.Throughput(), Log()
    callback.on_train_batch_end(None, log, None, (None, range(8)), 0)
    for number, work in ((1, 1), (2, 6), (3, 2)):
        step(callback, clock, log, of_trainer(every=3, global_step=number), wait=1, work=work)
    assert log == {"train/images_per_s": 2.0, "train/data_wait": 0.25}
    step(callback, clock, log, of_trainer(every=3, global_step=4), wait=0, work=1)
    assert log == {"train/images_per_s": 8.0, "train/data_wait": 0.0}
