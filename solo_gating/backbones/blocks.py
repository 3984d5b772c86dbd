"""Residual blocks with a second, gated way through them."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from ..gates import Gate
from .masking import convolve_masked
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

    def set_gates(self, gates: Sequence[Gate]) -> None:
        """Hold gates as `gate`, `gate2`, ..., in order."""
        for number, gate in enumerate(gates, 1):
            setattr(self, "gate" if number == 1 else f"gate{number}", gate)

    @property
    def gates(self) -> list[Gate]:
        """The gates, in order; none for a block of a dense encoder, or one whose gates were dropped."""
        return [module for module in self._modules.values() if isinstance(module, Gate)]


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
    (unification paper, Figure 1, which has N = 2). The gates are `gate`, `gate2`, ...

    Attributes:
        path: the way that it goes when it is called by itself, outside of its backbone.
        separate_bn: whether the gated path has its own BatchNorms.
    """

    path = "dense"
    separate_bn = False

    def add_gates(self, make: Callable[[int, int], Gate], separate_bn: bool) -> None:
        """Add the gates, and the gated path's BatchNorms as copies of the dense path's.

        Args:
            make: a gate for the channels of the block's input and of a convolution's output.
            separate_bn: as the attribute.
        """
        layers = convolutions(self)
        inputs = layers[0][1].in_channels
        self.set_gates([make(inputs, conv.out_channels) for _, conv, _ in layers[:-1]])
        self.separate_bn = separate_bn
        if separate_bn:
            for number, (_, _, norm) in enumerate(layers, 1):
                own = type(norm)(norm.num_features)
                own.load_state_dict(norm.state_dict())
                setattr(self, f"gated_bn{number}", own)

    @property
    def gated_norms(self) -> list[nn.Module]:
        """The BatchNorms of the gated path, in order."""
        layers = convolutions(self)
        if not self.separate_bn:
            return [norm for _, _, norm in layers]
        return [self.get_submodule(f"gated_bn{number}") for number in range(1, len(layers) + 1)]

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
        out, masks = self.forward_gated(x, choice.budget)
        choice.masks.extend(masks)
        return out

    def forward_gated(
        self, x: Tensor, budget: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """B × C_in × H × W, and the gates' budget → (B × C_out × H' × W', a mask for each gate)."""
        gates = self.gates
        if not gates:
            raise RuntimeError(
                "this block is the dense encoder's and has no gate; those of the gated one are in "
                "backbone.gated_net"
            )
        masks = tuple(gate(x, budget) for gate in gates)
        out = x
        for number, ((_, conv, _), norm) in enumerate(
            zip(convolutions(self), self.gated_norms, strict=True)
        ):
            out = conv(out) if number == 0 else convolve_masked(conv, out, masks[number - 1])
            out = norm(out)
            if number < len(masks):
                out = self.relu(out)
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out), masks


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

    def forward(self, x: Tensor, choice: Choice | None = None) -> Tensor:
        """B × C_in × H × W → B × C_out × H' × W'; without a choice each block goes its own way."""
        for block in self:
            x = block(x, choice)
        return x
