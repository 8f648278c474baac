"""Signs of life: a process that vanishes is missed, one that ends is not."""

import time

import pytest
from torch.distributed import HashStore

from locat_lightning.callbacks.heartbeat import OUT_OF_REACH, Heartbeat

FAST = {"every": 0.02, "lost_after": 0.3}


class Gone(HashStore):
    """A store whose process has gone: it refuses, or it never answers."""

    answers = True

    def multi_get(self, keys):
        if self.answers == "never":
            time.sleep(2)
        elif not self.answers:
            raise ConnectionError("reset by peer")
        return super().multi_get(keys)


def lost(heartbeat, seconds=1.5):
    deadline = time.monotonic() + seconds
    while not heartbeat.lost and time.monotonic() < deadline:
        time.sleep(0.01)
    return heartbeat.lost


def test_who_gives_signs_is_there_and_who_ends_is_not_missed():
    store = HashStore()
    beats = [Heartbeat(store, rank, 3, **FAST) for rank in range(3)]
    assert [lost(each, 0.3) for each in beats] == [""] * 3
    beats[1].stop()
    assert [lost(each, 0.4) for each in beats] == [""] * 3
    for each in beats:
        each.stop()


def test_who_gives_no_sign_is_missed_by_the_first_process():
    store = HashStore()
    store.set("locat/alive/2", "0")  # its only one
    first, second = (Heartbeat(store, rank, 3, **FAST) for rank in range(2))
    assert lost(first) == "process 2 of the run has given no sign for 0.3 s"
    assert not second.lost
    second.stop()


def test_who_begins_late_is_not_missed():
    first = Heartbeat(store := HashStore(), 0, 3, **FAST)
    second = Heartbeat(store, 1, 3, **FAST)  # the third lists its images
    assert lost(first, 0.6) == lost(second, 0) == ""
    second.stop()
    first.stop()


def test_a_store_that_fails_once_is_asked_again():
    store = Gone()
    beats = [Heartbeat(store, rank, 2, **FAST) for rank in range(2)]
    store.answers = False
    time.sleep(0.1)
    store.answers = True
    assert [lost(each, 0.5) for each in beats] == ["", ""]
    for each in beats:
        each.stop()


@pytest.mark.parametrize("answers", [False, "never"])
def test_the_others_miss_the_first_process(answers):
    store = Gone()
    store.set("locat/alive/0", "0")
    store.answers = answers
    other = Heartbeat(store, 1, 2, **FAST)
    assert lost(other) == OUT_OF_REACH
