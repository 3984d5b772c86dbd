"""The gate's decision: thresholded in evaluation, sampled with a straight-through gradient."""

import math

import pytest
import torch
import torch.nn.functional as F

from solo_gating.gates import ChannelGate, channel, gumbel_sigmoid, logistic_noise

from ..support.helpers import fixed_noise, randomise_norms

TEMPERATURE = 2 / 3


def test_evaluation_keeps_the_channels_whose_logit_is_not_negative():
    gate = ChannelGate(6, 5, reduction=2).double().eval()
    randomise_norms(gate)
    x = torch.randn(64, 6, 4, 4, dtype=torch.float64)
    pooled = x.mean(dim=(2, 3))
    norm = gate.norm
    hidden = pooled @ gate.reduce.weight[:, :, 0, 0].T
    hidden = (hidden - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
    hidden = F.relu(hidden * norm.weight + norm.bias)
    logits = hidden @ gate.expand.weight[:, :, 0, 0].T
    assert torch.equal(gate(x), (logits >= 0).double())
    assert 0 < gate(x).mean() < 1


def test_a_logit_of_zero_keeps_the_channel():
    gate = ChannelGate(4, 3).eval()
    torch.nn.init.zeros_(gate.expand.weight)
    assert torch.equal(gate(torch.randn(2, 4, 3, 3)), torch.ones(2, 3))


def test_sampled_masks_are_zeros_and_ones():
    gate = ChannelGate(4, 8).train()
    masks = gate(torch.randn(50, 4, 3, 3))
    assert torch.equal(masks.detach().unique(), torch.tensor([0.0, 1.0]))


def test_the_gradient_is_that_of_the_soft_mask_at_the_same_noise():
    logits = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(7, 5, dtype=torch.float64)
    with fixed_noise(3):
        noise = channel.logistic_noise(logits)
    soft = torch.sigmoid((logits + noise) / TEMPERATURE)
    (expected,) = torch.autograd.grad((weights * soft).sum(), logits)
    with fixed_noise(3):
        mask = gumbel_sigmoid(logits, TEMPERATURE)
    (gradient,) = torch.autograd.grad((weights * mask).sum(), logits)
    assert torch.equal(mask, (soft >= 0.5).double())
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("logit", [-3.0, -0.5, 0.0, 1.0, 2.5])
def test_a_channel_is_on_with_probability_sigmoid_of_its_logit(logit):
    """logit + noise ≥ 0 for logistic noise, whatever the temperature."""
    number = 100_000
    rate = gumbel_sigmoid(torch.full((number,), logit), TEMPERATURE).mean().item()
    probability = 1 / (1 + math.exp(-logit))
    assert abs(rate - probability) < 5 * math.sqrt(probability * (1 - probability) / number)


def test_the_noise_is_logistic():
    quantiles = torch.tensor([0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99])
    noise = logistic_noise(torch.zeros(200_000))
    share_below = (noise[:, None] <= torch.logit(quantiles)).float().mean(dim=0)
    error = 5 * (quantiles * (1 - quantiles) / 200_000).sqrt()
    assert ((share_below - quantiles).abs() < error).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_stay_finite(dtype):
    logits = torch.linspace(-8, 8, 50_000).to(dtype).requires_grad_()
    mask = gumbel_sigmoid(logits, TEMPERATURE)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    mask.sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad.abs().sum() > 0


def test_the_noise_of_half_precision_logits_is_not_half_precision():
    """In float16 a uniform draw is one of some 2,000 values, and its logit often infinite."""
    noise = logistic_noise(torch.zeros(200_000, dtype=torch.float16))
    assert torch.isfinite(noise).all()
    assert noise.unique().numel() > 50_000
