"""fbs, cgnet, cdg, scdg and dgc: against their formulas written out, and through the whole house."""

import copy
import math

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from solo_gating import BACKBONES, BaseMethod, InputError
from solo_gating.backbones import GatedResNet, ResNet, TwoEncoderResNet, register_resnet
from solo_gating.budgets import BudgetSchedule
from solo_gating.checkpoints.encoder import encoder_of
from solo_gating.deploy import compile as compile_encoder
from solo_gating.deploy.static import kept_channels, slice_encoder
from solo_gating.evaluate.calibrate import calibrate, mean_share
from solo_gating.evaluate.extract import extract
from solo_gating.evaluate.policy import policy_of
from solo_gating.flops import count_flops, selected_channels
from solo_gating.gates import (
    BoostingGate,
    ChannelGatingGate,
    ContrastiveDualGate,
    DynamicGroupGate,
    StructuredDualGate,
)
from solo_gating.main_pretrain import pretrain
from solo_gating.report.flops import format_report, summarise
from solo_gating.training import pretrain as training_pretrain

from ..support.encoders import digit_tensors, loader
from ..support.helpers import random_batch, run_config, run_folder, tiny_config, tiny_model

PER_PIXEL = {"cgnet": ChannelGatingGate, "cdg": ContrastiveDualGate, "scdg": StructuredDualGate}
KINDS = ("fbs", "dgc", *PER_PIXEL)
pytestmark = pytest.mark.usefixtures("no_pictures")
WIDTH = {"fbs": 4, "dgc": 4, "cgnet": 4, "cdg": 4, "scdg": 8}


def short(kind, cls=GatedResNet, width=8, **kwargs):
    """A network of one block in each stage, without a classifier."""
    torch.manual_seed(0)
    backbone = cls([1, 1, 1, 1], width=width, stem="cifar", gate=kind, **kwargs)
    backbone.fc = nn.Identity()
    return backbone


def layer(kind, inputs=8, outputs=16, stride=1, **kwargs):
    """A gate, the convolution that it computes, and what that reads, in float64."""
    torch.manual_seed(1)
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False).double()
    gate = PER_PIXEL[kind](inputs, outputs, **kwargs).double()
    return gate, conv, torch.randn(3, inputs, 7, 6, dtype=torch.float64).relu()


def base_mask(gate, conv, view):
    """Which weights the base has: those that its output has a gradient in."""
    x = torch.ones(1, conv.in_channels, 5, 5, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(gate.base_of(x, conv, view).sum(), conv.weight)
    return (gradient != 0).double()


def blocks(groups, out, inputs, sources):
    """A mask of weights, block by block."""
    mask = torch.zeros(out, inputs, 3, 3, dtype=torch.float64)
    for o, i in enumerate(sources):
        rows = slice(o * out // groups, (o + 1) * out // groups)
        mask[rows, i * inputs // groups : (i + 1) * inputs // groups] = 1
    return mask


def convolved(weight, x, stride):
    """A 3×3 convolution as sums over patches."""
    patches = F.unfold(x, 3, padding=1, stride=stride)
    out = torch.einsum("ok,bkl->bol", weight.flatten(1), patches)
    return out.unflatten(2, (-(-x.shape[2] // stride), -1))


# The partial sum


@pytest.mark.parametrize("kind", PER_PIXEL)
@pytest.mark.parametrize("view", [0, 1])
def test_a_partial_sum_decides_about_the_rest_of_each_pixel(kind, view):
    gate, conv, x = layer(kind, stride=2)
    gate.tau.data = torch.randn(gate.tau.shape, dtype=torch.float64) / 2
    out, shares, penalty = gate.train()(x, conv, view)
    sources = [3, 2, 1, 0] if view == 1 and kind != "cgnet" else [0, 1, 2, 3]
    mask = blocks(4, 16, 8, sources)
    base = convolved(conv.weight * mask, x, 2)
    salience = base
    if kind == "scdg":
        means = [base[:, i : i + 8].mean(1) for i in (0, 8)]
        salience = torch.stack([means[i // 8] for i in range(16)], 1)
    over = (0, 2, 3) if kind == "cgnet" else (2, 3)
    centred = salience - salience.mean(over, keepdim=True)
    normal = centred / (centred.square().mean(over, keepdim=True) + 1e-5).sqrt()
    tau = gate.tau.repeat_interleave(8) if kind == "scdg" else gate.tau
    on = (normal > tau[:, None, None]).double()
    expected = base + on * convolved(conv.weight * (1 - mask), x, 2)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(shares, on.mean((2, 3)))
    assert 0.2 < shares.mean() < 0.8
    target = {"cgnet": 1.0}.get(kind, 0.99)
    assert penalty.item() == pytest.approx(1e-4 * ((gate.tau - target) ** 2).sum().item())


@pytest.mark.parametrize("kind", PER_PIXEL)
def test_a_network_in_half_precision_decides_too(kind):
    gate, conv, x = (one.bfloat16() for one in layer(kind))
    for mode in (gate.train(), gate.eval()):
        out, shares, _ = mode(x, conv)
        assert out.dtype == torch.bfloat16
        assert 0.2 < shares.float().mean() < 0.8


@pytest.mark.parametrize("kind", PER_PIXEL)
def test_the_ends_of_tau_are_the_plain_and_the_grouped_convolution(kind):
    gate, conv, x = layer(kind)
    for view in (0, 1):
        gate.tau.data.fill_(-math.inf)
        out, shares, _ = gate.train()(x, conv, view)
        torch.testing.assert_close(out, conv(x))
        assert torch.equal(shares, torch.ones_like(shares))
        gate.tau.data.fill_(math.inf)
        out, shares, _ = gate(x, conv, view)
        anti = view == 1 and kind != "cgnet"
        rows = [conv.weight[4 * o : 4 * o + 4] for o in range(4)]
        inputs = [x[:, 2 * i : 2 * i + 2] for i in ([3, 2, 1, 0] if anti else [0, 1, 2, 3])]
        kept = [
            row[:, 2 * i : 2 * i + 2]
            for row, i in zip(rows, [3, 2, 1, 0] if anti else range(4), strict=True)
        ]
        expected = torch.cat(
            [F.conv2d(i, w, padding=1) for i, w in zip(inputs, kept, strict=True)], 1
        )
        torch.testing.assert_close(out, expected)
        assert not shares.any()


@pytest.mark.parametrize(
    ("groups", "overlap"), [(2, 0), (4, 0), (8, 0), (4, 0.5), (4, 0.75), (4, 1)]
)
def test_the_bases_of_two_views_have_as_much_in_common_as_asked(groups, overlap):
    gate, conv, _ = layer("cdg", 16, 16, groups=groups, overlap=overlap)
    first, second = (base_mask(gate.train(), conv, view) for view in (0, 1))
    assert torch.equal(first, blocks(groups, 16, 16, range(groups)))
    assert (first * second).sum() == overlap * first.sum()
    assert first.mean() == second.mean() == 1 / groups
    assert torch.equal(base_mask(gate, conv, 2), first)  # a third crop
    assert torch.equal(base_mask(gate.eval(), conv, 1), first)
    gate, conv, _ = layer("cdg", 16, 16, groups=groups, overlap=overlap, inference="antidiagonal")
    assert torch.equal(base_mask(gate.eval(), conv, 0), second)


@pytest.mark.parametrize(
    ("hard", "sparse"),
    [(False, False), (True, False), (False, True)],
    ids=["soft", "hard", "sparse"],
)
def test_the_gradient_goes_straight_through_to_tau(hard, sparse):
    gate, conv, x = layer("cdg", hard=hard, sparse_gradient=sparse, alpha=1.5, penalty_weight=0)
    gate.train()
    direction = torch.randn(3, 16, 7, 6, dtype=torch.float64)
    (gate(x, conv, 0).out * direction).sum().backward()
    with torch.no_grad():
        base = gate.base_of(x, conv, 0)
        scaled = 1.5 * (gate.norm(base) - gate.tau[:, None, None])
        slope = torch.sigmoid(scaled) * (1 - torch.sigmoid(scaled))
        if hard:
            slope = (scaled.abs() < 2).double() / 4
        if sparse:
            slope = slope * (scaled > 0)
        expected = -(direction * (conv(x) - base) * 1.5 * slope).sum((0, 2, 3))
    torch.testing.assert_close(gate.tau.grad, expected, rtol=1e-9, atol=1e-12)


def test_conditional_weights_learn_only_where_the_rest_is_added():
    gate, conv, x = layer("cdg")
    gate.tau.data[::2] = math.inf
    gate.tau.data[1::2] = -math.inf
    gate.train()(x, conv, 1).out.square().sum().backward()
    base = base_mask(gate, conv, 1).bool()
    assert not conv.weight.grad[::2][~base[::2]].any()
    assert conv.weight.grad[1::2][~base[1::2]].all()
    assert conv.weight.grad[base].all()


@pytest.mark.parametrize("kind", PER_PIXEL)
def test_a_map_of_one_pixel_is_decided_by_tau_alone(kind):
    gate, conv, _ = layer(kind)
    images = 1 if kind != "cgnet" else 2  # no BatchNorm takes a single number
    x = torch.rand(images, 8, 1, 1, dtype=torch.float64)
    assert torch.isfinite(gate.train()(x, conv, 0).out).all()
    if kind != "cgnet":
        assert not gate(x, conv, 0).shares.any()
        gate.tau.data.fill_(-1e-9)
        assert gate(x, conv, 0).shares.all()


@pytest.mark.parametrize("kind", ["cdg", "scdg"])
def test_an_image_s_decisions_do_not_depend_on_the_others(kind):
    gate, conv, x = layer(kind)
    together = gate.train()(x, conv, 1)
    for index in range(3):
        alone = gate(x[index : index + 1], conv, 1)
        torch.testing.assert_close(alone.out, together.out[index : index + 1])
        assert torch.equal(alone.shares, together.shares[index : index + 1])


# What is counted


def test_random_weights_at_tau_0_compute_five_eighths():
    backbone = short("cdg").eval()
    with torch.no_grad(), backbone.path("gated") as passes:
        backbone(torch.randn(8, 3, 32, 32))
    flops = count_flops(backbone, (32, 32))
    share = flops.gated_share(selected_channels(passes[-1].masks)).mean()
    assert share == pytest.approx(0.625, abs=0.015)


def test_the_poster_s_cuts_follow_from_its_sparsities():
    """But for the third row, which prints 1.53."""
    backbone = short("scdg")
    flops = count_flops(backbone, (32, 32))
    # Stem and shortcuts, which are plain: 3×3 at 34×34 pixels, and 1×1 at 17×17, 9×9 and 5×5.
    plain = 27 * 8 * 34**2 + sum(
        2**i * 8 * 2 ** (i + 1) * 8 * n**2 for i, n in enumerate((17, 9, 5))
    )
    for skipped, factor, printed in [(71.64, 2.161, 2.16), (66.24, 1.987, 1.98), (45.52, 1.518, 0)]:
        channels = (1 - skipped / 100) * flops.all_channels.double()[None]
        figures = flops.as_published(channels)
        assert figures["skipped"] == pytest.approx(skipped / 100)
        assert 1 / figures["gated_share"] == pytest.approx(factor, abs=5e-4)
        assert not printed or abs(1 / figures["gated_share"] - printed) < 0.01
        spent = plain + (flops.dense - plain) * (0.25 + 0.75 * (1 - skipped / 100))
        assert float(flops.gated(channels)) == pytest.approx(spent, rel=1e-12)
        text = format_report(summarise(backbone, flops, channels), "at τ")
        assert f"{factor:.2f}× fewer ({skipped:.2f}% of the conditional part skipped)" in text


def test_shares_are_over_outputs_and_dgc_s_over_multiplications():
    backbone = short("cdg")
    flops = count_flops(backbone, (16, 16))
    channels = torch.zeros(1, 8, dtype=torch.float64)
    channels[0, 0] = 8  # of the first convolution alone, whose outputs are 8 of 18 × 18 pixels
    outputs = sum(2 * 8 * 2**i * side**2 for i, side in enumerate((18, 9, 5, 3)))
    assert flops.gated_share(channels).item() == pytest.approx(0.25 + 0.75 * 8 * 18**2 / outputs)
    flops = count_flops(short("dgc"), (16, 16))
    assert flops.gated_share(0.45 * flops.all_channels.double()).item() == pytest.approx(0.45)
    assert flops.gates[0].decision == 4 * 2 * 8 * 1
    assert flops.gates[-1].decision == 4 * 2 * 64 * (64 // 8)


@pytest.mark.parametrize(
    ("kind", "cls", "block"),
    [("cgnet", GatedResNet, "bottleneck"), ("dgc", TwoEncoderResNet, "basic")],
)
def test_all_choices_together_cost_the_whole_convolutions(kind, cls, block):
    backbone = short(kind, cls, 4, block=block).eval()
    flops = count_flops(backbone, (15, 18))
    plain = count_flops(ResNet([1, 1, 1, 1], width=4, stem="cifar", block=block), (15, 18))
    assert flops.dense == plain.dense
    full = flops.all_channels
    assert flops.gated(full).item() == flops.dense + flops.decisions
    with torch.no_grad(), backbone.path("gated") as passes:
        backbone(torch.randn(2, 3, 15, 18))
    assert [mask.shape[1] for mask in passes[-1].masks] == full.tolist()


# fbs


def test_scores_choose_channels_and_multiply_them():
    torch.manual_seed(2)
    block = short("fbs", separate_bn=True).double().layer2[0].train()
    gate, x = block.gate, torch.rand(5, 8, 9, 7, dtype=torch.float64)
    nn.init.normal_(gate.predict.weight)
    budgets = torch.tensor([0.05, 0.3, 0.5, 0.99, 1.0], dtype=torch.float64)
    out, (mask,) = block.forward_gated(x, budgets)
    scores = F.relu(x.mean((2, 3)) @ gate.predict.weight.T + gate.predict.bias)
    for row, on, budget in zip(scores.tolist(), mask.tolist(), budgets.tolist(), strict=True):
        number = math.ceil(budget * 16)
        beyond = sorted(row, reverse=True)[number:]
        assert on == [float(not beyond or score > beyond[0]) for score in row]
        assert sum(on) <= number
    assert mask[4].all()
    hidden = block.conv1(x)
    mean, variance = hidden.mean((0, 2, 3)), hidden.var((0, 2, 3), correction=0)
    normal = (hidden - mean[:, None, None]) / (variance + 1e-5).sqrt()[:, None, None]
    scaled = scores[:, :, None, None] * normal + gate.shift[:, None, None]
    hidden = F.relu(mask[:, :, None, None] * scaled)
    expected = F.relu(block.gated_bn2(block.conv2(hidden)) + block.downsample(x))
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    assert not mask.requires_grad
    assert not hasattr(block, "gated_bn1")
    expected.sum().backward()
    assert gate.predict.weight.grad.abs().sum() > 0


def test_equal_scores_leave_fewer_channels_than_asked():
    gate = BoostingGate(4, 6)
    nn.init.zeros_(gate.predict.weight)
    gate.predict.bias.data = torch.tensor([2.0, 1.0, 1.0, 1.0, -1.0, -2.0])
    x = torch.rand(1, 4, 3, 3)
    for budget, left in [(0.1, 1), (0.5, 1), (4 / 6, 4), (5 / 6, 4), (1.0, 6)]:
        assert gate(x, torch.tensor(budget)).mask.sum() == left
    assert gate(x).mask.sum() == 6  # told nothing
    assert BoostingGate(4, 6, penalty_weight=0.1)(x).penalty > 0


# dgc


@pytest.mark.parametrize("training", [True, False])
def test_heads_convolve_their_own_channels(training):
    """Scores end at 4 in evaluation only, and some here are larger."""
    torch.manual_seed(3)
    gate = DynamicGroupGate(16, 8).double().train(training)
    conv = nn.Conv2d(16, 8, 3, 2, 1, bias=False).double()
    x = torch.rand(3, 16, 7, 6, dtype=torch.float64)
    nn.init.normal_(gate.expand.weight)
    budgets = torch.tensor([1.0, 0.45, 0.1], dtype=torch.float64)
    out, shares, penalty = gate(x, conv, 0, budgets)
    mean, variance = gate.norm.running_mean, gate.norm.running_var
    if training:
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    x = F.relu((x - mean[:, None, None]) / (variance + 1e-5).sqrt()[:, None, None])
    lasso = largest = 0.0
    for image, budget in enumerate(budgets.tolist()):
        inactive = round(16 * (1 - budget))
        means = x[image].mean((1, 2))
        for head in range(4):
            first = gate.reduce.weight[2 * head : 2 * head + 2, :, 0, 0]
            second = slice(16 * head, 16 * head + 16)
            scores = F.relu(
                gate.expand.weight[second, :, 0, 0] @ F.relu(first @ means)
                + gate.expand.bias[second]
            )
            largest = max(largest, scores.max().item())
            scores = scores if training else scores.clamp(max=4)
            lasso = lasso + scores.mean() / 3
            order = sorted(range(16), key=lambda c, s=scores: (-s[c].item(), c))
            on = torch.zeros(16, dtype=torch.float64)
            on[order[: 16 - inactive]] = 1
            kept = scores * on
            assert torch.equal(shares[image, second], on)
            weight = conv.weight[2 * head : 2 * head + 2]
            expected = F.conv2d((kept[:, None, None] * x[image])[None], weight, None, 2, 1)
            torch.testing.assert_close(out[image, 2 * head : 2 * head + 2], expected[0])
    assert largest > 4
    if training:
        assert penalty.item() == pytest.approx(1e-5 * lasso.item())
    else:
        assert penalty is None


@pytest.mark.parametrize(("limit", "finite"), [({}, True), ({"max_score": 1e38}, False)])
def test_scores_end_before_an_unusual_image_overflows(limit, finite):
    """Products of an image with scores of it grow as 2, 4, 16, ... from layer to layer."""
    torch.manual_seed(0)
    backbone = GatedResNet(
        [2, 2, 2, 2], width=4, stem="cifar", gate="dgc", gate_kwargs=limit
    ).eval()
    with torch.no_grad(), backbone.path("gated"):
        features = backbone(1000 * torch.randn(4, 3, 16, 16))
    assert features.isfinite().all().item() == finite


def test_the_ramp_is_the_published_one():
    """No inactive channel for a twelfth, then a straight line to three quarters (DGC's layers.py)."""
    gate, epochs = DynamicGroupGate(64, 64), 120
    schedule = BudgetSchedule(0.45, 0.45, round(0.6667 * epochs), round(0.0833 * epochs))
    scores = torch.rand(1, 4, 64).argsort(2).float()  # no two are equal
    for epoch in range(epochs):
        done, inactive = epoch / epochs, 0
        if 1 / 12 < done < 3 / 4:
            inactive = round(64 * 0.55 * 1.5 * (done - 1 / 12))
        elif done >= 3 / 4:
            inactive = round(64 * 0.55)
        active = gate.active(scores, torch.tensor(schedule.at(0, 0, epoch), dtype=torch.float64))
        assert (active == 0).sum(2).tolist() == [[inactive] * 4]


# Through the house


@pytest.fixture
def short_resnet():
    register_resnet("resnet_short", "basic", [1, 1, 1, 1])
    yield
    for kind in ("gated", "two_encoders", "plain"):
        del BACKBONES[f"resnet_short_{kind}"]
        del BaseMethod._BACKBONES[f"resnet_short_{kind}"]


@pytest.mark.usefixtures("short_resnet")
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_trains_and_its_checkpoint_is_evaluated(kind, tmp_path):
    losses = {"losses": ["budget"]} if kind == "cgnet" else {}
    cfg = run_config(
        tmp_path,
        "simclr_gated",
        max_epochs=1,
        limit_train_batches=1,
        backbone={"name": "resnet_short_gated", "kwargs": {"width": WIDTH[kind]}},
        gating={"gate": kind, "gate_kwargs": losses, "target_budget": 0.5},
    )
    logged = pretrain(cfg)["logged"]
    assert ("train_gate_penalty" in logged) == (kind != "fbs")
    assert ("train_budget_loss" in logged) == (kind == "cgnet")
    assert 0 < logged["train_flops_share"] < 1
    backbone = encoder_of(run_folder(tmp_path) / "last.ckpt").backbone
    images, labels = digit_tensors(slice(12))
    if kind == "scdg":
        calibrate(backbone, images, 0.6, tolerance=0.01).apply(backbone)
        assert mean_share(backbone, images) == pytest.approx(0.6, abs=0.02)
    if kind == "fbs":
        fast = compile_encoder(backbone)
        assert fast.engine != "pytorch"
    else:
        with pytest.warns(RuntimeWarning, match="on PyTorch instead of its own kernel"):
            fast = compile_encoder(backbone)
    with torch.no_grad(), backbone.path("gated") as passes:
        expected = backbone(images)
    features, masks = fast.features_and_masks(images)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    if kind == "fbs":
        assert all(map(torch.equal, masks, (mask.bool() for mask in passes[-1].masks)))
    maps = fast.feature_maps(images)[-1]
    torch.testing.assert_close(maps.mean((2, 3)), features)
    for task in (fast.to_bytes, lambda: compile_encoder(backbone, dtype="bfloat16").to_bytes()):
        if kind == "fbs":
            task()
            continue
        with pytest.raises(InputError, match="PyTorch"):
            task()
    found = extract(backbone, loader(images, labels), "gated")
    flops = count_flops(backbone, (16, 16))
    policy = policy_of(backbone, found, "resnet18_gated", {}, 0.5)
    assert policy.share == pytest.approx(mean_share(backbone, images))
    with pytest.raises(InputError, match=f"policy: got gates of kind '{kind}', which do more"):
        slice_encoder(backbone, kept_channels(policy, flops, "dynamic", 1), False)


class Killed(RuntimeError):
    pass


class KillAfterTheFirstEpoch(pl.Callback):
    def on_train_batch_start(self, trainer, *args):
        if trainer.current_epoch == 1:
            raise Killed


@pytest.mark.usefixtures("short_resnet")
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "dgc" else pytest.mark.slow) for kind in KINDS]
)
def test_a_killed_run_ends_as_an_undisturbed_one(kind, tmp_path, monkeypatch):
    ramp = {"budget_hold": 0.5, "budget_anneal": 0.5} if kind == "dgc" else {}
    settings = {
        "gating": {"gate": kind, "target_budget": 0.4, **ramp},
        "auto_resume": {"enabled": True},
        "backbone": {"name": "resnet_short_gated", "kwargs": {"width": WIDTH[kind]}},
        "limit_train_batches": 2,
    }
    weights = []
    for kill in (False, True):
        folder = tmp_path / str(kill)
        folder.mkdir()
        if kill:
            build = training_pretrain.build_trainer

            def killed(cfg, build=build):
                trainer = build(cfg)
                trainer.callbacks.append(KillAfterTheFirstEpoch())
                return trainer

            with monkeypatch.context() as patch:
                patch.setattr(training_pretrain, "build_trainer", killed)
                with pytest.raises(Killed):
                    pretrain(run_config(folder, "simclr_gated", **settings))
        pretrain(run_config(folder, "simclr_gated", **settings))
        checkpoint = run_folder(folder) / "last.ckpt"
        weights.append(torch.load(checkpoint, weights_only=True)["state_dict"])
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def gradients(model, run):
    """Of a step over two views that are gated, with the penalties; backward outside of the scope."""
    images = digit_tensors(slice(8))[0]
    with model.path("gated", "gated", budget=0.5 if model.budget_range else None) as passes:
        features = [run(view.clone()) for view in (images, images.flip(3))]
    loss = sum((n + 1) * view.square().sum() for n, view in enumerate(features))
    (loss + sum(100 * one.penalty for one in passes)).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_compiled_and_copied_networks_do_what_the_network_does(kind):
    plain = short(kind, width=WIDTH[kind], gate_kwargs={"penalty_weight": 0.1}).train()
    state = copy.deepcopy(plain.state_dict())
    expected = gradients(plain, plain)
    ways = {"recomputed": copy.deepcopy(plain)}
    if kind == "cdg":
        ways["compiled"] = copy.deepcopy(plain)
        ways["compiled"].compile(backend="eager", fullgraph=True)
    for way, net in ways.items():
        net.load_state_dict(state)
        net.zero_grad()

        def run(view, way=way, net=net):
            return checkpoint(net, view, use_reentrant=False) if way == "recomputed" else net(view)

        found = gradients(net, run)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            scale = gradient.abs().max().item()
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("kind", ["fbs", "dgc", "cdg"])
def test_tools_trace_the_gated_path(kind):
    backbone = short(kind, width=WIDTH[kind], path="gated").eval()
    backbone.budget = None if backbone.budget is None else 0.5
    images = digit_tensors(slice(4))[0]
    expected = backbone(images)
    for traced in (torch.fx.symbolic_trace(backbone), torch.jit.trace(backbone, images[:2])):
        torch.testing.assert_close(traced(images), expected, rtol=1e-4, atol=1e-5)


def test_the_views_of_a_step_have_different_bases_and_their_teacher_the_same():
    model = tiny_model(tiny_config("byol_gated", gating={"gate": "cdg", "momentum_path": "same"}))
    model.flops((16, 16))
    seen = {False: [], True: []}
    for teacher, net in ((False, model.backbone), (True, model.momentum_backbone)):
        gate = net.gates[0]
        sources = gate.sources

        def note(view, teacher=teacher, sources=sources):
            seen[teacher].append(view)
            return sources(view)

        gate.sources = note
    model.training_step(random_batch(), 0)
    assert seen == {False: [0, 1], True: [0, 1]}


def test_penalties_are_a_mean_over_the_gated_views():
    model = tiny_model(tiny_config("simclr_gated", gating={"gate": "cdg"}))
    model.training_step(random_batch(), 0)
    number = sum(gate.tau.numel() for gate in model.backbone.gates)
    assert number == 4 * (4 + 8 + 16 + 32)
    assert model.logged["train_gate_penalty"].item() == pytest.approx(1e-4 * 0.99**2 * number)


@pytest.mark.parametrize(
    ("kind", "kwargs", "message"),
    [
        (
            "cdg",
            {"groups": 3},
            "gate_kwargs.groups: got 3, expected a divisor of a convolution's 4 ch",
        ),
        (
            "cgnet",
            {"groups": 8},
            "gate_kwargs.groups: got 8, expected a divisor of a convolution's 4",
        ),
        ("cdg", {"groups": 1}, "gate_kwargs.groups: got 1, expected an even number"),
        ("cdg", {"overlap": 0.4}, "gate_kwargs.overlap: got 0.4, expected a multiple of 1/4 from"),
        ("cdg", {"inference": "both"}, "gate_kwargs.inference: got 'both', expected one of"),
        ("cgnet", {"losses": ["lasso"]}, "gate_kwargs.losses: got ['lasso'], expected some of"),
        ("scdg", {}, "gate: got 'scdg' for a convolution of 4 channels, expected a multiple of 8"),
        (
            "dgc",
            {"heads": 3},
            "gate_kwargs.heads: got 3, expected a divisor of a convolution's 4 ch",
        ),
        ("dgc", {"max_score": 0}, "gate_kwargs.max_score: got 0, expected a number > 0"),
        ("cgnet", {"overlap": 0.5}, "gating.gate_kwargs.overlap: no such key of gate 'cgnet'"),
        (
            "scdg",
            {"tau": 0.5},
            "gating.gate_kwargs.tau: no such key of gate 'scdg', expected are over",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_training(kind, kwargs, message):
    with pytest.raises(InputError) as error:
        tiny_model(tiny_config("simclr_gated", gating={"gate": kind, "gate_kwargs": kwargs}))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
