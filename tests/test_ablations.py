"""The study's variants (research/ablations.py) do what their names say."""

import math
import runpy
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch

from solo_gating import GATED_METHODS, METHODS

from .support.helpers import (
    ROOT,
    fixed_noise,
    random_batch,
    recorded_passes,
    tiny_config,
    tiny_model,
)

RANGE = [0.05, 0.9]


@pytest.fixture(scope="module", autouse=True)
def _registered():
    with mock.patch.dict(METHODS), mock.patch.dict(GATED_METHODS):
        yield runpy.run_path(str(ROOT / "research" / "ablations.py"))


def model_of(method, **kwargs):
    gating = {"target_budget": RANGE, "sparsity_weight": 10.0}
    overrides = {"gating": gating, "backbone": {"name": "resnet18_gated"}}
    return tiny_model(tiny_config(method, **overrides), **kwargs)


def step(model):
    """The loss with the gates' noise fixed, and both passes through the backbone."""
    seen = recorded_passes(model)
    with fixed_noise():
        return model.training_step(random_batch(), 0), seen


def test_half_of_the_steps_are_dense():
    model = model_of("vicreg_half_dense")
    paths = []
    for number in range(400):
        model._trainer.global_step = number
        paths.append(model.views_of_step())
    assert set(paths) == {("dense", "dense"), ("gated", "dense")}
    assert 150 < paths.count(("dense", "dense")) < 250


def test_views_are_shuffled_by_step():
    model = model_of("vicreg_shuffled")
    seen = []
    for number in range(40):
        model._trainer.global_step = number
        seen.append(model.views_of_step())
        assert model.views_of_step() == seen[-1]
    assert set(seen) == {("gated", "dense"), ("dense", "gated")}
    assert 10 < seen.count(("gated", "dense")) < 30


LOW, HIGH = RANGE


def draws(method, number=4000):
    """The budgets of the first steps."""
    schedule = model_of(method).budget_schedule
    return np.array([schedule.at(5, step, epoch=0) for step in range(number)])


def test_log_uniform_draws_are_uniform_in_the_logarithm():
    found = draws("vicreg_log_uniform")
    assert found.min() >= LOW
    assert found.max() <= HIGH
    assert found.mean() == pytest.approx((HIGH - LOW) / math.log(HIGH / LOW), abs=0.012)
    expected = np.log(np.sort(found) / LOW) / math.log(HIGH / LOW)
    # Kolmogorov-Smirnov: 1.63 / √n is the 1 % point.
    assert np.abs(expected - np.linspace(0, 1, len(found))).max() < 1.63 / len(found) ** 0.5


def test_a_sandwich_takes_both_ends_and_a_draw_in_turn():
    found = draws("vicreg_sandwich", 300).reshape(-1, 3)
    assert (found[:, 0] == LOW).all()
    assert (found[:, 1] == HIGH).all()
    assert (found[:, 2] == draws("vicreg_dual", 300).reshape(-1, 3)[:, 2]).all()
    assert len(set(found[:, 2])) == 100


@pytest.mark.parametrize("method", ["vicreg_log_uniform", "vicreg_sandwich"])
def test_other_draws_are_annealed_like_the_core_s(method):
    schedule = replace(model_of(method).budget_schedule, anneal_epochs=10)
    assert type(schedule) is type(model_of(method).budget_schedule)
    for epoch in (0, 4, 10):
        found = schedule.each(5, 0, epoch, 50)
        low = max(LOW, HIGH - (HIGH - LOW) * epoch / 10)
        assert low * (1 - 1e-12) <= min(found) <= max(found) <= HIGH


def test_gated_norms_are_inherited_once():
    model = model_of("vicreg_inherited_bn", epoch=1)
    model.gating = replace(model.gating, warmup_epochs=1)
    block = model.backbone.layer2[0]
    torch.nn.init.normal_(block.bn1.weight)
    block.bn2.running_mean += 3
    assert not torch.equal(block.gated_bn1.weight, block.bn1.weight)
    model.on_train_epoch_start()
    assert torch.equal(block.gated_bn1.weight, block.bn1.weight)
    assert torch.equal(block.gated_bn2.running_mean, block.bn2.running_mean)
    model._trainer.current_epoch = 2
    torch.nn.init.normal_(block.bn1.weight)
    model.on_train_epoch_start()
    assert not torch.equal(block.gated_bn1.weight, block.bn1.weight)


def test_variety_is_rewarded():
    diverse, plain = model_of("vicreg_diverse"), model_of("vicreg_dual")
    plain.load_state_dict(diverse.state_dict())
    loss, (gated, _) = step(diverse)
    masks = torch.cat(gated.masks, dim=1).detach().numpy()
    expected = step(plain)[0].item() - 4 * masks.var(axis=0).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_a_target_has_no_gradient():
    detached, plain = model_of("vicreg_detached_dense"), model_of("vicreg_dual")
    plain.load_state_dict(detached.state_dict())
    loss, expected = step(detached)[0], step(plain)[0]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for model, total in ((detached, loss), (plain, expected)):
        total.backward()
        norm = model.backbone.layer1[0].bn1.weight  # the dense path's own
        assert (norm.grad is None) is (model is detached)
        assert model.backbone.layer1[0].gated_bn1.weight.grad.abs().max() > 0
