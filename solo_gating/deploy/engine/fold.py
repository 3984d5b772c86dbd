"""A ResNet's weights with every BatchNorm folded into the convolution before it."""

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.resnet import BasicBlock
from torchvision.models.resnet import ResNet as TorchvisionResNet

from ...backbones import SlicedResNet, TwoEncoderResNet, TwoPathResNet, checked_path
from ...budgets import Range
from ...errors import InputError
from ...gates import BudgetEmbedding, ChannelGate


@dataclass(frozen=True)
class FoldedConvolution:
    """A convolution followed by its BatchNorm: x ↦ weight * x + bias.

    Attributes:
        weight: C_out × C_in × k × k.
        bias: C_out.
    """

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class FoldedGate:
    """A gate on pooled inputs: logits = expand · relu(reduce · x + bias), apart from their shift.

    Attributes:
        reduce: hidden × C_in.
        bias: hidden.
        expand: C_out × hidden.
    """

    reduce: Tensor
    bias: Tensor
    expand: Tensor


@dataclass(frozen=True)
class FoldedBlock:
    """relu(conv2(mask · relu(conv1 x)) + shortcut x), of 3×3 convolutions with padding 1.

    The mask, for each channel of conv1, is gate(x) ≥ threshold.

    Attributes:
        stride: of conv1 and the shortcut.
        shortcut: a 1×1 convolution; None for the identity.
        gate: None on the dense path.
    """

    stride: int
    conv1: FoldedConvolution
    conv2: FoldedConvolution
    shortcut: FoldedConvolution | None
    gate: FoldedGate | None


@dataclass(frozen=True)
class Shifts:
    """What is added to the logits of gates that have a bias or are told a budget.

    The kernel knows nothing of it: a shift of the logits is one of their thresholds.

    Attributes:
        bias: of the channels of all blocks, one block after another.
        embeddings: one for each block; empty for gates that are told no budget.
        budget_range: of the budgets that the gates can be told, None without one.
    """

    bias: Tensor
    embeddings: tuple[BudgetEmbedding, ...] = ()
    budget_range: Range | None = None

    @torch.no_grad()
    def at(self, budget: float | None) -> Tensor:
        """The shift of each channel, in the order of `bias`.

        Args:
            budget: in the range; None without one.
        """
        if budget is None:
            return self.bias
        told = torch.tensor(budget, dtype=torch.float32)
        return self.bias + torch.cat([embedding(told) for embedding in self.embeddings])


@dataclass(frozen=True)
class FoldedNetwork:
    """One path of a backbone, in float32.

    Attributes:
        stem: the first convolution.
        stride: of the stem.
        padding: of the stem, in pixels.
        max_pool: whether a 3×3 max-pool of stride 2 and padding 1 follows.
        blocks: those of the four stages, one after another.
        linear: weight (classes × C) and bias of the classifier; None without one.
        shifts: of the gates' logits; None on the dense path.
    """

    stem: FoldedConvolution
    stride: int
    padding: int
    max_pool: bool
    blocks: tuple[FoldedBlock, ...]
    linear: tuple[Tensor, Tensor] | None
    shifts: Shifts | None = None

    @property
    def features(self) -> int:
        """Length of the features of one image."""
        last = self.blocks[-1].conv2.bias if self.linear is None else self.linear[1]
        return len(last)

    @property
    def hidden(self) -> tuple[int, ...]:
        """For each block, the channels that its gate chooses from."""
        return tuple(len(block.conv1.bias) for block in self.blocks)

    @property
    def smallest_image(self) -> int:
        """The height and width that the stem needs at least, in pixels."""
        return max(1, self.stem.weight.shape[-1] - 2 * self.padding)

    def with_weights_rounded_to(self, dtype: torch.dtype) -> "FoldedNetwork":
        """The same network with the convolutions' weights rounded, in float32 as before."""

        def rounded(conv: FoldedConvolution) -> FoldedConvolution:
            return FoldedConvolution(conv.weight.to(dtype).float(), conv.bias)

        blocks = tuple(
            replace(
                block,
                conv1=rounded(block.conv1),
                conv2=rounded(block.conv2),
                shortcut=None if block.shortcut is None else rounded(block.shortcut),
            )
            for block in self.blocks
        )
        return replace(self, stem=rounded(self.stem), blocks=blocks)


@torch.no_grad()
def fold(backbone: nn.Module, path: str) -> FoldedNetwork:
    """Fold one path of a backbone, as it is in evaluation.

    Args:
        backbone: one of this package's ResNets, or torchvision's resnet18 or resnet34.
        path: "gated" or "dense".

    Raises:
        InputError: for a backbone without gates on the gated path, or with parts that are none of
            the above networks'.
    """
    checked_path(path, "path")
    if not isinstance(backbone, TorchvisionResNet):
        raise InputError(
            f"backbone: found {type(backbone).__name__}, accepted are ResNets of this package"
        )
    accepted = _paths(backbone)
    if path not in accepted:
        raise InputError(
            f"path: found {path}, this {type(backbone).__name__} has {' and '.join(accepted)} only"
        )
    two_encoders = isinstance(backbone, TwoEncoderResNet) and path == "gated"
    encoder: TorchvisionResNet = backbone.gated_net if two_encoders else backbone
    conv, pool = encoder.conv1, encoder.maxpool
    blocks = [
        block
        for layer in (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4)
        for block in layer
    ]
    for block in blocks:
        if not isinstance(block, BasicBlock):
            raise InputError(f"backbone: found {type(block).__name__}, accepted is BasicBlock")
    if not isinstance(pool, nn.Identity) and not _is_max_pool(pool):
        raise InputError(
            f"backbone: found {pool} after the stem, accepted are a 3×3 max-pool of stride 2 and none"
        )
    return FoldedNetwork(
        stem=_folded(conv, encoder.bn1),
        stride=_single(conv.stride),
        padding=_single(conv.padding),
        max_pool=not isinstance(pool, nn.Identity),
        blocks=tuple(_folded_block(block, path) for block in blocks),
        linear=_linear(backbone.fc),
        shifts=_shifts(backbone, blocks) if path == "gated" else None,
    )


def _shifts(backbone: nn.Module, blocks: list[Any]) -> Shifts:
    gates: list[ChannelGate] = [block.gate for block in blocks]
    embeddings = [
        copy.deepcopy(gate.embedding).to("cpu", torch.float32) for gate in gates if gate.embedding
    ]
    return Shifts(
        _float(torch.cat([gate.bias for gate in gates])),
        tuple(embeddings),
        getattr(backbone, "budget_range", None),
    )


def _paths(backbone: TorchvisionResNet) -> tuple[str, ...]:
    if isinstance(backbone, TwoPathResNet):
        return ("gated", "dense")
    if isinstance(backbone, SlicedResNet) and backbone.architecture["gates"]:
        return ("gated",)
    return ("dense",)


def _folded_block(block: BasicBlock, path: str) -> FoldedBlock:
    bn1, bn2, gate = block.bn1, block.bn2, None
    if path == "gated":
        if getattr(block, "separate_bn", False):
            bn1, bn2 = block.gated_bn1, block.gated_bn2
        reduce = _folded(block.gate.reduce, block.gate.norm)
        gate = FoldedGate(
            reduce.weight.flatten(1), reduce.bias, _float(block.gate.expand.weight).flatten(1)
        )
    return FoldedBlock(
        stride=_single(block.conv1.stride),
        conv1=_folded(block.conv1, bn1),
        conv2=_folded(block.conv2, bn2),
        shortcut=None if block.downsample is None else _folded(*block.downsample),
        gate=gate,
    )


def _folded(conv: nn.Conv2d, norm: nn.Module) -> FoldedConvolution:
    if conv.groups != 1 or _single(conv.dilation) != 1 or conv.padding_mode != "zeros":
        raise InputError(f"backbone: found {conv}, accepted are convolutions without groups")
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None or norm.running_var is None:
        raise InputError(f"backbone: found {norm}, accepted is BatchNorm with running statistics")
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
        _float(conv.weight.double() * scale[:, None, None, None]), _float(shift)
    )


def _linear(fc: nn.Module) -> tuple[Tensor, Tensor] | None:
    if isinstance(fc, nn.Identity):
        return None
    if not isinstance(fc, nn.Linear):
        raise InputError(f"backbone: found {fc} as fc, accepted are nn.Linear and nn.Identity")
    bias = torch.zeros(fc.out_features) if fc.bias is None else fc.bias
    return _float(fc.weight), _float(bias)


def _float(value: Tensor) -> Tensor:
    return value.detach().to("cpu", torch.float32, copy=True).contiguous()


def _single(pair: object) -> int:
    """The one number that a convolution's argument for rows and columns consists of."""
    values = pair if isinstance(pair, tuple) else (pair, pair)
    if not isinstance(values[0], int) or values[0] != values[1]:
        raise InputError(
            f"backbone: found a convolution with {pair!r} for rows and columns, accepted are equal "
            "numbers"
        )
    return values[0]


def _is_max_pool(pool: nn.Module) -> bool:
    return (
        isinstance(pool, nn.MaxPool2d)
        and (_single(pool.kernel_size), _single(pool.stride), _single(pool.padding)) == (3, 2, 1)
        and _single(pool.dilation) == 1
        and not pool.ceil_mode
    )
