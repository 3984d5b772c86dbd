"""Checks of config values, all with the same words."""

import difflib
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from .errors import InputError


def require(key: str, value: Any, accepted: Callable[[Any], Any], wording: str) -> None:
    """Refuse a config value.

    Raises:
        InputError: if `accepted(value)` is false: "key: got value, expected wording".
    """
    if not accepted(value):
        raise InputError(f"{key}: got {shown(value)}, expected {wording}")


def shown(value: Any) -> str:
    """A value as a message shows it: in one line, and of a long one the beginning and the end."""
    text = " ".join(repr(value).split("\n"))
    return text if len(text) <= 300 else f"{text[:199]}…{text[-100:]}"


def no_such_key(key: str, known: Iterable[str], accepted: str = "") -> InputError:
    """What to raise for a key that does not exist; names the nearest one that does.

    Args:
        key: the unknown one, with dots.
        known: those that exist.
        accepted: what else to say, as in "expected ...".
    """
    known = list(known)
    near = difflib.get_close_matches(key, known, n=1)
    if not near:  # of another group, perhaps
        last = key.rpartition(".")[2]
        ends = {name.rpartition(".")[2]: name for name in known}
        near = [ends[end] for end in difflib.get_close_matches(last, ends, n=1, cutoff=0.7)]
    parts = [f"{key}: no such key", accepted, f"the nearest is {near[0]}" if near else ""]
    return InputError(", ".join(part for part in parts if part))


@dataclass(frozen=True)
class Kind:
    """What a config key accepts.

    Attributes:
        accepts: whether it accepts a value.
        wording: what that is, for messages: "expected ...".
    """

    accepts: Callable[[Any], Any]
    wording: str

    def check(self, key: str, value: Any) -> None:
        """Refuse a value that is not of this kind.

        Raises:
            InputError: naming key, value and what is accepted.
        """
        require(key, value, self.accepts, self.wording)

    def or_null(self) -> "Kind":
        """The same, or null."""
        return Kind(lambda v: v is None or self.accepts(v), f"{self.wording}, or null")


def one_of(key: str, value: Any, accepted: Any) -> None:
    """Refuse what is not among some names."""
    require(key, value, lambda v: v in tuple(accepted), "one of " + ", ".join(sorted(accepted)))


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
    number = isinstance(value, Real) and not isinstance(value, bool)
    return number and not math.isnan(value)


def is_int(value: Any, least: int) -> bool:
    """Whether a config value is an integer, not a truth value, of at least `least`."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def is_number(value: Any) -> bool:
    """Whether a config value is a finite number, not a truth value."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    size: Any = abs(value)
    return size <= sys.float_info.max  # of an integer of any length, too


def is_not_negative(value: Any) -> bool:
    """Whether a config value is a number ≥ 0."""
    return is_number(value) and value >= 0


def is_positive(value: Any) -> bool:
    """Whether a config value is a number > 0."""
    return is_number(value) and value > 0


def is_share(value: Any) -> bool:
    """Whether a config value is a number in (0, 1]."""
    return is_positive(value) and value <= 1


def shortened(names: Sequence[str], most: int = 10) -> str:
    """Names for a message, separated by commas; of many only the first."""
    rest = f", ... ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
