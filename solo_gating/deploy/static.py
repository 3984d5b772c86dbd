"""Physically smaller encoders: the gated path without the channels that a policy never uses."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones import SlicedResNet, TwoEncoderResNet, TwoPathResNet
from ..errors import InputError
from ..evaluate.policy import Policy
from ..flops import BackboneFlops, count_flops
from ..gates import ChannelGate

KEEP = "dynamic, always_on or top:SHARE"


@dataclass(frozen=True)
class Kept:
    """The channels that stay in each block, in order of their numbers.

    Attributes:
        channels: for each block int64, the indices.
        share: F / F^O with all of them computed, without gates.
    """

    channels: tuple[Tensor, ...]
    share: float


def kept_channels(policy: Policy, flops: BackboneFlops, keep: str, multiple: int = 8) -> Kept:
    """Choose the channels that stay.

    Args:
        policy: by how many images each channel was selected.
        flops: of the encoder that is to be sliced.
        keep: "dynamic": those that any image selected ("data dependent" and "always on", as the
            unification paper samples its students); "always_on": those that all images selected;
            "top:0.3": in each block the most often selected ones, of all blocks together those with
            which the network has 0.3 of the dense FLOPs.
        multiple: numbers of channels are rounded up to a multiple of it, with the next most often
            selected ones, because dense engines compute in vectors; at most all channels.

    Raises:
        InputError: for a policy of another architecture, or a `keep` that is not accepted.
    """
    if [(b.name, b.channels) for b in policy.blocks] != [
        (b.name, b.channels) for b in flops.blocks
    ]:
        raise InputError(
            f"policy: found blocks of {[b.channels for b in policy.blocks]} channels, the encoder "
            f"has {[b.channels for b in flops.blocks]}"
        )
    if multiple < 1:
        raise InputError(f"multiple: found {multiple}, accepted is an integer ≥ 1")
    selected = [torch.tensor(block.selected) for block in policy.blocks]
    if keep == "dynamic":
        numbers = [int((counts > 0).sum()) for counts in selected]
    elif keep == "always_on":
        numbers = [int((counts == policy.images).sum()) for counts in selected]
    elif top := re.fullmatch(r"top:(0?\.\d+|1(\.0*)?)", keep):
        numbers = _most_selected(selected, policy.images, flops, float(top[1]))
    else:
        raise InputError(f"keep: found {keep!r}, accepted is {KEEP}, as in top:0.3")
    kept = []
    for counts, number in zip(selected, numbers, strict=True):
        rounded = min(len(counts), -(-max(number, 1) // multiple) * multiple)
        order = counts.argsort(descending=True, stable=True)
        kept.append(order[:rounded].sort().values)
    channels = torch.tensor([len(indices) for indices in kept], dtype=torch.float64)
    share = (float(flops.gated(channels)) - flops.gates) / flops.dense
    return Kept(tuple(kept), share)


def _most_selected(
    selected: list[Tensor], images: int, flops: BackboneFlops, share: float
) -> list[int]:
    """Numbers of channels with which the FLOPs are at most a share: one bar for all blocks."""
    available = share * flops.dense - (flops.fixed - flops.gates)
    if available < 0:
        lowest = (flops.fixed - flops.gates) / flops.dense
        raise InputError(f"keep: found top:{share}, accepted are shares from {lowest:.4f} to 1")
    ranked = sorted(
        (-count / images, index)
        for index, counts in enumerate(selected)
        for count in counts.tolist()
    )
    numbers = [0] * len(selected)
    for _, index in ranked:
        available -= flops.blocks[index].per_channel
        if available < 0:
            break
        numbers[index] += 1
    return numbers


def slice_encoder(backbone: TwoPathResNet, kept: Kept, gates: bool) -> SlicedResNet:
    """The gated path with the kept channels only, as a network of its own in evaluation mode.

    With gates it gives the gated path's features for every image that selects none of the removed
    channels, as all images of the policy do. Without gates all kept channels are always computed:
    an approximation.

    Args:
        backbone: a gated encoder.
        kept: from `kept_channels`.
        gates: whether the gates stay, at the backbone's threshold and for good at its budget.
    """
    source = backbone.gated_net if isinstance(backbone, TwoEncoderResNet) else backbone
    first = source.gated_blocks[0]
    gate_bias = gates and first.gate.expand.bias is not None
    net = SlicedResNet(
        [len(getattr(source, f"layer{stage}")) for stage in (1, 2, 3, 4)],
        hidden=[len(indices) for indices in kept.channels],
        gates=gates,
        gate_bias=gate_bias,
        reduction=max(1, first.gate.reduce.in_channels // first.gate.reduce.out_channels),
        width=source.bn1.num_features,
        stem="cifar" if isinstance(source.maxpool, nn.Identity) else "imagenet",
    )
    net.fc = nn.Identity()
    state = {}
    for name, value in source.state_dict().items():
        if "gate" not in name and not name.startswith("fc."):
            state[name] = value
    for (name, block), indices in zip(_named_blocks(source), kept.channels, strict=True):
        bn1, bn2 = (
            (block.gated_bn1, block.gated_bn2) if block.separate_bn else (block.bn1, block.bn2)
        )
        for key, value in bn1.state_dict().items():
            state[f"{name}.bn1.{key}"] = value if value.dim() == 0 else value[indices]
        for key, value in bn2.state_dict().items():
            state[f"{name}.bn2.{key}"] = value
        state[f"{name}.conv1.weight"] = block.conv1.weight[indices]
        state[f"{name}.conv2.weight"] = block.conv2.weight[:, indices]
        if gates:
            for key, value in block.gate.state_dict().items():
                if not key.startswith("embedding."):
                    state[f"{name}.gate.{key}"] = value
            state[f"{name}.gate.expand.weight"] = block.gate.expand.weight[indices]
            if gate_bias:
                state[f"{name}.gate.expand.bias"] = _bias(block.gate, backbone)[indices]
    net.load_state_dict(state)
    for block, original in zip(net.blocks, source.gated_blocks, strict=True):
        if block.gate is not None:
            block.gate.threshold = original.gate.threshold
    return net.eval().requires_grad_(False)


def _bias(gate: ChannelGate, backbone: TwoPathResNet) -> Tensor:
    """What the budget adds to the logits, as if it were part of the gate's bias."""
    if gate.embedding is None:
        return gate.bias
    with torch.no_grad():
        return gate.bias + gate.embedding(backbone.budget_told)


def _named_blocks(source: TwoPathResNet) -> list[tuple[str, Any]]:
    names = {module: name for name, module in source.named_modules()}
    return [(names[block], block) for block in source.gated_blocks]


def static_flops(net: SlicedResNet, resolution: tuple[int, int]) -> int:
    """Multiply-accumulates of a sliced encoder for one image, gates included.

    Args:
        net: from `slice_encoder`.
        resolution: height and width of the image.
    """
    flops = count_flops(net, resolution)
    return flops.dense + flops.gates
