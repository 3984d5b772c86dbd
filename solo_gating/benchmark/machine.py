"""What a benchmark runs on."""

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..checks import at_least, is_positive, require


def cpu_name() -> str:
    """The CPU's model."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cores() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_effort(threads: int, seconds: float) -> None:
    """Refuse what no benchmark can be run with here.

    Args:
        threads: of PyTorch.
        seconds: of timing.

    Raises:
        InputError: naming the option, what was found and what is accepted.
    """
    at_least("threads", threads, 1)
    require("threads", threads, lambda v: v <= cores(), f"at most {cores()} here")
    require("seconds", seconds, is_positive, "a number > 0")


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Versions of packages, None for one that is not installed, and of ours and Python."""
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found | {"solo-gating": __version__, "python": platform.python_version()}


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """PyTorch computes with a number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def now(device: torch.device) -> float:
    """Seconds of a clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def median_seconds(
    call: Callable[[], Any], device: torch.device, rounds: int, untimed: int = 1
) -> float:
    """How long a call alone takes on a device.

    Args:
        call: what is timed.
        device: that does it.
        rounds: calls of which the median is taken.
        untimed: calls before them.
    """
    times = []
    for _ in range(untimed + rounds):
        start = now(device)
        call()
        times.append(now(device) - start)
    return float(np.median(times[untimed:]))
