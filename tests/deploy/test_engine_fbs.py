"""FBS gates, which multiply what they choose, in every engine: against the backbone, and by hand."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import solo_gating_runtime
from solo_gating import InputError, deploy
from solo_gating.backbones import GatedResNet
from solo_gating.gates import GATES, BoostingGate, register_gate
from solo_gating_runtime.encoder import Encoder, Kernel
from solo_gating_runtime.file import to_bytes
from solo_gating_runtime.library import supported_engines
from solo_gating_runtime.network import Block, Convolution, Gate, Network

from ..support.encoders import assert_no_split_matters, digit_tensors, engines_here
from ..support.helpers import randomise_norms
from ..support.integer_reference import images as some_images
from .test_engine_kinds import assert_same, images

EVERYWHERE = pytest.mark.parametrize("engine", [*engines_here(), "pytorch"])


def short(block="basic", width=7, kind="fbs", **kwargs):
    """One block in each stage; a third of the channels have scores of exactly 0."""
    torch.manual_seed(0)
    net = GatedResNet([1, 1, 1, 1], block=block, width=width, stem="cifar", gate=kind, **kwargs)
    net.fc = nn.Identity()
    randomise_norms(net)
    for gate in net.gates:
        nn.init.normal_(gate.predict.weight, std=0.5 * gate.predict.in_features**-0.5)
        nn.init.normal_(gate.predict.bias, 0.5, 0.3)
        nn.init.normal_(gate.shift, std=0.3)
        with torch.no_grad():
            gate.predict.weight[::3] = 0
            gate.predict.bias[::3] = -1
    return net.eval()


@EVERYWHERE
@pytest.mark.parametrize(("block", "width"), [("basic", 7), ("basic", 16), ("bottleneck", 5)])
@pytest.mark.parametrize("separate_bn", [True, False])
def test_it_computes_what_the_backbone_computes(engine, block, width, separate_bn):
    net = short(block, width, separate_bn=separate_bn)
    fast = deploy.compile(net, engine=engine)
    assert fast.engine == engine
    for size, number in ((9, 1), (12, 5)):
        x = images(number, size)
        for budget in (0.01, 0.3, 0.6, 1.0):
            net.budget = fast.budget = budget
            assert_same(fast, net, x)
            masks = fast.features_and_masks(x)[1]
            for mask in masks:
                most = math.ceil(budget * mask.shape[1] - 1e-3)
                assert mask.sum(1).max() <= most
                # Scores of 0 tie at the border, unless all channels are chosen.
                off = mask[:, ::3]
                assert off.all() if most == mask.shape[1] else not off.any()
            if 0.1 < budget < 1 and number > 1:
                assert any((mask != mask[:1]).any() for mask in masks)


@EVERYWHERE
def test_the_dense_path_has_no_boosts(engine):
    net = short()
    assert_same(deploy.compile(net, "dense", engine=engine), net, images(2), "dense")


def by_hand(x, stem, first, second, gate, number):
    """A 3×3 stem and one block in float64, channel by channel and pixel by pixel."""

    def convolved(conv, x):
        outputs, inputs, kernel, _ = conv.weight.shape
        padded = np.zeros((inputs, x.shape[1] + 2, x.shape[2] + 2))
        padded[:, 1:-1, 1:-1] = x
        out = np.zeros((outputs, *x.shape[1:]))
        for c, i, j in np.ndindex(out.shape):
            seen = padded[:, i : i + kernel, j : j + kernel]
            out[c, i, j] = (seen * conv.weight[c].astype(float)).sum() + conv.bias[c]
        return out

    x = np.maximum(convolved(stem, x), 0)
    scores = [
        max(float(row @ x.mean((1, 2)) + b), 0.0)
        for row, b in zip(gate.reduce, gate.bias, strict=True)
    ]
    beyond = sorted(scores, reverse=True)[number:]
    mask = [not beyond or score > beyond[0] for score in scores]
    hidden = convolved(first, x)
    for c, (score, on, beta) in enumerate(zip(scores, mask, gate.beta, strict=True)):
        hidden[c] = np.maximum(score * hidden[c] + float(beta), 0) if on else 0
    return np.maximum(convolved(second, hidden) + x, 0), mask


def one_block(bfloat16=False):
    rng = np.random.default_rng(0)

    def floats(*shape, scale=1.0):
        return np.float32(rng.normal(size=shape) * scale)

    def convolution(inputs, outputs):
        weight = floats(outputs, inputs, 3, 3, scale=(9 * inputs) ** -0.5)
        return Convolution(weight, floats(outputs, scale=0.3), 1, 1)

    gate = Gate.boosting(floats(9, 5), floats(9, scale=0.5), floats(9, scale=0.3))
    gate.reduce[2], gate.bias[2] = 0, 0  # a score of 0, and two equal ones
    gate.reduce[4], gate.bias[4] = gate.reduce[3], gate.bias[3]
    block = Block((convolution(5, 9), convolution(9, 5)), None, (gate,))
    net = Network("gated", convolution(3, 5), False, (block,), None, (0.01, 1.0), "budget")
    return Network(**{**vars(net), "budget": 0.5, "bfloat16": bfloat16})


CASES = [*(("float32", engine) for engine in supported_engines()[:1])]
CASES += [("bfloat16", engine) for engine in supported_engines("bfloat16")[:2]]


@pytest.mark.parametrize(("dtype", "engine"), CASES)
def test_one_block_is_as_written_by_hand(dtype, engine):
    net, x = one_block(dtype == "bfloat16"), some_images(3, 3, 5, 8)
    encoder = Encoder(net, Kernel(net, to_bytes(net), engine), engine)
    block = net.blocks[0]
    for number in range(1, 10):
        encoder.budget = number / 9
        features, (masks,) = encoder.features_and_masks(x)
        (maps,) = encoder.feature_maps(x)
        for image, mask, found, mean in zip(x, masks, maps, features, strict=True):
            expected, own = by_hand(image, net.stem, *block.convolutions, block.gates[0], number)
            assert mask.tolist() == own
            error = np.abs(found - expected).max() / np.abs(expected).max()
            assert error < (1e-6 if dtype == "float32" else 3e-2)
            np.testing.assert_allclose(mean, found.mean((1, 2)), rtol=1e-4, atol=1e-5)


@EVERYWHERE
@pytest.mark.parametrize("beta", [-0.5, 0.0, 0.5])
def test_scores_of_0_leave_beta(engine, beta):
    net, x = short(), images(2, 8)
    for gate in net.gates:
        nn.init.zeros_(gate.predict.weight)
        nn.init.constant_(gate.predict.bias, -1.0)
        nn.init.constant_(gate.shift, beta)
    fast = deploy.compile(net, engine=engine, budget=1.0)
    with torch.no_grad():
        net.path, net.budget = "gated", 1.0
        expected = net(x)
    features, masks = fast.features_and_masks(x)
    assert all(mask.all() for mask in masks)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    fast.budget = 0.5
    features, masks = fast.features_and_masks(x)
    assert not any(mask.any() for mask in masks)


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_neither_threads_nor_batches_change_a_bit(block):
    for dtype in ("float32", "bfloat16"):
        fast = deploy.compile(short(block, 16, budget=0.5), dtype=dtype)
        assert_no_split_matters(fast._encoder.backend, images(5, 11).numpy())


@EVERYWHERE
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("budget", [0.3, 1.0])
def test_an_extreme_image_harms_no_other(engine, value, budget):
    net, x = short(), images(3, 9)
    fast = deploy.compile(net, engine=engine, budget=budget)
    alone = fast(x)
    x[1, 2, 5, 5] = value
    net.path, net.budget = "gated", budget
    with torch.no_grad():
        expected = net(x)[1]
    features = fast(x)
    assert torch.equal(features[[0, 2]], alone[[0, 2]])
    if value == 3e38:
        assert features[1].isfinite().all() == expected.isfinite().all()
    else:
        torch.testing.assert_close(features[1], expected, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_file_holds_it_without_pytorch(dtype, tmp_path):
    net, x = short(budget=0.4), images(3, 10)
    more = {"calibration": digit_tensors(slice(40))[0]} if dtype == "int8" else {}
    fast = deploy.compile(net, dtype=dtype, **more)
    file = tmp_path / "encoder.sgx"
    fast.save(file)
    assert file.read_bytes()[8] == 3
    for loaded in (solo_gating_runtime.load(file), deploy.load(file)):
        assert (loaded.path, loaded.dtype, loaded.budget) == ("gated", dtype, 0.4)
        for fast.budget in (0.4, 0.8):
            loaded.budget = fast.budget
            assert np.array_equal(loaded(x.numpy()), fast(x).numpy())
        assert loaded.to_bytes() == fast.to_bytes()
    slow = deploy.load(file, engine="pytorch")
    slow.budget = fast.budget
    largest = fast(x).abs().max()
    assert (slow(x) - fast(x)).abs().max() < (1e-5 if dtype == "float32" else 2e-2) * largest
    if dtype != "float32":
        report = fast.report(x)
        assert [path.path for path in report.paths] == ["gated", "dense"]
        assert report.paths[0].same_masks_error < 0.3


class Halved(BoostingGate):
    """Decides otherwise, and does not say how that folds."""

    def forward(self, x, budget=None):
        decided = super().forward(x, budget)
        return decided._replace(scale=decided.scale / 2)


def test_a_subclass_that_decides_otherwise_runs_on_pytorch():
    register_gate("halved")(Halved)
    try:
        net, x = short(kind="halved", budget=0.5), images(2, 9)
        with pytest.warns(RuntimeWarning, match="on PyTorch instead of its own kernel"):
            fast = deploy.compile(net)
        with torch.no_grad():
            net.path = "gated"
            torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-5)
    finally:
        del GATES["halved"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda gate: gate.output_norm.register_forward_hook(lambda *args: None),
            "got forward hooks, expected none for layer2.0.gate.output_norm",
        ),
        (
            lambda gate: setattr(gate, "output_norm", nn.BatchNorm2d(3)),
            r"expected 14 for layer2.0.gate.output_norm",
        ),
        (
            lambda gate: setattr(gate, "predict", nn.Linear(7, 13)),
            "got another number of channels, expected 14 for layer2.0.gate.predict",
        ),
        (
            lambda gate: setattr(gate, "shift", nn.Parameter(torch.ones(3))),
            r"got the shape \(3,\), expected 14 for layer2.0.gate",
        ),
        (
            lambda gate: gate.shift.data.fill_(math.nan),
            "got NaN or infinity, expected finite weights for layer2.0's gate",
        ),
    ],
)
def test_other_parts_are_refused(change, message):
    net = short()
    change(net.layer2[0].gate)
    with pytest.raises(InputError, match=message):
        deploy.compile(net)
