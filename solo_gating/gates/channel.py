"""The papers' gate: each channel is decided by its own logit."""

import torch
import torch.fx
from torch import Tensor

from .base import FoldedGate, register_gate
from .scores import BudgetEmbedding, ScoringGate, logistic_noise, straight_through

# torch.fx keeps calls of these as they are: what they do depends on the tensors' dtype.
torch.fx.wrap("gumbel_sigmoid")
torch.fx.wrap("thresholded")


def gumbel_sigmoid(logits: Tensor, temperature: float) -> Tensor:
    """Sample binary masks with a straight-through gradient.

    soft = sigmoid((logits + noise) / temperature), hard = soft ≥ 0.5; the value is hard, the
    gradient that of soft. (Jang et al., "Categorical Reparameterization with Gumbel-Softmax",
    arXiv:1611.01144, for two categories; DGNet, `models/mask.py` of lfr-0531/DGNet.)

    Args:
        logits: any shape.
        temperature: τ > 0; the papers use 2/3.

    Returns:
        A tensor of zeros and ones, of the logits' shape, in at least float32.
    """
    soft = torch.sigmoid((logits + logistic_noise(logits)) / temperature)
    return straight_through((soft >= 0.5).to(soft.dtype), soft)


def thresholded(logits: Tensor, threshold: float) -> Tensor:
    """Ones where logits reach the threshold, else zeros; of their shape, in at least float32."""
    return (logits >= threshold).to(torch.promote_types(logits.dtype, torch.float32))


@register_gate("channel")
class ChannelGate(ScoringGate):
    """The papers' gate, and solo-gating's default.

    In training the mask is sampled (`gumbel_sigmoid`); in evaluation it is logits ≥ threshold. Where
    training draws budgets from a range, a `BudgetEmbedding` shifts the logits.

    Args:
        in_channels: C_in, channels of the block's input.
        out_channels: C_out, channels that the gated convolution computes.
        reduction: r, the bottleneck's reduction rate.
        temperature: τ of the sampling in training.
        told: whether it is told budgets; W₂ then has a bias.
        bias: what W₂'s bias starts at; None for no bias, as in the papers, unless it is told budgets.
    """

    dial = "threshold"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        reduction: int = 4,
        temperature: float = 2 / 3,
        told: bool = False,
        bias: float | None = None,
    ):
        super().__init__(
            in_channels, out_channels, reduction, 0.0 if told and bias is None else bias
        )
        self.temperature = temperature
        if told:
            self.embedding = BudgetEmbedding(out_channels)

    def forward(self, x: Tensor, budget: Tensor | None = None) -> Tensor:
        """B × C_in × H × W, and the budget of `logits` → the binary mask, B × C_out."""
        logits = self.logits(x, budget)
        if self.training:
            return gumbel_sigmoid(logits, self.temperature)
        return thresholded(logits, self.threshold)

    def fold(self) -> FoldedGate:
        """As in `Gate`."""
        return self.folded_scores()
