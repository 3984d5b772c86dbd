"""What CGNet and CDG have in common: a part of a convolution decides, pixel by pixel, about the rest."""

from collections.abc import Sequence
from fractions import Fraction
from statistics import NormalDist
from typing import ClassVar

import torch
import torch.fx
from torch import Tensor, nn

from ..checks import is_not_negative, require, shown
from ..errors import InputError
from .base import ConvolutionGate, GatedOutput
from .grouped import check_divides, grouped
from .scores import straight_through

# torch.fx keeps calls of these as they are: what they do depends on tensors' dtypes and sizes.
torch.fx.wrap("instance_normalised")
torch.fx.wrap("in_float32")
torch.fx.wrap("decided")

_LOSSES = ("budget", "bound")


class PartialSumGate(ConvolutionGate):
    """out = base + M · (conv(x) − base), M = 1 where the normalised base exceeds τ, else 0.

    Input and output channels are cut into G equal groups. The base of an output group is the part of
    the convolution that reads one group of the input: 1/G of the multiply-accumulates, computed
    everywhere. The rest is added where the base asks for it: M has one number for each image, output
    channel (or run of them) and pixel. In training both are computed in full, as conv(x) and as a
    grouped convolution: 1 + 1/G convolutions.

    M is a step, whose gradient is that of sigmoid(α · (U − τ)), or, with `hard`, of
    clip((α · (U − τ) + 2) / 4, 0, 1), where U is the normalised base: straight through to τ and the base.
    Training adds λ · Σ (τ − target)².

    Nothing here is faster than the dense path: no filter is left out as a whole, and no engine of
    this package skips single pixels.

    Args:
        in_channels: C_in of the convolution.
        out_channels: C_out.
        groups: G.
        init: what τ starts at.
        target: of τ; None for the kind's own. Where U is normally distributed, Φ(τ) of the rest is
            skipped.
        penalty_weight: λ.
        alpha: α.
        hard: as above.
        sparse_gradient: whether M has a gradient only where it is 1; None for the kind's own.
        losses: those of "budget" and "bound" that apply; none as published.

    Attributes:
        run: so many neighbouring output channels share τ and decisions, from the mean of their bases.

    Raises:
        InputError: for numbers of channels that G, or `run`, does not divide, or a negative λ.
    """

    dial = "threshold"
    counts_outputs = True
    own_target: ClassVar[float] = 1.0
    own_sparse_gradient: ClassVar[bool] = False
    run: ClassVar[int] = 1

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        groups: int = 4,
        init: float = 0.0,
        target: float | None = None,
        penalty_weight: float = 1e-4,
        alpha: float = 2.0,
        hard: bool = False,
        sparse_gradient: bool | None = None,
        losses: Sequence[str] = (),
    ):
        super().__init__(in_channels, out_channels)
        check_divides("groups", groups, in_channels, out_channels)
        if out_channels % self.run:
            raise InputError(
                f"gate: got {self.kind!r} for a convolution of {out_channels} channels, expected a "
                f"multiple of {self.run}, which share their decisions"
            )
        if not (isinstance(losses, Sequence) and set(losses) <= set(_LOSSES)):
            raise InputError(f"gate_kwargs.losses: got {shown(losses)}, expected some of {_LOSSES}")
        require("gate_kwargs.penalty_weight", penalty_weight, is_not_negative, "a number ≥ 0")
        self.groups, self.losses = groups, tuple(losses)
        self.base = Fraction(1, groups)
        self.target = self.own_target if target is None else target
        self.penalty_weight, self.alpha, self.hard = penalty_weight, alpha, hard
        self.sparse_gradient = (
            self.own_sparse_gradient if sparse_gradient is None else sparse_gradient
        )
        # A vector, which LARS leaves alone.
        self.tau = nn.Parameter(torch.full((out_channels // self.run,), float(init)))
        self.norm = self.normalisation()

    @property
    def flops(self) -> int:
        """The base's output is there in any case; normalising it is not counted."""
        return 0

    @property
    def expected_share(self) -> float | None:
        """1 − Φ(target), as of normally distributed partial sums; None with the budget loss."""
        return None if "budget" in self.losses else 1 - NormalDist().cdf(self.target)

    def sources(self, view: int) -> tuple[int, ...]:
        """The input group that each output group's base reads."""
        return tuple(range(self.groups))

    def normalisation(self) -> nn.Module:
        """Makes U of the base's output, or of its means over runs."""
        raise NotImplementedError(f"{type(self).__name__} has no normalisation")

    def normalised(self, salience: Tensor) -> Tensor:
        """U, B × K × H × W, in at least float32."""
        return self.norm(in_float32(salience))

    def forward(
        self, x: Tensor, conv: nn.Conv2d, view: int = 0, budget: Tensor | None = None
    ) -> GatedOutput:
        """As in `ConvolutionGate`; a channel's share is that of the pixels where the rest is added."""
        whole = conv(x)
        base = salience = self.base_of(x, conv, view)
        if self.run > 1:
            salience = base.unflatten(1, (-1, self.run)).mean(2)
        # In evaluation only, as other gates' thresholds.
        tau = self.tau if self.training else self.tau + self.threshold
        mask = decided(self.normalised(salience), tau, self.alpha, self.hard, self.sparse_gradient)
        shares = (mask if self.losses else mask.detach()).mean((2, 3))
        if self.run > 1:
            mask, shares = (one.repeat_interleave(self.run, 1) for one in (mask, shares))
        penalty = None
        if self.training and self.penalty_weight:
            penalty = self.penalty_weight * (self.tau - self.target).square().sum()
        return GatedOutput(base + mask.to(base.dtype) * (whole - base), shares, penalty)

    def base_of(self, x: Tensor, conv: nn.Conv2d, view: int) -> Tensor:
        """The base's output, B × C_out × H' × W': a grouped convolution of the groups that it reads."""
        sources = self.sources(view)
        blocks = conv.weight.unflatten(1, (self.groups, -1)).unflatten(0, (self.groups, -1))
        weight = torch.cat([blocks[out, :, source] for out, source in enumerate(sources)])
        if sources != tuple(range(self.groups)):
            x = x.unflatten(1, (self.groups, -1))[:, list(sources)].flatten(1, 2)
        return grouped(conv, x, weight, self.groups)


class InstanceNormalisation(nn.Module):
    """Each image's channels with mean 0 and variance 1 over their pixels, without weights.

    A map of one pixel has no variance: it becomes 0, so that τ alone decides.
    """

    def forward(self, x: Tensor) -> Tensor:
        """B × C × H × W → the same."""
        return instance_normalised(x)


def instance_normalised(x: Tensor) -> Tensor:
    """As `InstanceNormalisation`."""
    if x.shape[-2:].numel() == 1:
        return torch.zeros_like(x)
    # F.group_norm refuses a single image with a single pixel, torch.group_norm takes whatever comes.
    return torch.group_norm(x, x.shape[1])


def in_float32(x: Tensor) -> Tensor:
    """The tensor in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def decided(
    salience: Tensor, tau: Tensor, alpha: float, hard: bool, sparse_gradient: bool
) -> Tensor:
    """Ones where B × K × H × W exceeds K numbers τ, else zeros; `PartialSumGate` says which gradient."""
    distance = salience - tau[:, None, None]
    on = distance > 0
    value = on.to(distance.dtype)
    # torch.jit.trace compares its graph with one that it makes without gradients.
    if not torch.is_grad_enabled() or torch.jit.is_tracing():
        return value
    distance = alpha * distance
    soft = ((distance + 2) / 4).clamp(0, 1) if hard else torch.sigmoid(distance)
    return straight_through(
        value, torch.where(on, soft, soft.detach()) if sparse_gradient else soft
    )
