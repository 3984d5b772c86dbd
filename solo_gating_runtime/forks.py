"""What a forked process may do: it has none of the threads of the process that it comes from.

OpenMP, the kernel's and PyTorch's, waits for such threads for ever.
"""

import os

_process = os.getpid()


def is_forked() -> bool:
    """Whether this process was forked since the engine was imported."""
    return os.getpid() != _process
