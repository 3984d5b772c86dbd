"""A ResNet's weights with every BatchNorm folded into the convolution before it."""

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...backbones import checked_path
from ...budgets import Range
from ...errors import InputError
from ...gates import BudgetEmbedding, ChannelGate
from .known import check_network, encoder_of, named_blocks


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
        told = self.bias.new_tensor(budget)
        with torch.autocast("cpu", enabled=False):  # decisions are no place for half precision
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
        InputError: for a backbone without gates on the gated path, with a part that `known` does
            not know, or with weights that are not finite.
    """
    checked_path(path, "path")
    check_network(backbone, path)
    encoder = encoder_of(backbone, path)
    conv, fc = encoder.conv1, backbone.get_submodule("fc")
    blocks = list(named_blocks(encoder))
    return FoldedNetwork(
        stem=_folded(conv, encoder.bn1, "conv1"),
        stride=_number(conv.stride),
        padding=_number(conv.padding),
        max_pool=not isinstance(encoder.maxpool, nn.Identity),
        blocks=tuple(_folded_block(block, path, name) for name, block in blocks),
        linear=_linear(fc) if isinstance(fc, nn.Linear) else None,
        shifts=_shifts(backbone, [block.gate for _, block in blocks]) if path == "gated" else None,
    )


def _shifts(backbone: nn.Module, gates: list[ChannelGate]) -> Shifts:
    embeddings = [
        copy.deepcopy(gate.embedding).to("cpu", torch.float32) for gate in gates if gate.embedding
    ]
    for embedding in embeddings:
        for value in embedding.parameters():
            _float(value, "a gate's embedding")
    return Shifts(
        _float(torch.cat([gate.bias for gate in gates]), "a gate's bias"),
        tuple(embeddings),
        getattr(backbone, "budget_range", None),
    )


def _folded_block(block: Any, path: str, name: str) -> FoldedBlock:
    bn1, bn2, gate = block.bn1, block.bn2, None
    if path == "gated":
        if getattr(block, "separate_bn", False):
            bn1, bn2 = block.gated_bn1, block.gated_bn2
        reduce = _folded(block.gate.reduce, block.gate.norm, f"{name}.gate.reduce")
        expand = _float(block.gate.expand.weight, f"{name}.gate.expand")
        gate = FoldedGate(reduce.weight.flatten(1), reduce.bias, expand.flatten(1))
    shortcut = None
    if block.downsample is not None:
        shortcut = _folded(block.downsample[0], block.downsample[1], f"{name}.downsample")
    return FoldedBlock(
        stride=_number(block.conv1.stride),
        conv1=_folded(block.conv1, bn1, f"{name}.conv1"),
        conv2=_folded(block.conv2, bn2, f"{name}.conv2"),
        shortcut=shortcut,
        gate=gate,
    )


def _folded(conv: nn.Conv2d, norm: Any, name: str) -> FoldedConvolution:
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
        _float(conv.weight.double() * scale[:, None, None, None], name), _float(shift, name)
    )


def _linear(fc: nn.Linear) -> tuple[Tensor, Tensor]:
    weight = _float(fc.weight, "fc")
    return weight, weight.new_zeros(len(weight)) if fc.bias is None else _float(fc.bias, "fc")


def _float(value: Tensor, name: str) -> Tensor:
    value = value.detach().to("cpu", torch.float32, copy=True).contiguous()
    if not value.isfinite().all():
        raise InputError(
            f"backbone: found NaN or infinity, accepted are finite weights for {name} and its BatchNorm"
        )
    return value


def _number(pair: Any) -> int:
    """The number that an argument for rows and columns consists of: `known` refused other pairs."""
    return pair[0] if isinstance(pair, tuple) else pair
