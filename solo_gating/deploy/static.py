"""Physically smaller encoders: the gated path without the channels that a policy never uses."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones import SlicedResNet, TwoPathResNet, convolutions
from ..errors import InputError
from ..flops import BackboneFlops, count_flops
from ..policies import Policy

KEEP = "dynamic, always_on or top:SHARE"


@dataclass(frozen=True)
class Kept:
    """The channels that stay in each block, in order of their numbers.

    Attributes:
        channels: for each gate int64, the indices.
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
        (gate.name, gate.channels) for gate in flops.gates
    ]:
        raise InputError(
            f"policy: got blocks of {[b.channels for b in policy.blocks]} channels, the encoder "
            f"has {flops.all_channels.tolist()}"
        )
    if multiple < 1:
        raise InputError(f"multiple: got {multiple}, expected an integer ≥ 1")
    selected = [torch.tensor(block.selected) for block in policy.blocks]
    if keep == "dynamic":
        numbers = policy.hidden
    elif keep == "always_on":
        numbers = [int((counts == policy.images).sum()) for counts in selected]
    elif top := re.fullmatch(r"top:(0?\.\d+|1(\.0*)?)", keep):
        numbers = _most_selected(selected, policy.images, flops, float(top[1]))
    else:
        raise InputError(f"keep: got {keep!r}, expected {KEEP}, as in top:0.3")
    kept = []
    for counts, number in zip(selected, numbers, strict=True):
        rounded = min(len(counts), -(-max(number, 1) // multiple) * multiple)
        order = counts.argsort(descending=True, stable=True)
        kept.append(order[:rounded].sort().values)
    channels = torch.tensor([len(indices) for indices in kept], dtype=torch.float64)
    share = (float(flops.gated(channels)) - flops.decisions) / flops.dense
    return Kept(tuple(kept), share)


def _most_selected(
    selected: list[Tensor], images: int, flops: BackboneFlops, share: float
) -> list[int]:
    """Numbers of channels with which the FLOPs are at most a share: one bar for all blocks."""
    available = share * flops.dense + flops.decisions
    if available < flops.fixed:
        lowest = (flops.fixed - flops.decisions) / flops.dense
        raise InputError(f"keep: got top:{share}, expected shares from {lowest:.4f} to 1")
    ranked = sorted(
        (-count / images, index)
        for index, counts in enumerate(selected)
        for count in counts.tolist()
    )
    # How many channels of each gate there are among the first so many.
    gates = torch.tensor([index for _, index in ranked])
    steps = torch.nn.functional.one_hot(gates, len(selected)).cumsum(0)
    numbers = torch.cat([torch.zeros_like(steps[:1]), steps])
    affordable = int((flops.gated(numbers) <= available).sum())  # costs rise
    return numbers[affordable - 1].tolist()


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
    source, kind = backbone.encoder("gated"), backbone.gates[0]
    if kind.streams and not gates:
        return _narrow(backbone, kept)
    if not kind.only_masks:
        raise InputError(
            f"policy: got gates of kind {kind.kind!r}, which do more than choose channels; expected "
            + ("gates=drop" if kind.streams else "a kind whose channels can be removed")
        )
    cut = [
        gate.sliced(indices, backbone.budget)
        for gate, indices in zip(backbone.gates, kept.channels, strict=True)
        if gates
    ]
    net = SlicedResNet(
        **source.architecture,
        hidden=[len(indices) for indices in kept.channels],
        gate=backbone.gates[0].kind if gates else None,
        gate_kwargs=[one["kwargs"] for one in cut],
    )
    net.fc = nn.Identity()
    names = {module: name for name, module in net.named_modules()}
    state, channels = source.dense_state_dict(), iter(kept.channels)
    for block, original in zip(net.blocks, backbone.gated_blocks, strict=True):
        sides = [None, *(next(channels) for _ in original.gates), None]
        for key, value in _block_weights(original, sides).items():
            state[f"{names[block]}.{key}"] = value
    for gate, whole, one in zip(net.gates, backbone.gates, cut, strict=False):
        gate.threshold = whole.threshold
        state |= {f"{names[gate]}.{key}": value for key, value in one["state"].items()}
    net.load_state_dict(state)
    return net.eval().requires_grad_(False)


def _narrow(backbone: TwoPathResNet, kept: Kept) -> SlicedResNet:
    """A slimmable encoder at a width, of which the first channels of every layer are kept."""
    source, between = backbone.encoder("gated"), len(backbone.stream_gates)
    widths = [len(indices) for indices in kept.channels]
    wide: list[Any] = [gate.channels for gate in backbone.stream_gates]
    if any(
        number * wide[0] != widths[0] * whole for number, whole in zip(widths, wide, strict=False)
    ):
        raise InputError(
            f"policy: got {widths[:between]} channels after stem and stages, expected shares of {wide} "
            "that are the same; another budget or multiple gives them"
        )
    architecture = source.architecture | {"width": widths[0], "hidden": widths[between:]}
    net = SlicedResNet(**architecture)
    net.fc = nn.Identity()
    state = source.dense_state_dict()
    names = {module: name for name, module in source.named_modules()}
    for block in backbone.gated_blocks:
        for key, value in _block_weights(block, [None] * (len(block.gates) + 2)).items():
            state[f"{names[block]}.{key}"] = value
    for key, value in net.state_dict().items():
        state[key] = state[key][tuple(slice(0, size) for size in value.shape)]
    net.load_state_dict(state)
    return net.eval().requires_grad_(False)


def _block_weights(block: Any, sides: list[Tensor | None]) -> dict[str, Tensor]:
    """A gated block's convolutions and BatchNorms, cut to the channels between them."""
    weights: dict[str, Tensor] = {}
    for number, ((name, conv, _), norm) in enumerate(
        zip(convolutions(block), block.gated_norms, strict=True)
    ):
        inputs, outputs = sides[number], sides[number + 1]
        weight: Tensor = conv.weight
        weight = weight if inputs is None else weight[:, inputs]
        weights[f"{name}.weight"] = weight if outputs is None else weight[outputs]
        for key, value in norm.state_dict().items():
            whole = value.dim() == 0 or outputs is None
            weights[f"bn{number + 1}.{key}"] = value if whole else value[outputs]
    return weights


def static_flops(net: SlicedResNet, resolution: tuple[int, int]) -> int:
    """Multiply-accumulates of a sliced encoder for one image, gates included.

    Args:
        net: from `slice_encoder`.
        resolution: height and width of the image.
    """
    flops = count_flops(net, resolution)
    return flops.dense + flops.decisions
