"""ResNets whose blocks compute fewer hidden channels: what is left of a gated encoder."""

from typing import Any

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from ..errors import InputError
from ..gates import ChannelGate
from .resnet import ResNet


class SlicedBasicBlock(BasicBlock):
    """torchvision's BasicBlock with any number of channels between its two convolutions.

    relu(bn2(conv2(relu(bn1(conv1 x)))) + shortcut(x)), as torchvision's, where conv1 gives `hidden`
    channels instead of C_out; with a gate m = gate(x) over them: conv2(m · relu(bn1(conv1 x))).
    """

    def slice(self, hidden: int, gate: bool, reduction: int, gate_bias: bool) -> None:
        """Replace conv1, bn1 and conv2 by ones with `hidden` channels between them."""
        conv1, conv2 = self.get_submodule("conv1"), self.get_submodule("conv2")
        self.conv1 = nn.Conv2d(conv1.in_channels, hidden, 3, conv1.stride, padding=1, bias=False)  # type: ignore[arg-type]
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, conv2.out_channels, 3, padding=1, bias=False)
        for conv in (self.conv1, self.conv2):  # as torchvision initialises a ResNet's
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        self.gate = (
            ChannelGate(conv1.in_channels, hidden, reduction, bias=gate_bias) if gate else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """B × C_in × H × W → B × C_out × H' × W'."""
        hidden = self.relu(self.bn1(self.conv1(x)))
        if self.gate is not None:
            hidden = hidden * self.gate(x).to(hidden.dtype)[:, :, None, None]
        out = self.bn2(self.conv2(hidden))
        out = out + (x if self.downsample is None else self.downsample(x))
        return self.relu(out)


class SlicedResNet(ResNet):
    """A ResNet that is physically smaller inside its blocks; what flows between them is the same.

    The sub-network of a channel policy, and the architecture of a student that is "sampled by the
    policy" (unification paper, section 3.1, "Comparison with self-supervised KD").

    Args:
        layers: number of blocks of the four stages.
        hidden: channels between the two convolutions of each block, in order.
        gates: whether the blocks have gates over these channels.
        reduction: the gates' reduction rate r.
        gate_bias: whether the gates' logits have a bias, as for the budget that they were told.
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
        gates: bool = False,
        reduction: int = 4,
        gate_bias: bool = False,
        **kwargs: Any,
    ):
        super().__init__(layers, block=SlicedBasicBlock, **kwargs)
        self.architecture = {
            "layers": layers,
            "hidden": hidden,
            "gates": gates,
            "reduction": reduction,
            "gate_bias": gate_bias,
            **kwargs,
        }
        blocks = self.blocks
        if len(hidden) != len(blocks) or any(number < 1 for number in hidden):
            raise InputError(
                f"hidden: found {hidden}, accepted are {len(blocks)} numbers of channels ≥ 1"
            )
        for block, number in zip(blocks, hidden, strict=True):
            block.slice(number, gates, reduction, gate_bias)

    @property
    def blocks(self) -> list[SlicedBasicBlock]:
        """Every block of the four stages."""
        return [*self.layer1, *self.layer2, *self.layer3, *self.layer4]
