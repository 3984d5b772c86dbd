"""One path of an encoder, as its file describes it: weights in the order of PyTorch's, as NumPy arrays.

Every BatchNorm is folded into the convolution before it. In an int8 network weights are int8 with a
scale for each output channel, and activations are numbers from 0 to 255 with a scale for each map:

- image: q = clamp(⌊x / image_scale⌉ + 128, 0, 255); pixels outside of the image are 128
- convolution: sum = Σ q · w, an int32; value = sum · (scale of the input · scale of the channel) + bias
- a map after its ReLU: q = clamp(⌊value / scale of the map⌉, 0, 255)
- behind a gate that boosts: value = (value + beta / s) · s, with scores s of at least 1e-20

⌊·⌉ rounds to the nearest integer, halves to the even one.

A network in bfloat16 is computed in it by the engines that are named after it (`library.computes`);
the others widen its weights and compute in float32. Weights, image and maps are bfloat16, the upper
halves of float32, rounded to the nearest, halves to even:

- image: numbers beyond the largest bfloat16, 3.39e38, count as it
- convolution: sums of products in float32. AVX512-BF16 adds one product after another, each result
  rounded to the nearest; NEON adds two at a time and rounds to odd. In which order is up to the
  engine, but the same for any batch and number of threads
- a map: min(max(sum, 0), 3.39e38), rounded once, with bias and shortcut in the sum; a sum that is not
  a number counts as 3.39e38
- behind a gate that boosts: sum · s + (bias + beta / s) · s, with s as in int8
- gates, means and the classifier: float32, as in int8; numbers below the least normal float may
  count as 0

In int8 and in computed bfloat16 an image with NaN or infinity has features of NaN, and masks that are
false on the gated path and true on the dense one.
"""

import itertools
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

# Of a block.
MOST_CONVOLUTIONS = 3

# A gate's `count` that follows the budget b: ⌈b · channels⌉.
BUDGET: Literal["budget"] = "budget"


@dataclass(frozen=True)
class Convolution:
    """x ↦ weight * x + bias.

    Attributes:
        weight: C_out × C_in × k × k, float32, or int8 from −127 to 127.
        bias: C_out, float32.
        stride: for rows and columns.
        padding: in pixels.
        scale: of int8 weights, C_out float32; None for float32 ones.
    """

    weight: NDArray[np.float32] | NDArray[np.int8]
    bias: Floats
    stride: int = 1
    padding: int = 0
    scale: Floats | None = None


@dataclass(frozen=True)
class Embedding:
    """What a budget b adds to the logits of a gate: expand · relu(weight · t + bias), t = log(b / (1 − b)).

    b is kept within 0.01 and 0.99.

    Attributes:
        weight: H.
        bias: H.
        expand: C_out × H.
    """

    weight: Floats
    bias: Floats
    expand: Floats


@dataclass(frozen=True)
class Gate:
    """logits = expand · relu(reduce · m + bias) + shift + embedding(budget), m: means of the input's channels.

    A gate with a beta boosts. Its scores s = relu(reduce · m + bias), one for each channel, choose those
    that exceed the (count + 1)-th largest score (all, if all are to be chosen), and multiply what they
    choose: relu(s · y + beta) takes the place of a convolution's relu(y).

    Attributes:
        reduce: hidden × C_in; hidden may be 0, and is C_out for a gate that boosts.
        bias: hidden.
        expand: C_out × hidden.
        shift: C_out.
        embedding: None for logits that no budget shifts.
        count: None to compute the channels whose logits reach the threshold; else those with so many of
            the largest logits (of equal ones the first), a number or `BUDGET`.
        beta: C_out, of a gate that boosts; its expand is C_out × 0, its shift zeros, its embedding None
            and its count `BUDGET`. None for others.
    """

    reduce: Floats
    bias: Floats
    expand: Floats
    shift: Floats
    embedding: Embedding | None = None
    count: int | Literal["budget"] | None = None
    beta: Floats | None = None

    @classmethod
    def boosting(cls, reduce: Floats, bias: Floats, beta: Floats) -> "Gate":
        """A gate that boosts."""
        nothing = np.zeros((len(beta), 0), np.float32)
        return cls(reduce, bias, nothing, np.zeros_like(beta), count=BUDGET, beta=beta)


@dataclass(frozen=True)
class Block:
    """relu(c_N(m_(N−1) · relu(c_(N−1)(... m_1 · relu(c_1 x)))) + shortcut x), with masks m_i = gate_i(x).

    Attributes:
        convolutions: c_1 to c_N.
        shortcut: a convolution; None for the identity.
        gates: one between each two convolutions; none on the dense path.
        scales: of an int8 network, those of the maps after c_1 to c_N; the last is the block's output's.
    """

    convolutions: tuple[Convolution, ...]
    shortcut: Convolution | None
    gates: tuple[Gate, ...] = ()
    scales: tuple[float, ...] = ()

    @property
    def hidden(self) -> tuple[int, ...]:
        """Channels between the convolutions."""
        return tuple(len(conv.bias) for conv in self.convolutions[:-1])

    @property
    def stride(self) -> int:
        """Of all its convolutions together."""
        return math.prod(conv.stride for conv in self.convolutions)

    @property
    def is_known(self) -> bool:
        """Whether the kernel runs it: few convolutions of 1×1 or 3×3."""
        kernels = [(conv.weight.shape[-1], conv.padding) for conv in self.convolutions]
        number = len(self.convolutions)
        return 2 <= number <= MOST_CONVOLUTIONS and all(k in [(1, 0), (3, 1)] for k in kernels)


@dataclass(frozen=True)
class Network:
    """One path of an encoder.

    Attributes:
        path: "gated" or "dense".
        stem: the first convolution; with float32 weights also in an int8 network that keeps it so.
        max_pool: whether a 3×3 max-pool of stride 2 and padding 1 follows.
        blocks: those of the four stages, one after another.
        linear: weight (classes × C) and bias of the classifier, float32; None without one.
        budget_range: of the budgets that the gates can be told, None without one.
        dial: what turns the gates: "threshold", "budget" or None.
        stages: the number of blocks in each; () for one stage.
        threshold: of the gates' logits, until another one is set.
        budget: that the gates are told until then; None for gates that are told none.
        bfloat16: whether the convolutions are to be held, and where possible computed, in bfloat16.
        image_scale: of an int8 network, the image's; None for float32 ones.
        stem_scale: of the map after the stem.
    """

    path: str
    stem: Convolution
    max_pool: bool
    blocks: tuple[Block, ...]
    linear: tuple[Floats, Floats] | None
    budget_range: tuple[float, float] | None = None
    dial: str | None = "threshold"
    image_scale: float | None = None
    stem_scale: float | None = None
    stages: tuple[int, ...] = ()
    threshold: float = 0.0
    budget: float | None = None
    bfloat16: bool = False

    @property
    def dtype(self) -> str:
        """Of the convolutions: "int8", "bfloat16" or "float32"."""
        if self.image_scale is not None:
            return "int8"
        return "bfloat16" if self.bfloat16 else "float32"

    @property
    def features(self) -> int:
        """Length of the features of one image."""
        last = self.blocks[-1].convolutions[-1].bias if self.linear is None else self.linear[1]
        return len(last)

    @cached_property
    def hidden(self) -> tuple[int, ...]:
        """For each gate, or where it would be, the channels that it chooses from."""
        return tuple(number for block in self.blocks for number in block.hidden)

    @property
    def gates(self) -> tuple[Gate, ...]:
        """All gates; none on the dense path."""
        return tuple(gate for block in self.blocks for gate in block.gates)

    @property
    def smallest_image(self) -> int:
        """The height and width that the stem needs at least, in pixels."""
        return max(1, self.stem.weight.shape[-1] - 2 * self.stem.padding)

    def map_shapes(self, height: int, width: int) -> list[tuple[int, int, int]]:
        """Channels, height and width of each stage's output, for an image of height × width."""
        stem = self.stem

        def after_stem(pixels: int) -> int:
            out = (pixels + 2 * stem.padding - stem.weight.shape[-1]) // stem.stride + 1
            return (out - 1) // 2 + 1 if self.max_pool else out

        sides = [after_stem(height), after_stem(width)]
        shapes, blocks = [], iter(self.blocks)
        for number in self.stages or (len(self.blocks),):
            for block in itertools.islice(blocks, number):
                sides = [-(-side // block.stride) for side in sides]
            shapes.append((len(block.convolutions[-1].bias), sides[0], sides[1]))
        return shapes
