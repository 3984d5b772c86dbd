"""The study's variants (research/every_budget/ablations.py) do what their names say."""

import runpy
from dataclasses import replace
from unittest import mock

import pytest
import torch

from solo_gating import GATED_METHODS, METHODS

from .helpers import ROOT, fixed_noise, random_batch, recorded_passes, tiny_config, tiny_model

RANGE = [0.05, 0.9]


@pytest.fixture(scope="module", autouse=True)
def _registered():
    with mock.patch.dict(METHODS), mock.patch.dict(GATED_METHODS):
        yield runpy.run_path(str(ROOT / "research" / "every_budget" / "ablations.py"))


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
