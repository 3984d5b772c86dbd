"""Dynamic group convolution (DGC): each head of output channels picks its own input channels."""

import torch
from torch import Tensor, nn

from ..checks import at_least, is_not_negative, is_positive, require
from .base import ConvolutionGate, GatedOutput, register_gate
from .grouped import check_divides, grouped
from .scores import from_means
from .top_k import largest

# As in top_k.py.
torch.fx.wrap("largest")


@register_gate("dgc")
class DynamicGroupGate(ConvolutionGate):
    """H heads of C_out / H output channels; head h convolves g_h · x', most of g_h's entries made 0.

    x' = relu(BN(x)) for the convolution's input x, with a BatchNorm of the gate's own.
    g_h = relu(F2_h relu(F1_h m)) ∈ R^C_in, from the means m of x'; F1 has no bias, F2's starts at 1. The
    round(C_in · (1 − b)) smallest entries become 0 at a budget b; training adds λ · Σ_h mean(g_h). All
    heads are one grouped convolution of H · C_in channels.

    Su et al., Dynamic Group Convolution, ECCV 2020; `layers.py` of hellozhuo/dgc. The original's ramp,
    from no inactive channel at a twelfth of training to all of them at three quarters, is
    `gating.budget_hold=0.0833` and `gating.budget_anneal=0.6667`. Differences: shortcuts are plain; of
    equal entries the first ones stay (in the original none stays, so that a head whose hidden units are
    all off computes nothing); the heads' outputs are not shuffled. That is a relabelling: a shuffle that
    is the same in all blocks of a stage can be undone by permuting the rows, and the next layers'
    columns, of the weights, as each head may read any channel.

    Each layer multiplies its input by scores of it, so that what is unusual in an image grows from layer to
    layer as 2, 4, 16, ...: in evaluation, where BatchNorm's statistics are not the image's own, the features
    of some in a thousand real images overflow. In evaluation scores therefore end at a limit, which the
    original has not.

    Args:
        in_channels: C_in of the convolution.
        out_channels: C_out.
        heads: H.
        squeeze: F1_h has C_in / squeeze rows, twice as many below 80 input channels.
        penalty_weight: λ.
        max_score: the limit of g_h in evaluation.

    Raises:
        InputError: for numbers of channels that H does not divide, or values that are not accepted.
    """

    dial = "budget"
    needs_budget = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        heads: int = 4,
        squeeze: int = 16,
        penalty_weight: float = 1e-5,
        max_score: float = 4.0,
    ):
        super().__init__(in_channels, out_channels)
        check_divides("heads", heads, in_channels, out_channels)
        require("gate_kwargs.max_score", max_score, is_positive, "a number > 0")
        require("gate_kwargs.penalty_weight", penalty_weight, is_not_negative, "a number ≥ 0")
        at_least("gate_kwargs.squeeze", squeeze, 1)
        hidden = max(1, in_channels // (squeeze if in_channels >= 80 else max(1, squeeze // 2)))
        # Each a layer for every head, side by side.
        self.reduce = nn.Conv2d(in_channels, heads * hidden, 1, bias=False)
        self.expand = nn.Conv2d(heads * hidden, heads * in_channels, 1, groups=heads)
        self.norm = nn.BatchNorm2d(in_channels)
        for layer in (self.reduce, self.expand):
            nn.init.kaiming_normal_(layer.weight)
        nn.init.ones_(self.expand.bias)  # type: ignore[arg-type]
        self.heads, self.penalty_weight, self.max_score = heads, penalty_weight, max_score
        self.choices = heads * in_channels

    @property
    def flops(self) -> int:
        """F1 and F2 of all heads."""
        return self.reduce.weight.numel() + self.expand.weight.numel()

    def forward(
        self, x: Tensor, conv: nn.Conv2d, view: int = 0, budget: Tensor | None = None
    ) -> GatedOutput:
        """As in `ConvolutionGate`; the shares are zeros and ones, head by head."""
        x = self.norm(x).relu()
        scores = from_means(
            x,
            self.reduce.weight.dtype,
            lambda m: self.expand(self.reduce(m).relu()).relu(),
        ).unflatten(1, (self.heads, -1))[..., 0, 0]
        if not self.training:
            scores = scores.clamp(max=self.max_score)
        active = self.active(scores.detach(), self.budget_or_own(budget).to(scores))
        masked = (x[:, None] * (scores * active).to(x.dtype)[..., None, None]).flatten(1, 2)
        out = grouped(conv, masked, conv.weight, self.heads)
        penalty = None
        if self.training and self.penalty_weight:
            penalty = self.penalty_weight * scores.mean((0, 2)).sum()
        return GatedOutput(out, active.flatten(1), penalty)

    def active(self, scores: Tensor, budget: Tensor) -> Tensor:
        """Scores, B × H × C_in, and a budget or one for each image → ones for those that stay, one at least."""
        number = (self.in_channels - (self.in_channels * (1 - budget)).round()).clamp(min=1)
        of_heads = number.expand(scores.shape[0]).repeat_interleave(self.heads)
        return largest(scores.flatten(0, 1), of_heads).unflatten(0, (-1, self.heads))
