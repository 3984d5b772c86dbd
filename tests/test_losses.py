"""Budget and bound loss against numbers worked out by hand."""

import math

import pytest
import torch
from omegaconf import OmegaConf

from solo_gating.config.gating import GatingConfig
from solo_gating.flops import selected_channels
from solo_gating.losses import bound_loss, budget_loss


@pytest.mark.parametrize(
    ("share", "target", "weight", "expected"),
    [(0.5, 0.3, 5.0, 0.2), (0.1, 0.3, 5.0, 0.2), (0.3, 0.3, 100.0, 0.0), (1.0, 0.5, 2.0, 0.5)],
)
def test_budget_loss(share, target, weight, expected):
    share = torch.tensor(share, dtype=torch.float64)
    assert budget_loss(share, target, weight).item() == pytest.approx(expected, abs=1e-15)
    relative = budget_loss(share, target, weight, relative=True)
    assert relative.item() == pytest.approx(expected / target, abs=1e-15)


@pytest.mark.parametrize(
    ("shares", "target", "epoch", "options", "expected"),
    [
        # p = 1: both bounds are the target itself; (0.3² + 0.1²) / 2 from both sides together.
        ([0.2, 0.6], 0.5, 0, {}, (0.3**2 + 0.1**2) / 2),
        ([0.5, 0.5], 0.5, 0, {}, 0.0),
        # p = 1/2: bounds 0.25 and 0.75.
        ([0.3, 0.7], 0.5, 1, {"decay": math.log(2)}, 0.0),
        ([0.05, 0.95], 0.5, 1, {"decay": math.log(2)}, (0.2**2 + 0.2**2) / 2),
        ([0.05, 0.95], 0.5, 1, {"decay": math.log(2), "weight": 3.0}, 3 * 0.2**2),
        # The decay as published: p = exp(−1), target 0.64: bounds 0.2354 and 0.8676.
        ([0.1, 0.9, 0.5, 0.8], 0.64, 50, {}, (0.1354428**2 + 0.0324366**2) / 4),
        ([0.2, 0.6], 0.5, 10**6, {}, 0.0),
    ],
)
def test_bound_loss(shares, target, epoch, options, expected):
    loss = bound_loss(torch.tensor(shares, dtype=torch.float64), target, epoch, **options)
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-15)


def test_bound_loss_pulls_each_block_to_its_own_bound():
    shares = torch.tensor([0.2, 0.9, 0.5], dtype=torch.float64, requires_grad=True)
    bound_loss(shares, 0.5, 1, decay=math.log(2)).backward()
    expected = [-2 * 0.05 / 3, 2 * 0.15 / 3, 0.0]
    assert shares.grad.tolist() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("gradient", "expected"),
    [("all", [[1, 1, 1], [1, 1, 1]]), ("selected", [[1, 0, 1], [0, 0, 1]])],
)
def test_the_gradient_of_the_number_of_channels(gradient, expected):
    mask = torch.tensor([[1.0, 0, 1], [0, 0, 1]], requires_grad=True)
    channels = selected_channels((mask, mask.detach()), gradient)
    assert channels.tolist() == [[2, 2], [1, 1]]
    channels.sum().backward()
    assert mask.grad.tolist() == expected


@pytest.mark.parametrize(
    ("given", "expected"), [("sqrt", 0.6), ("budget", 0.36), (0.25, 0.25), (1, 1)]
)
def test_bound_target(given, expected):
    cfg = OmegaConf.create({"gating": {"target_budget": 0.36, "bound_target": given}})
    gating = GatingConfig.from_config(cfg, ("gated", "dense"))
    assert gating.bound_share(0.36) == pytest.approx(expected)


def test_the_published_target_of_the_bounds_is_the_default():
    gating = GatingConfig.from_config(OmegaConf.create({}), ("gated", "dense"))
    assert gating.target_budget == 0.5
    assert gating.bound_share(0.5) == math.sqrt(0.5)
