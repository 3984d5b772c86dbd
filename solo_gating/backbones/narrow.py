"""A slimmable network's pass at one width, in the time that the narrow network takes."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from ..gates import SlimmableGate
from ..gates.shares import number_of_channels
from .two_path import TwoPathResNet


def can_be_narrowed(backbone: TwoPathResNet) -> bool:
    """Whether `narrowed` knows all of a backbone's layers; where not, its gates' masks do the same."""
    convs = [module for module in backbone.modules() if isinstance(module, nn.Conv2d)]
    norms = [
        module
        for module in backbone.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    return (
        all(type(gate) is SlimmableGate for gate in backbone.gates)
        and not backbone.is_compiled
        and all(isinstance(block, (BasicBlock, Bottleneck)) for block in backbone.blocks)
        and all(
            conv.groups == 1 and conv.bias is None and conv.dilation == (1, 1) for conv in convs
        )
        and all(type(norm) is nn.BatchNorm2d and norm.affine for norm in norms)
    )


@contextmanager
def narrowed(backbone: TwoPathResNet, width: float) -> Iterator[None]:
    """Inside a `with` block the dense path computes the first ⌈w·C⌉ channels of every layer, no others.

    Its features are the first ⌈w·C⌉ of those that the gated path has at a budget of w. BatchNorms
    normalise by the batch, as in training, and keep no statistics.

    Args:
        backbone: that `can_be_narrowed`.
        width: w, in (0, 1].
    """
    changed = []
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            channels = number_of_channels(width, module.out_channels)
            module.forward = partial(_convolve, module, channels)  # type: ignore[method-assign]
        elif isinstance(module, nn.BatchNorm2d):
            module.forward = partial(_normalise, module)  # type: ignore[method-assign]
        else:
            continue
        changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _convolve(conv: nn.Conv2d, channels: int, x: Tensor) -> Tensor:
    weight, stride = conv.weight[:channels, : x.shape[1]], conv.stride
    if conv.kernel_size == (1, 1):  # as `PickingConv2d`, since there may be few channels
        x, stride = x[:, :, :: stride[0], :: stride[1]], (1, 1)
    return F.conv2d(x, weight, None, stride, conv.padding)


def _normalise(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    channels = x.shape[1]
    weight, bias = norm.weight[:channels], norm.bias[:channels]
    return F.batch_norm(x, None, None, weight, bias, training=True, eps=norm.eps)
