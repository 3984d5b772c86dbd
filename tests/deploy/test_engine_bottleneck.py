"""Bottlenecks in the kernel, against the backbone in float64, and against the kernel itself."""

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import resnet50
from torchvision.models.resnet import Bottleneck

from solo_gating import InputError, deploy
from solo_gating.backbones import SlicedResNet
from solo_gating.deploy.static import Kept, slice_encoder
from solo_gating_runtime.encoder import Kernel
from solo_gating_runtime.file import to_bytes
from solo_gating_runtime.network import Block, Convolution, Gate, Network

from ..support.helpers import randomise_norms
from .test_engine_kinds import ANY, CASES, ISAS, assert_same, images, lively, settings


@ANY
@pytest.mark.parametrize(
    ("stem", "width", "size", "number"),
    [
        ("cifar", 8, (16, 16), 5),
        ("cifar", 10, (13, 7), 3),
        ("cifar", 3, (1, 1), 3),
        ("imagenet", 8, (33, 50), 3),
        ("imagenet", 12, (7, 7), 16),
        ("imagenet", 20, (1, 9), 3),
        ("imagenet", 8, (224, 224), 1),
    ],
)
def test_it_computes_what_the_backbone_computes(isa, stem, width, size, number):
    net = lively("resnet50_gated", width=width, stem=stem)
    x = torch.randn(number, 3, *size, generator=torch.Generator().manual_seed(0))
    for path in ("gated", "dense"):
        fast = deploy.compile(net, path, engine=isa)
        assert fast.engine == isa
        assert_same(fast, net, x, path)


@pytest.mark.parametrize("name", ["resnet101_gated", "resnet50_two_encoders"])
@pytest.mark.parametrize("separate_bn", [True, False])
def test_every_kind_of_gated_encoder(name, separate_bn):
    net = lively(name, **({"separate_bn": False} if not separate_bn else {}))
    for path in ("gated", "dense"):
        assert_same(deploy.compile(net, path, engine=ISAS[0]), net, images(2), path)


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_gate_at_every_setting(case):
    net = lively("resnet50_gated", **CASES[case])
    fast = deploy.compile(net, engine=ISAS[0])
    for name, value in settings(net):
        setattr(net, name, value)
        setattr(fast, name, value)
        assert_same(fast, net, images(3))


@ANY
def test_all_off_all_on_and_exactly_one_on(isa):
    net, x = lively("resnet50_gated"), images(2)
    fast = deploy.compile(net, engine=isa)
    for threshold, share in ((1e9, 0.0), (-1e9, 1.0)):
        net.threshold = fast.threshold = threshold
        assert torch.cat(fast.features_and_masks(x)[1], 1).float().mean() == share
        assert_same(fast, net, x)
    net = lively("resnet50_gated", gate="top_k")
    for gate in net.gates:
        gate.count = 1
    fast = deploy.compile(net, engine=isa)
    assert all((mask.sum(1) == 1).all() for mask in fast.features_and_masks(x)[1])
    assert_same(fast, net, x)


@ANY
@pytest.mark.parametrize("path", ["gated", "dense"])
def test_nothing_depends_on_the_batch_or_the_threads(isa, path):
    net, x = lively("resnet50_gated", width=12), images(5, 24)
    fast = deploy.compile(net, path, engine=isa)
    whole, masks = fast.features_and_masks(x)
    for threads in (1, 2, 3, 5):
        fast.threads = threads
        for split in (1, 3, 5):
            parts = torch.cat([fast(part) for part in x.split(split)])
            assert torch.equal(parts, whole)
    assert (0 < torch.cat(masks, 1).float().mean() < 1) == (path == "gated")


@ANY
def test_sizes_may_change_between_calls(isa):
    net = lively("resnet50_gated")
    fast = deploy.compile(net, engine=isa)
    for size in (16, 9, 24, 16):
        assert_same(fast, net, images(2, size))


@ANY
# Nearer to the largest number, what overflows depends on whether BatchNorms are folded.
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, -2e20])
def test_an_extreme_image_gives_what_pytorch_gives_and_harms_no_other(isa, value):
    net, x = lively("resnet50_gated", stem="imagenet"), images(3)
    fast = deploy.compile(net, engine=isa)
    fast.threads = 1
    alone = fast(x)
    x[1, 2, 5, 5] = value
    with torch.no_grad(), net.path("gated") as passes:
        expected = net(x)[1]
    features, masks = fast.features_and_masks(x)
    assert torch.equal(features[[0, 2]], alone[[0, 2]])
    assert torch.equal(torch.cat(masks, 1)[1], torch.cat(passes[-1].masks, 1)[1] > 0)
    atol = 1e-5 * expected.nan_to_num(0, 0, 0).abs().max().item()
    torch.testing.assert_close(features[1], expected, rtol=1e-3, atol=atol, equal_nan=True)


@ANY
def test_an_image_that_overflows_inside_harms_no_other(isa):
    net, x = lively("resnet50_gated"), images(5)
    with torch.no_grad():
        for block in net.gated_blocks:
            block.conv2.weight.mul_(100)
    for path in ("dense", "gated"):
        fast = deploy.compile(net, path, engine=isa)
        fast.threads = 2
        alone = fast(x)
        assert alone.isfinite().all()
        bad = x.clone()
        bad[1::2] *= 1e16  # finite, and no extreme image by itself
        for _ in range(2):
            assert torch.equal(fast(bad)[::2], alone[::2])
        assert torch.equal(fast(x), alone)


@ANY
def test_torchvision_and_a_classifier(isa):
    torch.manual_seed(0)
    net = resnet50(num_classes=10).eval()
    randomise_norms(net)
    with torch.no_grad():
        expected = net.double()(images(2, 64).double())
        rounding = (net.float()(images(2, 64)) - expected).abs().max()
    fast = deploy.compile(net, path="dense", engine=isa)
    assert fast.engine == isa
    assert fast.features == 10
    difference = (fast(images(2, 64)) - expected).abs().max()
    assert difference < 1e-5 * expected.abs().max() + 2 * rounding


@pytest.mark.parametrize("gates", [True, False])
def test_a_sliced_encoder(gates):
    net, x = lively("resnet50_gated"), images(3)
    kept = Kept(tuple(torch.arange(0, n, 2 + n % 3) for n in deploy.compile(net).channels), 0.5)
    small = slice_encoder(net, kept, gates)
    assert isinstance(small, SlicedResNet)
    fast = deploy.compile(small, path="gated" if gates else "dense", engine=ISAS[0])
    assert fast.channels == tuple(len(indices) for indices in kept.channels)
    with torch.no_grad():
        expected = small(x)
    assert (fast(x) - expected).abs().max() / expected.abs().max() < 1e-5


def test_stored_bfloat16_rounds_the_weights_and_nothing_else():
    net, x = lively("resnet50_gated"), images(3)
    fast = deploy.compile(net, "dense", dtype="bfloat16", engine="portable")
    # The same with weights that are rounded after folding.
    slow = deploy.compile(net, "dense", dtype="bfloat16", engine="pytorch")
    assert (fast(x) - slow(x)).abs().max() / slow(x).abs().max() < 1e-5


def test_weights_are_held_once_and_in_half_the_memory_with_bfloat16():
    net = lively("resnet50_gated", width=32, stem="imagenet")
    convolutions = sum(m.weight.numel() for m in net.modules() if isinstance(m, nn.Conv2d))
    engines = [
        deploy.compile(net, dtype=dtype)._encoder.backend for dtype in ("float32", "bfloat16")
    ]
    assert 4 * convolutions < engines[0].nbytes < 4.1 * convolutions
    gates = sum(gate.flops for gate in net.gates)
    smaller = 4 * gates + 2 * (convolutions - gates)
    assert smaller < engines[1].nbytes < 1.1 * smaller


CHAINS = {  # kernel sizes and strides of the convolutions
    "1×1 twice": [(1, 1), (1, 1)],
    "3×3 of stride 2 at the end": [(1, 1), (3, 2)],
    "1×1 of stride 2 at the start": [(1, 2), (3, 1), (1, 1)],
    "3×3 three times, stride 3": [(3, 1), (3, 3), (3, 1)],
    "two strides": [(3, 2), (3, 2), (1, 1)],
}


@ANY
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("size", [(9, 12), (8, 5)])
def test_blocks_of_any_convolutions(isa, chain, size):
    """No backbone has these; the reference is the masked network in float64."""
    random = torch.Generator().manual_seed(0)

    def conv(inputs, out, kernel, stride):
        weight = torch.randn(out, inputs, kernel, kernel, generator=random) / (inputs * kernel)
        bias = torch.randn(out, generator=random)
        return Convolution(weight.numpy(), bias.numpy(), stride, kernel // 2)

    widths = [7, 20, 9, 23]
    layers = [
        conv(widths[i], widths[i + 1], *kernel_and_stride)
        for i, kernel_and_stride in enumerate(CHAINS[chain])
    ]
    total = 1
    for layer in layers:
        total *= layer.stride
    shortcut = conv(7, widths[len(layers)], 1, total)
    masks = [torch.rand(n, generator=random) < 0.5 for n in widths[1 : len(layers)]]
    none = np.zeros(0, np.float32)
    gates = tuple(
        Gate(none, none, none, torch.where(mask, 1.0, -1.0).numpy(), None) for mask in masks
    )
    block = Block(tuple(layers), shortcut, gates)
    net = Network("gated", conv(3, 7, 3, 1), False, (block,), None)
    x = torch.randn(2, 3, *size, generator=random)

    def run(conv, x):
        weight, bias = (torch.from_numpy(part).double() for part in (conv.weight, conv.bias))
        return nn.functional.conv2d(x, weight, bias, conv.stride, conv.padding)

    stem = run(net.stem, x.double()).relu()
    out = stem
    for layer, mask in zip(layers, [*masks, None], strict=True):
        out = run(layer, out)
        if mask is not None:
            out = out.relu() * mask[:, None, None]
    expected = (out + run(shortcut, stem)).relu().mean((2, 3))
    kernel = Kernel(net, to_bytes(net), isa)
    results = kernel.run(x.numpy(), kernel.decide(0.0, None), 1)
    assert torch.equal(torch.from_numpy(results.masks), torch.cat(masks).expand(2, -1))
    assert (torch.from_numpy(results.features) - expected).abs().max() < 1e-5 * expected.abs().max()


class DoubledBottleneck(Bottleneck):
    def forward(self, x):
        return 2 * super().forward(x)


def test_other_blocks_are_refused_by_name():
    net = resnet50(num_classes=3)
    net.layer1[1].__class__ = DoubledBottleneck
    with pytest.raises(InputError, match=r"got DoubledBottleneck, expected .*layer1\.1"):
        deploy.compile(net, "dense")
