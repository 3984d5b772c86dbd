"""Residual blocks with a second, gated way through them."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from ..gates import BaseGate, ConvolutionGate, Decision, Gate
from .masking import apply_mask, convolve_masked
from .paths import Choice, refuse_in_scope

# The classes of torchvision's residual blocks, by the names that architectures give them.
BLOCKS: dict[str, type[nn.Module]] = {"basic": BasicBlock, "bottleneck": Bottleneck}


def convolutions(block: nn.Module) -> list[tuple[str, nn.Conv2d, Any]]:
    """A block's convolutions in order, with their names and the BatchNorms that follow them.

    They are conv1, conv2, ... and bn1, bn2, ..., as in torchvision's blocks.
    """
    found: list[tuple[str, Any, Any]] = []
    while (name := f"conv{len(found) + 1}") in block._modules:
        norm = block.get_submodule(f"bn{len(found) + 1}")
        found.append((name, block.get_submodule(name), norm))
    return found


class BlockMixin(nn.Module):
    """What this package puts before a plain class of blocks: `class Gated(GatedBlock, BasicBlock)`."""

    relu: nn.Module
    downsample: nn.Module | None

    def set_gates(self, gates: Sequence[BaseGate]) -> None:
        """Hold gates as `gate`, `gate2`, ..., in order."""
        for number, gate in enumerate(gates, 1):
            setattr(self, "gate" if number == 1 else f"gate{number}", gate)

    @property
    def gates(self) -> list[BaseGate]:
        """The gates, in order; none for a block of a dense encoder, or one whose gates were dropped."""
        return [module for module in self._modules.values() if isinstance(module, BaseGate)]

    @property
    def gates_at(self) -> dict[int, BaseGate]:
        """The gates by the numbers of their convolutions, from 0."""
        gates = self.gates
        if not gates:
            return {}
        at = gates[0].positions([conv for _, conv, _ in convolutions(self)])
        return dict(zip(at, gates, strict=True))


def plain_block(block: type[nn.Module]) -> type[nn.Module]:
    """The class of blocks that a mixin of this package's was put before; or the class itself."""
    return block.__bases__[1] if issubclass(block, BlockMixin) else block


class GatedBlock(BlockMixin):
    """What makes a residual block gated: `class GatedBasicBlock(GatedBlock, BasicBlock)`.

    dense: the block's own `forward`; gated, with convolutions conv1, ..., convN and a gate between
    each two of them, which sees the block's input x:

        h_0 = x,  h_i = gate_i(x) · relu(bn'_i(conv_i h_(i−1))) for i < N,
        out = relu(bn'_N(conv_N h_(N−1)) + shortcut(x))

    bn' are the gated path's own BatchNorms (`gated_bn1`, ...) or, if they are shared, bn1, ...
    (unification paper, Figure 1, which has N = 2). Gates that also scale, or that compute a convolution
    in part (`ConvolutionGate`), say what stands there instead. The gates are `gate`, `gate2`, ...

    Attributes:
        path: the way that it goes when it is called by itself, outside of its backbone.
        separate_bn: whether the gated path has its own BatchNorms.
    """

    path = "dense"
    separate_bn = False

    def add_gates(
        self, kind: type[BaseGate], make: Callable[[int, int], BaseGate], separate_bn: bool
    ) -> None:
        """Add the gates, and the gated path's BatchNorms as copies of the dense path's.

        Args:
            kind: of the gates.
            make: a gate for the channels of the block's input, or its convolution's, and of the
                convolution's output.
            separate_bn: as the attribute.
        """
        layers = convolutions(self)
        convs = [conv for _, conv, _ in layers]
        at = kind.positions(convs)
        sources = [convs[n if issubclass(kind, ConvolutionGate) else 0] for n in at]
        self.set_gates(
            [
                make(source.in_channels, convs[n].out_channels)
                for n, source in zip(at, sources, strict=True)
            ]
        )
        self.separate_bn = separate_bn
        if separate_bn:
            owned = [n for n, gate in self.gates_at.items() if _output_norm(gate) is not None]
            for number, (_, _, norm) in enumerate(layers):
                if number not in owned:
                    own = type(norm)(norm.num_features)
                    own.load_state_dict(norm.state_dict())
                    setattr(self, f"gated_bn{number + 1}", own)

    @property
    def gated_norms(self) -> list[nn.Module]:
        """The BatchNorms of the gated path, in order."""
        gates, norms = self.gates_at, []
        for number, (_, _, shared) in enumerate(convolutions(self)):
            own = _output_norm(gates.get(number))
            if own is None and self.separate_bn:
                own = self.get_submodule(f"gated_bn{number + 1}")
            norms.append(shared if own is None else own)
        return norms

    @property
    def gated_only(self) -> list[nn.Module]:
        """The modules that the gated path alone uses."""
        return [*self.gates, *(self.gated_norms if self.separate_bn else [])]

    def forward(self, x: Tensor, choice: Choice | None = None) -> Tensor:
        """B × C_in × H × W → B × C_out × H' × W', on the chosen path or its own.

        Raises:
            RuntimeError: for the gated path of a block without a gate; or without a choice, while
                a scope of its backbone is open.
        """
        if choice is None:
            refuse_in_scope(self)
            choice = Choice(self.path)
        if choice.path == "dense":
            return super().forward(x)
        out, masks = self.forward_gated(x, choice.budget, choice)
        choice.masks.extend(masks)
        return out

    def forward_gated(
        self, x: Tensor, budget: Tensor | None = None, choice: Choice | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """B × C_in × H × W, and the gates' budget → (B × C_out × H' × W', a mask for each gate).

        Args:
            x: the block's input.
            budget: what the gates are told.
            choice: of the pass, which says the view and takes the gates' penalties.
        """
        gates, choice = self.gates_at, choice or Choice("gated", budget)
        if not gates:
            raise RuntimeError(
                "this block is the dense encoder's and has no gate; those of the gated one are in "
                "backbone.gated_net"
            )
        decisions = {
            n: _decision(gate(x, budget)) for n, gate in gates.items() if isinstance(gate, Gate)
        }
        masks, penalties = (
            [d.mask for d in decisions.values()],
            [d.penalty for d in decisions.values()],
        )
        layers, out = convolutions(self), x
        for number, ((_, conv, _), norm) in enumerate(zip(layers, self.gated_norms, strict=True)):
            gate = gates.get(number)
            if isinstance(gate, ConvolutionGate):
                out, shares, penalty = gate(out, conv, choice.view, budget)
                masks.append(shares)
                penalties.append(penalty)
            elif number - 1 in decisions:
                out = convolve_masked(conv, out, decisions[number - 1].mask)
            else:
                out = conv(out)
            out = norm(out)
            if number in decisions:
                out = _scaled(out, decisions[number])
            if number < len(layers) - 1:
                out = self.relu(out)
        choice.penalties.extend(penalty for penalty in penalties if penalty is not None)
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out), tuple(masks)


def _output_norm(gate: BaseGate | None) -> nn.Module | None:
    return gate.output_norm if isinstance(gate, Gate) and gate.has_output_norm else None


def _decision(decided: Tensor | Decision) -> Decision:
    return decided if isinstance(decided, Decision) else Decision(decided)


def _scaled(out: Tensor, decision: Decision) -> Tensor:
    """scale · out + shift, in the dtype of `out`."""
    _, scale, shift, _ = decision
    if scale is not None:
        out = out * scale.to(out.dtype)[:, :, None, None]
    return out if shift is None else out + shift.to(out.dtype)[..., None, None]


class GatedBasicBlock(GatedBlock, BasicBlock):
    """torchvision's BasicBlock with a gate on conv1's output."""


class GatedBottleneck(GatedBlock, Bottleneck):
    """torchvision's Bottleneck with gates on conv1's and conv2's outputs."""


_MADE: dict[tuple[type[nn.Module], type[nn.Module]], Any] = {}


def mixed(mixin: type[nn.Module], block: type[nn.Module]) -> Any:
    """A class of blocks behind a mixin: the same one for the same two."""
    if (mixin, block) not in _MADE:
        name = mixin.__name__.removesuffix("Block") + block.__name__
        _MADE[mixin, block] = type(name, (mixin, block), {"__module__": block.__module__})
    return _MADE[mixin, block]


def gated_block(block: type[nn.Module]) -> type[GatedBlock]:
    """The gated version of a class of residual blocks.

    Args:
        block: with convolutions conv1, conv2, ..., BatchNorms bn1, bn2, ..., `relu` and `downsample`,
            whose `forward` is the dense path.
    """
    own: dict[Any, Any] = {BasicBlock: GatedBasicBlock, Bottleneck: GatedBottleneck}
    return own.get(block) or mixed(GatedBlock, block)


class Stage(nn.Sequential):
    """A stage's blocks, which are handed what was chosen for the pass."""

    def forward(
        self, x: Tensor, choice: Choice | None = None, stream: Tensor | None = None
    ) -> Tensor:
        """B × C_in × H × W → B × C_out × H' × W'; without a choice each block goes its own way.

        Args:
            x: the stage's input.
            choice: of the pass.
            stream: B × C_out, a mask for every block's output; None for all channels.
        """
        for block in self:
            x = block(x, choice)
            if stream is not None:
                x = apply_mask(x, stream)
        return x
