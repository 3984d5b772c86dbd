"""PyTorch in a forked process."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from solo_gating_runtime.forks import is_forked


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
