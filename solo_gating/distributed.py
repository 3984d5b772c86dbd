"""Which of a run's processes this one is."""

import torch.distributed as dist


def rank_and_processes() -> tuple[int, int]:
    """This process's number, from 0, and how many there are; (0, 1) without others."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
