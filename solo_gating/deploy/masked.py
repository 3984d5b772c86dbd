"""One path of an encoder in PyTorch, in float32: every channel is computed, and masks are applied."""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from solo_gating_runtime.network import BUDGET, Block, Convolution, Gate, Network

from ..gates.shares import number_of_channels
from .engine.forks import one_thread_if_forked

# Images at a time: with more, maps leave the CPU's cache.
_BATCH = 32


class MaskedNetwork:
    """Computes what calibration and reports look at: maps, and features with given masks.

    Args:
        net: with float32 weights.
    """

    def __init__(self, net: Network):
        self._net = net

    @torch.no_grad()
    def run(
        self,
        images: Tensor,
        *,
        threshold: float = 0.0,
        budget: float | None = None,
        masks: Sequence[Tensor] | None = None,
        note: Callable[[int, Tensor], None] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Features and masks of some images.

        Args:
            images: B × C × H × W, float32.
            threshold: of the gates' logits.
            budget: that the gates are told.
            masks: for each gate B × channels, bool, instead of what the gates decide.
            note: is told every map with its number, B × C × H × W, before masks are applied: 0 is the
                stem's, then those of each block's convolutions follow.

        Returns:
            Features, B × F, and for each gate, or where it would be, a mask, B × channels, bool.
        """
        pieces = []
        with torch.autocast("cpu", enabled=False), one_thread_if_forked():
            for begin in range(0, len(images), _BATCH):
                part = slice(begin, begin + _BATCH)
                own = None if masks is None else [mask[part] for mask in masks]
                pieces.append(self._batch(images[part], threshold, budget, own, note))
        features = torch.cat([features for features, _ in pieces])
        parts = zip(*(masks for _, masks in pieces), strict=True)
        return features, tuple(torch.cat(part) for part in parts)

    def _batch(
        self,
        images: Tensor,
        threshold: float,
        budget: float | None,
        masks: Sequence[Tensor] | None,
        note: Callable[[int, Tensor], None] | None,
    ) -> tuple[Tensor, list[Tensor]]:
        note = note or (lambda number, x: None)
        net = self._net
        x = convolved(net.stem, images).relu_()
        note(0, x)
        if net.max_pool:
            x = F.max_pool2d(x, 3, 2, 1)
        given: Iterator[Tensor] | None = None if masks is None else iter(masks)
        used: list[Tensor] = []
        number = 1
        for block in net.blocks:
            own = [
                next(given) if given is not None else decided(block, index, x, threshold, budget)
                for index in range(len(block.hidden))
            ]
            out = x
            for conv, mask in zip(block.convolutions, own, strict=False):
                out = convolved(conv, out).relu_()
                note(number, out)
                number += 1
                out *= mask[:, :, None, None]
            shortcut = x if block.shortcut is None else convolved(block.shortcut, x)
            x = convolved(block.convolutions[-1], out).add_(shortcut).relu_()
            note(number, x)
            number += 1
            used += own
        features = x.mean((2, 3))
        if net.linear is not None:
            features = F.linear(features, *map(torch.from_numpy, net.linear))
        return features, used


def convolved(conv: Convolution, x: Tensor) -> Tensor:
    """A convolution with float32 weights."""
    weight, bias = torch.from_numpy(conv.weight), torch.from_numpy(conv.bias)
    return F.conv2d(x, weight, bias, conv.stride, conv.padding)


def decided(block: Block, index: int, x: Tensor, threshold: float, budget: float | None) -> Tensor:
    """What a block's gate of that index decides, B × channels, bool; all channels without one."""
    if not block.gates:
        return torch.ones(len(x), block.hidden[index], dtype=torch.bool)
    gate = block.gates[index]
    hidden = F.linear(x.mean((2, 3)), torch.from_numpy(gate.reduce), torch.from_numpy(gate.bias))
    logits = F.linear(hidden.relu_(), torch.from_numpy(gate.expand))
    logits += torch.from_numpy(_shift(gate, budget))
    if gate.count is None:
        return logits >= threshold
    channels = logits.shape[1]
    count = gate.count
    if count == BUDGET:
        count = number_of_channels(1.0 if budget is None else budget, channels)
    chosen = logits.sort(dim=1, descending=True, stable=True).indices[:, : int(count)]
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(1, chosen, True)


def _shift(gate: Gate, budget: float | None) -> np.ndarray:
    told = gate.embedding
    if told is None or budget is None:
        return gate.shift
    kept = min(max(budget, 0.01), 0.99)
    hidden = told.weight.astype(np.float64) * math.log(kept / (1 - kept)) + told.bias
    return np.float32(gate.shift + told.expand @ np.maximum(hidden, 0))
