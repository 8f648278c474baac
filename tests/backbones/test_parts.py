"""Checkpoints in parts: which folders are theirs, and what others than ours say."""

import pytest
import torch

from locat_lightning.backbones.parts import NUMBER, assemble, new_folder, remove_parts, write_part
from locat_lightning.errors import InputError


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    for rank in range(2):
        write_part(path, 3, rank, {0: torch.full((1, 2), rank)})
    return path


def contents(**where):
    return {"parts": {"folder": 3, "processes": 2} | where, "w": {NUMBER: 0, "shape": [2, 2]}}


def test_a_copy_beside_the_parts_is_nobodys(checkpoint):
    copy = checkpoint.with_suffix(".parts") / "4 (copy)"
    copy.mkdir()
    assert new_folder(checkpoint) == 4
    remove_parts(checkpoint, keep=3)
    assert copy.is_dir()
    assert assemble(contents(), checkpoint, torch.load)["w"].tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize("where", [torch.zeros(2), torch.zeros(()), {"folder": float("inf")}, [], None])
def test_a_checkpoint_that_names_no_parts(checkpoint, where):
    with pytest.raises(InputError, match="does not say where its parts are"):
        assemble({"parts": where}, checkpoint, torch.load)


def test_the_first_part_that_is_missing_is_named_however_many_there_are(checkpoint):
    with pytest.raises(InputError, match=r"2\.pt is missing"):
        assemble(contents(processes=10**15), checkpoint, torch.load)


@pytest.mark.parametrize("part", [torch.zeros(2), [], None, {0: "rows"}, {0: torch.zeros(3, 2)}])
def test_parts_that_do_not_fit(checkpoint, part):
    with pytest.raises(InputError, match="do not fit"):
        assemble(contents(), checkpoint, lambda file: part)
