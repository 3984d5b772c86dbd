"""The two losses that make the gates choose: budget and bound."""

import math

import torch.nn.functional as F
from torch import Tensor


def budget_loss(flops_share: Tensor, target_budget: float | Tensor, weight: float = 5.0) -> Tensor:
    """λ · (F^R / F^O − t_d)² (unification paper, Eq. 3).

    Args:
        flops_share: F^R / F^O with F^R averaged over the batch, a scalar; or of each image, B.
        target_budget: t_d, in (0, 1]; or one for each image.
        weight: λ. The papers' 5 suits runs of hundreds of epochs.
    """
    return weight * (flops_share - target_budget) ** 2


def bound_loss(
    channel_shares: Tensor,
    bound_target: float,
    epoch: int,
    weight: float = 1.0,
    decay: float = 0.02,
) -> Tensor:
    """γ · (mean_l relu(p·s* − s_l)² + mean_l relu(s_l − (1 − p + p·s*))²), p = exp(−decay·epoch).

    Keeps every block near the target early on, and lets go as p decays (DGNet, Li et al. 2021;
    `solo/losses/regularization_channel.py` of KrishnaTarun/Unification).

    Args:
        channel_shares: s_l, the batch's mean share of selected channels in each block, length L.
            The published gradient is that of `flops.selected_channels(masks, "selected")`.
        bound_target: s*, in (0, 1]. The authors take √t_d: in DGNet the budget is the product of
            two gates, spatial and channel. Only the channel gate remains here, so that t_d
            itself would be the consistent choice.
        epoch: epochs since the gates were switched on.
        weight: γ.
        decay: of p, per epoch.
    """
    p = math.exp(-decay * epoch)
    lower = F.relu(p * bound_target - channel_shares).square().mean()
    upper = F.relu(channel_shares - (1 - p + p * bound_target)).square().mean()
    return weight * (lower + upper)
