"""What an engine that computes in bfloat16 computes, in NumPy, slowly: each step as it is defined.

Maps and weights are bfloat16, the upper halves of float32, rounded to the nearest, halves to the even
one. With `exact`, sums are float32 in the order of AVX512-BF16's engine, which has to give the same
bits; without, they are float64, and nothing but their rounding to bfloat16 is left. In the order:

- a word holds two numbers; the product of the upper ones is added first, then that of the lower ones,
  each result rounded to float32 (a product has no rounding error and cannot overflow)
- stem, and the last convolution of a block: from the bias on, word after word; of a shortcut's words
  before; each pair of channels with all elements of the kernel. An identity is added at the end
- other convolutions: the numbers of a row of the kernel are columns × channels; word i goes to partial
  sum i mod 16, row after row; partial sums are folded i with i ^ 1, i ^ 2, i ^ 4, i ^ 8; then the bias
- behind a gate that boosts these are sum · s + (bias + beta / s) · s
- a map: max(0, min(sum, the largest bfloat16))
- means: pixels of even and odd columns apart, row after row, then both, times 1 / pixels
- sums over channels of gates and classifier: as in int8
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from solo_gating_runtime.network import Block, Convolution, Gate, Network

from .integer_reference import (
    Boost,
    Floats,
    Mask,
    boosts,
    classified,
    decide,
    masks_of,
    stacked,
    windows,
)

LARGEST = np.float32(3.3895313892515355e38)
_LANES = 16


@dataclass(frozen=True)
class Result:
    """What a network makes of B images.

    Attributes:
        features: B × F.
        masks: for each gate, or where it would be, B × channels; those that were computed.
        maps: for each block its output, B × C × H × W.
    """

    features: Floats
    masks: tuple[Mask, ...]
    maps: tuple[Floats, ...]


def rounded(numbers: NDArray) -> Floats:
    """To bfloat16, of finite numbers."""
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)


def in_bfloat16(net: Network) -> Network:
    """A network with the weights that an int8 one stands for."""

    def floats(conv: Convolution) -> Convolution:
        scale = np.float32(1) if conv.scale is None else conv.scale[:, None, None, None]
        return replace(conv, weight=rounded(conv.weight * scale), scale=None)

    blocks = [
        replace(
            block,
            convolutions=tuple(map(floats, block.convolutions)),
            shortcut=None if block.shortcut is None else floats(block.shortcut),
            scales=(),
        )
        for block in net.blocks
    ]
    return replace(
        net,
        stem=floats(net.stem),
        blocks=tuple(blocks),
        image_scale=None,
        stem_scale=None,
        bfloat16=True,
    )


def run(
    net: Network,
    images: Floats,
    threshold: float = 0.0,
    budget: float | None = None,
    masks: Sequence[Mask] | None = None,
    exact: bool = True,
) -> Result:
    """Run a network in bfloat16 on images, one after another.

    Args:
        net: with weights that are bfloat16.
        images: B × C × H × W, float32, finite.
        threshold: of the gates' logits.
        budget: that the gates are told.
        masks: for each gate B × channels, instead of what the gates decide.
        exact: whether sums are float32 in the engine's order.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        results = [
            _run_one(
                net, x, threshold, budget, None if masks is None else [m[i] for m in masks], exact
            )
            for i, x in enumerate(images)
        ]
    return Result(
        np.stack([result[0] for result in results]),
        stacked(result[1] for result in results),
        stacked(result[2] for result in results),
    )


def _run_one(
    net: Network,
    image: Floats,
    threshold: float,
    budget: float | None,
    forced: Sequence[Mask] | None,
    exact: bool,
) -> tuple[Floats, list[Mask], list[Floats]]:
    x = _stem(net, rounded(np.clip(image, -LARGEST, LARGEST)), exact)
    masks: list[Mask] = []
    maps: list[Floats] = []
    for block in net.blocks:

        def decided(gate: Gate, x: Floats = x) -> Mask:
            return decide(gate, _means(x), threshold, budget)

        own = masks_of(block, forced, len(masks), decided)
        masks += own
        x = _block(block, x, own, boosts(block, _means(x)), exact)
        maps.append(x)
    return classified(net, _means(x)), masks, maps


def _stem(net: Network, image: Floats, exact: bool) -> Floats:
    conv = net.stem
    if exact:
        seen = windows(conv, image, 0)
        sums = _from(conv.bias, seen.shape[1:3])
        numbers = [(j, c) for j in range(seen.shape[-1]) for c in range(len(seen))]
        for i in range(seen.shape[-1]):
            for first in range(0, len(numbers), 2):
                for j, c in reversed(numbers[first : first + 2]):
                    sums = _added(sums, conv.weight[:, c, i, j, None, None], seen[c, :, :, i, j])
        x = _map(sums)
    else:
        x = _map(_sums(conv, image))
    if not net.max_pool:
        return x
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))  # nothing is below 0
    pools = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    return pools[:, ::2, ::2].max(axis=(3, 4))


def _block(
    block: Block, x: Floats, masks: Sequence[Mask], boosted: Sequence[Boost | None], exact: bool
) -> Floats:
    *firsts, last = block.convolutions
    h, inputs = x, np.arange(len(x))
    for number, (conv, mask, boost) in enumerate(zip(firsts, masks, boosted, strict=True)):
        chosen = np.flatnonzero(mask)
        bias, scale = conv.bias[chosen], np.ones(len(chosen), np.float32)
        if boost is not None:
            scale = boost[0][chosen]
            bias = (bias + boost[1][chosen]) * scale
        part = replace(conv, weight=conv.weight[chosen][:, inputs], bias=np.zeros_like(bias))
        # Maps have whole vectors of channels, hidden ones whole quads of those that are chosen.
        sums = _dots(part, h, 4 if number else _LANES) if exact else _sums(part, h)
        h = _map(sums * scale[:, None, None] + bias[:, None, None])
        inputs = chosen
    last = replace(last, weight=last.weight[:, inputs])
    shortcut = block.shortcut
    if not exact:
        added = x if shortcut is None else _sums(shortcut, x)
        return _map(_sums(last, h) + added)
    if shortcut is None:
        return _map(_pairs(_from(last.bias, x.shape[1:]), last, h) + x)
    bias = np.float32(last.bias.astype(np.float64) + shortcut.bias)
    sums = _pairs(_from(bias, [-(-side // block.stride) for side in x.shape[1:]]), shortcut, x)
    return _map(_pairs(sums, last, h))


def _from(bias: Floats, size: Sequence[int]) -> Floats:
    return np.broadcast_to(bias[:, None, None], (len(bias), *size))


def _map(sums: NDArray) -> Floats:
    """A sum that is not a number is the largest."""
    values = np.nan_to_num(np.float32(sums), nan=LARGEST, posinf=LARGEST, neginf=0)
    return rounded(np.clip(values, 0, LARGEST))


def _sums(conv: Convolution, x: Floats) -> NDArray[np.float64]:
    seen, weight = windows(conv, x.astype(np.float64), 0), conv.weight.astype(np.float64)
    sums = np.einsum("chwij,ocij->ohw", seen, weight, optimize=True)
    return sums + conv.bias.astype(np.float64)[:, None, None]


def _pairs(sums: Floats, conv: Convolution, x: Floats) -> Floats:
    """Products of pairs of channels and elements of the kernel, added one by one."""
    seen = windows(conv, x, 0)
    for first in range(0, len(x), 2):
        for i, j in np.ndindex(conv.weight.shape[2:]):
            for c in reversed(range(first, min(first + 2, len(x)))):
                sums = _added(sums, conv.weight[:, c, i, j, None, None], seen[c, :, :, i, j])
    return sums


def _added(sums: Floats, weight: Floats, x: Floats) -> Floats:
    """A product may be beyond float32 where the result is not; in float64 it is exact."""
    return np.float32(sums + weight.astype(np.float64) * x)


def _dots(conv: Convolution, x: Floats, multiple: int) -> Floats:
    """Sums of 16 partial sums, of a map whose channels are padded to a multiple."""
    more = -len(x) % multiple
    seen = windows(conv, np.pad(x, ((0, more), (0, 0), (0, 0))), 0)
    weight = np.pad(conv.weight, ((0, 0), (0, more), (0, 0), (0, 0)))
    height, width, kernel = seen.shape[1:4]
    length, outputs = kernel * len(seen), len(weight)
    padded = -(-length // (2 * _LANES)) * (2 * _LANES)
    rows = np.zeros((height, width, kernel, padded), np.float32)
    rows[..., :length] = seen.transpose(1, 2, 3, 4, 0).reshape(height, width, kernel, length)
    factors = np.zeros((outputs, kernel, padded), np.float32)
    factors[..., :length] = weight.transpose(0, 2, 3, 1).reshape(outputs, kernel, length)
    steps = kernel * padded // (2 * _LANES)
    words = rows.reshape(height, width, steps, _LANES, 2)
    factors = factors.reshape(outputs, 1, 1, steps, _LANES, 2)
    partial = np.zeros((outputs, height, width, _LANES), np.float32)
    for step in range(steps):
        for half in (1, 0):
            partial = _added(partial, factors[:, :, :, step, :, half], words[:, :, step, :, half])
    lanes = np.arange(_LANES)
    for bit in (1, 2, 4, 8):
        partial = partial + partial[..., lanes ^ bit]
    return partial[..., 0] + conv.bias[:, None, None]


def _means(x: Floats) -> Floats:
    sums = np.zeros((2, len(x)), np.float32)
    for row, column in np.ndindex(x.shape[1:]):
        sums[column % 2] += x[:, row, column]
    return (sums[0] + sums[1]) * np.float32(1 / (x.shape[1] * x.shape[2]))
