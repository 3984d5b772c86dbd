"""The kernel with every kind of gate, against the backbone in float64, and counts in closed form."""

import copy
import functools
import json
import math
import warnings

import pytest
import torch
from torch import nn

from solo_gating import deploy
from solo_gating.backbones import BACKBONES
from solo_gating.gates import GATES, BoostingGate, Gate, ScoringGate, register_gate
from solo_gating_runtime.library import supported_engines

from ..support.encoders import digit_tensors, engines_here

ISAS = supported_engines()
ANY = pytest.mark.parametrize("isa", engines_here())

# Kinds, with a single budget and a range of them.
CASES = {
    "channel": {},
    "channel of a range": {"budget_range": (0.1, 0.9)},
    "top_k": {"gate": "top_k", "budget_range": (0.3, 0.3), "gate_kwargs": {"bias": 0.0}},
    "top_k of a range": {"gate": "top_k", "budget_range": (0.05, 1.0)},
    "top_k of a count": {"gate": "top_k", "gate_kwargs": {"count": 5}},
    "fixed": {"gate": "fixed", "budget_range": (0.3, 0.3)},
    "fixed of a range": {"gate": "fixed", "budget_range": (0.05, 1.0)},
    "fbs": {"gate": "fbs", "budget_range": (0.3, 0.3)},
    "fbs of a range": {"gate": "fbs", "budget_range": (0.05, 1.0)},
}


def lively(name="resnet18_gated", **kwargs):
    """Gates whose scores depend on the image, and statistics as after some training."""
    return copy.deepcopy(_lively(name, json.dumps(kwargs)))


@functools.cache
def _lively(name, kwargs):
    torch.manual_seed(0)
    net = BACKBONES[name](**{"width": 8, "stem": "cifar", **json.loads(kwargs)})
    net.fc = nn.Identity()
    for gate in net.gates:
        if isinstance(gate, ScoringGate):
            nn.init.ones_(gate.norm.bias)  # else all hidden units of a small gate are often off
            nn.init.normal_(gate.expand.weight)
            if gate.expand.bias is not None:
                nn.init.normal_(gate.expand.bias)
        if isinstance(gate, BoostingGate):  # with larger weights features explode in 16 blocks
            nn.init.normal_(gate.predict.weight, std=0.01 * gate.predict.in_features**-0.5)
            nn.init.normal_(gate.predict.bias, 0.5, 0.5)
            nn.init.normal_(gate.shift, std=0.3)
    x, _ = digit_tensors(slice(200, 264))
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad(), net.train().path("dense", "gated"):
        for _ in range(2):
            net(x)
    return net.eval()


def images(number, size=16, seed=0):
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def reference(net, x, path="gated"):
    """Features and masks of the backbone in float64."""
    try:
        with net.double().path(path) as passes:
            features = net(x.double())
    finally:
        net.float()
    return features, [mask > 0 for mask in passes[-1].masks]


def assert_same(fast, net, x, path="gated"):
    expected, masks = reference(net, x, path)
    features, found = fast.features_and_masks(x)
    for mask, own in zip(found, masks if path == "gated" else [], strict=path == "gated"):
        assert torch.equal(mask, own)
    # As exact as PyTorch's own float32 where that is worse than 1e-5 of the largest.
    with torch.no_grad(), net.path(path):
        rounding = (net(x) - expected).abs().max()
    assert (features - expected).abs().max() < 1e-5 * expected.abs().max() + 2 * rounding


def settings(net):
    """What the dial can be turned to."""
    if net.budget_range is not None:
        low, high = net.budget_range
        yield from [("budget", value) for value in sorted({low, (low + high) / 2, high})]
    if net.gates[0].dial == "threshold":
        yield from [("threshold", value) for value in (-0.5, 0.7, 0.2)]


@ANY
@pytest.mark.parametrize("case", CASES)
def test_every_kind_runs_in_the_kernel_at_every_setting(isa, case):
    net = lively(**CASES[case])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast = deploy.compile(net, engine=isa)
    assert fast.engine == isa
    shares = []
    for name, value in settings(net):
        setattr(net, name, value)
        setattr(fast, name, value)
        fast.threads = 2
        assert_same(fast, net, images(5))
        together = fast(images(5))
        for fast.threads in (1, 2):
            assert torch.equal(fast(images(5)), together)
            assert torch.equal(fast(images(5)[:1]), together[:1])
        shares.append(torch.cat(fast.features_and_masks(images(5))[1], 1).float().mean().item())
    assert len(set(shares)) == (1 if "count" in case else len(shares))


@ANY
@pytest.mark.parametrize("kind", ["top_k", "fixed"])
@pytest.mark.parametrize("budget", [0.01, 0.3, 0.5, 1.0])
def test_counts_are_exact(isa, kind, budget):
    net = lively(gate=kind)
    fast = deploy.compile(net, engine=isa, budget=budget)
    for mask in fast.features_and_masks(images(5))[1]:
        channels = mask.shape[1]
        assert (mask.sum(1) == max(1, math.ceil(budget * channels - 1e-3))).all()


@ANY
def test_of_equal_scores_the_first_channels_are_chosen(isa):
    net = lively(gate="top_k", gate_kwargs={"bias": 0.0})
    scores = {}
    for gate in net.gates:
        nn.init.zeros_(gate.expand.weight)
        channels = len(gate.expand.bias)
        scores[channels] = torch.arange(channels) % 3 * 1.0
        gate.expand.bias.data.copy_(scores[channels])
    fast = deploy.compile(net, engine=isa)
    for fast.budget in (0.1, 0.4, 0.8):
        for mask in fast.features_and_masks(images(2))[1]:
            channels = mask.shape[1]
            number = math.ceil(fast.budget * channels - 1e-3)
            order = sorted(range(channels), key=lambda c: (-(c % 3), c))
            assert mask.all(0).nonzero().flatten().tolist() == sorted(order[:number])
            assert torch.equal(mask[0], mask[1])


@ANY
def test_more_channels_than_there_are(isa):
    net = lively(gate="top_k")
    for gate in net.gates:
        gate.count = 20
    fast = deploy.compile(net, engine=isa)
    assert [mask.sum().item() for mask in fast.features_and_masks(images(1))[1]] == [
        min(20, channels) for channels in fast.channels
    ]
    assert_same(fast, net, images(2))


@ANY
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_an_extreme_image_gets_as_many_channels_and_harms_no_other(isa, value):
    net, x = lively(gate="top_k"), images(3)
    fast = deploy.compile(net, engine=isa, budget=0.3)
    net.budget = 0.3
    alone = fast(x)
    x[1, 2, 5, 5] = value
    with torch.no_grad(), net.path("gated"):
        expected = net(x)[1]
    features, masks = fast.features_and_masks(x)
    assert torch.equal(features[[0, 2]], alone[[0, 2]])
    assert all(len(set(mask.sum(1).tolist())) == 1 for mask in masks)
    torch.testing.assert_close(features[1], expected, rtol=1e-3, atol=1e-5, equal_nan=True)


class EverySecond(Gate):
    """Of no kind that folds."""

    dial = "budget"
    losses = ()

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.channels = out_channels

    def forward(self, x, budget=None):
        return (torch.arange(self.channels) % 2).to(x).expand(len(x), -1)


def test_a_kind_that_does_not_fold_runs_on_pytorch_with_one_warning():
    register_gate("every_second")(EverySecond)
    try:
        net = lively(gate="every_second")
        with pytest.warns(RuntimeWarning, match="runs on PyTorch") as caught:
            fast = deploy.compile(net)
        assert len(caught) == 1
        assert fast.engine == "pytorch"
        assert_same(fast, net, images(3))
        dense = deploy.compile(net, "dense")
        assert dense.engine in ISAS
        assert_same(dense, net, images(3), "dense")
    finally:
        del GATES["every_second"]
