"""Feature boosting and suppression (FBS): scores choose channels, and multiply them."""

import torch
from torch import Tensor, nn

from ..checks import is_not_negative, require
from .base import Decision, FoldedGate, Gate, register_gate
from .scores import from_means
from .shares import numbers_of_channels


@register_gate("fbs")
class BoostingGate(Gate):
    """h = relu(mask · (g · BN(conv x) + β)), with scores g = relu(A m + b) of the means m of the input.

    mask: g > the (k + 1)-th largest g, k = ⌈d·C⌉ for a budget d; the BatchNorm has no weights, and no
    gradient passes the mask, only the scores. As fewer than k scores may be positive, or several be
    equal, fewer than k channels may stay; an image never has more.

    Gao et al., Dynamic Channel Pruning: Feature Boosting and Suppression, ICLR 2019;
    `mayo/net/tf/gate/parametric.py` and `base.py` of deep-fry/mayo. Differences: gates are between a
    block's convolutions only, where zeros spare both of them (the original gates every convolution, the
    stem's and shortcuts' included), and their input is the block's. From a trained network the original
    lowers d in steps; here `gating.budget_anneal` does so, from the start.

    The multiplication by g is not counted as FLOPs, as no BatchNorm's is.

    Args:
        in_channels: C_in, channels of the block's input.
        out_channels: C, channels of the convolution.
        penalty_weight: λ of λ · Σ_c mask · g, mean over the images, which training adds; 0 as in the
            original's own configs.

    Raises:
        InputError: for a negative λ.
    """

    losses = ()
    dial = "budget"
    needs_budget = True
    only_masks = False
    has_output_norm = True

    def __init__(self, in_channels: int, out_channels: int, *, penalty_weight: float = 0.0):
        super().__init__()
        require("gate_kwargs.penalty_weight", penalty_weight, is_not_negative, "a number ≥ 0")
        self.predict = nn.Linear(in_channels, out_channels)
        nn.init.trunc_normal_(self.predict.weight, std=0.05, a=-0.1, b=0.1)
        nn.init.ones_(self.predict.bias)
        self.output_norm = nn.BatchNorm2d(out_channels, affine=False)
        self.shift = nn.Parameter(torch.full((out_channels,), 0.1))
        self.penalty_weight = penalty_weight

    @property
    def flops(self) -> int:
        """C_in · C."""
        return self.predict.weight.numel()

    def forward(self, x: Tensor, budget: Tensor | None = None) -> Decision:
        """B × C_in × H × W, and a budget or one for each image → mask, scores and β."""
        scores = from_means(
            x, self.predict.weight.dtype, lambda means: self.predict(means.flatten(1)).relu()
        )
        channels = self.predict.out_features
        number = (
            numbers_of_channels(self.budget_or_own(budget), channels)
            .to(scores.device)
            .long()
            .reshape(-1, 1)
        )
        ordered = scores.detach().sort(dim=1, descending=True).values
        border = ordered.gather(1, number.clamp(max=channels - 1).expand(scores.shape[0], 1))
        mask = ((scores > border) | (number == channels)).to(scores.dtype)
        penalty = None
        if self.training and self.penalty_weight:
            penalty = self.penalty_weight * (mask * scores).sum(1).mean()
        return Decision(mask, scores, self.shift, penalty)

    def fold(self) -> FoldedGate:
        """As in `Gate`: one that boosts."""
        return FoldedGate.boosting(self.predict.weight, self.predict.bias, self.shift)
