import numpy as np
import pytest

from locat_lightning.data.sampling import laned_order


def by_turns(starts, lanes, seed, epoch):
    """The same in plain loops."""
    rng = np.random.default_rng([seed, epoch])
    shards = list(rng.permutation(len(starts) - 1))
    queues = [[] for _ in range(min(lanes, len(shards)))]
    for turn, shard in enumerate(shards):
        images = list(range(starts[shard], starts[shard + 1]))
        queues[turn % len(queues)] += [images[place] for place in rng.permutation(len(images))]
    order = []
    while any(queues):
        order += [queue.pop(0) for queue in queues if queue]
    return order


@pytest.mark.parametrize("lanes", [1, 3, 7, 16])
@pytest.mark.parametrize("counts", [[5], [3, 3, 3, 3, 3, 3, 3], [1, 9, 4, 4, 2, 7, 5]])
def test_lanes_take_turns_with_shards(lanes, counts):
    starts = np.cumsum([0, *counts])
    order = laned_order(starts, lanes, seed=3, epoch=2)
    assert order.tolist() == by_turns(starts.tolist(), lanes, 3, 2)
    assert sorted(order.tolist()) == list(range(sum(counts)))


def test_the_order_follows_from_seed_and_epoch():
    starts = np.arange(0, 101, 10)
    one = laned_order(starts, 4, seed=0, epoch=0).tolist()
    assert laned_order(starts, 4, seed=0, epoch=0).tolist() == one
    others = [
        laned_order(starts, 4, seed=seed, epoch=epoch).tolist() for seed, epoch in ((0, 1), (1, 0), (1, 1))
    ]
    assert len({tuple(each) for each in [one, *others]}) == 4  # also where seed + epoch is the same


def test_few_shards_are_read_at_once_and_each_by_one_of_two_processes():
    starts, lanes = np.arange(0, 161, 10), 4
    order = laned_order(starts, lanes, seed=0, epoch=0)
    shards = order // 10
    for begin in range(0, 160, 40):  # the shards of all lanes end together
        assert len(set(shards[begin : begin + 40])) == lanes
        assert all(
            len(set(shards[place : place + lanes])) == lanes for place in range(begin, begin + 40, lanes)
        )
    assert set(shards[::2]).isdisjoint(shards[1::2])
