"""Which of a run's processes this one is, and what the others have."""

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_processes() -> tuple[int, int]:
    """This process's number, from 0, and how many there are; (0, 1) without others."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def of_all_processes(rows: Tensor) -> Tensor:
    """Every process's rows, one after the other; without a gradient.

    Args:
        rows: as many on every process.
    """
    _, processes = rank_and_processes()
    if processes == 1:
        return rows.detach()
    parts = [torch.empty_like(rows) for _ in range(processes)]
    dist.all_gather(parts, rows.detach().contiguous())
    return torch.cat(parts)
