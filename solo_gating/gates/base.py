"""What a gate is, and the kinds that are known by name."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor, nn

from ..checks import Kind, is_int, is_number, shown
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

    A gate with a beta boosts: its scores s = relu(reduce · m + bias), one for each channel, choose those
    that exceed the (count + 1)-th largest score (all, if all are to be chosen), and h = relu(s · bn(conv
    x) + beta) for these.

    Attributes:
        reduce: hidden × C_in; hidden may be 0, and is C_out for a gate that boosts.
        bias: hidden.
        expand: C_out × hidden.
        shift: C_out.
        embedding: None for logits that no budget shifts.
        count: of channels; "budget" for ⌈b · C_out⌉ at a budget b, which is 1 for a gate that is told
            none; None for a gate with a threshold.
        beta: C_out, of a gate that boosts, whose count is "budget", and which has no other shift,
            expand or embedding (`boosting`); None for others.
    """

    reduce: Tensor
    bias: Tensor
    expand: Tensor
    shift: Tensor
    embedding: FoldedEmbedding | None = None
    count: int | Literal["budget"] | None = None
    beta: Tensor | None = None

    @classmethod
    def boosting(cls, reduce: Tensor, bias: Tensor, beta: Tensor) -> "FoldedGate":
        """A gate that boosts."""
        nothing = beta.new_zeros(len(beta), 0)
        return cls(reduce, bias, nothing, torch.zeros_like(beta), count="budget", beta=beta)


class Decision(NamedTuple):
    """What a gate decided, where that is more than a mask: h = relu(mask · (scale · bn(conv x) + shift)).

    Attributes:
        mask: B × C_out, of zeros and ones.
        scale: B × C_out, of the normalised output; None for 1.
        shift: C_out, or B × C_out, added to it; None for 0.
        penalty: what the decision adds to training's loss, a number, its weight included; None for
            nothing.
    """

    mask: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None
    penalty: Tensor | None = None


class GatedOutput(NamedTuple):
    """What a convolution's gate computed.

    Attributes:
        out: B × C_out × H' × W', the convolution's output, without BatchNorm.
        shares: B × `choices`, numbers from 0 to 1: how much of each choice was computed.
        penalty: as in `Decision`.
    """

    out: Tensor
    shares: Tensor
    penalty: Tensor | None = None


class BaseGate(nn.Module):
    """What all kinds of gates have in common; a kind is a subclass of `Gate` or `ConvolutionGate`.

    Its constructor takes numbers of input and output channels, and keyword arguments of its own: those
    of the config's `gating.gate_kwargs`, and of `reduction`, `temperature` and `told` (whether training
    draws budgets from a range, and tells them) those that it names.

    Attributes:
        kind: its name, set by `register_gate`.
        losses: those of training's that apply: "budget" and "bound" push the channels used towards
            the budget; a kind that meets it by construction has none.
        dial: what sets a trained gate to another share of the FLOPs: its "threshold", the "budget"
            that it is told, or None.
        needs_budget: whether it is told the budget also where training has a single one.
        only_masks: whether zeros and ones for whole channels are all that it does; what cuts networks
            to channels knows no others, what runs them without PyTorch those that `fold` describes.
        streams: whether gates of this kind also choose the channels of what flows between blocks: one
            for the stem's output and one for those of each stage's blocks, which are told the budget.
        views: how many of a step's views it tells apart.
        flops: multiply-accumulates of a decision for one image; None to count those of its layers.
        threshold: of a gate whose dial it is; set by the backbone, in no checkpoint.
        budget: what it is told unless a pass says otherwise; as `threshold`.
    """

    kind: ClassVar[str] = ""
    losses: Sequence[str] = ("budget", "bound")
    dial: ClassVar[str | None] = None
    needs_budget: ClassVar[bool] = False
    only_masks: ClassVar[bool] = True
    streams: ClassVar[bool] = False
    views: ClassVar[int] = 1

    threshold: float = 0.0
    budget: float | None = None

    @classmethod
    def positions(cls, convolutions: Sequence[nn.Conv2d]) -> list[int]:
        """The convolutions of a block that have a gate of this kind, as numbers from 0."""
        raise NotImplementedError

    @property
    def flops(self) -> int | None:
        """As in the class's docstring."""
        return None

    def budget_or_own(self, budget: Tensor | None) -> Tensor:
        """What a kind that always has a budget goes by: the pass's, or else `budget`, or else 1."""
        if budget is not None:
            return budget
        return torch.full((), 1.0 if self.budget is None else self.budget)

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


class Gate(BaseGate):
    """Decides from a block's input which of a convolution's output channels to compute for an image.

    A kind is a subclass with a name (`register_gate`), whose constructor takes the channels of the
    block's input and of the convolution (see `BaseGate`). `forward(x, budget)` takes the block's input,
    B × C_in × H × W, and a budget, a number or one for each image, or None for a gate that is told
    none; it gives the mask, B × C_out, of zeros and ones, with a gradient if the gate is to learn; or a
    `Decision`, which may also scale. Everything else has a default.

    A kind that scales may have a BatchNorm of its own for the convolution's output, `output_norm`: the
    gated path then goes through it instead of the block's.

    Attributes:
        has_output_norm: whether its gates have one.
    """

    has_output_norm: ClassVar[bool] = False
    output_norm: nn.Module

    @classmethod
    def positions(cls, convolutions: Sequence[nn.Conv2d]) -> list[int]:
        """All but the last, behind which there is no hidden map."""
        return list(range(len(convolutions) - 1))

    def forward(self, x: Tensor, budget: Tensor | None = None) -> Tensor | Decision:
        """B × C_in × H × W, and a budget → the mask, B × C_out, or a `Decision`."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")


class ConvolutionGate(BaseGate):
    """Computes a convolution in part: called in its place, with its weight.

    A kind is a subclass with a name (`register_gate`), whose constructor takes the channels of the
    convolution's input and output (see `BaseGate`). `forward(x, conv, view, budget)` takes the
    convolution's own input, B × C_in × H × W, the convolution, whose weight is also the dense path's,
    the number of the step's view, and a budget as in `Gate`. It gives the output and the shares of its
    choices that were computed.

    What is computed for every image is `base` of the convolution's multiply-accumulates; the rest
    divides evenly among the choices.

    Attributes:
        kernels: the sizes of the convolutions that have such a gate.
        choices: how many there are; a constructor that says nothing else leaves the output channels.
        base: as above.
        counts_outputs: whether the kind's papers take a network's mean share over all outputs of its
            convolutions; or else over their multiply-accumulates.
    """

    losses: Sequence[str] = ()
    only_masks: ClassVar[bool] = False
    kernels: ClassVar[tuple[tuple[int, int], ...]] = ((3, 3),)
    counts_outputs: ClassVar[bool] = False

    base: Fraction = Fraction(0)

    @property
    def expected_share(self) -> float | None:
        """Of its choices, the mean share that training leads to; None where the budget says so."""
        return None

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.choices = out_channels

    @classmethod
    def positions(cls, convolutions: Sequence[nn.Conv2d]) -> list[int]:
        """Those of the kind's kernel sizes."""
        return [n for n, conv in enumerate(convolutions) if conv.kernel_size in cls.kernels]

    def forward(
        self, x: Tensor, conv: nn.Conv2d, view: int = 0, budget: Tensor | None = None
    ) -> GatedOutput:
        """As in the class's docstring."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")


GATES: dict[str, type[BaseGate]] = {}

_Kind = TypeVar("_Kind", bound=type[BaseGate])


def register_gate(name: str) -> Callable[[_Kind], _Kind]:
    """Name a kind of gate, for `gating.gate` of a config and `gate` of a backbone.

        @register_gate("mine")
        class Mine(Gate): ...

    Args:
        name: another class of the same name takes the place of the one before, as when a notebook's
            cell is run again; the package's own kinds cannot be replaced.

    Raises:
        InputError: for a class that is no gate, or a name of the package's own.
    """

    def register(cls: _Kind) -> _Kind:
        if not (isinstance(cls, type) and issubclass(cls, (Gate, ConvolutionGate))):
            raise InputError(
                f"register_gate: got {shown(cls)}, expected a subclass of Gate or ConvolutionGate"
            )
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


def gate_class(name: Any, key: str = "gate") -> type[BaseGate]:
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


_OF_TYPES: dict[Any, Kind] = {
    float: Kind(is_number, "a number"),
    int: Kind(lambda v: is_int(v, -(2**31)), "an integer"),
    bool: Kind(lambda v: isinstance(v, bool), "true or false"),
    str: Kind(lambda v: isinstance(v, str), "a text"),
}


def check_gate_kwargs(name: str, kwargs: Mapping[str, Any], key: str) -> None:
    """Refuse a keyword argument that a kind of gate does not take, or whose type its annotation is not.

    Raises:
        InputError: naming it and what is accepted.
    """
    accepted = _arguments(gate_class(name, key))
    for argument, value in kwargs.items():
        if argument not in accepted and "**" not in accepted:
            known = ", ".join(accepted) or "none"
            raise InputError(
                f"{key}.{argument}: no such key of gate {name!r}, expected are {known}"
            )
        annotation = accepted.get(argument)
        types = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
        if value is None and NoneType in types:
            continue
        for one in types:
            if one in _OF_TYPES:
                _OF_TYPES[one].check(f"{key}.{argument}", value)


def make_gate(
    name: str,
    in_channels: int,
    out_channels: int,
    kwargs: Mapping[str, Any],
    common: Mapping[str, Any],
) -> BaseGate:
    """A gate of a kind.

    Args:
        name: of the kind.
        in_channels: C_in, of the block's input, or of the convolution for a `ConvolutionGate`.
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


def _arguments(cls: type[BaseGate]) -> dict[str, Any]:
    """A kind's keyword arguments and their annotations, with those that it hands on; "**" for any."""
    names: dict[str, Any] = {}
    for owner in cls.__mro__:
        init = vars(owner).get("__init__")
        if init is None:
            continue
        own = list(inspect.signature(init).parameters.values())[3:]
        for one in own:
            if one.kind is not one.VAR_KEYWORD:
                names.setdefault(one.name, one.annotation)
        if all(one.kind is not one.VAR_KEYWORD for one in own):
            return names
    return {**names, "**": None}
