"""What the bridge makes of solo-learn: optimiser, schedule, kNN and linear evaluation."""

import inspect
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier
from solo.methods import METHODS as SOLO_METHODS
from torch import nn

from solo_gating import BACKBONES, GATED_METHODS, METHODS, methods
from solo_gating.solo_learn import LARS, LINE, LinearModel, WeightedKNNClassifier, installed_line

from ..support.helpers import tiny_config, tiny_model

# LARS


def lars_by_hand(weights, gradient, steps, lr, eta, eps, momentum, decay, clip, exclude):
    """The rule of You et al. 2017 (Eq. 6) with SGD's momentum, one array at a time, in NumPy."""
    weights = [w.copy() for w in weights]
    velocity = [None] * len(weights)
    for step in range(steps):
        for i, (w, g) in enumerate(zip(weights, gradient(weights, step), strict=True)):
            norm_w, norm_g = np.sqrt((w**2).sum()), np.sqrt((g**2).sum())
            if not (exclude and w.ndim == 1) and norm_w > 0 and norm_g > 0:
                rate = eta * norm_w / (norm_g + decay * norm_w + eps)
                if clip:
                    rate = min(rate / lr, 1.0)
                g = rate * (g + decay * w)
            velocity[i] = g if velocity[i] is None else momentum * velocity[i] + g
            w -= lr * velocity[i]
    return weights


def problem():
    """Arrays of several ranks, one of them all zero, and a gradient that changes with each step."""
    rng = np.random.RandomState(1)
    shapes = [(5, 4), (4,), (2, 3, 3, 3), (6, 2), (3, 3)]
    weights = [rng.standard_normal(shape) for shape in shapes]
    weights[3][:] = 0
    targets = [rng.standard_normal((10, *shape)) for shape in shapes]

    def gradient(current, step):
        return [
            10**i * (w - t[step]) for i, (w, t) in enumerate(zip(current, targets, strict=True))
        ]

    return weights, targets, gradient


def optimise(make, steps=6):
    """The weights after some steps with a closure, which is how Lightning calls an optimiser."""
    weights, targets, _ = problem()
    parameters = [nn.Parameter(torch.from_numpy(w.copy())) for w in weights]
    optimizer = make(parameters)
    for step in range(steps):

        def closure(step=step):
            optimizer.zero_grad()
            loss = sum(
                0.5 * 10**i * ((p - torch.from_numpy(t[step])) ** 2).sum()
                for i, (p, t) in enumerate(zip(parameters, targets, strict=True))
            )
            loss.backward()
            return loss

        assert optimizer.step(closure) > 0
    return [p.detach().numpy() for p in parameters]


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("exclude", [True, False])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_lars_follows_its_rule(clip, exclude, momentum):
    settings = {"lr": 0.3, "eta": 0.02, "eps": 1e-8, "momentum": momentum}
    weights, _, gradient = problem()
    expected = lars_by_hand(
        weights, gradient, steps=6, decay=1e-3, clip=clip, exclude=exclude, **settings
    )
    found = optimise(
        lambda p: LARS(p, weight_decay=1e-3, clip_lr=clip, exclude_bias_n_norm=exclude, **settings)
    )
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


def test_lars_is_not_sgd():
    common = {"lr": 0.3, "momentum": 0.9}
    lars = optimise(lambda p: LARS(p, clip_lr=True, exclude_bias_n_norm=True, eta=0.02, **common))
    sgd = optimise(lambda p: torch.optim.SGD(p, **common))
    for by_lars, by_sgd in zip(lars, sgd, strict=True):
        excluded = by_lars.ndim == 1
        assert np.allclose(by_lars, by_sgd, rtol=1e-9 if excluded else 0.1) == excluded


def test_lars_puts_weight_decay_back():
    optimizer = LARS([nn.Parameter(torch.ones(2, 2))], lr=0.1, weight_decay=0.5)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2, 2)
    optimizer.step()
    assert optimizer.param_groups[0]["weight_decay"] == 0.5


def test_lars_leaves_a_weight_without_gradient_alone():
    parameter = nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([parameter], lr=0.1, weight_decay=0.5)
    parameter.grad = torch.zeros(2, 2)
    optimizer.step()
    assert torch.equal(parameter, torch.ones(2, 2))


@pytest.mark.skipif(LINE == "legacy", reason="1.0.2 has another LARS")
@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.9, "clip_lr": True, "eta": 0.02, "exclude_bias_n_norm": True},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "dampening": 0.1},
        {},
    ],
)
def test_lars_is_solo_learns(settings):
    from solo.utils.lars import LARS as SoloLARS

    def both(lars):
        return optimise(lambda p: lars(p, lr=0.3, weight_decay=1e-3, **settings))

    for ours, theirs in zip(both(LARS), both(SoloLARS), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-13)


def test_lars_waits_for_no_device():
    """Tensors without data: a branch on one of them raises."""
    parameters = [nn.Parameter(torch.ones(3, 2, device="meta")) for _ in range(2)]
    optimizer = LARS(parameters, lr=0.1, momentum=0.9, weight_decay=0.1, clip_lr=True)
    for _ in range(2):
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer.step()


# The schedule


BACKBONE, GATES, CLASSIFIER, PROJECTOR, PREDICTOR = range(5)


def scheduled_rates(method, steps=40, **scheduler):
    cfg = tiny_config(
        method,
        max_epochs=8,
        optimizer={"lr": 0.5, "classifier_lr": 0.2},
        scheduler={"warmup_epochs": 2, **scheduler},
    )
    model = tiny_model(cfg, steps=steps)
    (optimizer,), (scheduler,) = model.configure_optimizers()
    scheduler = scheduler["scheduler"] if isinstance(scheduler, dict) else scheduler
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return rates


def warmup_cosine(step, base, warmup, total=40, start=3e-5, least=0.0):
    if step < warmup:
        return start + step * (base - start) / (warmup - 1)
    return least + (base - least) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


@pytest.mark.parametrize(
    ("options", "kwargs"),
    [
        ({}, {"warmup": 10}),
        ({"min_lr": 0.01, "warmup_start_lr": 0.001}, {"warmup": 10, "least": 0.01, "start": 0.001}),
        ({"warmup_epochs": 1}, {"warmup": 5}),
    ],
)
def test_warm_up_is_linear_and_the_rest_a_cosine(options, kwargs):
    rates = scheduled_rates("vicreg_dual", **options)
    for step, rate in enumerate(rates):
        assert rate[BACKBONE] == pytest.approx(warmup_cosine(step, 0.5, **kwargs), abs=1e-12)
        assert rate[PROJECTOR] == rate[GATES] == rate[BACKBONE]
        assert rate[CLASSIFIER] == pytest.approx(warmup_cosine(step, 0.2, **kwargs), abs=1e-12)
    assert [max(group) for group in zip(*rates, strict=True)] == pytest.approx([0.5, 0.5, 0.2, 0.5])


def test_without_warm_up_the_cosine_starts_at_once():
    rates = scheduled_rates("vicreg_dual", warmup_epochs=0)
    assert rates[0][BACKBONE] == 0.5
    for step, rate in enumerate(rates):
        expected = 0.25 * (1 + math.cos(math.pi * step / 40))
        assert rate[BACKBONE] == pytest.approx(expected, abs=1e-12)


def test_simsiam_s_predictor_keeps_its_rate():
    """From the second step on: solo-learn's first step is warm-up for every group."""
    rates = scheduled_rates("simsiam_gated")
    assert rates[0][PREDICTOR] == pytest.approx(3e-5)
    assert {rate[PREDICTOR] for rate in rates[1:]} == {0.5}
    assert rates[20][PROJECTOR] < 0.5


def test_milestones_divide_the_rate():
    cfg = tiny_config(scheduler={"name": "step", "lr_decay_steps": [3, 5], "warmup_epochs": 0})
    (optimizer,), (scheduler,) = tiny_model(cfg).configure_optimizers()
    scheduler = scheduler["scheduler"] if isinstance(scheduler, dict) else scheduler
    rates = []
    for _ in range(7):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.1] * 3 + [0.01] * 2 + [0.001] * 2)


def test_biases_and_norms_can_be_spared_weight_decay():
    model = tiny_model(
        tiny_config(optimizer={"exclude_bias_n_norm_wd": True}, scheduler={"name": "none"})
    )
    groups = model.configure_optimizers().param_groups
    decay = {p: group["weight_decay"] for group in groups for p in group["params"]}
    for name, p in model.named_parameters():
        spared = p.ndim == 1 or name.startswith("classifier") or ".gate." in name
        assert decay[p] == (0 if spared else 1e-4), name


def test_accumulated_batches_scale_the_rates():
    model = tiny_model(tiny_config(accumulate_grad_batches=4, scheduler={"name": "none"}))
    rates = [group["lr"] for group in model.configure_optimizers().param_groups]
    assert rates == pytest.approx([0.4] * len(rates))


# Nearest neighbours


def features(number, seed, classes=4):
    rng = np.random.RandomState(seed)
    targets = np.arange(number) % classes
    return (rng.standard_normal((number, 6)) + 0.8 * targets[:, None]).astype(np.float32), targets


def top1(train, test, **kwargs):
    knn = WeightedKNNClassifier(**kwargs)
    for part in np.array_split(np.arange(len(train[0])), 3):  # as from several batches
        x, y = (torch.from_numpy(array[part]) for array in train)
        knn(train_features=x, train_targets=y)
    knn(test_features=torch.from_numpy(test[0]), test_targets=torch.from_numpy(test[1]))
    return knn.compute()[0]


@pytest.mark.parametrize("matrix", [int(5e6), 500])
def test_the_nearest_neighbour_is_scikit_learn_s(matrix):
    train, test = features(80, 0), features(60, 1)
    expected = 100 * KNeighborsClassifier(n_neighbors=1).fit(*train).score(*test)
    found = top1(train, test, k=1, distance_fx="euclidean", max_distance_matrix_size=matrix)
    assert 30 < expected < 95
    assert found == pytest.approx(expected)


def test_cosine_neighbours_vote_with_their_similarity():
    train, test = features(80, 2), features(60, 3)
    correct = 0
    for feature, target in zip(*test, strict=True):
        norms = np.linalg.norm(train[0], axis=1) * np.linalg.norm(feature)
        similarity = train[0] @ feature / norms
        votes = np.zeros(4)
        for index in np.argsort(similarity)[-5:]:
            votes[train[1][index]] += math.exp(similarity[index] / 0.07)
        correct += votes.argmax() == target
    found = top1(train, test, k=5, distance_fx="cosine")
    assert found == pytest.approx(100 * correct / 60)


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_neighbours_of_a_class_that_is_not_tested_count(distance):
    """A test set need not hold every class of the training set, nor be labelled 0, 1, 2 ..."""
    train, test = features(80, 0), features(60, 1)
    chosen = test[1] == 3
    test = (test[0][chosen], test[1][chosen])
    if distance == "euclidean":
        expected = 100 * KNeighborsClassifier(n_neighbors=1).fit(*train).score(*test)
        assert top1(train, test, k=1, distance_fx=distance) == pytest.approx(expected)
    else:
        assert 0 <= top1(train, test, k=5, distance_fx=distance) <= 100


def test_no_features_have_no_accuracy():
    knn = WeightedKNNClassifier(k=1)
    assert knn.compute()[0] == -1
    knn(train_features=torch.zeros(0, 6), train_targets=torch.zeros(0, dtype=torch.long))
    knn(test_features=torch.zeros(4, 6), test_targets=torch.zeros(4, dtype=torch.long))
    assert knn.compute()[0] == -1


# Linear evaluation


def test_linear_evaluation_trains_one_layer_on_frozen_features():
    torch.manual_seed(0)
    backbone = BACKBONES["resnet18_gated"](width=4, stem="cifar")
    backbone.fc = nn.Identity()
    cfg = tiny_config(
        data={"num_classes": 6},
        optimizer={"kwargs": {"momentum": 0.0}},
        scheduler={"name": "step", "lr_decay_steps": [60]},
        finetune=False,
    )
    model = LinearModel(backbone, cfg=cfg).double()
    model.log = model.log_dict = lambda *args, **kwargs: None
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    images = torch.randn(30, 3, 16, 16, dtype=torch.float64)
    targets = torch.arange(30) % 6
    with torch.no_grad():
        features = backbone.eval()(images)
    weight, bias = (p.detach().clone() for p in model.classifier.parameters())
    (optimizer,), _ = model.configure_optimizers()
    (group,) = optimizer.param_groups
    assert len(group["params"]) == 2
    assert (group["lr"], group["momentum"]) == (0.1, 0.0)
    for step in range(5):
        optimizer.zero_grad()
        loss = model.training_step([images, targets], step)
        loss.backward()
        optimizer.step()
        logits = features @ weight.T + bias
        expected = logits.logsumexp(1).mean() - logits[torch.arange(30), targets].mean()
        assert loss.item() == pytest.approx(expected.item())
        slope = (logits.softmax(1) - F.one_hot(targets, 6)) / 30
        weight -= group["lr"] * (slope.T @ features + group["weight_decay"] * weight)
        bias -= group["lr"] * (slope.sum(0) + group["weight_decay"] * bias)
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, before[name]), name


# The registries


def test_solo_learn_s_own_registries_know_the_plugin_s_names():
    import solo

    assert solo.methods.METHODS is SOLO_METHODS
    for name, method in GATED_METHODS.items():
        assert SOLO_METHODS[name] is METHODS[name] is method
    assert isinstance(SOLO_METHODS["vicreg_dual"](tiny_config()), SOLO_METHODS["base"])
    assert solo.methods.base.BaseMethod._BACKBONES.items() >= BACKBONES.items()
    assert solo.methods.BaseMethod._BACKBONES is solo.methods.base.BaseMethod._BACKBONES


def test_a_method_that_is_registered_later_is_in_all_registries(monkeypatch):
    for registry in (SOLO_METHODS, METHODS, GATED_METHODS):
        for name in ("mine_dual", "mine_gated", "mine_distilled"):  # taken out again afterwards
            monkeypatch.setitem(registry, name, None)
    methods.register_gated("mine", METHODS["vicreg"])
    for name in ("mine_dual", "mine_gated", "mine_distilled"):
        assert SOLO_METHODS[name] is METHODS[name] is GATED_METHODS[name]
        assert issubclass(SOLO_METHODS[name], METHODS["vicreg"])


# Which line


def test_the_installed_line_is_recognised():
    takes_config = "cfg" in inspect.signature(SOLO_METHODS["base"].__init__).parameters
    assert installed_line() == LINE == ("modern" if takes_config else "legacy")


def test_without_solo_learn_the_import_says_what_to_install():
    code = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *args: None if name == "solo" else find(name, *args)
import solo_gating
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    assert "pip install --no-deps solo-learn==1.0.2" in result.stderr.splitlines()[-1]
