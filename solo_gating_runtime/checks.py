"""Checks of values that users set, all with the same words."""

import math
import sys
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

from .errors import InputError


def require(key: str, value: Any, accepted: Callable[[Any], Any], wording: str) -> None:
    """Refuse a value.

    Raises:
        InputError: if `accepted(value)` is false: "key: got value, expected wording".
    """
    if not accepted(value):
        raise InputError(f"{key}: got {shown(value)}, expected {wording}")


def shown(value: Any) -> str:
    """A value as a message shows it: in one line, and of a long one the beginning and the end."""
    text = " ".join(repr(value).split("\n"))
    return text if len(text) <= 300 else f"{text[:199]}…{text[-100:]}"


def one_of(key: str, value: Any, accepted: Any) -> None:
    """Refuse what is not among some names."""
    require(key, value, lambda v: v in tuple(accepted), "one of " + ", ".join(sorted(accepted)))


def is_int(value: Any, least: int) -> bool:
    """Whether a value is an integer, not a truth value, of at least `least`."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, not a truth value."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    size: Any = abs(value)
    return size <= sys.float_info.max  # of an integer of any length, too


def checked_threshold(value: Any, key: str = "threshold") -> float:
    """A threshold of the gates' logits as a number; infinite ones close or open all gates.

    Raises:
        InputError: for what is no number.
    """
    require(key, value, _is_threshold, "a number")
    return float(value)


def _is_threshold(value: Any) -> bool:
    number = isinstance(value, Real) and not isinstance(value, bool)
    return number and not math.isnan(value)


def checked_budget(
    budget: Any, budget_range: tuple[float, float] | None, key: str = "budget"
) -> float:
    """The budget as a number, if a network can be told it.

    Args:
        budget: the share of the dense FLOPs that the gates should aim at.
        budget_range: what the network was trained for; None for gates that are told none.
        key: that names it, for messages.

    Raises:
        InputError: for a number outside of the range, or any for a network without one.
    """
    if budget_range is None:
        raise InputError(
            f"{key}: got {budget!r}, the network's gates are told no budget; expected null"
        )
    low, high = budget_range
    require(
        key,
        budget,
        lambda v: is_number(v) and low <= v <= high,
        f"a number from {low:g} to {high:g}, the range that the network was trained for",
    )
    return float(budget)
