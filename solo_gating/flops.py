"""FLOPs of a backbone: what each part costs, and what an image's masks cost.

FLOPs are multiply-accumulates of the convolutions, the gates' included; BatchNorm, ReLU, pooling
and the classifier are not counted. That is how the papers count. A gated convolution costs its
multiply-accumulates × the share of the channels that it reads × the share of those that it writes:
exact for every image, also where a block has several gates, or where gates stand between blocks. A
convolution that a gate of its own computes in part (`gates.ConvolutionGate`) is two entries: what
every image costs, and the rest, which divides evenly among the gate's choices.
"""

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .backbones import ResNet, TwoPathResNet, convolutions
from .gates import BaseGate, ConvolutionGate
from .transfer import numbers_like

# The channels that a gradient of numbers of selected channels reaches.
GRADIENTS = ("all", "selected")


@dataclass(frozen=True)
class ConvolutionFlops:
    """Multiply-accumulates of a convolution for one image, all channels computed.

    Attributes:
        part: of the network: "stem" or a block's name, as `layer1.0`.
        macs: k²·H·W·C_in·C_out, or one part of them.
        reads: the gate (its number in the network) that chooses its input channels; None for none.
        writes: the gate that chooses its output channels.
    """

    part: str
    macs: int
    reads: int | None = None
    writes: int | None = None


@dataclass(frozen=True)
class GateFlops:
    """What a gate chooses from, and what its decision costs.

    Attributes:
        name: the block's, as `layer1.0`; where a block has several gates with the convolution's,
            as `layer1.0.conv2`.
        part: the block's name.
        channels: C_out, the channels that it chooses from; or the choices of a `ConvolutionGate`.
        decision: multiply-accumulates for one image.
        base: of a `ConvolutionGate`, the part of its convolution that every image costs.
        weight: what its share counts in `BackboneFlops.gated_share`: the convolution's outputs, or its
            multiply-accumulates; 0 for a gate of another family.
    """

    name: str
    part: str
    channels: int
    decision: int
    base: Fraction = Fraction(0)
    weight: int = 0


@dataclass(frozen=True)
class BackboneFlops:
    """Multiply-accumulates of a backbone for one image of one size."""

    convolutions: tuple[ConvolutionFlops, ...]
    gates: tuple[GateFlops, ...]

    @property
    def dense(self) -> int:
        """F^O of the papers' Eq. 3: stem and blocks, without gates."""
        return sum(conv.macs for conv in self.convolutions)

    @property
    def decisions(self) -> int:
        """All gates together."""
        return sum(gate.decision for gate in self.gates)

    @property
    def fixed(self) -> int:
        """What every image costs on the gated path: stem, shortcuts and gates."""
        free = [c for c in self.convolutions if c.reads is None and c.writes is None]
        return self.decisions + sum(conv.macs for conv in free)

    @property
    def lowest_share(self) -> float:
        """The least that the gated path can use, of the dense FLOPs."""
        return self.fixed / self.dense

    @property
    def all_channels(self) -> Tensor:
        """The channels that each of the L gates chooses from, int64, L."""
        return torch.tensor([gate.channels for gate in self.gates])

    def gated(self, channels: Tensor) -> Tensor:
        """F^R for numbers of selected channels.

        Args:
            channels: ... × L, selected channels of each of the L gates (`selected_channels`), of one
                image: where a block has several gates, a mean over images has another cost than
                the images have on average. Its dtype is the result's; int64 and float64 are exact.

        Returns:
            ..., multiply-accumulates.
        """
        each = [0] * len(self.gates)  # of one selected channel, where no other gate takes part
        pairs: dict[tuple[int, int], int] = {}
        for conv in self.convolutions:
            if conv.reads is not None and conv.writes is not None:
                both = self.gates[conv.reads].channels * self.gates[conv.writes].channels
                pair = (conv.reads, conv.writes)
                pairs[pair] = pairs.get(pair, 0) + conv.macs // both
            elif conv.reads is not None or conv.writes is not None:
                gate: Any = conv.writes if conv.reads is None else conv.reads
                each[gate] += conv.macs // self.gates[gate].channels
        cost = (channels * numbers_like(each, channels)).sum(-1) + self.fixed
        for (reads, writes), macs in pairs.items():
            cost = cost + channels[..., reads] * channels[..., writes] * macs
        return cost

    def share(self, channels: Tensor) -> Tensor:
        """F^R / F^O for numbers of selected channels, ... × L → ...; differentiable."""
        return self.gated(channels) / self.dense

    def gated_share(self, channels: Tensor) -> Tensor:
        """The share as papers count that treat every convolution as gated: nothing else costs anything.

        Of convolutions that are computed in part, base + (1 − base) · d, where d is the mean share of
        the rest: over all their outputs (CGNet, CDG), or over their multiply-accumulates (DGC).

        Args:
            channels: as in `gated`.

        Returns:
            ...; differentiable.
        """
        weights = [gate.weight for gate in self.gates]
        if not all(weights):
            free = sum(c.macs for c in self.convolutions if c.reads is None and c.writes is None)
            return (self.gated(channels) - self.fixed) / (self.dense - free)
        bases = [float(gate.base) for gate in self.gates]
        base = torch.tensor(bases, dtype=channels.dtype, device=channels.device)
        computed = base + (1 - base) * self.channel_shares(channels)
        return (computed * numbers_like(weights, channels)).sum(-1) / sum(weights)

    def as_published(self, channels: Tensor) -> dict[str, float]:
        """Figures as papers on gates that do more than mask count them, means over images.

        Args:
            channels: N × L.

        Returns:
            "gated_share" (of `gated_share`), and where a base is computed in any case "skipped", the
            share of the rest that is not.
        """
        share, base = float(self.gated_share(channels).mean()), float(self.gates[0].base)
        skipped = {"skipped": (1 - share) / (1 - base)} if base else {}
        return {"gated_share": share, **skipped}

    def channel_shares(self, channels: Tensor) -> Tensor:
        """Numbers of selected channels as shares of those to choose from, ... × L → ... × L."""
        return channels / numbers_like([gate.channels for gate in self.gates], channels)

    @property
    def parts(self) -> dict[str, "BackboneFlops"]:
        """Stem and blocks by name, each as if it were a network; numbers of gates stay.

        A part's gates are those of the whole network, with decisions of no cost elsewhere, so that
        the same `channels` can be given to all.
        """
        names = dict.fromkeys(conv.part for conv in self.convolutions)
        return {
            name: BackboneFlops(
                tuple(conv for conv in self.convolutions if conv.part == name),
                tuple(
                    gate if gate.part == name else replace(gate, part=name, decision=0)
                    for gate in self.gates
                ),
            )
            for name in names
        }


def selected_channels(masks: tuple[Tensor, ...], gradient: str = "all") -> Tensor:
    """One B × C_out mask for each of L gates → B × L, channels selected; differentiable.

    Args:
        masks: zeros and ones, or shares, whose sum need be no whole number.
        gradient: that of the sum, which is 1 for "all" channels; or that of the mask's L1 norm, which
            is 1 for "selected" channels and 0 for the others (Mask_c of KrishnaTarun/Unification).
            The value is the same.
    """
    counted = masks if gradient == "all" else [mask.abs() for mask in masks]
    return torch.stack([mask.sum(dim=1) for mask in counted], dim=1)


@torch.no_grad()
def count_flops(backbone: ResNet, resolution: tuple[int, int]) -> BackboneFlops:
    """Count a backbone's multiply-accumulates from its modules, at an input size.

    A copy of the backbone without data runs on PyTorch's FLOP counter, so that whatever the
    modules are (width, stem, depth, block, gate) is what is counted.

    Args:
        backbone: one of this package's ResNets.
        resolution: height and width of an input image, in pixels.
    """
    net = copy.deepcopy(backbone).to("meta", torch.float32).eval()
    encoder = net.encoder("gated")
    gated = _multiplications(net, resolution, "gated")
    # A gate that computes its convolution itself hides it; the dense path has it.
    in_part = any(isinstance(gate, ConvolutionGate) for gate in getattr(net, "gates", []))
    plain = _multiplications(encoder, resolution, "dense") if in_part else gated
    names = {module: name for name, module in encoder.named_modules()}
    gates = _stream_flops(encoder, names)
    # The first of them chooses the stem's output, the next those of each stage.
    between = bool(gates)
    counts = [ConvolutionFlops("stem", plain[encoder.conv1], writes=0 if between else None)]
    source = counts[0].writes
    for block in encoder.blocks:
        part, layers, at = names[block], convolutions(block), getattr(block, "gates_at", {})
        stage = [block in stage for stage in encoder.stages].index(True)
        target = stage + 1 if between else None
        numbers = {n: len(gates) + index for index, n in enumerate(at)}
        rest = plain[block] - sum(plain[gate] for gate in at.values())
        for number, (name, conv, _) in enumerate(layers):
            macs, gate = plain[conv], at.get(number)
            rest -= macs
            if isinstance(gate, ConvolutionGate):
                base = int(gate.base * macs)
                counts.append(ConvolutionFlops(part, base))
                counts.append(ConvolutionFlops(part, macs - base, writes=numbers[number]))
            else:
                reads = None if in_part else numbers.get(number - 1, source)
                writes = numbers.get(number, target)
                counts.append(ConvolutionFlops(part, macs, reads, writes))
            if gate is not None:
                title = part if len(at) == 1 else f"{part}.{name}"
                gates.append(_gate_flops(gate, title, part, conv, macs, gated))
        # The shortcut, and whatever else a block has.
        counts.append(ConvolutionFlops(part, rest, source, target))
        source = target
    return BackboneFlops(tuple(counts), tuple(gates))


def _multiplications(net: ResNet, resolution: tuple[int, int], path: str) -> dict[nn.Module, int]:
    """Multiply-accumulates of each module for one image, on a path of a network without data."""
    counter = FlopCounterMode(display=False)
    image = torch.zeros(1, 3, *resolution, device="meta", dtype=torch.float32)
    with counter, net.path(path) if isinstance(net, TwoPathResNet) else nullcontext():
        net(image)
    counted = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    root = type(net).__name__
    # PyTorch counts a multiply-accumulate as two operations.
    return {m: int(counted.get(f"{root}.{name}", 0)) // 2 for name, m in net.named_modules()}


def _stream_flops(encoder: ResNet, names: Mapping[nn.Module, str]) -> list[GateFlops]:
    """The gates of the stem's and of each stage's output, which decide nothing that costs anything."""
    gates = encoder.stream_gates if isinstance(encoder, TwoPathResNet) else []
    if not gates:
        return []
    stages = [(names[stage], names[stage[0]], stage[-1]) for stage in encoder.stages]
    outputs = [(name, part, convolutions(last)[-1][1].out_channels) for name, part, last in stages]
    every = [("stem", "stem", encoder.conv1.out_channels), *outputs]
    return [GateFlops(name, part, channels, 0) for name, part, channels in every]


def _gate_flops(
    gate: BaseGate,
    name: str,
    part: str,
    conv: nn.Conv2d,
    macs: int,
    counted: Mapping[nn.Module, int],
) -> GateFlops:
    decision = gate.flops
    if not isinstance(gate, ConvolutionGate):
        return GateFlops(
            name, part, conv.out_channels, counted[gate] if decision is None else decision
        )
    if decision is None:
        decision = sum(counted[layer] for layer in gate.children())
    outputs = conv.out_channels * macs // conv.weight.numel()
    weight = outputs if gate.counts_outputs else macs
    return GateFlops(name, part, gate.choices, decision, gate.base, weight)


def count_parameters(module: nn.Module) -> int:
    """Number of weights in a module."""
    return sum(parameter.numel() for parameter in module.parameters())
