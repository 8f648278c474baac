"""What several processes found, brought together: every image once, whichever process saw it."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor


def distributed() -> bool:
    """Return whether there are other processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def first_process() -> bool:
    """Return whether this process is the one that speaks for all."""
    return not distributed() or dist.get_rank() == 0


def gather_rows(keys: Tensor, *tables: Tensor, device: torch.device) -> list[Tensor]:
    """Join the tables of all processes: one row for each distinct key, ascending.

    Keys are [n] int64, tables [n, ...] of the same type in all processes; n differs from process to process,
    and a key may come more than once. All are on the CPU, as is the result; `device` is that of the process
    group. All processes call it, and all get the whole. It takes the memory of the result beside the parts'.
    """
    all_keys = list(parts(keys, device))
    distinct = torch.cat(all_keys).unique()
    joined = []
    for table in tables:
        whole = table.new_empty(0)
        for of_process, part in zip(all_keys, parts(table, device), strict=True):
            if len(part):
                if not len(whole):
                    whole = part.new_empty(len(distinct), *part.shape[1:])
                whole[torch.searchsorted(distinct, of_process)] = part
        joined.append(whole)
    return joined


def parts(part: Tensor, device: torch.device) -> Iterator[Tensor]:
    """Yield the part [n, ...] of each process in turn, one at a time and without padding, in CPU memory.

    All processes must call it and exhaust it. Only n differs from process to process, and without rows the
    rest may, too. `device` is that of the process group.
    """
    if not distributed():
        yield part
        return
    shape = torch.tensor(part.shape, device=device)
    shapes = [torch.empty_like(shape) for _ in range(dist.get_world_size())]
    dist.all_gather(shapes, shape)
    for rank, size in enumerate(shape.tolist() for shape in shapes):
        mine = rank == dist.get_rank()
        sent = part.contiguous().to(device) if mine else torch.empty(size, dtype=part.dtype, device=device)
        if sent.numel():
            dist.broadcast(sent.flatten().view(torch.uint8), src=rank)  # as bytes: NCCL knows no int16
        yield part if mine else sent.cpu()
