"""US3L: a network for every width that its own moving average teaches."""

import math
from functools import cache
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
from torch.utils.data import DataLoader

from solo_gating import InputError, main_export
from solo_gating.backbones import SlicedResNet
from solo_gating.backbones.statistics import recalibrated
from solo_gating.budgets import WidthSchedule
from solo_gating.checkpoints.encoder import encoder_of
from solo_gating.config.pretraining import prepare_config
from solo_gating.data import evaluation_loader
from solo_gating.evaluate.evaluation import Evaluation, statistics_loader
from solo_gating.files import read_json
from solo_gating.flops import count_flops
from solo_gating.losses import group_penalty, nt_xent, output_groups
from solo_gating.main_knn import evaluate_knn
from solo_gating.main_policy import evaluate_policy
from solo_gating.training import pretrain as training_pretrain

from ..support.encoders import evaluation_config, nothing_twice
from ..support.helpers import copy_of, random_batch, tiny_config, tiny_model
from ..training.test_randomness import equal, small_config, trained, write_data

OWN = {"optimizer": {"weight_decay": 0.0}, "momentum": {"base_tau": 0.9, "final_tau": 0.9}}


def config(**overrides: Any) -> Any:
    return OmegaConf.merge(tiny_config("us3l", max_epochs=4), OWN, overrides)


@cache
def built(base: str) -> Any:
    return tiny_model(prepare_config(config(method_kwargs={"base_loss": base})))


def model_of(base: str = "simclr", epoch: int = 3, dtype: Any = torch.float64) -> Any:
    """A model whose optimiser and backward passes are recorded in `model.did`."""
    model = copy_of(built(base)).to(dtype)
    model._trainer = SimpleNamespace(current_epoch=epoch, lr_scheduler_configs=[])
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


def strengths(p):
    """λ_i of each output channel of a parameter, for λ = 5·10⁻⁵ and a = 0.05."""
    size, found = len(p), []
    for channel in range(size):
        group = min(7, channel // max(1, size // 8)) if p.ndim != 2 else 0
        found.append(5e-5 * (1 - 0.05 * group))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(20, 3, 3, 3), (64,), (4, 2, 1, 1), (9, 6)])
def test_the_penalty_is_gentler_to_later_channels(shape):
    rng = np.random.RandomState(0)
    p = rng.standard_normal(shape)
    expected = sum(s * (one**2).sum() for s, one in zip(strengths(p).tolist(), p, strict=True))
    parameters = [nn.Parameter(torch.from_numpy(p))]
    found = group_penalty(parameters, map(output_groups, parameters), 5e-5, 0.05)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_a_flat_penalty_is_a_weight_decay_of_twice_its_strength():
    parameters = [nn.Parameter(torch.randn(16, 3, dtype=torch.float64)) for _ in range(2)]
    group_penalty(parameters, map(output_groups, parameters), 5e-5, 0.0).backward()
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
                sums = p.square().reshape(len(p), -1).sum(1)
                loss = loss + sums @ strengths(p)
        loss.backward()
        if per_width or number == len(widths) - 1:
            sgd.step()


@pytest.mark.parametrize(
    ("base", "steps", "masks"),
    [
        ("simclr", "per_width", False),
        ("byol", "per_width", True),
        ("simclr", "per_batch", False),
    ],
)
def test_a_batch_is_learnt_from_at_each_width(base, steps, masks, monkeypatch):
    """The reference masks; a narrow pass computes no other channels."""
    if masks:
        monkeypatch.setattr("solo_gating.methods.us3l.can_be_narrowed", lambda backbone: False)
    ours, theirs = model_of(base), model_of(base)
    ours.step_at_each_width = steps == "per_width"
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
    model = model_of(dtype=torch.float32)
    off: list[float] = []

    def compare(layer: nn.Module, inputs: Any, out: torch.Tensor) -> None:
        weight, bias = layer.weight.bfloat16(), layer.bias.bfloat16()
        expected = F.linear(inputs[0].bfloat16(), weight, bias)
        off.append((out - expected).abs().max().item())

    model.projector[0].register_forward_hook(compare)
    with torch.autocast("cpu", torch.bfloat16):
        model.training_step(random_batch(dtype=torch.float32), 0)
    assert off == [0.0] * 6


# Whole runs


class Watch(Callback):
    """The learning rate of each batch, and how often the teacher has followed."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.followed = 0

    def on_train_start(self, trainer: Any, model: Any) -> None:
        if not hasattr(model, "momentum_updater"):
            return
        update = model.momentum_updater.update

        def counted(*pair: Any) -> None:
            self.followed += 1
            update(*pair)

        model.momentum_updater.update = counted

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def watched(cfg: Any) -> tuple[Any, Watch]:
    """A run's checkpoint and log, and what was seen of it."""
    watch, build = Watch(), training_pretrain.build_trainer

    def with_watch(cfg: Any) -> Any:
        trainer = build(cfg)
        trainer.callbacks.append(watch)
        return trainer

    with mock.patch.object(training_pretrain, "build_trainer", with_watch):
        return trained(cfg), watch


def run_config(folder: Any, name: str, method: str = "us3l", **overrides: Any) -> Any:
    own = OWN if method == "us3l" else {}
    own = OmegaConf.merge(own, {"checkpoint": {"dir": str(folder / name)}}, overrides)
    return small_config(folder, method, **own)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("us3l")
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    """A run of three epochs of two batches, the first of which has width 1 alone."""
    return watched(run_config(folder, "whole"))


def test_the_optimiser_steps_at_each_width_and_the_teacher_follows_once_a_batch(whole):
    (checkpoint, logged), watch = whole
    assert checkpoint["global_step"] == 2 * (1 + 3 + 3)
    assert watch.followed == 2 * 6  # backbone and projector
    assert {"train_narrow_loss", "train_group_penalty", "train_nce_loss"} <= set(logged)
    assert 0.25**2 < logged["train_flops_share"] < 1


def test_a_run_that_is_killed_goes_on_as_if_undisturbed(whole, folder):
    ours, theirs = trained(run_config(folder, "killed"), (1, 1)), whole[0]
    for key in ("state_dict", "epoch", "global_step"):
        assert equal(ours[0][key], theirs[0][key]), key
    assert equal(ours[0]["optimizer_states"][0]["state"], theirs[0]["optimizer_states"][0]["state"])
    assert ours[1] == theirs[1]


def test_rates_follow_the_schedule_of_a_method_of_one_step(whole, folder):
    _, theirs = watched(run_config(folder, "simclr", "simclr"))
    assert whole[1].rates == pytest.approx(theirs.rates, rel=1e-12)
    assert len(set(theirs.rates)) == 5


def test_a_schedule_by_epochs_with_lars_in_half_precision_and_one_step_a_batch(folder):
    cfg = run_config(
        folder,
        "others",
        method_kwargs={"optimizer_steps": "per_batch"},
        optimizer={"name": "lars", "kwargs": {"eta": 0.02}},
        scheduler={"name": "step", "lr_decay_steps": [1, 2]},
        precision="bf16-mixed",
    )
    (checkpoint, logged), watch = watched(cfg)
    rate = watch.rates[0]
    expected = [rate, rate, rate / 10, rate / 10, rate / 100, rate / 100]
    assert watch.rates == pytest.approx(expected)
    assert checkpoint["global_step"] == 6
    assert math.isfinite(logged["train_narrow_loss"])


# Evaluation


def knn_by_hand(encoder, cfg, path, budget):
    """Features of training and validation images, 1-NN with NumPy; statistics by hooks on BatchNorms."""
    net = encoder.backbone
    train, val = (evaluation_loader(cfg, split, 64) for split in ("train", "val"))
    images, _ = next(iter(DataLoader(train.dataset, batch_size=1000)))
    for norm in [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]:
        norm.train()
        norm.momentum = 1.0
    with torch.no_grad(), net.path(path, budget=budget):
        net(images)
    net.eval()
    (f, a), (g, b) = ([*map(torch.cat, zip(*loader, strict=True))] for loader in (train, val))
    with torch.no_grad(), net.path(path, budget=budget):
        f, g = net(f), net(g)
    nearest = torch.cdist(g.double(), f.double()).argmin(1)
    return 100 * (a[nearest] == b).double().mean().item()


def evaluated(task, name, checkpoint, *overrides):
    return task(evaluation_config(name, checkpoint, *overrides))


@pytest.fixture(scope="module")
def checkpoint(whole, folder):
    (file,) = (folder / "whole").glob("*/*/last.ckpt")
    return file


def test_neighbours_are_found_with_statistics_of_the_width(checkpoint):
    found = evaluated(evaluate_knn, "knn", checkpoint, "budget=0.5")
    assert found["settings"]["recalibrate"] == 2048
    encoder = encoder_of(checkpoint)
    cfg = OmegaConf.merge(encoder.args, {"data": {"num_workers": 0}})
    for path in ("dense", "gated"):
        expected = knn_by_hand(encoder, cfg, path, 0.5)
        assert found[path]["knn_top1"] == pytest.approx(expected)


def test_the_dial_is_swept_with_statistics_of_each_width(checkpoint, monkeypatch):
    asked = []
    of_path = Evaluation.of_path

    def recorded(self, path):
        asked.append((path, self.encoder.backbone.budget))
        return of_path(self, path)

    monkeypatch.setattr(Evaluation, "of_path", recorded)
    for name in ("draw_policy", "draw_sweep"):
        monkeypatch.setattr(f"solo_gating.evaluate.tasks.policy.{name}", lambda *args: None)
    with nothing_twice():
        found = evaluated(evaluate_policy, "policy", checkpoint, "sweep=true", "shares=[0.25,1.0]")
    budgets = [point["budget"] for point in found["gated"]["sweep"]]
    assert asked == [("gated", 0.625), ("dense", 0.625), *(("gated", one) for one in budgets)]
    assert len(budgets) == 3
    assert found["gated"]["sweep"][-1]["share"] == 1
    assert found["gated"]["sweep"][-1]["knn_top1"] == found["dense"]["knn_top1"]


def test_a_width_is_exported_as_a_narrow_network(checkpoint, tmp_path, monkeypatch, call):
    monkeypatch.setattr("solo_gating.evaluate.tasks.policy.draw_policy", lambda *args: None)
    output = tmp_path / "policy"
    with nothing_twice():
        evaluated(evaluate_policy, "policy", checkpoint, "budget=0.5", f"output={output}")
    arguments = [f"checkpoint={checkpoint}", f"policy={output}/policy.json", "multiple=1"]
    arguments += ["format=torch", f"output={tmp_path}/narrow"]
    code, _, error = call(main_export, *arguments, "gates=drop")
    assert code == 2
    assert "evaluate: missing, method 'us3l' has no BatchNorm statistics of narrow" in error
    made: list[Any] = []  # `torch.export` takes long, and is tested elsewhere
    monkeypatch.setattr(
        "solo_gating.deploy.export._contents", lambda *given: made.append(given[2]) or {}
    )
    with nothing_twice():
        code, _, error = call(main_export, *arguments, "gates=drop", "evaluate=true")
    assert code == 0, error
    report = read_json(tmp_path / "narrow" / "export.json")
    assert report["knn_top1_before"] == report["knn_top1_after"]
    assert report["hidden"] == [2, 2, 4, 4, 8, 8, 16, 16]
    (narrow,) = made
    assert isinstance(narrow, SlicedResNet)
    backbone = encoder_of(checkpoint).backbone
    cfg = OmegaConf.merge(encoder_of(checkpoint).args, {"data": {"num_workers": 0}})
    images = next(iter(evaluation_loader(cfg, "val", 8)))[0]
    backbone.budget = 0.5
    with torch.no_grad(), recalibrated(backbone, statistics_loader(cfg, 2048), "gated"):
        with backbone.path("gated"):
            expected = backbone(images)
        torch.testing.assert_close(narrow(images), expected[:, :16], rtol=1e-4, atol=1e-5)
    assert count_flops(narrow, (8, 8)).dense == report["flops"]


# What cannot be


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"gating": {"gate": "channel"}}, "gating.gate: got 'channel'.*slimmable or fixed"),
        (
            {"gating": {"gate": "fixed", "gate_kwargs": {"count": 4}}},
            "gate_kwargs.count: got 4.*expected none",
        ),
        ({"gating": {"target_budget": 0.5}}, r"gating.target_budget: got 0.5.*\[0.25, 1.0\]"),
        ({"gating": {"target_budget": [0.2, 0.9]}}, "gating.target_budget: got"),
        ({"gating": {"separate_bn": True}}, "gating.separate_bn: got True.*expected False"),
        ({"gating": {"budget_per_image": True}}, "gating.budget_per_image: got True"),
        ({"gating": {"warmup_epochs": 1}}, "gating.warmup_epochs: got 1.*expected 0"),
        ({"momentum": {"final_tau": 1.0}}, "momentum.final_tau: got 1.0.*constant.*base_tau=0.9"),
        ({"optimizer": {"weight_decay": 1e-4}}, "optimizer.weight_decay: got 0.0001 beside"),
        ({"gradient_clip_val": 1.0}, "gradient_clip_val: got 1.0.*expected None"),
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches: got 2.*expected 1"),
        ({"max_steps": 10}, "max_steps: got 10"),
        ({"backbone": {"name": "resnet18_two_encoders"}}, "backbone.name: got"),
        ({"method_kwargs": {"base_loss": "vicreg"}}, "base_loss: got 'vicreg'"),
        ({"method_kwargs": {"optimizer_steps": "three"}}, "optimizer_steps: got 'three'"),
    ],
)
def test_a_config_is_refused_in_one_sentence(overrides, message):
    with pytest.raises(InputError, match=message) as caught:
        prepare_config(config(**overrides))
    assert "\n" not in str(caught.value)
