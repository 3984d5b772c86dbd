"""Dual, gated and distilled versions of solo-learn's methods, by name."""

import inspect
from collections.abc import Callable
from types import CodeType
from typing import Any

from ..errors import InputError
from ..solo_learn import METHODS, SOLO_METHODS, BaseMethod, register
from .gated import DistilledMethod, DualMethod, GatedMethod, GatedViewsMethod, LearntGates

GATED_METHODS: dict[str, type[GatedMethod]] = {}

_DISTILLED = "on dense views, to whose features a gated pass regresses"
_NO_CONTINUING = (
    "it makes its memory of other batches when training starts: no run could be continued"
)
# Methods of solo-learn's that cannot be gated, and why.
REFUSED = {
    "deepclusterv2": _NO_CONTINUING,
    "linear": "it trains a classifier on a frozen backbone",
    "mae": "it masks a vision transformer's patches, and gates choose a ResNet's channels",
    "ressl": "it trains the first view only: the other view's path would learn nothing",
    "swav": _NO_CONTINUING,
}


def register_gated(
    name: str, method: type[BaseMethod], dual: str = "", gated: str = ""
) -> tuple[type[Any], type[Any]]:
    """Register `<name>_dual`, `<name>_gated` and `<name>_distilled`, versions of a method of solo-learn's.

        MineDual, MineGated = register_gated("mine", Mine)

    Args:
        name: what the names begin with.
        method: a class of `METHODS`, or one of your own: a subclass of `BaseMethod`, or of
            `BaseMomentumMethod`, whose `training_step` calls its base's once.
        dual: a docstring for the first class.
        gated: one for the second.

    Returns:
        The first two classes; `GATED_METHODS` has the third.

    Raises:
        InputError: for a method that cannot be gated; the message says why.
    """
    _check(name, method)
    classes = []
    for kind, bases, doc, default in (
        ("dual", (method, DualMethod), dual, "with one view gated and one dense"),
        ("gated", (method, GatedViewsMethod), gated, "with both views gated"),
        ("distilled", (LearntGates, method, DistilledMethod), "", _DISTILLED),
    ):
        title = f"{method.__name__}{kind.capitalize()}"
        content = {"__doc__": doc or f"{method.__name__} {default}.", "__module__": __package__}
        cls = type(title, bases, content)
        GATED_METHODS[f"{name}_{kind}"] = cls
        register(f"{name}_{kind}", cls)
        classes.append(cls)
    return classes[0], classes[1]


def register_own(name: str, method: type[GatedMethod]) -> None:
    """Register a gated method that is no version of one of solo-learn's.

    Args:
        name: for the key `method` of a config.
        method: the class.
    """
    GATED_METHODS[name] = method
    register(name, method)


def _check(name: str, method: Any) -> None:
    for refused, reason in REFUSED.items():
        for registry in (METHODS, SOLO_METHODS):
            cls = registry.get(refused)
            if cls is not None and isinstance(method, type) and issubclass(method, cls):
                raise InputError(f"{name}: method {refused!r} cannot be gated: {reason}")
    if not (isinstance(method, type) and issubclass(method, BaseMethod)):
        raise InputError(f"{name}: got {method!r}, expected a subclass of BaseMethod")
    for cls in method.__mro__:
        step = vars(cls).get("training_step")
        if step is not None and "training_step" not in _names(inspect.unwrap(step)):
            if cls in BaseMethod.__mro__:
                return
            raise InputError(
                f"{name}: {cls.__name__}.training_step does not call its base's training_step, "
                "where the views take their paths; expected one call"
            )


def _names(function: Callable[..., Any]) -> set[str]:
    """The names that a function's code refers to."""
    code: CodeType | None = getattr(function, "__code__", None)
    return set() if code is None else set(code.co_names)
