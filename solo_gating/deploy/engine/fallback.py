"""What the kernel computes, in PyTorch."""

import torch
from torch import Tensor
from torch.nn import functional

from .fold import FoldedBlock, FoldedGate, FoldedNetwork
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
    def run(self, images: Tensor, thresholds: Tensor | None, threads: int) -> tuple[Tensor, Tensor]:
        """As `KernelEngine.run`; the number of threads is PyTorch's own."""
        net = self._net
        features = torch.empty(len(images), net.features, dtype=torch.float32, device="cpu")
        masks = torch.empty(len(images), sum(net.hidden), dtype=torch.bool, device="cpu")
        with torch.autocast("cpu", enabled=False), one_thread_if_forked():
            for index, image in enumerate(images):
                # Copies, because PyTorch's sums depend on how an image lies in memory.
                one = self._one(image[None].clone(), thresholds)
                features[index : index + 1], masks[index] = one
        return features, masks

    def _one(self, image: Tensor, thresholds: Tensor | None) -> tuple[Tensor, Tensor]:
        net = self._net
        x = functional.conv2d(image, net.stem.weight, net.stem.bias, net.stride, net.padding)
        x = x.relu_()
        if net.max_pool:
            x = functional.max_pool2d(x, 3, 2, 1)
        # In an image with NaN or infinity channels that are not chosen count: NaN · 0 = NaN.
        extreme = not bool(image.isfinite().all())
        pieces = [None] * len(net.blocks) if thresholds is None else thresholds.split(net.hidden)
        masks = []
        for block, piece in zip(net.blocks, pieces, strict=True):
            if block.gate is None or piece is None:
                mask = torch.ones(len(block.conv1.bias), dtype=torch.bool, device="cpu")
            else:
                mask = _logits(block.gate, x) >= piece
            masks.append(mask)
            x = _masked_block(block, x, mask) if extreme else _gathered_block(block, x, mask)
        features = x.mean((2, 3))
        if net.linear is not None:
            features = functional.linear(features, *net.linear)
        return features, torch.cat(masks)


def _logits(gate: FoldedGate, x: Tensor) -> Tensor:
    hidden = functional.linear(x.mean((2, 3)), gate.reduce, gate.bias).relu_()
    return functional.linear(hidden, gate.expand)[0]


def _gathered_block(block: FoldedBlock, x: Tensor, mask: Tensor) -> Tensor:
    conv1, conv2 = block.conv1.weight, block.conv2.weight
    bias1 = block.conv1.bias
    if not mask.all():
        chosen = mask.nonzero().flatten()
        conv1, bias1, conv2 = conv1[chosen], bias1[chosen], conv2[:, chosen]
    out = _shortcut(block, x)
    if len(bias1) == 0:
        return (out + block.conv2.bias[:, None, None]).relu_()
    hidden = functional.conv2d(x, conv1, bias1, block.stride, 1).relu_()
    return (functional.conv2d(hidden, conv2, block.conv2.bias, 1, 1) + out).relu_()


def _masked_block(block: FoldedBlock, x: Tensor, mask: Tensor) -> Tensor:
    hidden = functional.conv2d(x, block.conv1.weight, block.conv1.bias, block.stride, 1).relu_()
    hidden = hidden * mask[:, None, None]
    out = functional.conv2d(hidden, block.conv2.weight, block.conv2.bias, 1, 1)
    return (out + _shortcut(block, x)).relu_()


def _shortcut(block: FoldedBlock, x: Tensor) -> Tensor:
    if block.shortcut is None:
        return x
    return functional.conv2d(x, block.shortcut.weight, block.shortcut.bias, block.stride)
