"""What the kernel computes, in PyTorch."""

import itertools
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from solo_gating_runtime.encoder import Decisions, Results
from solo_gating_runtime.network import (
    BUDGET,
    Block,
    Convolution,
    Embedding,
    Floats,
    Gate,
    Network,
)

from ...gates import Gate as GateModule
from ...gates.shares import number_of_channels
from .fold import Folded
from .forks import one_thread_if_forked


class Chosen(NamedTuple):
    """What a gate decided, for B images or, without the first dimension, for one.

    Attributes:
        mask: B × C_out, bool.
        scale: B × C_out, what a convolution's output is multiplied by; None for 1, as `beta` for 0.
        beta: C_out, added to that.
    """

    mask: Tensor
    scale: Tensor | None = None
    beta: Tensor | None = None

    def boosted(self, out: Tensor) -> Tensor:
        """A convolution's output, B × C_out × H × W or for one image, with scale and beta."""
        if self.scale is None or self.beta is None:
            return out
        return out * self.scale[..., None, None] + self.beta[:, None, None]

    def of_channels(self, channels: Tensor | None) -> "Chosen":
        """For some of the channels only, of one image."""
        if channels is None or self.scale is None or self.beta is None:
            return self
        return Chosen(self.mask[channels], self.scale[channels], self.beta[channels])


class TorchEngine:
    """Runs a folded network with PyTorch's convolutions on the chosen channels of each image.

    Of the ways to do so without a compiler it is the fastest for one image: the chosen rows of the
    weights are copied, and a convolution of that size does the rest. At half of the channels it is
    slower than the dense encoder.

    Args:
        folded: the network; its dtype is what the convolutions' weights are rounded to; sums and
            activations are float32.

    Attributes:
        is_compilable: whether the kernel could run it, too.
    """

    def __init__(self, folded: Folded):
        self._net, self._modules = _rounded(folded.network), folded.modules
        self.is_compilable = folded.is_compilable

    def decide(self, threshold: float, budget: float | None) -> Decisions | None:
        """What the gates go by; None on the dense path.

        Args:
            threshold: of the logits, for gates that have one.
            budget: in the range; None without one.
        """
        return decide(self._net, threshold, budget)

    @torch.no_grad()
    def run(
        self, images: Floats, decisions: Decisions | None, threads: int, maps: bool = False
    ) -> Results:
        """As `Kernel.run`; the number of threads is PyTorch's own."""
        results = Results.empty(self._net, images, maps)
        with torch.autocast("cpu", enabled=False), one_thread_if_forked():
            for index, image in enumerate(images):
                # Copies, because PyTorch's sums depend on how an image lies in memory.
                one = torch.from_numpy(image[None].copy())
                features, masks, stages = self._one(one, decisions)
                results.features[index : index + 1] = features.numpy()
                results.masks[index] = masks.numpy()
                for to, stage in zip(results.maps, stages, strict=False):
                    to[index : index + 1] = stage.numpy()
        return results

    def _one(
        self, image: Tensor, decisions: Decisions | None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Features, masks and the stages' outputs."""
        net = self._net
        x = _convolved(net.stem, image).relu_()
        if net.max_pool:
            x = functional.max_pool2d(x, 3, 2, 1)
        # In an image with NaN or infinity channels that are not chosen count: NaN · 0 = NaN.
        extreme = not bool(image.isfinite().all())
        gates = iter(self._with_thresholds(decisions))
        masks, stages, blocks = [], [], iter(net.blocks)
        for number in net.stages:
            for block in itertools.islice(blocks, number):
                own = [
                    Chosen(torch.ones(channels, dtype=torch.bool, device="cpu"))
                    if decisions is None
                    else _chosen(*next(gates), x, decisions.budget)
                    for channels in block.hidden
                ]
                masks += [one.mask for one in own]
                x = _masked_block(block, x, own) if extreme else _gathered_block(block, x, own)
            stages.append(x)
        features = x.mean((2, 3))
        if net.linear is not None:
            features = functional.linear(features, *map(torch.from_numpy, net.linear))
        return features, torch.cat(masks), stages

    def _with_thresholds(
        self, decisions: Decisions | None
    ) -> list[tuple[Gate | GateModule, Tensor, int]]:
        """Each gate with its thresholds and its count."""
        if decisions is None:
            return []
        gates = [
            module or gate for module, gate in zip(self._modules, self._net.gates, strict=True)
        ]
        thresholds = torch.from_numpy(decisions.thresholds).split(self._net.hidden)
        return list(zip(gates, thresholds, decisions.counts.tolist(), strict=True))


def decide(net: Network, threshold: float, budget: float | None) -> Decisions | None:
    """What the gates go by, as the kernel computes it; None on the dense path.

    Args:
        net: the network.
        threshold: of the logits, for gates that have one.
        budget: in the range; None without one.
    """
    if not net.gates:
        return None
    thresholds, counts = [], []
    for gate, channels in zip(net.gates, net.hidden, strict=True):
        count = -1 if gate.count is None else gate.count
        if count == BUDGET:
            count = number_of_channels(1.0 if budget is None else budget, channels)
        shift = gate.shift.astype(np.float64)
        if gate.embedding is not None and budget is not None:
            shift = shift + _embedded(gate.embedding, budget)
        counts.append(count)
        # With a count logits are compared with each other: shifts are no thresholds.
        thresholds.append(-shift if count >= 0 else threshold - shift)
    return Decisions(np.concatenate(thresholds).astype(np.float32), np.array(counts), budget)


def _rounded(net: Network) -> Network:
    """The network with the convolutions' weights rounded to its dtype, in float32 as before."""
    if net.dtype == "float32":
        return net

    def rounded(conv: Convolution) -> Convolution:
        weight = torch.from_numpy(conv.weight).to(torch.bfloat16).float()
        return replace(conv, weight=weight.numpy())

    blocks = tuple(
        replace(
            block,
            convolutions=tuple(map(rounded, block.convolutions)),
            shortcut=None if block.shortcut is None else rounded(block.shortcut),
        )
        for block in net.blocks
    )
    return replace(net, stem=rounded(net.stem), blocks=blocks)


def _embedded(embedding: Embedding, budget: float) -> NDArray[np.float64]:
    kept = min(max(budget, 0.01), 0.99)
    log_odds = np.log(kept / (1 - kept))
    weight, bias, expand = (
        part.astype(np.float64) for part in (embedding.weight, embedding.bias, embedding.expand)
    )
    return expand @ np.maximum(weight * log_odds + bias, 0)


def chosen(gate: Gate, thresholds: Tensor, count: int, x: Tensor) -> Chosen:
    """What a gate decides.

    Args:
        gate: of B images' blocks.
        thresholds: of its logits, C_out.
        count: how many channels it chooses, or -1.
        x: the block's input, B × C_in × H × W.
    """
    reduce, bias, expand = map(torch.from_numpy, (gate.reduce, gate.bias, gate.expand))
    hidden = functional.linear(x.mean((2, 3)), reduce, bias).relu_()
    if gate.beta is not None:
        border = hidden.sort(dim=1, descending=True).values[:, count : count + 1]
        every = count >= hidden.shape[1]
        mask = torch.ones_like(hidden, dtype=torch.bool) if every else hidden > border
        return Chosen(mask, hidden, torch.from_numpy(gate.beta))
    logits = functional.linear(hidden, expand)
    if count < 0:
        return Chosen(logits >= thresholds)
    first = (logits - thresholds).sort(dim=1, descending=True, stable=True).indices[:, :count]
    return Chosen(torch.zeros_like(logits, dtype=torch.bool).scatter_(1, first, True))


def _chosen(
    gate: Gate | GateModule, thresholds: Tensor, count: int, x: Tensor, budget: float | None
) -> Chosen:
    """The same for one image, or what a gate's module decides."""
    if isinstance(gate, GateModule):
        return Chosen(gate(x, None if budget is None else x.new_tensor(budget))[0] > 0)
    mask, scale, beta = chosen(gate, thresholds, count, x)
    return Chosen(mask[0], None if scale is None else scale[0], beta)


def _weights(conv: Convolution) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(conv.weight), torch.from_numpy(conv.bias)


def _convolved(conv: Convolution, x: Tensor) -> Tensor:
    return functional.conv2d(x, *_weights(conv), conv.stride, conv.padding)


def _gathered_block(block: Block, x: Tensor, decided: list[Chosen]) -> Tensor:
    out, inputs = x, None
    for conv, own in zip(block.convolutions, [*decided, None], strict=True):
        weight, bias = _weights(conv)
        if inputs is not None:
            weight = weight[:, inputs]
        inputs = None if own is None or bool(own.mask.all()) else own.mask.nonzero().flatten()
        if inputs is not None:
            weight, bias = weight[inputs], bias[inputs]
        # PyTorch has no convolution of no channels.
        if weight.shape[1] == 0 or weight.shape[0] == 0:
            size = [-(-side // conv.stride) for side in out.shape[2:]]
            out = bias[None, :, None, None].expand(1, -1, *size)
        else:
            out = functional.conv2d(out, weight, bias, conv.stride, conv.padding)
        if own is not None:
            out = own.of_channels(inputs).boosted(out).relu()
    return (out + _shortcut(block, x)).relu_()


def _masked_block(block: Block, x: Tensor, decided: list[Chosen]) -> Tensor:
    out = x
    for conv, own in zip(block.convolutions, [*decided, None], strict=True):
        out = _convolved(conv, out)
        if own is not None:
            out = own.boosted(out).relu_() * own.mask[:, None, None]
    return (out + _shortcut(block, x)).relu_()


def _shortcut(block: Block, x: Tensor) -> Tensor:
    return x if block.shortcut is None else _convolved(block.shortcut, x)
