"""One path of an encoder in PyTorch, in float32: every channel is computed, and masks are applied."""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from solo_gating_runtime.network import Convolution, Gate, Network

from .engine.fallback import Chosen, chosen, decide
from .engine.forks import one_thread_if_forked

# A gate, the thresholds of its logits, and how many channels it chooses, or -1.
_Rule = tuple[Gate, Tensor, int]

Note = Callable[[int, Tensor, Tensor | None], None]

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
        threshold: float,
        budget: float | None,
        *,
        masks: Sequence[Tensor] | None = None,
        note: Note | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Features and masks of some images.

        Args:
            images: B × C × H × W, float32.
            threshold: of the gates' logits.
            budget: that the gates are told.
            masks: for each gate B × channels, bool, instead of what the gates decide.
            note: is told every map with its number, B × C × H × W, and the mask that is applied next,
                B × C, or None: 0 is what the first block reads, then the maps of each block's
                convolutions follow.

        Returns:
            Features, B × F, and for each gate, or where it would be, a mask, B × channels, bool.
        """
        net, pieces = self._net, []
        decisions = decide(net, threshold, budget)
        rules: list[_Rule] = []
        if decisions is not None:
            thresholds = torch.from_numpy(decisions.thresholds).split(net.hidden)
            rules = list(zip(net.gates, thresholds, decisions.counts.tolist(), strict=True))
        with torch.autocast("cpu", enabled=False), one_thread_if_forked():
            for begin in range(0, len(images), _BATCH):
                part = slice(begin, begin + _BATCH)
                own = None if masks is None else [mask[part] for mask in masks]
                pieces.append(self._batch(images[part].contiguous(), rules, own, note))
        features = torch.cat([features for features, _ in pieces])
        parts = zip(*(masks for _, masks in pieces), strict=True)
        return features, tuple(torch.cat(part) for part in parts)

    def _batch(
        self,
        images: Tensor,
        rules: Sequence[_Rule],
        masks: Sequence[Tensor] | None,
        note: Note | None,
    ) -> tuple[Tensor, list[Tensor]]:
        note = note or (lambda number, x, mask: None)
        net = self._net
        x = convolved(net.stem, images).relu_()
        if net.max_pool:
            x = F.max_pool2d(x, 3, 2, 1)
        note(0, x, None)
        given: Iterator[Tensor] | None = None if masks is None else iter(masks)
        gates = iter(rules)
        used: list[Tensor] = []
        number = 1
        for block in net.blocks:
            if rules:
                own = [chosen(*next(gates), x) for _ in block.hidden]
            else:
                own = [
                    Chosen(torch.ones(len(x), hidden, dtype=torch.bool)) for hidden in block.hidden
                ]
            if given is not None:
                own = [one._replace(mask=next(given)) for one in own]
            out = x
            for conv, one in zip(block.convolutions, own, strict=False):
                out = one.boosted(convolved(conv, out)).relu_()
                note(number, out, one.mask)
                number += 1
                out *= one.mask[:, :, None, None]
            shortcut = x if block.shortcut is None else convolved(block.shortcut, x)
            x = convolved(block.convolutions[-1], out).add_(shortcut).relu_()
            note(number, x, None)
            number += 1
            used += [one.mask for one in own]
        features = x.mean((2, 3))
        if net.linear is not None:
            features = F.linear(features, *map(torch.from_numpy, net.linear))
        return features, used


def convolved(conv: Convolution, x: Tensor) -> Tensor:
    """A convolution with float32 weights."""
    weight, bias = torch.from_numpy(conv.weight), torch.from_numpy(conv.bias)
    return F.conv2d(x, weight, bias, conv.stride, conv.padding)
