"""The gate of slimmable networks: the first channels, the same for all images."""

from typing import Any

import torch
import torch.fx
from torch import Tensor

from .base import FoldedGate, Gate, register_gate
from .shares import fixed_count, number_of_channels, numbers_of_channels


@register_gate("fixed")
class FixedGate(Gate):
    """The first ⌈b·C⌉ channels of every image: no weights, no decisions, no losses.

    What is left of gating without gates: a slimmable network (Yu et al., arXiv:1812.08928) between
    the two convolutions of each block, and so the rival that every other kind has to beat.

    Args:
        in_channels: C_in, channels of the block's input; not used.
        out_channels: C, channels that the gated convolution computes.
        count: a fixed number of channels, at most C, whatever the budget; None for ⌈b·C⌉.
    """

    losses = ()
    dial = "budget"
    needs_budget = True

    def __init__(self, in_channels: int, out_channels: int, *, count: int | None = None):
        super().__init__()
        self.in_channels, self.channels = in_channels, out_channels
        self.count = fixed_count(count, out_channels)

    @property
    def flops(self) -> int:
        """Nothing is decided."""
        return 0

    def forward(self, x: Tensor, budget: Tensor | None = None) -> Tensor:
        """B × C_in × H × W, and a budget or one for each image → the mask, B × C."""
        if budget is None or self.count is not None:
            budget = torch.full((), self._share, device=x.device)
        number = numbers_of_channels(budget, self.channels).reshape(-1, 1)
        first = torch.arange(self.channels, device=x.device) < number.to(x.device)
        dtype = torch.promote_types(x.dtype, torch.float32)
        return first.to(dtype).expand(x.shape[0], self.channels)

    @property
    def _share(self) -> float:
        if self.count is not None:
            return self.count / self.channels
        return 1.0 if self.budget is None else self.budget

    def fold(self) -> FoldedGate:
        """Equal logits, of which the first are the largest."""
        channels = self.channels
        return FoldedGate(
            reduce=torch.zeros(0, self.in_channels),
            bias=torch.zeros(0),
            expand=torch.zeros(channels, 0),
            shift=torch.zeros(channels),
            count="budget" if self.count is None else number_of_channels(self._share, channels),
        )

    def sliced(self, channels: Tensor, budget: float | None) -> dict[str, Any]:
        """As in `Gate`."""
        number = number_of_channels(self._share if budget is None else budget, self.channels)
        return {"kwargs": {"count": int((channels < number).sum())}, "state": {}}
