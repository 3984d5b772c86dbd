"""Numbers of channels for budgets that are shares of the channels."""

import math

from torch import Tensor

from ..checks import at_least

# 0.3 · 10 may come out as 3.0000001, in particular in float32; that is no reason for a fourth channel.
_ROUNDING = 1e-3


def fixed_count(count: int | None, channels: int) -> int | None:
    """A kind's argument `count`, at most C; None as it is.

    Raises:
        InputError: for anything but an integer ≥ 1.
    """
    if count is None:
        return None
    at_least("gating.gate_kwargs.count", count, 1)
    return min(count, channels)


def number_of_channels(budget: float, channels: int) -> int:
    """⌈b·C⌉, at least one.

    Args:
        budget: b, in (0, 1].
        channels: C.
    """
    return min(channels, max(1, math.ceil(budget * channels - _ROUNDING)))


def numbers_of_channels(budget: Tensor, channels: int) -> Tensor:
    """`number_of_channels` of a tensor of budgets, of its shape."""
    return (budget * channels - _ROUNDING).ceil().clamp(1, channels)
