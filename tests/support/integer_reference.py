"""What an int8 network computes, in NumPy, slowly: every step as its definition is written.

Integers are exact, floating-point operations are single float32 ones in the stated order, so that an
engine has to give the same bits. The definition is in `solo_gating_runtime/network.py`, and in short:

- image: q = clamp(⌊x · (1 / image_scale)⌉ + 128, 0, 255), with 128 around the image
- a map: q = clamp(⌊float(sum) · m + b⌉, 0, 255), m and b computed in float64 and rounded once
- behind a gate that boosts: float(sum) · (m · s) + (b + (beta / s) / scale) · s, each a float32
- sums over channels of gates and classifier: 16 partial sums, folded i with i + 8, i + 4, i + 2, i + 1
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from solo_gating_runtime.network import BUDGET, Block, Convolution, Embedding, Gate, Network

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Boost = tuple[Floats, Floats]

_ZERO_OF_IMAGE = 128

# Kernels of the blocks of random networks.
BASIC = ((3, 3),) * 4
BOTTLENECK = ((1, 3, 1),) * 3


@dataclass(frozen=True)
class Result:
    """What an int8 network makes of B images.

    Attributes:
        features: B × F, float32.
        masks: for each gate, or where it would be, B × channels; those that were computed.
        maps: for each block its output, B × C × H × W, uint8.
        stem: the map that the first block reads, B × C × H × W, uint8.
    """

    features: Floats
    masks: tuple[Mask, ...]
    maps: tuple[Bytes, ...]
    stem: Bytes


def run(
    net: Network,
    images: Floats,
    threshold: float = 0.0,
    budget: float | None = None,
    masks: Sequence[Mask] | None = None,
) -> Result:
    """Run an int8 network on images, one after another.

    Args:
        net: with int8 weights; the stem's may be float32.
        images: B × C × H × W, float32.
        threshold: of the gates' logits.
        budget: that the gates are told.
        masks: for each gate B × channels, instead of what the gates decide.
    """
    results = [
        _run_one(net, image, threshold, budget, None if masks is None else [m[i] for m in masks])
        for i, image in enumerate(images)
    ]
    return Result(
        np.stack([result.features for result in results]),
        stacked(result.masks for result in results),
        stacked(result.maps for result in results),
        np.stack([result.stem for result in results]),
    )


def _run_one(
    net: Network,
    image: Floats,
    threshold: float,
    budget: float | None,
    forced: Sequence[Mask] | None,
) -> Result:
    finite = bool(np.isfinite(image).all())
    # What comes of such an image is fixed; its maps are those of an empty one.
    x = _stem(net, image if finite else np.zeros_like(image))
    if net.max_pool:
        x = _max_pool(x)
    stem, scale = x, _f64(net.stem_scale)
    masks: list[Mask] = []
    maps: list[Bytes] = []
    for block in net.blocks:

        def decided(gate: Gate, x: Bytes = x, scale: np.float64 = scale) -> Mask:
            if not finite:
                return np.zeros(len(gate.shift), bool)
            return decide(gate, _means(x, scale), threshold, budget)

        own = masks_of(block, forced, len(masks), decided)
        masks += own
        x = _block(block, x, scale, own, boosts(block, _means(x, scale)))
        scale = _f64(block.scales[-1])
        maps.append(x)
    features = classified(net, _means(x, scale))
    if not finite:
        features = np.full_like(features, np.nan)
    return Result(features, tuple(masks), tuple(maps), stem)


def _stem(net: Network, image: Floats) -> Bytes:
    conv, stem_scale = net.stem, _f64(net.stem_scale)
    if conv.scale is None:
        sums = _float32_sums(conv, image)
        with np.errstate(over="ignore", invalid="ignore"):
            values = np.maximum(sums + conv.bias[:, None, None], np.float32(0))
            return _to_bytes(values * (np.float32(1) / np.float32(net.stem_scale)))
    with np.errstate(over="ignore"):
        pixels = np.rint(image * (np.float32(1) / np.float32(net.image_scale)))
    q = _to_bytes(pixels + np.float32(_ZERO_OF_IMAGE))
    image_scale, scale = _f64(net.image_scale), conv.scale.astype(np.float64)
    row_sums = conv.weight.astype(np.int64).sum(axis=(1, 2, 3)).astype(np.float64)
    shift = _ZERO_OF_IMAGE * row_sums * image_scale * scale / stem_scale
    m = image_scale * scale / stem_scale
    b = conv.bias.astype(np.float64) / stem_scale - shift
    return _to_bytes(_scaled(_sums(conv, q, _ZERO_OF_IMAGE), m, b))


def _block(
    block: Block,
    x: Bytes,
    x_scale: np.float64,
    masks: Sequence[Mask],
    boosted: Sequence[Boost | None],
) -> Bytes:
    h, scale = x, x_scale
    for conv, mask, out, boost in zip(
        block.convolutions[:-1], masks, block.scales, boosted, strict=False
    ):
        out_scale = _f64(out)
        m = np.float32(scale * conv.scale.astype(np.float64) / out_scale)
        b = np.float32(conv.bias.astype(np.float64) / out_scale)
        if boost is not None:
            m, b = m * boost[0], (b + boost[1] / np.float32(out_scale)) * boost[0]
        values = _scaled(_sums(conv, h), m, b)
        h, scale = _to_bytes(values) * mask[:, None, None], out_scale
    last, out_scale = block.convolutions[-1], _f64(block.scales[-1])
    bias = last.bias.astype(np.float64)
    if block.shortcut is None:
        shortcut = x.astype(np.float32) * np.float32(x_scale / out_scale)
    else:
        bias = bias + block.shortcut.bias.astype(np.float64)
        m = np.float32(x_scale * block.shortcut.scale.astype(np.float64) / out_scale)
        shortcut = _sums(block.shortcut, x).astype(np.float32) * m[:, None, None]
    m = scale * last.scale.astype(np.float64) / out_scale
    return _to_bytes(_scaled(_sums(last, h), m, bias / out_scale) + shortcut)


def masks_of(
    block: Block, forced: Sequence[Mask] | None, before: int, decided: Callable[[Gate], Mask]
) -> list[Mask]:
    """For each gate of a block, or where it would be, the channels that are computed.

    Args:
        block: without gates all of its channels are.
        forced: the whole network's, instead of what its gates decide.
        before: the number of those that belong to earlier blocks.
        decided: by a gate of the block.
    """
    if forced is not None:
        own = forced[before : before + len(block.hidden)]
        return [mask.astype(bool) for mask in own]
    if not block.gates:
        return [np.ones(channels, bool) for channels in block.hidden]
    return [decided(gate) for gate in block.gates]


def classified(net: Network, means: Floats) -> Floats:
    """The features: the means of the last map, or what a classifier makes of them."""
    if net.linear is None:
        return means
    weight, bias = net.linear
    return np.float32([dot(means, row) for row in weight]) + bias


def stacked(of_images: Iterable[Sequence[NDArray]]) -> tuple[NDArray, ...]:
    """Several arrays of each image → as many of all images."""
    return tuple(map(np.stack, zip(*of_images, strict=True)))


def decide(gate: Gate, means: Floats, threshold: float, budget: float | None) -> Mask:
    """What a gate decides, from the means of its block's input."""
    if gate.beta is not None:
        s = scores(gate, means)
        beyond = sorted(s, reverse=True)[number_of_channels(budget, len(s)) :]
        return np.array([not beyond or score > beyond[0] for score in s])
    logits = np.zeros(len(gate.shift), np.float32)
    for k in range(len(gate.bias)):
        hidden = dot(means, gate.reduce[k]) + gate.bias[k]
        if not hidden <= 0:  # NaN, of a network in bfloat16, stays NaN
            logits = logits + hidden * gate.expand[:, k]
    shift = _shift(gate, budget)
    if gate.count is None:
        return logits >= np.float32(threshold - shift)
    channels = len(logits)
    count = number_of_channels(budget, channels) if gate.count == BUDGET else int(gate.count)
    order = sorted(range(channels), key=lambda c: (-(logits[c] + np.float32(shift[c])), c))
    mask = np.zeros(channels, bool)
    mask[order[:count]] = True
    return mask


def scores(gate: Gate, means: Floats) -> Floats:
    """Of a gate that boosts, one for each channel."""
    sums = [dot(means, row) + bias for row, bias in zip(gate.reduce, gate.bias, strict=True)]
    return np.maximum(np.float32(sums), np.float32(0))


def boosts(block: Block, means: Floats) -> list[Boost | None]:
    """For each gate of a block, or where it would be, its scores s and beta / s if it boosts."""
    found: list[Boost | None] = [None] * len(block.hidden)
    for k, gate in enumerate(block.gates):
        if gate.beta is not None:
            s = np.maximum(scores(gate, means), np.float32(1e-20))
            found[k] = (s, gate.beta / s)
    return found


def number_of_channels(budget: float | None, channels: int) -> int:
    """⌈b · channels⌉, but at least one; 0.3 · 10 = 3.0000001 is no reason for a fourth one."""
    share = 1.0 if budget is None else budget
    return min(channels, max(1, math.ceil(share * channels - 1e-3)))


def _shift(gate: Gate, budget: float | None) -> NDArray[np.float64]:
    """With what a budget adds to it; the thresholds that it gives are rounded once, to float32."""
    shift, told = gate.shift.astype(np.float64), gate.embedding
    if told is None:
        return shift
    assert budget is not None
    b = min(max(budget, 0.01), 0.99)
    hidden = np.maximum(told.weight.astype(np.float64) * math.log(b / (1 - b)) + told.bias, 0)
    return shift + told.expand.astype(np.float64) @ hidden


def _sums(conv: Convolution, x: Bytes, outside: int = 0) -> NDArray[np.int64]:
    """C_out × H × W, Σ q · w; float64 products and sums of integers below 2⁵³ are exact."""
    seen = windows(conv, x.astype(np.float64), outside)
    weight = conv.weight.astype(np.float64)
    return np.einsum("chwij,ocij->ohw", seen, weight, optimize=True).astype(np.int64)


def _float32_sums(conv: Convolution, image: Floats) -> Floats:
    """The same in float32: over input channels, rows and columns of the kernel, one by one."""
    seen = windows(conv, image, 0)
    channels, height, width, kernel, _ = seen.shape
    sums = np.zeros((len(conv.bias), height, width), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for c, i, j in np.ndindex(channels, kernel, kernel):
            sums = sums + seen[c, :, :, i, j] * conv.weight[:, c, i, j, None, None]
    return sums


def windows(conv: Convolution, x: NDArray, outside: int) -> NDArray:
    """C × H_out × W_out × k × k."""
    pad, kernel = conv.padding, conv.weight.shape[-1]
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad)), constant_values=outside)
    seen = np.lib.stride_tricks.sliding_window_view(padded, (kernel, kernel), axis=(1, 2))
    return seen[:, :: conv.stride, :: conv.stride]


def _scaled(sums: NDArray[np.int64], m: NDArray, b: NDArray) -> Floats:
    """float(sum) · m + b."""
    m, b = np.float32(m)[:, None, None], np.float32(b)[:, None, None]
    return sums.astype(np.float32) * m + b


def _to_bytes(values: Floats) -> Bytes:
    """clamp(⌊value⌉, 0, 255); NaN, which only a float32 stem can make of huge pixels, gives 0."""
    return np.nan_to_num(np.clip(np.rint(values), 0, 255), nan=0).astype(np.uint8)


def _max_pool(x: Bytes) -> Bytes:
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))  # nothing is below 0
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    return windows[:, ::2, ::2].max(axis=(3, 4))


def _means(x: Bytes, scale: np.float64) -> Floats:
    pixels = x.shape[1] * x.shape[2]
    return x.sum(axis=(1, 2), dtype=np.int64).astype(np.float32) * np.float32(scale / pixels)


def dot(a: Floats, b: Floats) -> np.float32:
    """Of all engines: 16 partial sums, folded i with i + 8, i + 4, i + 2, i + 1."""
    partial = [np.float32(0)] * 16
    for i in range(len(a)):
        partial[i % 16] = partial[i % 16] + a[i] * b[i]
    for half in (8, 4, 2, 1):
        partial = [partial[i] + partial[i + half] for i in range(half)]
    return partial[0]


def _f64(scale: float | None) -> np.float64:
    """A scale as its file holds it, a float32."""
    assert scale is not None
    return np.float64(np.float32(scale))


def images(*shape: int, seed: int = 0) -> Floats:
    """Standard normal numbers."""
    return np.float32(np.random.default_rng(seed).normal(size=shape))


def random_network(
    seed: int = 0,
    *,
    width: int = 8,
    blocks: Sequence[tuple[int, ...]] = ((3, 3),) * 8,
    path: str = "gated",
    float_stem: bool = False,
    imagenet_stem: bool = False,
    classes: int | None = None,
    count: int | str | None = None,
    embedding: bool = False,
    extreme: bool = False,
    boosting: bool = False,
) -> Network:
    """An int8 network with random weights, whose maps use most of the 256 numbers.

    A block whose map or channels change has a convolution as its shortcut, others have none. Odd
    blocks from the third on double the channels and halve the map. A gate follows each convolution
    but a block's last.

    Args:
        seed: of all numbers.
        width: channels after the stem.
        blocks: the sizes of each block's kernels, 1 or 3.
        path: "gated" or "dense".
        float_stem: whether the stem's weights are float32.
        imagenet_stem: 7×7 of stride 2 and a max-pool; else 3×3 with a padding of 2.
        classes: of a classifier; None for none.
        count: of all gates, as in `Gate`.
        embedding: whether gates have one.
        extreme: all weights of convolutions are −127 or 127, so that sums get as large as they can.
        boosting: whether all gates boost; some of the scores are 0, and some are equal.
    """
    rng = np.random.default_rng(seed)

    def floats(*shape: int, scale: float = 1.0) -> Floats:
        return np.float32(rng.normal(size=shape) * scale)

    def convolution(
        inputs: int, outputs: int, kernel: int, stride: int = 1, gain: float = 1.0
    ) -> Convolution:
        fan_in = inputs * kernel**2
        weight = floats(outputs, inputs, kernel, kernel, scale=gain * math.sqrt(2 / fan_in))
        scale = np.float32(np.abs(weight).max(axis=(1, 2, 3)) / 127)
        quantised = np.rint(weight / scale[:, None, None, None]).clip(-127, 127).astype(np.int8)
        if extreme:
            quantised = np.int8(127 * np.where(quantised < 0, -1, 1))
            scale = scale / np.float32(3)
        return Convolution(quantised, floats(outputs, scale=0.2), stride, kernel // 2, scale)

    def gate(inputs: int, channels: int) -> Gate:
        if boosting:
            reduce, bias = floats(channels, inputs, scale=1 / inputs), 1 + floats(channels)
            reduce[:2], bias[0], bias[1] = 0, -1, 1
            reduce[3], bias[3] = reduce[2], bias[2]
            return Gate.boosting(reduce, bias, floats(channels, scale=0.3))
        hidden = max(1, inputs // 4)
        told = Embedding(floats(4), floats(4), floats(channels, 4)) if embedding else None
        return Gate(
            floats(hidden, inputs, scale=2 / math.sqrt(inputs)),
            floats(hidden, scale=0.5),
            floats(channels, hidden),
            floats(channels, scale=0.3),
            told,
            count,
        )

    kernel, stride, padding = (7, 2, 3) if imagenet_stem else (3, 1, 2)
    stem = convolution(3, width, kernel, stride)
    if float_stem:
        weight = floats(width, 3, kernel, kernel, scale=math.sqrt(2 / (3 * kernel**2)))
        stem = Convolution(weight, stem.bias, stride, padding)
    else:
        stem = Convolution(stem.weight, stem.bias, stride, padding, stem.scale)
    inputs, made = width, []
    for index, kernels in enumerate(blocks):
        wider = index >= 2 and index % 2 == 0
        hidden = inputs * 2 if wider else inputs
        outputs = hidden
        sizes = [inputs, *[hidden] * (len(kernels) - 1), outputs]
        step = kernels.index(3) if 3 in kernels else 0
        convs = tuple(
            convolution(a, b, size, 2 if wider and i == step else 1, 0.5 if i else 1.0)
            for i, (a, b, size) in enumerate(zip(sizes[:-1], sizes[1:], kernels, strict=True))
        )
        shortcut = convolution(inputs, outputs, 1, 2) if wider else None
        gates = tuple(gate(inputs, len(conv.bias)) for conv in convs[:-1])
        scales = tuple(float(np.float32(rng.uniform(3, 5) / 255)) for _ in convs)
        made.append(Block(convs, shortcut, gates if path == "gated" else (), scales))
        inputs = outputs
    return Network(
        path=path,
        stem=stem,
        max_pool=imagenet_stem,
        blocks=tuple(made),
        linear=None if classes is None else (floats(classes, inputs), floats(classes)),
        budget_range=(0.05, 1.0 if boosting else 0.9)
        if embedding or boosting or count == BUDGET
        else None,
        dial="budget" if boosting or count == BUDGET else "threshold" if count is None else None,
        image_scale=float(np.float32(4 / 127)),
        stem_scale=float(np.float32(4 / 255)),
    )
