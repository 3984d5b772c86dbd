"""Kinds of gates: those that are shipped, and one from outside of the package."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor

from solo_gating import InputError, create_backbone, main_flops
from solo_gating.checkpoints.encoder import encoder_of
from solo_gating.deploy import compile as compile_encoder
from solo_gating.evaluate.calibrate import calibrate, mean_share
from solo_gating.flops import count_flops, selected_channels
from solo_gating.gates import GATES, ChannelGate, FixedGate, Gate, TopKGate, register_gate
from solo_gating.gates.shares import number_of_channels
from solo_gating.gates.top_k import largest
from solo_gating.main_knn import evaluate_knn
from solo_gating.main_policy import evaluate_policy
from solo_gating.main_pretrain import pretrain

from ..support.encoders import digit_tensors, evaluation_config, run_config
from ..support.helpers import random_batch, tiny_config, tiny_model

RANGE = [0.1, 0.9]


class Loudest(Gate):
    """A gate that has no weights but one number for each channel: a user's, in 20 lines."""

    def __init__(self, in_channels: int, out_channels: int, *, start: float = 0.5):
        super().__init__()
        self.level = torch.nn.Parameter(torch.full((out_channels,), start))

    def forward(self, x: Tensor, budget: Tensor | None = None) -> Tensor:
        loud = x.mean((1, 2, 3))[:, None] + self.level
        soft = torch.sigmoid(loud - 0.5)
        return (soft > 0.5).to(soft.dtype) - soft.detach() + soft


@pytest.fixture
def mine():
    register_gate("mine")(Loudest)
    yield
    del GATES["mine"]


def backbone_of(kind, **kwargs):
    torch.manual_seed(0)
    return create_backbone("resnet18_gated", width=8, stem="cifar", gate=kind, **kwargs).eval()


# From outside


def test_a_kind_from_outside_goes_through_everything(mine, tmp_path, capsys):
    cfg = run_config(
        tmp_path,
        max_epochs=1,
        gating={"gate": "mine", "gate_kwargs": {"start": 0.4}, "target_budget": 0.3},
        knn_eval={"enabled": True},
        check_val_every_n_epoch=1,
        checkpoint={"enabled": True, "dir": str(tmp_path / "runs")},
    )
    metrics = pretrain(cfg)
    assert 0 < metrics["logged"]["val_flops_share"] <= 1.01
    assert {"val_gated_acc1", "val_gated_knn_acc1"} <= set(metrics["logged"])
    (checkpoint,) = (tmp_path / "runs").glob("*/*/last.ckpt")
    rows = evaluate_knn(evaluation_config("knn", checkpoint, "path=both"))
    assert {"dense", "gated"} <= set(rows)
    policy = evaluate_policy(evaluation_config("policy", checkpoint))
    assert 0 < policy["gated"]["share"] <= 1.01
    with pytest.raises(InputError, match="gates of kind 'mine' have nothing to turn"):
        evaluate_policy(evaluation_config("policy", checkpoint, "calibrate=0.5"))
    cfg.flops = {"checkpoint": str(checkpoint), "output": str(tmp_path / "flops")}
    assert main_flops.report_flops(cfg)["parameters"]["gates"] == sum(
        2 * 4 * 2**stage for stage in range(4)
    )
    backbone = encoder_of(checkpoint).backbone
    with pytest.warns(RuntimeWarning, match="with gates that say how they fold") as caught:
        fast = compile_encoder(checkpoint)
    assert len([one for one in caught if "more slowly" in str(one.message)]) == 1
    images, _ = digit_tensors(slice(9))
    with torch.no_grad(), backbone.path("gated") as passes:
        expected = backbone(images)
    features, masks = fast.features_and_masks(images)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(masks, passes[-1].masks, strict=True):
        assert torch.equal(ours, theirs.bool())


def test_a_checkpoint_whose_kind_is_not_registered_says_so(tmp_path):
    register_gate("mine")(Loudest)
    cfg = run_config(
        tmp_path,
        max_epochs=1,
        gating={"gate": "mine"},
        checkpoint={"enabled": True, "dir": str(tmp_path / "runs")},
    )
    pretrain(cfg)
    del GATES["mine"]
    (checkpoint,) = (tmp_path / "runs").glob("*/*/last.ckpt")
    with pytest.raises(InputError) as error:
        encoder_of(checkpoint)
    known = ", ".join(sorted(GATES))
    assert f"backbone.kwargs.gate: got 'mine', expected one of {known}" in str(error.value)


def test_a_gate_s_own_layers_are_counted(mine):
    class Costly(Loudest):
        def __init__(self, in_channels, out_channels):
            super().__init__(in_channels, out_channels)
            self.look = torch.nn.Conv2d(in_channels, 2, 3, bias=False)

        def forward(self, x, budget=None):
            return super().forward(x + self.look(x).mean())

    register_gate("mine")(Costly)  # a notebook's cell, run again
    flops = count_flops(backbone_of("mine"), (16, 16))
    # The CIFAR stem makes 18 × 18 pixels, of which a 3×3 without padding leaves 16 × 16.
    assert flops.gates[0].decision == 9 * 8 * 2 * 16 * 16


@pytest.mark.parametrize(
    ("gating", "message"),
    [
        ({"gate": "chanel"}, "gating.gate: got 'chanel', expected one of "),
        (
            {"gate": "fixed", "gate_kwargs": {"reduction": 4}},
            "gating.gate_kwargs.reduction: no such key of gate 'fixed', expected are count",
        ),
        ({"gate_kwargs": "wide"}, "gating.gate_kwargs: got 'wide', expected a group of arguments"),
        (
            {"gate": "top_k", "target_budget": RANGE, "budget_embedding": False},
            "gating.budget_embedding: got false, gates of kind 'top_k' are always told the budget",
        ),
    ],
)
def test_what_a_kind_does_not_know_is_refused(gating, message):
    with pytest.raises(InputError) as error:
        tiny_model(tiny_config(gating=gating))
    assert str(error.value).startswith(message)


def test_a_shipped_kind_cannot_be_replaced():
    with pytest.raises(InputError, match="register_gate: got 'channel', expected a name that is"):
        register_gate("channel")(Loudest)
    with pytest.raises(InputError, match="expected a subclass of Gate"):
        register_gate("other")(torch.nn.Linear)


# top_k and fixed


@pytest.mark.parametrize("budget", [0.01, 0.1, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("channels", [1, 7, 10, 64])
def test_a_share_of_the_channels_is_rounded_up(budget, channels):
    from fractions import Fraction

    exact = Fraction(str(budget)) * channels
    assert number_of_channels(budget, channels) == max(1, math.ceil(exact))
    in_float32 = torch.tensor(budget, dtype=torch.float32)
    assert number_of_channels(float(in_float32), channels) == max(1, math.ceil(exact))


def test_top_k_takes_the_largest_scores_of_each_image():
    gate = TopKGate(6, 10, reduction=2).eval()
    gate.expand.weight.data[3] = gate.expand.weight.data[7]  # ties
    x = torch.randn(9, 6, 4, 4)
    scores = gate.logits(x).detach().numpy()
    budgets = torch.linspace(0.05, 1, 9)
    masks = gate(x, budgets).detach().numpy()
    for row, mask, budget in zip(scores, masks, budgets.tolist(), strict=True):
        order = sorted(range(10), key=lambda c: (-row[c], c))
        expected = set(order[: number_of_channels(budget, 10)])
        assert set(np.flatnonzero(mask)) == expected
    assert torch.equal(gate(x, torch.tensor(0.3)).sum(1), torch.full((9,), 3.0))


def test_top_k_s_gradient_is_that_of_sigmoids_whose_sum_stays():
    rng = np.random.default_rng(0)
    scores, tau = 2 * rng.standard_normal((5, 8)), 0.5
    numbers = np.array([1, 3, 4, 7, 8])
    direction = rng.standard_normal((5, 8))
    given = torch.tensor(scores, requires_grad=True)
    (largest(given, torch.tensor(numbers), tau) * torch.tensor(direction)).sum().backward()

    def soft(row, border):
        return 1 / (1 + np.exp(-(row - border) / tau))

    def of_sum(row, total):  # the border at which the sigmoids add up to it
        return brentq(lambda border: soft(row, border).sum() - total, -60, 60, xtol=1e-14)

    for row, number, weights, found in zip(scores, numbers, direction, given.grad, strict=True):
        ordered = np.sort(row)[::-1]
        border = (ordered[number - 1] + ordered[min(number, 7)]) / 2
        total = soft(row, border).sum()
        expected = np.zeros(8)
        for c, step in itertools.product(range(8), (1e-5, -1e-5)):
            moved = row + step * np.eye(8)[c]
            expected[c] += weights @ soft(moved, of_sum(moved, total)) / (2 * step)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("spread", [1.0, 1e4])
def test_a_loss_that_likes_channels_does_not_move_top_k_s_scores(spread):
    scores = (spread * torch.randn(4, 16)).requires_grad_()
    largest(scores, torch.tensor(5), 2 / 3).sum().backward()
    torch.testing.assert_close(scores.grad, torch.zeros(4, 16), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet18_gated", "resnet50_gated", "resnet18_two_encoders"])
@pytest.mark.parametrize("kind", ["top_k", "fixed"])
def test_every_image_costs_the_same(kind, name):
    torch.manual_seed(0)
    backbone = create_backbone(name, width=4, stem="cifar", gate=kind, budget_range=RANGE).eval()
    flops = count_flops(backbone, (15, 18))
    for budget in (0.1, 0.37, 0.9):
        with torch.no_grad(), backbone.path("gated", budget=budget) as passes:
            backbone(torch.randn(6, 3, 15, 18))
        spent = flops.gated(selected_channels(passes[-1].masks).long())
        assert len(spent.unique()) == 1
        for mask in passes[-1].masks:
            wanted = number_of_channels(budget, mask.shape[1])
            assert torch.equal(mask.sum(1), torch.full((6,), float(wanted)))


def test_fixed_gates_take_the_first_channels_and_have_no_weights():
    backbone = backbone_of("fixed", budget_range=RANGE)
    assert not list(backbone.gates[0].parameters())
    with torch.no_grad(), backbone.path("gated", budget=torch.tensor([0.25, 0.5])) as passes:
        backbone(torch.randn(2, 3, 16, 16))
    assert passes[-1].masks[0].tolist() == [[1] * 2 + [0] * 6, [1] * 4 + [0] * 4]
    assert count_flops(backbone, (16, 16)).decisions == 0


@pytest.mark.parametrize("kind", ["top_k", "fixed"])
@pytest.mark.parametrize(
    "gating",
    [{"target_budget": 0.3}, {"target_budget": RANGE, "budget_per_image": True}],
    ids=["number", "per image"],
)
def test_kinds_without_losses_train_on_a_number_and_on_a_range(kind, gating):
    model = tiny_model(tiny_config(gating={"gate": kind, **gating}))
    before = {name: value.clone() for name, value in model.backbone.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model.training_step(random_batch(), 0)
    loss.backward()
    optimizer.step()
    assert "train_budget_loss" not in model.logged
    assert 0 < model.logged["train_flops_share"] < 1
    moved = {n for n, value in model.backbone.named_parameters() if not value.equal(before[n])}
    assert "layer1.0.conv1.weight" in moved
    assert any(".gate." in name for name in moved) == (kind == "top_k")
    assert model.backbone.budget == pytest.approx(0.3 if gating["target_budget"] == 0.3 else 0.5)


@pytest.mark.parametrize("kind", ["top_k", "fixed"])
def test_a_budget_is_their_dial(kind):
    backbone, (images, _) = backbone_of(kind, budget_range=RANGE), digit_tensors(slice(8))
    setting = calibrate(backbone, images, 0.4)
    assert setting.threshold == 0
    setting.apply(backbone)
    assert mean_share(backbone, images) == pytest.approx(0.4, abs=0.06)  # of 8 channels
    with pytest.raises(InputError, match=f"gates of kind '{kind}' decide without one; expected 0"):
        backbone.threshold = 0.5


@pytest.mark.parametrize("kind", ["channel", "top_k", "fixed"])
@pytest.mark.parametrize("engine", ["pytorch", None])
@pytest.mark.parametrize("budget_range", [None, RANGE], ids=["number", "range"])
def test_all_kinds_compile(kind, engine, budget_range):
    backbone = backbone_of(kind, budget_range=budget_range)
    images, _ = digit_tensors(slice(5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast = compile_encoder(backbone, engine=engine)
    for budget in [None] if fast.budget is None else [fast.budget, 0.2, 0.9]:
        if budget is not None:
            fast.budget = backbone.budget = budget
        with torch.no_grad(), backbone.path("gated") as passes:
            expected = backbone(images)
        features, masks = fast.features_and_masks(images)
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
        for ours, theirs in zip(masks, passes[-1].masks, strict=True):
            assert torch.equal(ours, theirs.bool())


def test_a_fixed_gate_by_itself_needs_no_budget():
    gate = FixedGate(3, 4)
    assert gate(torch.randn(2, 3, 5, 5)).tolist() == [[1.0] * 4] * 2
    gate.budget = 0.5
    assert gate(torch.randn(2, 3, 5, 5)).tolist() == [[1.0, 1.0, 0.0, 0.0]] * 2


def test_a_gate_that_decides_otherwise_does_not_fold_as_its_base():
    class Most(ChannelGate):
        """Computes what its base does not."""

        def forward(self, x, budget=None):
            return 1 - super().forward(x, budget)

    register_gate("mine")(Most)
    try:
        backbone, (images, _) = backbone_of("mine"), digit_tensors(slice(4))
        with pytest.warns(RuntimeWarning, match="gates that say how they fold"):
            fast = compile_encoder(backbone)
        with torch.no_grad(), backbone.path("gated") as passes:
            backbone(images)
        for ours, theirs in zip(fast.features_and_masks(images)[1], passes[-1].masks, strict=True):
            assert torch.equal(ours, theirs.bool())
    finally:
        del GATES["mine"]


@pytest.mark.parametrize("kind", ["top_k", "fixed"])
def test_a_count_is_at_most_all_channels_and_at_least_one(kind):
    """Stages differ in their width: a count of 12 is all of 8 channels, and 12 of 16."""
    backbone = backbone_of(kind, gate_kwargs={"count": 12}).train()
    with backbone.path("gated") as passes:
        backbone(torch.randn(2, 3, 16, 16))
    assert [mask.sum(1).unique().tolist() for mask in passes[-1].masks[:4]] == [
        [8],
        [8],
        [12],
        [12],
    ]
    with pytest.raises(InputError, match=r"gating\.gate_kwargs\.count: got 0"):
        backbone_of(kind, gate_kwargs={"count": 0})
