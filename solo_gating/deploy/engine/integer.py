"""What the kernel computes of an int8 network, in PyTorch: the same bits, more slowly.

Sums of integers are computed in float64, in which they are exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from solo_gating_runtime.encoder import Decisions, Results
from solo_gating_runtime.network import Block, Convolution, Floats, Gate, Network

from .fallback import decide
from .forks import one_thread_if_forked

# The number of a black pixel, and of all pixels outside of an image.
_ZERO = 128

# A gate, the thresholds of its logits, and how many channels it chooses, or -1.
_Rule = tuple[Gate, Floats, int]

# A dot product's partial sums.
_LANES = 16

# A boosting gate's smaller scores count as this.
_LEAST_SCORE = np.float32(1e-20)


@dataclass(frozen=True)
class _Convolution:
    """A convolution of integers, and how its sums become a map.

    Attributes:
        weight: C_out × C_in × k × k, float64.
        factor: float32, C_out × 1 × 1: what sums are multiplied by,
        offset: ... and what is added then; None for a shortcut, whose offset the last one has.
    """

    weight: Tensor
    factor: Tensor
    offset: Tensor | None
    stride: int
    padding: int

    def __call__(
        self,
        x: Tensor,
        rows: Tensor | None,
        columns: Tensor | None,
        boost: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The map before rounding, of the chosen input channels (`columns`) and output ones.

        With a boost, two numbers for each of the latter, the second one is added, and the first one
        multiplies.
        """
        weight, factor, offset = self.weight, self.factor, self.offset
        if columns is not None:
            weight = weight[:, columns]
        if rows is not None:
            weight, factor = weight[rows], factor[rows]
            offset = None if offset is None else offset[rows]
        if boost is not None and offset is not None:
            scale, shift = boost
            factor, offset = factor * scale, (offset + shift) * scale
        if weight.shape[0] == 0 or weight.shape[1] == 0:  # PyTorch has no such convolution
            size = [-(-side // self.stride) for side in x.shape[1:]]
            sums = torch.zeros(len(weight), *size)
        else:
            out = F.conv2d(x[None].double(), weight, None, self.stride, self.padding)
            sums = out[0].float()
        values = sums * factor
        return values if offset is None else values + offset


class IntegerEngine:
    """Runs an int8 network image by image, each on its chosen channels.

    Args:
        net: with int8 weights; the stem's may be float32.
    """

    def __init__(self, net: Network):
        assert net.image_scale is not None
        assert net.stem_scale is not None
        self._net = net
        self._image_scale, self._stem_scale = net.image_scale, net.stem_scale
        self._scales = [self._stem_scale, *(block.scales[-1] for block in net.blocks)]
        self._blocks = [
            _convolutions(block, scale)
            for block, scale in zip(net.blocks, self._scales, strict=False)
        ]
        self._stem = (
            None if net.stem.scale is None else _stem(net, self._image_scale, self._stem_scale)
        )

    def decide(self, threshold: float, budget: float | None) -> Decisions | None:
        """What the gates go by; None on the dense path."""
        return decide(self._net, threshold, budget)

    @torch.no_grad()
    def run(
        self, images: Floats, decisions: Decisions | None, threads: int, maps: bool = False
    ) -> Results:
        """As `Kernel.run`; the number of threads is PyTorch's own."""
        net = self._net
        results = Results.empty(net, images, maps)
        for array in (results.features, *results.maps):
            array.fill(np.nan)
        results.masks.fill(decisions is None)
        rules: list[_Rule] = []
        if decisions is not None:
            thresholds = np.split(decisions.thresholds, np.cumsum(net.hidden)[:-1])
            rules = list(zip(net.gates, thresholds, decisions.counts.tolist(), strict=True))
        with torch.autocast("cpu", enabled=False), one_thread_if_forked():
            for index, image in enumerate(images):
                if np.isfinite(image).all():
                    one = torch.from_numpy(image.copy())
                    results.features[index], results.masks[index], outputs = self._one(one, rules)
                    ends = np.cumsum(net.stages)
                    for to, end in zip(results.maps, ends, strict=False):
                        to[index] = outputs[end - 1]
        return results

    def _one(
        self, image: Tensor, rules: Sequence[_Rule]
    ) -> tuple[Floats, NDArray[np.bool_], list[Floats]]:
        """Features, masks and the blocks' outputs."""
        net = self._net
        x = self._first_map(image)
        if net.max_pool:
            x = F.max_pool2d(x[None], 3, 2, 1)[0]
        masks: list[Tensor] = []
        outputs: list[Floats] = []
        for block, parts, scale, out_scale in zip(
            net.blocks, self._blocks, self._scales, self._scales[1:], strict=False
        ):
            means = _means(x, scale)
            own = [_Chosen(torch.ones(channels, dtype=torch.bool)) for channels in block.hidden]
            if rules:
                own = [_chosen(*rule, means) for rule in rules[len(masks) : len(masks) + len(own)]]
            masks += [one.mask for one in own]
            *firsts, last, shortcut = parts
            out, columns = x, None
            for conv, one, map_scale in zip(firsts, own, block.scales, strict=False):
                rows = one.mask.nonzero().flatten()
                out = _rounded(conv(out, rows, columns, one.boost(rows, map_scale)))
                columns = rows
            added = x * _float(scale, out_scale) if shortcut is None else shortcut(x, None, None)
            x = _rounded(last(out, None, columns) + added)
            outputs.append(x.numpy() * np.float32(out_scale))
        features = _means(x, self._scales[-1])
        if net.linear is not None:
            weight, bias = net.linear
            features = _dots(weight, features) + bias
        return features, torch.cat(masks).numpy(), outputs

    def _first_map(self, image: Tensor) -> Tensor:
        net = self._net
        if self._stem is None:
            values = _float32_sums(net.stem, image).relu_()
            return _rounded(values * _float(1.0, self._stem_scale))
        pixels = (image * _float(1.0, self._image_scale)).round() + _ZERO
        pad = net.stem.padding
        return _rounded(
            self._stem(F.pad(pixels.clamp(0, 255), (pad,) * 4, value=_ZERO), None, None)
        )


def _stem(net: Network, image_scale: float, stem_scale: float) -> _Convolution:
    """The stem on pixels from 0 to 255, padded."""
    conv = net.stem
    assert conv.scale is not None
    scale = conv.scale.astype(np.float64)
    rows = conv.weight.sum(axis=(1, 2, 3), dtype=np.int64)
    offset = conv.bias.astype(np.float64) / stem_scale
    offset -= _ZERO * rows * image_scale * scale / stem_scale
    return _convolution(replace(conv, padding=0), image_scale, stem_scale, offset)


def _convolutions(block: Block, scale: float) -> list[Any]:
    """Those of a block whose input has this scale, and its shortcut, None for the identity."""
    made = []
    inputs = scale
    *firsts, last = block.convolutions
    for conv, out in zip(firsts, block.scales, strict=False):
        made.append(_convolution(conv, inputs, out, conv.bias.astype(np.float64) / out))
        inputs = out
    out, bias, shortcut = block.scales[-1], last.bias.astype(np.float64), None
    if block.shortcut is not None:
        bias += block.shortcut.bias
        shortcut = _convolution(block.shortcut, scale, out, None)
    return [*made, _convolution(last, inputs, out, bias / out), shortcut]


def _convolution(
    conv: Convolution, scale: float, out: float, offset: NDArray[np.float64] | None
) -> _Convolution:
    """A convolution between maps of these scales."""
    assert conv.scale is not None
    factor = scale * conv.scale.astype(np.float64) / out
    return _Convolution(
        torch.from_numpy(conv.weight).double(),
        _column(factor),
        None if offset is None else _column(offset),
        conv.stride,
        conv.padding,
    )


def _column(values: NDArray[Any]) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))[:, None, None]


def _float32_sums(conv: Convolution, image: Tensor) -> Tensor:
    """A stem of float32 weights: products are added one by one, in the order of the weights."""
    kernel, pad = conv.weight.shape[-1], conv.padding
    padded = F.pad(image, (pad,) * 4)
    windows = padded.unfold(1, kernel, conv.stride).unfold(2, kernel, conv.stride)
    weight = torch.from_numpy(conv.weight)
    sums = torch.zeros(len(weight), *windows.shape[1:3])
    for c, i, j in np.ndindex(weight.shape[1:]):
        sums += windows[c, :, :, i, j] * weight[:, c, i, j, None, None]
    return sums + torch.from_numpy(conv.bias)[:, None, None]


def _rounded(values: Tensor) -> Tensor:
    """A map's integers, as float32; NaN, which huge pixels can give in a float32 stem, becomes 0."""
    return values.round().clamp(0, 255).nan_to_num(0)


def _float(numerator: float, denominator: float) -> float:
    return float(np.float32(numerator / denominator))


def _means(x: Tensor, scale: float) -> Floats:
    sums = x.double().sum((1, 2)).float().numpy()
    return sums * np.float32(scale / (x.shape[1] * x.shape[2]))


def _dots(weight: Floats, x: Floats) -> Floats:
    """weight · x in the order that all engines have: 16 sums, then the upper half on the lower one."""
    products = np.pad(weight * x, ((0, 0), (0, -len(x) % _LANES)))
    lanes = np.add.accumulate(products.reshape(len(weight), -1, _LANES), axis=1)[:, -1]
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


@dataclass(frozen=True)
class _Chosen:
    """What a gate decided: a mask, and of one that boosts s and beta / s, else None."""

    mask: Tensor
    scale: Floats | None = None
    shift: Floats | None = None

    def boost(self, rows: Tensor, map_scale: float) -> tuple[Tensor, Tensor] | None:
        """For these channels of a map: relu(s · y + beta) = s · relu(y + beta / s)."""
        if self.scale is None or self.shift is None:
            return None
        return _column(self.scale)[rows], _column(self.shift / np.float32(map_scale))[rows]


def _chosen(gate: Gate, thresholds: Floats, count: int, means: Floats) -> _Chosen:
    hidden = _dots(gate.reduce, means) + gate.bias if len(gate.bias) else gate.bias
    if gate.beta is not None:
        scores = np.maximum(hidden, 0)
        # The last one is below all scores, for when all are chosen.
        ordered = np.append(np.sort(scores)[::-1], np.float32(-np.inf))
        scale = np.maximum(scores, _LEAST_SCORE)
        return _Chosen(torch.from_numpy(scores > ordered[count]), scale, gate.beta / scale)
    alive = hidden > 0
    products = (hidden[alive] * gate.expand[:, alive]).T
    logits = np.zeros_like(gate.shift)
    if len(products):
        logits = np.add.accumulate(products)[-1]
    if count < 0:
        return _Chosen(torch.from_numpy(logits >= thresholds))
    order = np.argsort(-(logits - thresholds), kind="stable")
    mask = torch.zeros(len(logits), dtype=torch.bool)
    mask[torch.from_numpy(order[:count].copy())] = True
    return _Chosen(mask)
