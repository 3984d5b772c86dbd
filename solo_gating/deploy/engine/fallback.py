"""What the kernel computes, in PyTorch."""

import torch
from torch import Tensor
from torch.nn import functional

from ...gates import FoldedGate, Gate
from .fold import Decisions, FoldedBlock, FoldedConvolution, FoldedNetwork
from .forks import one_thread_if_forked


class TorchEngine:
    """Runs a folded network with PyTorch's convolutions on the chosen channels of each image.

    Of the ways to do so without a compiler it is the fastest for one image: the chosen rows of the
    weights are copied, and a convolution of that size does the rest. At half of the channels it is
    slower than the dense encoder.

    Args:
        net: the folded network.
        dtype: what the convolutions' weights are rounded to; sums and activations are float32.
    """

    def __init__(self, net: FoldedNetwork, dtype: torch.dtype):
        self._net = net.with_weights_rounded_to(dtype)

    @torch.no_grad()
    def run(
        self, images: Tensor, decisions: Decisions | None, threads: int
    ) -> tuple[Tensor, Tensor]:
        """As `KernelEngine.run`; the number of threads is PyTorch's own."""
        net = self._net
        features = torch.empty(len(images), net.features, dtype=torch.float32, device="cpu")
        masks = torch.empty(len(images), sum(net.hidden), dtype=torch.bool, device="cpu")
        with torch.autocast("cpu", enabled=False), one_thread_if_forked():
            for index, image in enumerate(images):
                # Copies, because PyTorch's sums depend on how an image lies in memory.
                one = self._one(image[None].clone(), decisions)
                features[index : index + 1], masks[index] = one
        return features, masks

    def _one(self, image: Tensor, decisions: Decisions | None) -> tuple[Tensor, Tensor]:
        net = self._net
        x = _convolved(net.stem, image).relu_()
        if net.max_pool:
            x = functional.max_pool2d(x, 3, 2, 1)
        # In an image with NaN or infinity channels that are not chosen count: NaN · 0 = NaN.
        extreme = not bool(image.isfinite().all())
        gates = iter(_with_thresholds(net, decisions))
        masks = []
        for block in net.blocks:
            own = [
                torch.ones(channels, dtype=torch.bool, device="cpu")
                if decisions is None
                else _mask(*next(gates), decisions.budget, x)
                for channels in block.hidden
            ]
            masks += own
            x = _masked_block(block, x, own) if extreme else _gathered_block(block, x, own)
        features = x.mean((2, 3))
        if net.linear is not None:
            features = functional.linear(features, *net.linear)
        return features, torch.cat(masks)


def _with_thresholds(
    net: FoldedNetwork, decisions: Decisions | None
) -> list[tuple[FoldedGate | Gate, Tensor, int]]:
    """Each gate with its thresholds and its count."""
    if decisions is None:
        return []
    thresholds = decisions.thresholds.split(net.hidden)
    return list(zip(net.gates, thresholds, decisions.counts.tolist(), strict=True))


def _mask(
    gate: FoldedGate | Gate, thresholds: Tensor, count: int, budget: float | None, x: Tensor
) -> Tensor:
    """The mask for one image, C_out, bool."""
    if isinstance(gate, Gate):
        return gate(x, None if budget is None else x.new_tensor(budget))[0] > 0
    hidden = functional.linear(x.mean((2, 3)), gate.reduce, gate.bias).relu_()
    logits = functional.linear(hidden, gate.expand)[0]
    if count < 0:
        return logits >= thresholds
    chosen = (logits - thresholds).sort(descending=True, stable=True).indices[:count]
    return torch.zeros_like(logits, dtype=torch.bool).index_fill_(0, chosen, True)


def _convolved(conv: FoldedConvolution, x: Tensor) -> Tensor:
    return functional.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding)


def _gathered_block(block: FoldedBlock, x: Tensor, masks: list[Tensor]) -> Tensor:
    out, inputs = x, None
    for conv, mask in zip(block.convolutions, [*masks, None], strict=True):
        weight, bias = conv.weight, conv.bias
        if inputs is not None:
            weight = weight[:, inputs]
        inputs = None if mask is None or bool(mask.all()) else mask.nonzero().flatten()
        if inputs is not None:
            weight, bias = weight[inputs], bias[inputs]
        # PyTorch has no convolution of no channels.
        if weight.shape[1] == 0 or weight.shape[0] == 0:
            size = [-(-side // conv.stride) for side in out.shape[2:]]
            out = bias[None, :, None, None].expand(1, -1, *size)
        else:
            out = functional.conv2d(out, weight, bias, conv.stride, conv.padding)
        if mask is not None:
            out = out.relu()
    return (out + _shortcut(block, x)).relu_()


def _masked_block(block: FoldedBlock, x: Tensor, masks: list[Tensor]) -> Tensor:
    out = x
    for conv, mask in zip(block.convolutions, [*masks, None], strict=True):
        out = _convolved(conv, out)
        if mask is not None:
            out = out.relu_() * mask[:, None, None]
    return (out + _shortcut(block, x)).relu_()


def _shortcut(block: FoldedBlock, x: Tensor) -> Tensor:
    return x if block.shortcut is None else _convolved(block.shortcut, x)
