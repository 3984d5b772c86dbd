"""US3L: a network for every width that its own moving average teaches."""

import math
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from omegaconf import OmegaConf
from torch import nn

from solo_gating import InputError
from solo_gating.budgets import WidthSchedule
from solo_gating.config.pretraining import prepare_config
from solo_gating.losses import group_penalty, negative_cosine, nt_xent
from solo_gating.training import pretrain as training_pretrain

from ..support.helpers import default_dtype, random_batch, tiny_config, tiny_model
from ..training.test_randomness import equal, small_config, trained, write_data

OWN = {"optimizer": {"weight_decay": 0.0}, "momentum": {"base_tau": 0.9, "final_tau": 0.9}}


def config(**overrides: Any) -> Any:
    return OmegaConf.merge(tiny_config("us3l", max_epochs=4), OWN, overrides)


def model_of(epoch: int = 3, **overrides: Any) -> Any:
    """A model whose optimiser and backward passes are recorded in `model.did`."""
    with default_dtype(torch.float64):
        model = tiny_model(prepare_config(config(**overrides)), epoch=epoch)
    model._trainer.lr_scheduler_configs = []
    model.did = []
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    def step() -> None:
        model.did.append("step")
        sgd.step()

    def backward(loss: torch.Tensor) -> None:
        model.did.append("backward")
        loss.backward()

    model.optimizers = lambda: SimpleNamespace(step=step, zero_grad=sgd.zero_grad)
    model.manual_backward = backward
    return model


# Widths


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        (8, [1, 1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]),
        (10, [1, 1, 1, 0.75, 0.75, 0.5, 0.5, 0.5, 0.25, 0.25]),
        (3, [1, 0.75, 0.5]),
        (1, [1]),
    ],
)
def test_the_narrowest_width_falls_by_quarters(epochs, expected):
    schedule = WidthSchedule(0.25, epochs)
    assert [schedule.narrowest(epoch) for epoch in range(epochs)] == pytest.approx(expected)


def test_the_widths_of_a_batch_are_the_full_one_the_narrowest_and_one_between():
    schedule = WidthSchedule(0.25, 400)
    assert schedule.at(5, 99, 7) == (1.0,)
    drawn = [schedule.at(5, 399, batch) for batch in range(200)]
    assert {(widest, narrowest) for widest, _, narrowest in drawn} == {(1.0, 0.25)}
    between = np.sort([middle for _, middle, _ in drawn])
    uniform = np.linspace(0.25, 1, 200)
    assert np.abs(between - uniform).max() < 1.63 * 0.75 / math.sqrt(200)  # Kolmogorov, 1 %
    assert schedule.at(5, 399, 3) == schedule.at(5, 399, 3)
    assert len({schedule.at(s, e, b) for s, e, b in ((5, 399, 3), (6, 399, 3), (5, 398, 3))}) == 3


# Losses


def test_nt_xent_is_simclr_s_over_both_projections():
    rng = np.random.RandomState(0)
    s, t = rng.standard_normal((5, 4)), rng.standard_normal((5, 4))
    z = np.concatenate([s, t])
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    total = 0.0
    for i in range(10):
        others = sum(math.exp(z[i] @ z[j] / 0.5) for j in range(10) if j != i)
        total -= math.log(math.exp(z[i] @ z[(i + 5) % 10] / 0.5) / others)
    found = nt_xent(torch.from_numpy(s), torch.from_numpy(t), 0.5)
    assert found.item() == pytest.approx(total / 10, rel=1e-12)


@pytest.mark.parametrize("shape", [(20, 3, 3, 3), (64,), (4, 2, 1, 1), (9, 6)])
def test_the_penalty_is_gentler_to_later_channels(shape):
    rng = np.random.RandomState(0)
    p = rng.standard_normal(shape)
    expected = 0.0
    for channel in range(shape[0]):
        group = min(7, channel // max(1, shape[0] // 8)) if len(shape) != 2 else 0
        expected += 5e-5 * (1 - 0.05 * group) * (p[channel] ** 2).sum()
    found = group_penalty([nn.Parameter(torch.from_numpy(p))], 5e-5, 0.05)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_a_flat_penalty_is_a_weight_decay_of_twice_its_strength():
    parameters = [nn.Parameter(torch.randn(16, 3, dtype=torch.float64)) for _ in range(2)]
    group_penalty(parameters, 5e-5, 0.0).backward()
    torch.testing.assert_close(parameters[1].grad, 1e-4 * parameters[1].detach())


# A batch


def reference_step(model, batch, base, per_width):
    """The same batch with autograd, torch's SGD and the formulas; on a network of its own."""
    _, views, targets = batch
    heads = [model.projector, model.narrow_predictor, model.predictor]
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    def projected(path, width):
        told = torch.tensor(width)
        with model.backbone.path(path, budget=told):
            return [model.backbone(view) for view in views]

    with torch.no_grad(), model.momentum_backbone.path("dense"):
        taught = [model.momentum_projector(model.momentum_backbone(view)) for view in views]

    def cosines(predicted):
        pairs = ((predicted[0], taught[1]), (predicted[1], taught[0]))
        return sum(-(F.normalize(p) * F.normalize(t)).sum(1).mean() for p, t in pairs) / 2

    widths = model.widths.at(0, 3, 0)
    for number, width in enumerate(widths):
        if number == 0 or per_width:
            sgd.zero_grad()
        features = projected("dense" if width == 1 else "gated", width)
        z = [heads[0](f) for f in features]
        if width < 1:
            loss, own = cosines([heads[1](one) for one in z]), heads[1]
        elif base == "byol":
            loss, own = cosines([heads[2](one) for one in z]), heads[2]
        else:
            loss, own = (nt_xent(z[0], taught[1], 0.5) + nt_xent(z[1], taught[0], 0.5)) / 2, None
        if width == 1:
            logits = [model.classifier(f.detach()) for f in features]
            loss = loss + sum(F.cross_entropy(one, targets) for one in logits) / 2
        for module in (model.backbone, heads[0], own):
            for p in module.parameters() if module is not None else ():
                size = len(p)
                for channel in range(size):
                    group = min(7, channel // max(1, size // 8)) if p.dim() != 2 else 0
                    loss = loss + 5e-5 * (1 - 0.05 * group) * p[channel].square().sum()
        loss.backward()
        if per_width or number == len(widths) - 1:
            sgd.step()


@pytest.mark.parametrize(
    ("base", "steps"), [("simclr", "per_width"), ("byol", "per_width"), ("simclr", "per_batch")]
)
def test_a_batch_is_learnt_from_at_each_width(base, steps):
    kwargs = {"base_loss": base, "optimizer_steps": steps}
    ours, theirs = model_of(method_kwargs=kwargs), model_of(method_kwargs=kwargs)
    with torch.no_grad():
        for model in (ours, theirs):
            for p in model.momentum_backbone.parameters():
                p.mul_(0.8)
    batch = random_batch()
    ours.training_step(batch, 0)
    each = ["backward", "step"] * 3
    assert ours.did == (each if steps == "per_width" else ["backward"] * 3 + ["step"])
    reference_step(theirs, batch, base, steps == "per_width")
    parameters = dict(theirs.named_parameters())
    for name, found in ours.named_parameters():
        torch.testing.assert_close(found, parameters[name], rtol=1e-9, atol=1e-11, msg=name)


def test_running_statistics_are_those_of_the_full_width():
    ours, full = model_of(), model_of(epoch=0)
    for model in (ours, full):
        model.training_step(random_batch(), 0)
    assert full.did == ["backward", "step"]
    buffers = dict(full.named_buffers())
    assert any("running_mean" in name for name in buffers)
    for name, found in ours.named_buffers():
        if not name.startswith("narrow_predictor"):
            torch.testing.assert_close(found, buffers[name], rtol=0, atol=0, msg=name)
    assert all(m.track_running_stats for m in ours.modules() if hasattr(m, "track_running_stats"))


def test_each_width_sees_the_weights_that_the_one_before_left_in_half_precision_too():
    """Autocast keeps its copies of the weights until it ends."""
    model = tiny_model(prepare_config(config()), epoch=3, dtype=torch.float32)
    model._trainer.lr_scheduler_configs = []
    sgd = torch.optim.SGD(model.backbone.parameters(), lr=10.0)
    model.optimizers, model.manual_backward = (lambda: sgd), (lambda loss: loss.backward())
    off: list[float] = []

    def compare(conv: nn.Module, inputs: Any, out: torch.Tensor) -> None:
        expected = F.conv2d(inputs[0].bfloat16(), conv.weight.bfloat16(), padding=2)
        off.append((out - expected).abs().max().item())

    model.backbone.conv1.register_forward_hook(compare)
    with torch.autocast("cpu", torch.bfloat16):
        model.training_step(random_batch(dtype=torch.float32), 0)
    assert off[:6] == [0.0] * 6


# Whole runs


class Watch(Callback):
    """The rates and the number of the teacher's steps after each batch."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def watched(cfg: Any, *kills: tuple[int, int]) -> tuple[Any, list[float], int]:
    """A run's checkpoint and log, its rates, and how often a teacher followed."""
    watch, build = Watch(), training_pretrain.build_trainer

    def with_watch(cfg: Any) -> Any:
        trainer = build(cfg)
        trainer.callbacks.append(watch)
        return trainer

    followed = []
    from solo_gating.solo_learn import BaseMomentumMethod

    updater = "solo.utils.momentum.MomentumUpdater.update"
    import solo.utils.momentum as momentum

    update = momentum.MomentumUpdater.update

    def counted(self: Any, *pair: Any) -> None:
        followed.append(pair)
        update(self, *pair)

    with (
        mock.patch.object(training_pretrain, "build_trainer", with_watch),
        mock.patch(updater, counted),
    ):
        found = trained(cfg, *kills)
    assert BaseMomentumMethod is not None
    return found, watch.rates, len(followed)
