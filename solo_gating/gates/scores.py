"""What gates with weights have in common: a score for each channel, from the block's input."""

from collections.abc import Callable
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from .base import FoldedEmbedding, FoldedGate, Gate

# Asked once: the compiler of PyTorch 2.11 cannot look into the question, and would stop at each gate.
_WITH_AUTOCAST = frozenset(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "mps", "xpu")))


def logistic_noise(logits: Tensor) -> Tensor:
    """Logistic noise log u − log(1 − u), u ~ U(0, 1), one draw for each logit.

    Drawn in at least float32: in half precision u is often exactly 0 or 1.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    uniform = torch.rand(logits.shape, dtype=dtype, device=logits.device)
    return torch.logit(uniform, eps=torch.finfo(dtype).eps)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of one, the gradient of the other (arXiv:1308.3432)."""
    return hard - soft.detach() + soft


class _SpatialMean(torch.autograd.Function):
    """Mean over pixels in a dtype, without a copy of x in it or a gradient of x's size in either."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return x.sum((2, 3), keepdim=True, dtype=dtype) / (x.shape[2] * x.shape[3])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        _, _, height, width = ctx.shape
        return (gradient / (height * width)).to(ctx.dtype).expand(ctx.shape), None


def spatial_mean(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """B × C × H × W → B × C × 1 × 1, as `nn.AdaptiveAvgPool2d(1)`.

    That one's gradient is a whole B × C × H × W tensor; this one's a view of B × C numbers.

    Args:
        x: any tensor of four dimensions.
        dtype: the mean's; None for x's.
    """
    dtype = dtype or x.dtype
    # torch.jit.trace compares its graph with one that it makes without gradients.
    if not torch.is_grad_enabled() or torch.jit.is_tracing():
        return F.adaptive_avg_pool2d(x.to(dtype), 1)
    return _SpatialMean.apply(x, dtype)


def from_means(x: Tensor, dtype: torch.dtype, scores: Callable[[Tensor], Tensor]) -> Tensor:
    """What a function makes of the means of x's channels, B × C × 1 × 1, in a dtype despite autocast.

    Decisions are no place for half precision.
    """
    if isinstance(x, torch.fx.Proxy):
        return scores(F.adaptive_avg_pool2d(x, 1))
    device = x.device.type
    if device in _WITH_AUTOCAST and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return scores(spatial_mean(x, dtype))
    return scores(spatial_mean(x))


class BudgetEmbedding(nn.Module):
    """What a budget adds to the logit of each of a gate's channels.

    U · relu(w · t + v) for a budget b with the log-odds t = log(b / (1 − b)): a curve with four
    kinks for each channel, learnt, from 5·C_out + 8 numbers together with the gate's bias. It starts
    as t itself: a channel with a logit of t is sampled with probability b, so that the gates start
    near every budget. (Weights that start at zero would hardly move under LARS, whose steps are
    proportional to them.)

    Args:
        channels: C_out.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.reduce = nn.Linear(1, 4)
        self.expand = nn.Linear(4, channels, bias=False)
        with torch.no_grad():  # relu(t) − relu(−t) = t, and kinks at t = 1 and t = −1
            self.reduce.weight.copy_(torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]))
            self.reduce.bias.copy_(torch.tensor([0.0, 0.0, -1.0, -1.0]))
            self.expand.weight.copy_(torch.tensor([1.0, -1.0, 0.0, 0.0]).expand(channels, 4))

    def forward(self, budget: Tensor) -> Tensor:
        """Budgets of any shape → the same and C_out.

        No network needs less than a hundredth, and 1 has no log-odds: t stays within ±4.6.
        """
        log_odds = torch.logit(budget, eps=0.01)
        shifts = self.expand(torch.relu(self.reduce(log_odds.reshape(-1, 1))))
        return shifts.reshape(budget.shape + (-1,))  # noqa: RUF005 - torch.fx unpacks no shape


class ScoringGate(Gate):
    """Scores each channel by a squeeze-and-excitation bottleneck.

    logits = W₂ · relu(BN(W₁ · avgpool(x))), with W₁ of C_in → C_in / reduction and
    W₂ of C_in / reduction → C_out (unification paper, Eq. 2). The mask is known before the block's
    first convolution runs.

    Args:
        in_channels: C_in, channels of the block's input.
        out_channels: C_out, channels that the gated convolution computes.
        reduction: r, the bottleneck's reduction rate.
        bias: what W₂'s bias starts at; None for no bias.

    Attributes:
        embedding: what a budget adds to the logits; None for logits that no budget shifts.
    """

    embedding: BudgetEmbedding | None

    def __init__(
        self, in_channels: int, out_channels: int, reduction: int = 4, bias: float | None = None
    ):
        super().__init__()
        hidden = max(1, in_channels // reduction)
        self.reduce = nn.Conv2d(in_channels, hidden, kernel_size=1, bias=False)
        self.norm = nn.BatchNorm2d(hidden)
        self.relu = nn.ReLU(inplace=True)
        self.expand = nn.Conv2d(hidden, out_channels, kernel_size=1, bias=bias is not None)
        for conv in (self.reduce, self.expand):  # as torchvision initialises a ResNet's
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        if self.expand.bias is not None and bias is not None:
            nn.init.constant_(self.expand.bias, bias)
        self.embedding = None

    @property
    def flops(self) -> int:
        """Both 1×1 convolutions. What a budget adds is the same for all images, and not counted."""
        return self.reduce.weight.numel() + self.expand.weight.numel()

    def logits(self, x: Tensor, budget: Tensor | None = None) -> Tensor:
        """B × C_in × H × W → B × C_out.

        Args:
            x: the block's input.
            budget: for a gate with an embedding: a number, or one for each image, B; None for
                `budget`.
        """
        return from_means(x, self.reduce.weight.dtype, lambda means: self._logits(means, budget))

    def _logits(self, means: Tensor, budget: Tensor | None) -> Tensor:
        hidden = self.relu(self.norm(self.reduce(means)))
        logits = self.expand(hidden).flatten(1)
        if self.embedding is None:
            return logits
        if budget is None:
            budget = logits.new_full((), self.budget)
        return logits + self.embedding(budget.to(logits.dtype))

    @property
    def bias(self) -> Tensor:
        """W₂'s, C_out; zeros without one."""
        if self.expand.bias is None:
            return self.expand.weight.new_zeros(self.expand.out_channels)
        return self.expand.bias

    @torch.no_grad()
    def shift(self, budget: float | None) -> Tensor:
        """What bias and budget add to the logits, C_out."""
        if self.embedding is None:
            return self.bias.detach()
        device = self.bias.device.type
        with torch.autocast(device, enabled=False):  # as in `logits`
            return self.bias + self.embedding(self.bias.new_tensor(budget))

    @torch.no_grad()
    def folded_scores(self) -> FoldedGate:
        """For a kind's `fold`: the logits, with the BatchNorm folded into W₁.

        In float64, so that it costs one rounding and no more.
        """
        norm: Any = self.norm
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        shift = -norm.running_mean.double() * scale
        if norm.weight is not None:
            scale, shift = scale * norm.weight.double(), shift * norm.weight.double()
        if norm.bias is not None:
            shift = shift + norm.bias.double()
        if self.reduce.bias is not None:
            shift = shift + self.reduce.bias.double() * scale
        reduce = self.reduce.weight.flatten(1).double() * scale[:, None]
        embedding = None
        if self.embedding is not None:
            embedding = FoldedEmbedding(
                self.embedding.reduce.weight.flatten(),
                self.embedding.reduce.bias,
                self.embedding.expand.weight,
            )
        return FoldedGate(reduce, shift, self.expand.weight.flatten(1), self.bias, embedding)

    def sliced(self, channels: Tensor, budget: float | None) -> dict[str, Any]:
        """As in `Gate`; bias and budget become the bias."""
        state = {k: v for k, v in self.state_dict().items() if not k.startswith("embedding.")}
        state["expand.weight"] = self.expand.weight.detach()[channels]
        has_bias = self.expand.bias is not None or self.embedding is not None
        if has_bias:
            state["expand.bias"] = self.shift(budget)[channels]
        reduction = max(1, self.reduce.in_channels // self.reduce.out_channels)
        kwargs: dict[str, Any] = {"reduction": reduction}
        return {"kwargs": {**kwargs, "bias": 0.0 if has_bias else None}, "state": state}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # solo-learn's main_linear.py loads what fits and drops the rest without a word.
        if self.embedding is None and f"{prefix}embedding.expand.weight" in state_dict:
            raise InputError(
                "backbone.kwargs.budget_range: got none, expected the range of budgets that "
                "this checkpoint was trained for (backbone.kwargs.budget_range of its args.json)"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)
