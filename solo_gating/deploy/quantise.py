"""From an encoder's float32 weights and some images to one in 8-bit integers.

Weights get a scale for each output channel, activations one for each map: the largest number that
calibration images give divided by the largest integer. Gates stay in float32. `network.py` of
solo_gating_runtime says what is computed with them.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from solo_gating_runtime.network import Block, Convolution, Network

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
    largest = _largest(net, images)
    stem, *scales = (_scale(value, _MAP) for value in largest)
    maps = iter(scales)
    return replace(
        net,
        stem=net.stem if float_stem else _quantised(net.stem, "the stem"),
        blocks=tuple(
            _quantised_block(
                block, tuple(next(maps) for _ in block.convolutions), f"block {number}"
            )
            for number, block in enumerate(net.blocks, 1)
        ),
        image_scale=_scale(float(images.abs().max()), _IMAGE),
        stem_scale=stem,
    )


def _largest(net: Network, images: Tensor) -> NDArray[np.float64]:
    """The largest number of each map, the stem's first."""
    number = 1 + sum(len(block.convolutions) for block in net.blocks)
    largest = np.zeros(number)

    def note(index: int, x: Tensor) -> None:
        largest[index] = np.maximum(largest[index], float(x.max()))  # NaN stays

    network = MaskedNetwork(net)
    network.run(images, net.threshold, net.budget, note=note)
    if net.budget_range is not None:
        for end in net.budget_range:
            part = images[::_PART_AT_ENDS]
            network.run(part, net.threshold, end, note=note)
    if not np.isfinite(largest).all():
        raise InputError("calibration: got images whose maps overflow, expected normalised ones")
    return largest


def _quantised_block(block: Block, scales: tuple[float, ...], name: str) -> Block:
    shortcut = block.shortcut
    return replace(
        block,
        convolutions=tuple(_quantised(conv, name) for conv in block.convolutions),
        shortcut=None if shortcut is None else _quantised(shortcut, name),
        scales=scales,
    )


def _quantised(conv: Convolution, name: str) -> Convolution:
    """Weights as integers; those of a channel whose largest one is 0 are 0."""
    terms = conv.weight[0].size
    if terms * _MAP * _WEIGHT >= 2**31:
        raise InputError(
            f"backbone: got sums of {terms} products in {name}, expected at most "
            f"{(2**31 - 1) // (_MAP * _WEIGHT)} for dtype=int8"
        )
    weight = conv.weight.astype(np.float64)
    scale = np.float32(np.maximum(np.abs(weight).max(axis=(1, 2, 3)) / _WEIGHT, _SMALLEST))
    integers = np.rint(weight / scale[:, None, None, None]).clip(-_WEIGHT, _WEIGHT)
    return replace(conv, weight=integers.astype(np.int8), scale=scale)


def _scale(largest: float, integer: int) -> float:
    """A float32; of a map that is 0 on all images 1 / integer, which says nothing worse than another."""
    value = np.float32((largest or 1.0) / integer)
    return float(max(value, _SMALLEST))
