"""torchvision's ResNet, at any width and with either stem."""

from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import ResNet as TorchvisionResNet

from ..errors import InputError
from .blocks import BLOCKS, plain_block

STEMS = ("imagenet", "cifar")
_NOT_HERE = {
    "groups": (1, "ResNeXt's grouped convolutions"),
    "width_per_group": (64, "wide ResNets"),
    "replace_stride_with_dilation": (False, "dilated ResNets"),
}
_TORCHVISIONS_WIDTH = 64

# Below it oneDNN, up to 3.12 at least, writes past its workspace in the weights' gradient of a strided
# 1×1 convolution of channels-last images (uxlfoundation/oneDNN, issue 6035): on AVX-512 below 16
# channels, on AVX2 below 8. Runs then crash, hang, or learn from wrong gradients.
_FEWEST_CHANNELS = 16


class PickingConv2d(nn.Conv2d):
    """A strided 1×1 convolution without bias that first picks the pixels it needs; same values."""

    @classmethod
    def like(cls, conv: nn.Conv2d) -> "PickingConv2d":
        """The same convolution; it takes over the weight."""
        channels = (conv.in_channels, conv.out_channels)
        picking = cls(*channels, 1, stride=conv.stride, bias=False, device="meta")  # type: ignore[arg-type]
        picking.weight = conv.weight
        return picking

    def forward(self, x: Tensor) -> Tensor:
        """B × C_in × H × W → B × C_out × H / stride × W / stride, rounded up."""
        down, across = self.stride
        return F.conv2d(x[:, :, ::down, ::across], self.weight)


class ResNet(TorchvisionResNet):
    """torchvision's ResNet with two more arguments; with their defaults it is torchvision's.

    Args:
        layers: number of blocks of the four stages.
        width: channels of the first stage (64 in torchvision); the stages have width × 1, 2, 4, 8.
        stem: "imagenet" (7×7, stride 2, max-pool) or "cifar", solo-learn's stem for small images:
            3×3, stride 1, padding 2, no max-pool (`solo/methods/base.py` of vturrisi/solo-learn).
        block: the class of the residual blocks, or its name in `BLOCKS`.
        zero_init_residual: start every residual branch at zero, as torchvision's argument.
        kwargs: torchvision's other arguments (`num_classes`, `norm_layer`), but for those of
            ResNeXt, wide and dilated ResNets, whose convolutions nothing that counts, cuts or exports
            networks knows.

    Raises:
        InputError: for a width or stem that is not accepted, or one of these arguments.
    """

    def __init__(
        self,
        layers: list[int],
        *,
        width: int = 64,
        stem: str = "imagenet",
        block: str | type[nn.Module] = "basic",
        zero_init_residual: bool = False,
        **kwargs: Any,
    ):
        if not isinstance(width, int) or isinstance(width, bool) or width < 1:
            raise InputError(f"backbone.kwargs.width: got {width!r}, expected an integer ≥ 1")
        if stem not in STEMS:
            raise InputError(f"backbone.kwargs.stem: got {stem!r}, expected {STEMS}")
        for name, (usual, what) in _NOT_HERE.items():
            if kwargs.get(name) not in (None, usual) and any(np.ravel(kwargs[name]) != usual):
                raise InputError(
                    f"backbone.kwargs.{name}: got {kwargs[name]!r}, expected {usual}: {what} are not "
                    "supported"
                )
        block = BLOCKS[block] if isinstance(block, str) else block
        self._width = width  # before torchvision builds its layers
        super().__init__(block, layers, zero_init_residual=zero_init_residual, **kwargs)  # type: ignore[arg-type]
        self._block = plain_block(block)
        if width != _TORCHVISIONS_WIDTH:
            classes = self.get_submodule("fc").out_features
            self.bn1 = self._norm_layer(width)
            self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
            self.fc: nn.Module = nn.Linear(self.inplanes, classes)
        if stem == "cifar":
            self.conv1 = nn.Conv2d(3, width, kernel_size=3, stride=1, padding=2, bias=False)
            self.maxpool = nn.Identity()

    def _make_layer(self, block: Any, planes: int, *args: Any, **kwargs: Any) -> nn.Sequential:
        if planes == _TORCHVISIONS_WIDTH:  # the first stage
            self.inplanes = self._width
        planes = planes * self._width // _TORCHVISIONS_WIDTH
        layer = super()._make_layer(block, planes, *args, **kwargs)
        shortcut = layer[0].downsample
        if shortcut is not None and shortcut[0].in_channels < _FEWEST_CHANNELS:
            shortcut[0] = PickingConv2d.like(shortcut[0])
        return layer

    @property
    def stages(self) -> list[nn.Sequential]:
        """The four stages."""
        return [self.layer1, self.layer2, self.layer3, self.layer4]

    @property
    def blocks(self) -> list[Any]:
        """The blocks of the four stages, one after another."""
        return [block for stage in self.stages for block in stage]

    def encoder(self, path: str) -> "ResNet":
        """The network that a path goes through; another one only where there are two encoders.

        Args:
            path: "gated" or "dense".
        """
        return self

    @property
    def gated_only(self) -> list[nn.Module]:
        """The modules that a gated path alone uses; none for a network without one."""
        return []

    def dense_state_dict(self) -> dict[str, Tensor]:
        """The dense path's weights under torchvision's names, without `fc`."""
        prefixes = tuple(
            f"{name}."
            for name, module in self.named_modules()
            if any(module is one for one in self.gated_only)
        )
        return {
            name: value
            for name, value in self.state_dict().items()
            if not name.startswith(("fc.", *prefixes))
        }

    @property
    def architecture(self) -> dict[str, Any]:
        """`ResNet(**architecture)` is the dense path's like, apart from its `fc`."""
        names = {cls: name for name, cls in BLOCKS.items()}
        return {
            "layers": [len(stage) for stage in self.stages],
            "block": names.get(self._block, self._block),
            "width": self._width,
            "stem": "cifar" if isinstance(self.maxpool, nn.Identity) else "imagenet",
        }

    def __setattr__(self, name: str, value: Any) -> None:
        # solo-learn's BaseMethod gives every `resnet*` on CIFAR a new stem of 64 channels,
        # whatever the network's width; bn1 says how many this network needs.
        if name == "conv1" and "bn1" in self._modules:
            value = fit_out_channels(value, self.bn1.num_features)
        super().__setattr__(name, value)


def fit_out_channels(conv: nn.Conv2d, channels: int) -> nn.Conv2d:
    """The convolution itself, or its like with another number of output channels."""
    if conv.out_channels == channels:
        return conv
    return nn.Conv2d(
        conv.in_channels,
        channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        bias=conv.bias is not None,
    )
