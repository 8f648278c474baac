"""Rows of one process; test_features and test_retrieval have two."""

import pytest
import torch

from locat_lightning.evaluation.gather import distributed, first_process, gather_rows, parts

CPU = torch.device("cpu")


def test_one_process_is_not_distributed_and_speaks():
    assert not distributed()
    assert first_process()
    table = torch.ones(3, 2)
    assert [id(part) for part in parts(table, CPU)] == [id(table)]


@pytest.mark.parametrize("keys", [[3, 1, 2], [7, 7, 0], [2**40, -1, 5]])
def test_one_row_for_each_key_ascending(keys):
    keys = torch.tensor(keys)
    rows, labels = gather_rows(keys, torch.stack([keys, keys + 1], 1).double(), keys.short(), device=CPU)
    distinct = sorted(set(keys.tolist()))
    assert rows.tolist() == [[key, key + 1] for key in distinct]
    assert torch.equal(labels, torch.tensor(distinct).short())
    assert (rows.dtype, labels.dtype) == (torch.float64, torch.int16)


def test_what_is_gathered_is_no_part():
    part = torch.ones(2, 2)
    (rows,) = gather_rows(torch.arange(2), part, device=CPU)
    rows += 1
    assert torch.equal(part, torch.ones(2, 2))


def test_no_keys_give_no_rows():
    assert len(gather_rows(torch.empty(0, dtype=torch.int64), torch.empty(0, 3), device=CPU)[0]) == 0
