"""Slimmable gates: at a width, the gated path is a network that is physically narrower."""

import math
from functools import cache

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from solo_gating import InputError
from solo_gating.backbones import create_backbone
from solo_gating.backbones.statistics import batch_norms, recalibrated, untracked
from solo_gating.deploy import compile as compile_encoder
from solo_gating.deploy.static import Kept, slice_encoder
from solo_gating.evaluate.calibrate import calibrate
from solo_gating.flops import count_flops, selected_channels
from solo_gating.gates.shares import number_of_channels

from ..support.helpers import randomise_norms

BLOCKS = {"resnet18": (BasicBlock, [2, 2, 2, 2]), "resnet50": (Bottleneck, [3, 4, 6, 3])}


def slimmable(name: str = "resnet18", stem: str = "cifar", width: int = 8):
    torch.manual_seed(0)
    kwargs = {"gate": "slimmable", "budget_range": [0.25, 1.0], "separate_bn": False}
    net = create_backbone(f"{name}_gated", width=width, stem=stem, **kwargs).double()
    randomise_norms(net)
    return net.eval()


class Narrow(nn.Module):
    """A ResNet of ⌈w·C⌉ channels wherever torchvision's has C, written out; weights are the first ones."""

    def __init__(self, name: str, stem: str, width: int, budget: float, state: dict):
        super().__init__()
        block, depths = BLOCKS[name]

        def n(channels: int) -> int:
            return math.ceil(budget * channels - 1e-9)

        def conv(c_in: int, c_out: int, size: int, stride: int = 1, padding: int | None = None):
            padding = size // 2 if padding is None else padding
            return nn.Conv2d(c_in, c_out, size, stride, padding, bias=False)

        last, self.pooled = n(width), stem == "imagenet"
        self.conv1 = conv(3, last, 7, 2) if self.pooled else conv(3, last, 3, padding=2)
        self.bn1 = nn.BatchNorm2d(last)
        self.stages = []
        for stage, depth in enumerate(depths):
            inner = width * 2**stage
            outer = inner * block.expansion
            for index in range(depth):
                stride = 2 if stage and not index else 1
                if block is BasicBlock:
                    sizes = [(last, n(inner), 3, stride), (n(inner), n(outer), 3, 1)]
                else:
                    sizes = [(last, n(inner), 1, 1), (n(inner), n(inner), 3, stride)]
                    sizes.append((n(inner), n(outer), 1, 1))
                parts = nn.ModuleDict()
                for number, (c_in, c_out, size, step) in enumerate(sizes, 1):
                    parts[f"conv{number}"] = conv(c_in, c_out, size, step)
                    parts[f"bn{number}"] = nn.BatchNorm2d(c_out)
                if stride != 1 or last != n(outer):
                    short = [conv(last, n(outer), 1, stride), nn.BatchNorm2d(n(outer))]
                    parts["downsample"] = nn.Sequential(*short)
                self.add_module(f"layer{stage + 1}_{index}", parts)
                self.stages.append((f"layer{stage + 1}", index, parts))
                last = n(outer)
        self.double()
        own = self.state_dict()
        for key, value in own.items():
            whole = state[key.replace("_", ".", 1) if key.startswith("layer") else key]
            first = tuple(slice(0, size) for size in value.shape)
            own[key] = whole[first] if first else whole
        self.load_state_dict(own)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        if self.pooled:
            x = nn.functional.max_pool2d(x, 3, 2, 1)
        for _, _, parts in self.stages:
            out, number = x, 1
            while f"conv{number}" in parts:
                out = parts[f"bn{number}"](parts[f"conv{number}"](out))
                number += 1
                if f"conv{number}" in parts:
                    out = torch.relu(out)
            x = torch.relu(out + (parts["downsample"](x) if "downsample" in parts else x))
        return x.mean((2, 3))


@cache
def images(number: int = 6):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(number, 3, 16, 16, generator=generator, dtype=torch.float64)


CASES = [
    ("resnet18", "cifar", 0.5),
    ("resnet18", "imagenet", 0.3),
    ("resnet50", "cifar", 0.55),
]


@pytest.mark.parametrize(("name", "stem", "budget"), CASES)
def test_a_width_is_a_narrow_network(name, stem, budget):
    """Features, gradients of its weights in training, and multiply-accumulates."""
    net = slimmable(name, stem)
    narrow = Narrow(name, stem, 8, budget, net.state_dict()).eval()
    with net.path("gated", budget=budget) as passes:
        found = net(images())
    expected = narrow(images())
    kept = expected.shape[1]
    torch.testing.assert_close(found[:, :kept], expected, rtol=1e-10, atol=1e-12)
    assert found[:, kept:].abs().max() == 0
    channels = selected_channels(passes[-1].masks).long()
    assert count_flops(net, (16, 16)).gated(channels).unique().tolist() == [macs_of(narrow)]

    net.train(), narrow.train()
    with untracked(net), net.path("gated", budget=budget):
        net(images()).square().sum().backward()
    narrow(images()).square().sum().backward()
    gradients = {key: p.grad for key, p in net.named_parameters()}
    for key, p in narrow.named_parameters():
        whole = gradients[key.replace("_", ".", 1) if key.startswith("layer") else key]
        inside = whole[tuple(slice(0, size) for size in p.shape)]
        torch.testing.assert_close(inside, p.grad, rtol=1e-8, atol=1e-10, msg=key)
        assert whole.abs().sum().item() == pytest.approx(inside.abs().sum().item(), rel=1e-12)


def macs_of(net: nn.Module) -> int:
    """Output elements times inputs of each, over all convolutions; for one image."""
    counted = []

    def count(conv, inputs, output):
        counted.append(output[0].numel() * conv.weight[0].numel())

    hooks = [m.register_forward_hook(count) for m in net.modules() if isinstance(m, nn.Conv2d)]
    net(images(1))
    for hook in hooks:
        hook.remove()
    return sum(counted)


def test_the_full_width_is_the_dense_network_bit_for_bit():
    net = slimmable()
    with torch.no_grad():
        with net.path("dense"):
            dense = net(images())
        with net.path("gated", budget=1.0):
            assert torch.equal(net(images()), dense)
        with net.path("gated", budget=0.5):
            assert not torch.equal(net(images()), dense)


def kept(net, budget: float) -> Kept:
    flops = count_flops(net, (16, 16))
    numbers = [number_of_channels(budget, gate.channels) for gate in flops.gates]
    return Kept(tuple(map(torch.arange, numbers)), 0.0)


def test_sliced_it_is_the_narrow_network():
    net = slimmable(width=16)
    sliced = slice_encoder(net, kept(net, 0.5), gates=False).double()
    narrow = Narrow("resnet18", "cifar", 16, 0.5, net.state_dict()).eval()
    torch.testing.assert_close(sliced(images(2)), narrow(images(2)), rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match=r"policy: got \[5, 5, 10, 20, 39\] channels after stem"):
        slice_encoder(net, kept(net, 0.3), gates=False)
    with pytest.raises(InputError, match=r"gates of kind 'slimmable'.*expected gates=drop"):
        slice_encoder(net, kept(net, 0.5), gates=True)


def test_compiled_it_runs_on_pytorch():
    net = slimmable().float()
    with pytest.warns(RuntimeWarning, match="runs on PyTorch"):
        fast = compile_encoder(net, "gated", budget=0.5)
    with torch.no_grad(), net.path("gated", budget=0.5):
        expected = net(images().float())
    torch.testing.assert_close(fast(images().float()), expected, rtol=1e-4, atol=1e-5)


def test_images_of_one_batch_may_have_widths_of_their_own():
    net = slimmable()
    budgets = torch.tensor([0.25, 1.0, 0.5, 0.75, 0.3, 1.0])
    with torch.no_grad():
        with net.path("gated", budget=budgets):
            found = net(images())
        for index, budget in enumerate(budgets.tolist()):
            with net.path("gated", budget=budget):
                expected = net(images())[index]
            torch.testing.assert_close(found[index], expected, rtol=1e-10, atol=1e-12)


# Of ResNet-18 on 32 × 32 pixels, by arithmetic.
FLOPS = {1.0: 703_560_448, 0.75: 396_127_296, 0.5: 176_389_504, 0.25: 44_347_072}


def test_flops_are_those_of_narrow_plain_resnets():
    flops = count_flops(slimmable(width=64).float(), (32, 32))
    assert (flops.dense, flops.lowest_share) == (FLOPS[1.0], 0)
    assert [gate.name for gate in flops.gates[:6]] == [
        *("stem", "layer1", "layer2", "layer3", "layer4", "layer1.0"),
    ]
    for width, expected in FLOPS.items():
        channels = torch.tensor([math.ceil(width * gate.channels) for gate in flops.gates])
        assert int(flops.gated(channels)) == expected
    plain = create_backbone("resnet18_plain", width=16, stem="cifar")
    assert count_flops(plain, (32, 32)).dense == expected
    parts = flops.parts.values()
    assert sum(int(part.gated(channels)) for part in parts) == expected


def test_the_dial_finds_the_width_of_a_share():
    net = slimmable(width=16).float()
    setting = calibrate(net, images().float(), 0.25)
    assert setting.budget == pytest.approx(0.5, abs=0.02)
    assert setting.share == pytest.approx(0.25, abs=0.01)
    with pytest.raises(
        InputError, match=r"got 0.01, expected shares from 0.0\d+ to 1.0000: .*0.25"
    ):
        calibrate(net, images().float(), 0.01)


# BatchNorm's statistics


def batches(size: int = 6):
    return [[part, None] for part in images(12).split(size)]


def state_of(net):
    return {key: value.clone() for key, value in net.state_dict().items()}


def test_recalibrated_statistics_are_those_of_the_narrow_network():
    """With torch's cumulative averages, fed the same batches."""
    net = slimmable()
    narrow = Narrow("resnet18", "cifar", 8, 0.5, net.state_dict())
    for norm in batch_norms(narrow):
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        for part, _ in batches():
            narrow.train()(part)
        before, modes = state_of(net), [m.training for m in net.modules()]
        net.budget = 0.5
        with recalibrated(net, batches(), "gated"):
            with net.path("gated"):
                found = net(images())
            assert not any(m.training for m in net.modules())
        expected = narrow.eval()(images())
    torch.testing.assert_close(found[:, : expected.shape[1]], expected, rtol=1e-10, atol=1e-12)
    after = net.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert [m.training for m in net.modules()] == modes
    assert {norm.momentum for norm in batch_norms(net)} == {0.1}


def test_what_a_path_does_not_take_keeps_its_statistics():
    torch.manual_seed(0)
    net = create_backbone("resnet18_gated", width=4, stem="cifar").double()
    randomise_norms(net)
    before = state_of(net)
    with recalibrated(net.train(), batches(), "gated"):
        after = state_of(net)
    changed = {k for k, v in after.items() if not torch.equal(v, before[k])}
    blocks = {key.split(".running")[0].split(".num")[0] for key in changed}
    assert {"layer1.0.gated_bn1", "bn1", "layer2.0.downsample.1"} <= blocks
    assert not any(".bn1" in key or ".bn2" in key or ".gate." in key for key in changed)
    assert net.training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_an_error_inside_puts_everything_back():
    net = slimmable()
    before = state_of(net)
    with pytest.raises(ZeroDivisionError), recalibrated(net, batches(), "gated"):
        raise ZeroDivisionError
    with pytest.raises(RuntimeError), recalibrated(net, [[images()[:, :2], None]], "gated"):
        pass
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not any(m.training for m in net.modules())
