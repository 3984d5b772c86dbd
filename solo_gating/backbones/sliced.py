"""ResNets whose blocks compute fewer hidden channels: what is left of a gated encoder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import is_int, require
from ..errors import InputError
from ..gates import BaseGate, make_gate
from ..policies import read_policy
from .blocks import BLOCKS, BlockMixin, convolutions, mixed
from .masking import apply_mask
from .resnet import ResNet


class SlicedBlock(BlockMixin):
    """A residual block with any numbers of channels between its convolutions.

    out = relu(bn_N(conv_N h_(N−1)) + shortcut(x)), h_i = relu(bn_i(conv_i h_(i−1))) with `hidden[i]`
    channels; where gates stay, h_i is multiplied by their masks as in `GatedBlock`.
    """

    def slice(self, hidden: Sequence[int], gates: Sequence[BaseGate]) -> None:
        """Replace the convolutions by ones with so many channels between them."""
        layers = convolutions(self)
        first, last = layers[0][1], layers[-1][1]
        widths = [first.in_channels, *hidden, last.out_channels]
        for number, (_, conv, norm) in enumerate(layers, 1):
            channels = (widths[number - 1], widths[number])
            new = nn.Conv2d(
                *channels,  # type: ignore[arg-type]
                conv.kernel_size,  # type: ignore[arg-type]
                conv.stride,  # type: ignore[arg-type]
                conv.padding,  # type: ignore[arg-type]
                bias=False,
            )
            # As torchvision initialises a ResNet's.
            nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
            setattr(self, f"conv{number}", new)
            if norm.num_features != widths[number]:  # else it may start at zero
                setattr(self, f"bn{number}", type(norm)(widths[number]))
        self.set_gates(gates)

    def forward(self, x: Tensor) -> Tensor:
        """B × C_in × H × W → B × C_out × H' × W'."""
        masks = [gate(x) for gate in self.gates]
        layers = convolutions(self)
        out = x
        for number, (_, conv, norm) in enumerate(layers, 1):
            out = norm(conv(out))
            if number < len(layers):
                out = self.relu(out)
                if masks:
                    out = apply_mask(out, masks[number - 1])
        out = out + (x if self.downsample is None else self.downsample(x))
        return self.relu(out)


def sliced_block(block: type[nn.Module]) -> type[nn.Module]:
    """The sliced version of a class of residual blocks, as `blocks.gated_block`."""
    return mixed(SlicedBlock, block)


class SlicedResNet(ResNet):
    """A ResNet that is physically smaller inside its blocks; what flows between them is the same.

    The sub-network of a channel policy, and the architecture of a student that is "sampled by the
    policy" (unification paper, section 3.1, "Comparison with self-supervised KD").

    Args:
        layers: number of blocks of the four stages.
        hidden: channels between the convolutions of each block, in order: one number for each
            BasicBlock, two for each Bottleneck.
        block: as in `ResNet`.
        gate: the kind of the gates over these channels; None for no gates.
        gate_kwargs: arguments of the kind's, for each gate.
        kwargs: those of `ResNet`.

    Attributes:
        architecture: the arguments it was made with; `SlicedResNet(**architecture)` is its like.

    Raises:
        InputError: for numbers of channels that do not fit the blocks.
    """

    def __init__(
        self,
        layers: list[int],
        *,
        hidden: list[int],
        block: str | type[nn.Module] = "basic",
        gate: str | None = None,
        gate_kwargs: Sequence[dict[str, Any]] = (),
        **kwargs: Any,
    ):
        plain = BLOCKS[block] if isinstance(block, str) else block
        super().__init__(layers, block=sliced_block(plain), **kwargs)
        self._architecture = {
            "layers": layers,
            "hidden": hidden,
            "block": block,
            "gate": gate,
            "gate_kwargs": list(gate_kwargs),
            **kwargs,
        }
        between = [len(convolutions(one)) - 1 for one in self.blocks]
        if len(hidden) != sum(between) or any(number < 1 for number in hidden):
            raise InputError(
                f"hidden: got {hidden}, expected {sum(between)} numbers of channels ≥ 1"
            )
        arguments = list(gate_kwargs) or [{} for _ in hidden]
        for one, number in zip(self.blocks, between, strict=True):
            widths, hidden = hidden[:number], hidden[number:]
            own, arguments = arguments[:number], arguments[number:]
            inputs = convolutions(one)[0][1].in_channels
            gates = []
            if gate is not None:
                for width, its in zip(widths, own, strict=True):
                    gates.append(make_gate(gate, inputs, width, its, {}))
            one.slice(widths, gates)

    @property
    def architecture(self) -> dict[str, Any]:
        """As in the class's docstring."""
        return self._architecture

    @property
    def gates(self) -> list[BaseGate]:
        """All gates, in order; none for a static network."""
        return [gate for block in self.blocks for gate in block.gates]


POLICY = "backbone.kwargs.policy"


def resnet_of_policy(
    layers: list[int],
    *,
    block: str | type[nn.Module] = "basic",
    policy: str | Path | None = None,
    hidden: Sequence[int] | None = None,
    **kwargs: Any,
) -> SlicedResNet:
    """A ResNet without gates, as wide inside its blocks as a policy's channels, with fresh weights.

    The student of the unification paper's Table 3: "we combine data dependent + always on channels
    to get the architecture of student" (its supplementary material, "Learned Policy").

    Args:
        layers: number of blocks of the four stages.
        block: as in `ResNet`.
        policy: a file of main_policy's, of a gated ResNet with these layers, blocks and width.
        hidden: instead of it, the numbers of channels themselves, as in `SlicedResNet`.
        kwargs: those of `ResNet`.

    Raises:
        InputError: for a file that is no policy, a policy of another architecture, or neither or
            both of them.
    """
    if (policy is None) == (hidden is None):
        raise InputError(
            f"{POLICY}: got {'no policy' if policy is None else 'a policy and hidden widths'}, "
            "expected main_policy's policy.json, or backbone.kwargs.hidden"
        )
    if policy is not None:
        hidden = _hidden_of(policy, layers, block, kwargs.get("width", 64))
    require(
        "backbone.kwargs.hidden",
        hidden,
        lambda v: isinstance(v, Sequence) and all(is_int(number, 1) for number in v),
        "a list of integers ≥ 1",
    )
    return SlicedResNet(layers, hidden=list(hidden), block=block, **kwargs)  # type: ignore[arg-type]


def _hidden_of(file: str | Path, layers: list[int], block: Any, width: int) -> list[int]:
    """A policy's numbers of channels, if it is of a gated ResNet like this."""
    policy = read_policy(file, POLICY)
    with torch.device("meta"):
        whole = ResNet(layers, block=block, width=width)
    expected = []
    for stage, blocks in enumerate(whole.stages, 1):
        for number, one in enumerate(blocks):
            inner = convolutions(one)[:-1]
            part = f"layer{stage}.{number}"
            names = [part] if len(inner) == 1 else [f"{part}.{name}" for name, _, _ in inner]
            expected += [
                (n, conv.out_channels) for n, (_, conv, _) in zip(names, inner, strict=True)
            ]
    if [(one.name, one.channels) for one in policy.blocks] != expected:
        raise InputError(
            f"{POLICY}: {str(file)!r} is of a network with {[one.channels for one in policy.blocks]} "
            f"channels, expected {[channels for _, channels in expected]}, those of backbone.name and "
            "backbone.kwargs.width"
        )
    return policy.hidden
