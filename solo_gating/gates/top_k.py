"""A gate with the same cost for every image: the channels with the largest scores."""

from dataclasses import replace
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor

from .base import FoldedGate, register_gate
from .scores import ScoringGate, logistic_noise, straight_through
from .shares import fixed_count, number_of_channels, numbers_of_channels

torch.fx.wrap("largest")


def largest(scores: Tensor, number: Tensor, temperature: float | None = None) -> Tensor:
    """Mark each row's largest scores.

    Args:
        scores: B × C.
        number: how many; a number or one for each row, B.
        temperature: τ of the gradient, which is that of sigmoid((score − b) / τ). b lies half way
            between the smallest score that is marked and the largest that is not, and moves with the
            scores so that the sigmoids' sum stays; None for no gradient.

    Returns:
        Zeros and exactly `number` ones in each row, of equal scores those that come first; in at
        least float32.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    ordered, order = scores.sort(dim=1, descending=True, stable=True)
    rank = torch.arange(scores.shape[1], device=scores.device)
    number = number.reshape(-1, 1)
    hard = torch.zeros_like(scores).scatter(
        1, order, (rank < number).to(scores.dtype).expand_as(scores)
    )
    if temperature is None:
        return hard
    last = (number.long() - 1).expand(len(scores), 1)
    beyond = (last + 1).clamp(max=scores.shape[1] - 1)
    border = (ordered.gather(1, last) + ordered.gather(1, beyond)) / 2
    away = (scores - border).detach() / temperature
    # With a border that stays, every loss that likes channels raises all scores together, which marks
    # none, and drowns what tells them apart.
    moves = (F.logsigmoid(away) + F.logsigmoid(-away)).softmax(dim=1)
    relative = scores - (moves * scores).sum(dim=1, keepdim=True)
    soft = torch.sigmoid(away + (relative - relative.detach()) / temperature)
    return straight_through(hard, soft)


@register_gate("top_k")
class TopKGate(ScoringGate):
    """Exactly ⌈b·C⌉ channels for each image, those with the largest scores.

    The cost is the same for every image, so that it needs neither budget nor bound loss. In training
    logistic noise is added to the scores and the gradient is straight-through: of the sigmoids around
    the border between both groups, whose sum stays (`largest`).

    Args:
        in_channels: C_in, channels of the block's input.
        out_channels: C, channels that the gated convolution computes.
        reduction: r, the bottleneck's reduction rate.
        temperature: τ of the gradient.
        count: a fixed number of channels, at most C, whatever the budget; None for ⌈b·C⌉.
        bias: of the scores, what it starts at; None for none.
    """

    losses = ()
    dial = "budget"
    needs_budget = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        reduction: int = 4,
        temperature: float = 2 / 3,
        count: int | None = None,
        bias: float | None = None,
    ):
        super().__init__(in_channels, out_channels, reduction, bias)
        self.temperature = temperature
        self.count = fixed_count(count, out_channels)

    def forward(self, x: Tensor, budget: Tensor | None = None) -> Tensor:
        """B × C_in × H × W, and a budget or one for each image → the binary mask, B × C."""
        logits = self.logits(x)
        channels = self.expand.out_channels
        if self.count is not None:
            number = torch.full((), self.count, device=logits.device)
        else:
            number = numbers_of_channels(self.budget_or_own(budget), channels).to(logits.device)
        if not self.training:
            return largest(logits, number)
        return largest(logits + logistic_noise(logits), number, self.temperature)

    def fold(self) -> FoldedGate:
        """As in `Gate`, with a count."""
        return replace(self.folded_scores(), count="budget" if self.count is None else self.count)

    def sliced(self, channels: Tensor, budget: float | None) -> dict[str, Any]:
        """As in `Gate`; the number stays, so that images that need no removed channel lose nothing."""
        cut = super().sliced(channels, budget)
        count = self.count
        if count is None:
            count = number_of_channels(1.0 if budget is None else budget, self.expand.out_channels)
        return {**cut, "kwargs": {**cut["kwargs"], "count": min(count, len(channels))}}
