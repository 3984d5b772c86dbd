"""Checks of config values, all with the same words."""

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from solo_gating_runtime.checks import (
    checked_threshold,
    is_int,
    is_number,
    one_of,
    require,
    shown,
)

from .errors import InputError

__all__ = [
    "Kind",
    "are_three",
    "at_least",
    "checked_threshold",
    "is_int",
    "is_not_negative",
    "is_number",
    "is_positive",
    "is_share",
    "no_such_key",
    "one_of",
    "require",
    "shortened",
    "shown",
    "true_or_false",
]


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


def at_least(key: str, value: Any, least: int) -> None:
    """Refuse what is not an integer of at least `least`."""
    require(key, value, lambda v: is_int(v, least), f"an integer ≥ {least}")


def true_or_false(key: str, value: Any) -> None:
    """Refuse what is not a truth value."""
    require(key, value, lambda v: isinstance(v, bool), "true or false")


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


def are_three(value: Any, test: Callable[[Any], bool]) -> bool:
    """Whether a value is a list of three that pass a test: one number for each colour."""
    return isinstance(value, list) and len(value) == 3 and all(map(test, value))
