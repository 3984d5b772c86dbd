"""A ResNet's weights with every BatchNorm folded into the convolution before it."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...backbones import ResNet, checked_path, convolutions
from ...budgets import Range
from ...errors import InputError
from ...gates import FoldedGate, Gate
from .known import check_network, named_blocks

# Of a block that the kernel runs.
MOST_CONVOLUTIONS = 3


@dataclass(frozen=True)
class FoldedConvolution:
    """A convolution followed by its BatchNorm: x ↦ weight * x + bias.

    Attributes:
        weight: C_out × C_in × k × k.
        bias: C_out.
        stride: for rows and columns.
        padding: in pixels.
    """

    weight: Tensor
    bias: Tensor
    stride: int = 1
    padding: int = 0


@dataclass(frozen=True)
class FoldedBlock:
    """relu(c_N(m_(N−1) · relu(c_(N−1)(... m_1 · relu(c_1 x)))) + shortcut x), with masks m_i = gate_i(x).

    Attributes:
        convolutions: c_1 to c_N.
        shortcut: a convolution; None for the identity.
        gates: one between each two convolutions; none on the dense path. A gate that cannot be
            folded is a module, with which only PyTorch can run the network.
    """

    convolutions: tuple[FoldedConvolution, ...]
    shortcut: FoldedConvolution | None
    gates: tuple[FoldedGate | Gate, ...] = ()

    @property
    def hidden(self) -> tuple[int, ...]:
        """Channels between the convolutions."""
        return tuple(len(conv.bias) for conv in self.convolutions[:-1])

    @property
    def is_basic(self) -> bool:
        """Whether it is two 3×3 convolutions, the second of stride 1."""
        return self._kernels == [(3, 1), (3, 1)] and self.convolutions[1].stride == 1

    @property
    def is_compilable(self) -> bool:
        """Whether the kernel runs it: few convolutions of 1×1 or 3×3, with folded gates or none."""
        folded = all(isinstance(gate, FoldedGate) for gate in self.gates)
        number = len(self.convolutions)
        known = all(kernel in [(1, 0), (3, 1)] for kernel in self._kernels)
        return folded and known and 2 <= number <= MOST_CONVOLUTIONS

    @property
    def _kernels(self) -> list[tuple[int, int]]:
        return [(conv.weight.shape[-1], conv.padding) for conv in self.convolutions]


@dataclass(frozen=True)
class Decisions:
    """What gates go by at a setting of the dial, for all channels, one gate after another.

    Attributes:
        thresholds: float32, of each channel's logit before it is shifted.
        counts: for each gate how many channels it chooses; -1 for those that reach the threshold.
        budget: what gates that are not folded are told.
    """

    thresholds: Tensor
    counts: Tensor
    budget: float | None

    @property
    def counted(self) -> bool:
        """Whether any gate chooses a number of channels."""
        return bool((self.counts >= 0).any())


@dataclass(frozen=True)
class FoldedNetwork:
    """One path of a backbone, in float32.

    Attributes:
        stem: the first convolution.
        max_pool: whether a 3×3 max-pool of stride 2 and padding 1 follows.
        blocks: those of the four stages, one after another.
        linear: weight (classes × C) and bias of the classifier; None without one.
        budget_range: of the budgets that the gates can be told, None without one.
        dial: as in `Gate`.
    """

    stem: FoldedConvolution
    max_pool: bool
    blocks: tuple[FoldedBlock, ...]
    linear: tuple[Tensor, Tensor] | None
    budget_range: Range | None = None
    dial: str | None = "threshold"

    @property
    def features(self) -> int:
        """Length of the features of one image."""
        last = self.blocks[-1].convolutions[-1].bias if self.linear is None else self.linear[1]
        return len(last)

    @property
    def hidden(self) -> tuple[int, ...]:
        """For each gate, or where it would be, the channels that it chooses from."""
        return tuple(number for block in self.blocks for number in block.hidden)

    @property
    def gates(self) -> list[FoldedGate | Gate]:
        """All gates; none on the dense path."""
        return [gate for block in self.blocks for gate in block.gates]

    def decisions(self, threshold: float, budget: float | None) -> Decisions | None:
        """What the gates go by; None on the dense path.

        Args:
            threshold: of the logits, for gates that have one.
            budget: in the range; None without one.
        """
        if not self.gates:
            return None
        thresholds, counts = [], []
        with torch.device("cpu"):  # whatever the default is
            for gate, channels in zip(self.gates, self.hidden, strict=True):
                shift, count = torch.zeros(channels, dtype=torch.float32), -1
                if isinstance(gate, FoldedGate):
                    shift = gate.shift(budget).float()
                    count = -1 if gate.count is None else gate.count(budget)
                counts.append(count)
                # With a count logits are compared with each other: shifts are no thresholds.
                thresholds.append(-shift if count >= 0 else threshold - shift)
            return Decisions(torch.cat(thresholds), torch.tensor(counts), budget)

    @property
    def smallest_image(self) -> int:
        """The height and width that the stem needs at least, in pixels."""
        return max(1, self.stem.weight.shape[-1] - 2 * self.stem.padding)

    def with_weights_rounded_to(self, dtype: torch.dtype) -> "FoldedNetwork":
        """The same network with the convolutions' weights rounded, in float32 as before."""

        def rounded(conv: FoldedConvolution) -> FoldedConvolution:
            return replace(conv, weight=conv.weight.to(dtype).float())

        blocks = tuple(
            replace(
                block,
                convolutions=tuple(map(rounded, block.convolutions)),
                shortcut=None if block.shortcut is None else rounded(block.shortcut),
            )
            for block in self.blocks
        )
        return replace(self, stem=rounded(self.stem), blocks=blocks)


@torch.no_grad()
def fold(backbone: nn.Module, path: str) -> FoldedNetwork:
    """Fold one path of a backbone, as it is in evaluation.

    Args:
        backbone: one of this package's ResNets, or torchvision's resnet18, 34, 50 or 101.
        path: "gated" or "dense".

    Raises:
        InputError: for a backbone without gates on the gated path, with a part that `known` does
            not know, or with weights that are not finite.
    """
    checked_path(path, "path")
    check_network(backbone, path)
    encoder: Any = backbone.encoder(path) if isinstance(backbone, ResNet) else backbone
    fc = backbone.get_submodule("fc")
    return FoldedNetwork(
        stem=_folded(encoder.conv1, encoder.bn1, "conv1"),
        max_pool=not isinstance(encoder.maxpool, nn.Identity),
        blocks=tuple(_folded_block(block, path, name) for name, block in named_blocks(encoder)),
        linear=_linear(fc) if isinstance(fc, nn.Linear) else None,
        budget_range=getattr(backbone, "budget_range", None) if path == "gated" else None,
        dial=cast(Any, backbone).gates[0].dial if path == "gated" else "threshold",
    )


def _folded_block(block: Any, path: str, name: str) -> FoldedBlock:
    layers = convolutions(block)
    norms = [norm for _, _, norm in layers]
    gates: list[FoldedGate | Gate] = []
    if path == "gated":
        norms = getattr(block, "gated_norms", norms)
        gates = [_folded_gate(gate, f"{name}'s gate") for gate in block.gates]
    shortcut = None
    if block.downsample is not None:
        shortcut = _folded(block.downsample[0], block.downsample[1], f"{name}.downsample")
    return FoldedBlock(
        tuple(
            _folded(conv, norm, f"{name}.{conv_name}")
            for (conv_name, conv, _), norm in zip(layers, norms, strict=True)
        ),
        shortcut,
        tuple(gates),
    )


def _folded_gate(gate: Gate, name: str) -> FoldedGate | Gate:
    # A copy: later changes to the backbone have no effect.
    gate = copy.deepcopy(gate).to("cpu").eval()
    with torch.device("cpu"):
        folded = gate.fold() if _fold_is_of_forward(type(gate)) else None
    if folded is None:
        return gate.float()
    return replace(
        folded,
        reduce=_float(folded.reduce, name),
        bias=_float(folded.bias, name),
        expand=_float(folded.expand, name),
        shift=_shift(gate.float(), name),
    )


def _fold_is_of_forward(kind: type[Gate]) -> bool:
    """Whether no subclass decides otherwise than the class whose `fold` it inherits."""

    def owner(name: str) -> type:
        return next(cls for cls in kind.__mro__ if name in vars(cls))

    decides = [name for name in ("forward", "logits") if hasattr(kind, name)]
    return all(issubclass(owner("fold"), owner(name)) for name in decides)


def _shift(gate: Gate, name: str) -> Callable[[float | None], Tensor]:
    for value in gate.parameters():
        _float(value, name)
    return gate.fold().shift  # type: ignore[union-attr]


def _folded(conv: Any, norm: Any, name: str) -> FoldedConvolution:
    # In float64, so that folding costs one rounding and no more.
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    if conv.bias is not None:
        shift = shift + conv.bias.double() * scale
    return FoldedConvolution(
        _float(conv.weight.double() * scale[:, None, None, None], name),
        _float(shift, name),
        _number(conv.stride),
        _number(conv.padding),
    )


def _linear(fc: nn.Linear) -> tuple[Tensor, Tensor]:
    weight = _float(fc.weight, "fc")
    return weight, weight.new_zeros(len(weight)) if fc.bias is None else _float(fc.bias, "fc")


def _float(value: Tensor, name: str) -> Tensor:
    value = value.detach().to("cpu", torch.float32, copy=True).contiguous()
    if not value.isfinite().all():
        raise InputError(
            f"backbone: got NaN or infinity, expected finite weights for {name} and its BatchNorm"
        )
    return value


def _number(pair: Any) -> int:
    """The number that an argument for rows and columns consists of: `known` refused other pairs."""
    return pair[0] if isinstance(pair, tuple) else pair
