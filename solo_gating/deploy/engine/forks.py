"""What a forked process may do: it has none of the threads of the process that it comes from.

OpenMP, PyTorch's and the kernel's, waits for such threads for ever.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_process = os.getpid()


def is_forked() -> bool:
    """Whether this process was forked since the engine was imported."""
    return os.getpid() != _process


@contextmanager
def one_thread_if_forked() -> Iterator[None]:
    """PyTorch on a single thread inside a `with` block, in a forked process."""
    if not is_forked():
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
