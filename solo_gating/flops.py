"""FLOPs of a backbone: what each part costs, and what a batch of masks costs.

FLOPs are multiply-accumulates of the convolutions, the gates' included; BatchNorm, ReLU, pooling
and the classifier are not counted. That is how the papers count.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .backbones import ResNet, TwoEncoderResNet, TwoPathResNet
from .transfer import numbers_like

# The channels that a gradient of numbers of selected channels reaches.
GRADIENTS = ("all", "selected")


@dataclass(frozen=True)
class BlockFlops:
    """Multiply-accumulates of one block for one image, all channels computed.

    Attributes:
        name: the block's name in the backbone, as `layer1.0`.
        channels: C_out, the channels that its gate chooses from.
        conv1: k²·H·W·C_in·C_out.
        conv2: k²·H·W·C_out·C_out.
        shortcut: the shortcut's convolution, 0 where there is none.
        gate: both 1×1 convolutions of the gate, 0 where there is none.
    """

    name: str
    channels: int
    conv1: int
    conv2: int
    shortcut: int
    gate: int

    @property
    def dense(self) -> int:
        """All channels, without the gate."""
        return self.conv1 + self.conv2 + self.shortcut

    @property
    def per_channel(self) -> int:
        """k²·H·W·(C_in + C_out): what one selected channel costs in conv1 and conv2."""
        return (self.conv1 + self.conv2) // self.channels


@dataclass(frozen=True)
class BackboneFlops:
    """Multiply-accumulates of a backbone for one image of one size."""

    stem: int
    blocks: tuple[BlockFlops, ...]

    @property
    def dense(self) -> int:
        """F^O of the papers' Eq. 3: stem and blocks, without gates."""
        return self.stem + sum(block.dense for block in self.blocks)

    @property
    def gates(self) -> int:
        """All gates together."""
        return sum(block.gate for block in self.blocks)

    @property
    def fixed(self) -> int:
        """What every image costs on the gated path: stem, shortcuts and gates."""
        return self.stem + self.gates + sum(block.shortcut for block in self.blocks)

    @property
    def lowest_share(self) -> float:
        """The least that the gated path can use, of the dense FLOPs."""
        return self.fixed / self.dense

    def gated(self, channels: Tensor) -> Tensor:
        """F^R for numbers of selected channels.

        Args:
            channels: ... × L, selected channels of each of the L blocks (`selected_channels`).
                Its dtype is the result's; int64 and float64 are exact.

        Returns:
            ..., multiply-accumulates.
        """
        cost = numbers_like([block.per_channel for block in self.blocks], channels)
        return (channels * cost).sum(-1) + self.fixed

    def share(self, channels: Tensor) -> Tensor:
        """F^R / F^O for numbers of selected channels, ... × L → ...; differentiable."""
        return self.gated(channels) / self.dense

    def channel_shares(self, channels: Tensor) -> Tensor:
        """Numbers of selected channels as shares of each block's, ... × L → ... × L."""
        return channels / numbers_like([block.channels for block in self.blocks], channels)


def selected_channels(masks: tuple[Tensor, ...], gradient: str = "all") -> Tensor:
    """One B × C_out mask for each of L blocks → B × L, channels selected; differentiable.

    Args:
        masks: zeros and ones.
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
    modules are (width, stem, depth) is what is counted.

    Args:
        backbone: one of this package's ResNets.
        resolution: height and width of an input image, in pixels.
    """
    net = copy.deepcopy(backbone).to("meta", torch.float32).eval()
    gated = isinstance(net, TwoPathResNet)
    encoder = net.gated_net if isinstance(net, TwoEncoderResNet) else net
    counter = FlopCounterMode(display=False)
    image = torch.zeros(1, 3, *resolution, device="meta", dtype=torch.float32)
    if gated:
        with counter, net.path("gated"):
            net(image)
    else:
        with counter:
            net(image)
    counted = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    names = {module: name for name, module in net.named_modules()}

    def macs(module: nn.Module) -> int:
        # PyTorch counts a multiply-accumulate as two operations.
        return int(counted.get(f"{type(net).__name__}.{names[module]}", 0)) // 2

    blocks = [
        BlockFlops(
            name=names[block].removeprefix("gated_net."),
            channels=block.conv1.out_channels,
            conv1=macs(block.conv1),
            conv2=macs(block.conv2),
            shortcut=0 if block.downsample is None else macs(block.downsample[0]),
            gate=sum(macs(conv) for conv in (block.gate.reduce, block.gate.expand))
            if getattr(block, "gate", None)
            else 0,
        )
        for layer in (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4)
        for block in layer
    ]
    return BackboneFlops(stem=macs(encoder.conv1), blocks=tuple(blocks))


def count_parameters(module: nn.Module) -> int:
    """Number of weights in a module."""
    return sum(parameter.numel() for parameter in module.parameters())
