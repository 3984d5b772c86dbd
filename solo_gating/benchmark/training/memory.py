"""The largest number of bytes that a call makes PyTorch hold."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

# What is measured, for reports.
MEANING = {
    "cpu": "bytes of PyTorch's CPU allocator by torch.profiler, oneDNN's own scratch memory excluded",
    "cuda": "torch.cuda.max_memory_allocated",
}


def added_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """The most that is allocated at any moment of a call, above what was allocated before it.

    On a GPU by the allocator's own high-water mark; on a CPU, whose allocator has none, by the
    allocations and releases that the profiler records.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    results: Any = profiler.profiler.kineto_results  # type: ignore[union-attr]
    changes = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    held = most = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        held += change
        most = max(most, held)
    return most


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' memory, what several of them share counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
