"""What a gate is, and the kinds that are known by name."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from torch import Tensor, nn

from ..checks import shown
from ..errors import InputError

# What a gate's kind may leave to be turned after training.
DIALS = ("threshold", "budget", None)


@dataclass(frozen=True)
class FoldedEmbedding:
    """What a budget b adds to logits: expand · relu(weight · t + bias), t = log(b / (1 − b)).

    b is kept within 0.01 and 0.99.

    Attributes:
        weight: H.
        bias: H.
        expand: C_out × H.
    """

    weight: Tensor
    bias: Tensor
    expand: Tensor


@dataclass(frozen=True)
class FoldedGate:
    """A gate as the compiled engine runs it, from the means m of its input's channels.

    logits = expand · relu(reduce · m + bias) + shift + embedding(budget); a channel is computed if its
    logit reaches the threshold, or, for a gate with a count, if it is one of so many with the largest
    logits (of equal ones those that come first).

    Attributes:
        reduce: hidden × C_in; hidden may be 0.
        bias: hidden.
        expand: C_out × hidden.
        shift: C_out.
        embedding: None for logits that no budget shifts.
        count: of channels; "budget" for ⌈b · C_out⌉ at a budget b, which is 1 for a gate that is told
            none; None for a gate with a threshold.
    """

    reduce: Tensor
    bias: Tensor
    expand: Tensor
    shift: Tensor
    embedding: FoldedEmbedding | None = None
    count: int | Literal["budget"] | None = None


class Gate(nn.Module):
    """Decides which of a convolution's output channels to compute for an image.

    A kind of gate is a subclass with a name (`register_gate`). Its constructor takes the channels of
    the block's input and of the convolution, and keyword arguments of its own: those of the config's
    `gating.gate_kwargs`, and of `reduction`, `temperature` and `told` (whether training draws budgets
    from a range, and tells them) those that it names. `forward(x, budget)` takes the block's input,
    B × C_in × H × W, and a budget, a number or one for each image, or None for a gate that is told
    none; it gives the mask, B × C_out, of zeros and ones, with a gradient if the gate is to learn.
    Everything else has a default.

    Attributes:
        kind: its name, set by `register_gate`.
        losses: those of training's that apply: "budget" and "bound" push the channels used towards
            the budget; a kind that meets it by construction has none.
        dial: what sets a trained gate to another share of the FLOPs: its "threshold", the "budget"
            that it is told, or None.
        needs_budget: whether it is told the budget also where training has a single one.
        flops: multiply-accumulates of a decision for one image; None to count those of its layers.
        threshold: of a gate whose dial it is; set by the backbone, in no checkpoint.
        budget: what it is told unless a pass says otherwise; as `threshold`.
    """

    kind: ClassVar[str] = ""
    losses: ClassVar[tuple[str, ...]] = ("budget", "bound")
    dial: ClassVar[str | None] = None
    needs_budget: ClassVar[bool] = False

    threshold: float = 0.0
    budget: float | None = None

    @property
    def flops(self) -> int | None:
        """As in the class's docstring."""
        return None

    def forward(self, x: Tensor, budget: Tensor | None = None) -> Tensor:
        """B × C_in × H × W, and a budget → the mask, B × C_out."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def fold(self) -> FoldedGate | None:
        """The gate for the compiled engine; None for a kind that only PyTorch can run.

        It counts for the `forward` beside it: a subclass that decides otherwise says anew how it folds.
        """
        return None

    def sliced(self, channels: Tensor, budget: float | None) -> dict[str, Any]:
        """A gate for some of its channels, for good at a budget: keyword arguments and weights.

        Args:
            channels: int64, indices of those that stay.
            budget: None for a gate that is told none.

        Returns:
            "kwargs", of the kind's constructor, and "state", its state dict.

        Raises:
            InputError: for a kind that cannot be cut.
        """
        raise InputError(
            f"gates: got keep, gates of kind {self.kind!r} cannot be cut to the kept channels; "
            "expected drop"
        )


GATES: dict[str, type[Gate]] = {}

_Kind = TypeVar("_Kind", bound=type[Gate])


def register_gate(name: str) -> Callable[[_Kind], _Kind]:
    """Name a kind of gate, for `gating.gate` of a config and `gate` of a backbone.

        @register_gate("mine")
        class Mine(Gate): ...

    Args:
        name: another class of the same name takes the place of the one before, as when a notebook's
            cell is run again; the package's own kinds cannot be replaced.

    Raises:
        InputError: for a class that is no `Gate`, or a name of the package's own.
    """

    def register(cls: _Kind) -> _Kind:
        if not (isinstance(cls, type) and issubclass(cls, Gate)):
            raise InputError(f"register_gate: got {shown(cls)}, expected a subclass of Gate")
        before = GATES.get(name)
        own = __package__.partition(".")[0]
        if before is not None and before.__module__.startswith(f"{own}."):
            raise InputError(f"register_gate: got {name!r}, expected a name that is free")
        if cls.dial not in DIALS:
            raise InputError(
                f"register_gate: {name}.dial: got {cls.dial!r}, expected one of {DIALS}"
            )
        cls.kind = name
        GATES[name] = cls
        return cls

    return register


def gate_class(name: Any, key: str = "gate") -> type[Gate]:
    """A kind of gate by its name.

    Raises:
        InputError: naming `key` and the kinds that are known.
    """
    if not isinstance(name, str) or name not in GATES:
        raise InputError(
            f"{key}: got {shown(name)}, expected one of {', '.join(sorted(GATES))}; other kinds are "
            "known once the module that registers them is imported"
        )
    return GATES[name]


def check_gate_kwargs(name: str, kwargs: Mapping[str, Any], key: str) -> None:
    """Refuse a keyword argument that a kind of gate does not take.

    Raises:
        InputError: naming it and those that are.
    """
    accepted = _arguments(gate_class(name, key))
    for argument in kwargs:
        if argument not in accepted and "**" not in accepted:
            known = ", ".join(accepted) or "none"
            raise InputError(
                f"{key}.{argument}: no such key of gate {name!r}, expected are {known}"
            )


def make_gate(
    name: str,
    in_channels: int,
    out_channels: int,
    kwargs: Mapping[str, Any],
    common: Mapping[str, Any],
) -> Gate:
    """A gate of a kind.

    Args:
        name: of the kind.
        in_channels: C_in, of the block's input.
        out_channels: C_out, of the convolution.
        kwargs: of the kind's own.
        common: those that the kind gets if it names them.

    Raises:
        InputError: for a kind that is not known, or an argument that it does not take.
    """
    cls = gate_class(name, "backbone.kwargs.gate")
    check_gate_kwargs(name, kwargs, "backbone.kwargs.gate_kwargs")
    taken = {key: value for key, value in common.items() if key in _arguments(cls)}
    return cls(in_channels, out_channels, **{**taken, **kwargs})


def _arguments(cls: type[Gate]) -> list[str]:
    """The names of a kind's keyword arguments; "**" for any."""
    names = []
    for parameter in list(inspect.signature(cls).parameters.values())[2:]:
        names.append("**" if parameter.kind is parameter.VAR_KEYWORD else parameter.name)
    return names
