"""From an encoder's float32 weights and some images to one in 8-bit integers.

Weights get a scale for each output channel, activations one for each map: the largest number that
calibration images give divided by the largest integer. Biases make up for what rounding the weights
changes on average. Gates stay in float32. `network.py` of
solo_gating_runtime says what is computed with them.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from solo_gating_runtime.network import Convolution, Network

from ..errors import InputError
from .masked import MaskedNetwork

# The largest image, map and weight as integers; an image's zero is 128.
_IMAGE, _MAP, _WEIGHT = 127, 255, 127

# Of these, that many images show maps at both ends of the range of budgets.
_PART_AT_ENDS = 4

# Smaller scales are no ordinary float32.
_SMALLEST = float(np.finfo(np.float32).tiny)


def quantise(net: Network, images: Tensor, *, float_stem: bool = False) -> Network:
    """Turn one path of an encoder into an int8 one.

    The maps' scales are those of these images. A hidden map's covers all of its channels, those that
    the gates do not choose, too, so that it holds at every threshold and budget; what blocks read is
    looked at with the channels that are chosen at the network's threshold and budget and, for gates that can be
    told a range of budgets, with a quarter of the images at both of its ends.

    Args:
        net: with float32 weights.
        images: as `calibration_images` gives them, N × C × H × W.
        float_stem: whether the stem keeps its float32 weights.

    Raises:
        InputError: for a network whose maps overflow on these images, or whose sums could overflow.
    """
    largest, means = _seen(net, images)
    stem, *scales = (_scale(value, _MAP) for value in largest)
    maps = list(zip(scales, means[1:], strict=True))
    blocks, inputs = [], means[0]
    for number, block in enumerate(net.blocks, 1):
        own, maps = maps[: len(block.convolutions)], maps[len(block.convolutions) :]
        read = [inputs, *(mean for _, mean in own)]
        name = f"block {number}"
        shortcut = block.shortcut
        blocks.append(
            replace(
                block,
                convolutions=tuple(
                    _quantised(conv, mean, name)
                    for conv, mean in zip(block.convolutions, read, strict=False)
                ),
                shortcut=None if shortcut is None else _quantised(shortcut, inputs, name),
                scales=tuple(scale for scale, _ in own),
            )
        )
        inputs = read[-1]
    pixels = images.double().mean((0, 2, 3)).numpy()
    return replace(
        net,
        stem=net.stem if float_stem else _quantised(net.stem, pixels, "the stem"),
        blocks=tuple(blocks),
        image_scale=_scale(float(images.abs().max()), _IMAGE),
        stem_scale=stem,
    )


def _seen(net: Network, images: Tensor) -> tuple[NDArray[np.float64], list[NDArray[np.float64]]]:
    """The largest number of each map, and its channels' means with masks; the stem's first."""
    number = 1 + sum(len(block.convolutions) for block in net.blocks)
    largest = np.zeros(number)
    sums: dict[int, Tensor] = {}

    def note_largest(index: int, x: Tensor, mask: Tensor | None) -> None:
        largest[index] = np.maximum(largest[index], float(x.max()))  # NaN stays

    def note(index: int, x: Tensor, mask: Tensor | None) -> None:
        note_largest(index, x, mask)
        means = x.mean((2, 3)) if mask is None else x.mean((2, 3)) * mask
        sums[index] = sums.get(index, 0) + means.double().sum(0)

    network = MaskedNetwork(net)
    network.run(images, net.threshold, net.budget, note=note)
    for end in net.budget_range or ():
        network.run(images[::_PART_AT_ENDS], net.threshold, end, note=note_largest)
    if not np.isfinite(largest).all():
        raise InputError("calibration: got images whose maps overflow, expected normalised ones")
    return largest, [(sums[index] / len(images)).numpy() for index in range(number)]


def _quantised(conv: Convolution, means: NDArray[np.float64], name: str) -> Convolution:
    """Weights as integers; those of a channel whose largest one is 0 are 0.

    What rounding them adds to a channel on average, given the means of the input's channels, is taken
    from its bias.
    """
    terms = conv.weight[0].size
    if terms * _MAP * _WEIGHT >= 2**31:
        raise InputError(
            f"backbone: got sums of {terms} products in {name}, expected at most "
            f"{(2**31 - 1) // (_MAP * _WEIGHT)} for dtype=int8"
        )
    weight = conv.weight.astype(np.float64)
    scale = np.float32(np.maximum(np.abs(weight).max(axis=(1, 2, 3)) / _WEIGHT, _SMALLEST))
    steps = scale.astype(np.float64)[:, None, None, None]
    integers = np.rint(weight / steps).clip(-_WEIGHT, _WEIGHT)
    lost = (weight - integers * steps).sum(axis=(2, 3)) @ means
    bias = np.float32(conv.bias + lost)
    return replace(conv, weight=integers.astype(np.int8), bias=bias, scale=scale)


def _scale(largest: float, integer: int) -> float:
    """A float32; of a map that is 0 on all images 1 / integer, which is as good as any other."""
    value = np.float32((largest or 1.0) / integer)
    return float(max(value, _SMALLEST))
