"""Damaged files: bytes that are flipped, files that are cut, fields that are something else."""

import random
from pathlib import Path

import pytest
import torch

from locat_lightning.backbones.weights import read_checkpoint
from locat_lightning.errors import InputError
from tests.commands.runs import LAST
from tests.commands.test_killed import differences

pytestmark = pytest.mark.usefixtures("workplace")

DAMAGES = 300


def flipped(data, place):
    position = place.randrange(len(data))
    return data[:position] + bytes([data[position] ^ 1 << place.randrange(8)]) + data[position + 1 :]


def cut(data, place):
    return data[: place.randrange(len(data))]


def zeroed(data, place):
    position, length = place.randrange(len(data)), place.randrange(1, 4096)
    return data[:position] + bytes(len(data[position : position + length])) + data[position + length :]


@pytest.mark.parametrize("damage", [flipped, cut, zeroed], ids=lambda each: each.__name__)
def test_a_damaged_checkpoint_is_refused_or_reads_as_before(damage, trained, record_property):
    place, sound, refused = random.Random(0), LAST.read_bytes(), 0
    expected = torch.load(LAST, weights_only=True)
    for _ in range(DAMAGES):
        Path("damaged.ckpt").write_bytes(damage(sound, place))
        try:
            found = read_checkpoint("damaged.ckpt")
        except InputError:
            refused += 1
        else:  # bytes that mean nothing, as dates
            assert differences(expected, found) == []
    record_property(f"checkpoints {damage.__name__}", f"{DAMAGES}, {refused} refused, others read as before")
