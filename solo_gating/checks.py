"""Checks of config values, all with the same words."""

import math
import sys
from collections.abc import Callable
from typing import Any

from .errors import InputError


def require(key: str, value: Any, accepted: Callable[[Any], Any], wording: str) -> None:
    """Refuse a config value.

    Raises:
        InputError: if `accepted(value)` is false: "key: found value, accepted is wording".
    """
    if not accepted(value):
        raise InputError(f"{key}: found {shown(value)}, accepted is {wording}")


def shown(value: Any) -> str:
    """A value as a message shows it: in one line, and not at any length."""
    text = " ".join(repr(value).split("\n"))
    return text if len(text) <= 200 else f"{text[:199]}…"


def one_of(key: str, value: Any, accepted: Any) -> None:
    """Refuse what is not among some names."""
    require(key, value, lambda v: v in accepted, "one of " + ", ".join(sorted(accepted)))


def at_least(key: str, value: Any, least: int) -> None:
    """Refuse what is not an integer of at least `least`."""
    require(key, value, lambda v: is_int(v, least), f"an integer ≥ {least}")


def true_or_false(key: str, value: Any) -> None:
    """Refuse what is not a truth value."""
    require(key, value, lambda v: isinstance(v, bool), "true or false")


def checked_threshold(value: Any, key: str = "threshold") -> float:
    """A threshold of the gates' logits as a number; infinite ones close or open all gates.

    Raises:
        InputError: for what is no number.
    """
    require(key, value, _is_threshold, "a number")
    return float(value)


def _is_threshold(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and not math.isnan(value)


def is_int(value: Any, least: int) -> bool:
    """Whether a config value is an integer, not a truth value, of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: Any) -> bool:
    """Whether a config value is a finite number, not a truth value."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= sys.float_info.max  # of an integer of any length, too


def is_not_negative(value: Any) -> bool:
    """Whether a config value is a number ≥ 0."""
    return is_number(value) and value >= 0


def is_positive(value: Any) -> bool:
    """Whether a config value is a number > 0."""
    return is_number(value) and value > 0


def is_share(value: Any) -> bool:
    """Whether a config value is a number in (0, 1]."""
    return is_positive(value) and value <= 1
