"""ResNets that are as wide inside their blocks as a policy says."""

import json
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import nn

from solo_gating import BaseMethod, InputError, create_backbone
from solo_gating.backbones import BACKBONES, convolutions
from solo_gating.deploy.dense import dense_resnet
from solo_gating.deploy.static import kept_channels
from solo_gating.flops import count_flops
from solo_gating.policies import read_policy

from ..support.encoders import assert_refused, flops_by_hand

IMAGES = 10


@cache
def flops_of(name, width=4):
    with torch.device("meta"):
        return count_flops(create_backbone(name, width=width, stem="cifar"), (16, 16))


def write_policy(file, width=4, name="resnet18_gated", hidden=None):
    """A policy in which of each gate so many channels are always on, so many depend, and others rest."""
    gates = flops_of(name, width).gates
    blocks = []
    for number, gate in enumerate(gates):
        n = gate.channels // 2 + number % 2 if hidden is None else hidden[number]
        on = n // 2
        selected = [IMAGES] * on + [3] * (n - on) + [0] * (gate.channels - n)
        blocks.append(
            {
                "name": gate.name,
                "channels": gate.channels,
                "selected": selected,
                "always_on": on,
                "always_off": gate.channels - n,
                "input_dependent": n - on,
                "active": 0.3,
                "active_std": 0.1,
            }
        )
    content = {
        "schema": "solo-gating policy 1",
        "backbone": {"name": name, "kwargs": {"width": width}},
        "resolution": [16, 16],
        "images": IMAGES,
        "threshold": 0.0,
        "budget": None,
        "target_budget": 0.3,
        "share": 0.25,
        "share_std": 0.01,
        "blocks": blocks,
        "classes": [],
    }
    file.write_text(json.dumps(content))
    return file


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_widths_are_the_policy_s(name, tmp_path):
    file = write_policy(tmp_path / "policy.json", name=f"{name}_gated")
    with torch.device("meta"):
        net = create_backbone(f"{name}_policy", policy=file, width=4, stem="cifar")
        whole = create_backbone(f"{name}_plain", width=4, stem="cifar")
    counted = iter(read_policy(file).blocks)
    for block, like in zip(net.blocks, whole.blocks, strict=True):
        layers, theirs = convolutions(block), convolutions(like)
        for (_, conv, norm), (_, after, _) in pairwise(layers):
            one = next(counted)
            n = sum(count > 0 for count in one.selected)
            assert n == one.always_on + one.input_dependent
            assert conv.out_channels == norm.num_features == after.in_channels == n
        assert layers[0][1].in_channels == theirs[0][1].in_channels
        assert layers[-1][1].out_channels == theirs[-1][1].out_channels
    assert net.gates == []
    if name == "resnet18":
        kept = kept_channels(read_policy(file), flops_of(f"{name}_gated"), "dynamic", 1)
        found = count_flops(net, (16, 16)).dense / flops_of(f"{name}_gated").dense
        assert found == pytest.approx(kept.share, rel=1e-12)


def test_flops_by_hand(tmp_path):
    hidden = [2, 4, 5, 8, 1, 16, 9, 32]
    file = write_policy(tmp_path / "policy.json", hidden=hidden)
    net = create_backbone("resnet18_policy", policy=file, width=4, stem="cifar")
    decisions = flops_of("resnet18_gated").decisions
    assert count_flops(net, (16, 16)).dense == flops_by_hand(hidden) - decisions
    again = create_backbone("resnet18_policy", hidden=hidden, width=4, stem="cifar")
    again.load_state_dict(net.state_dict())
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(again.eval()(x), net.eval()(x))
    assert torch.equal(dense_resnet(net)(x), net(x))


def test_a_block_without_a_channel_keeps_one(tmp_path):
    file = write_policy(tmp_path / "policy.json", hidden=[2, 0, 5, 8, 1, 16, 9, 32])
    net = create_backbone("resnet18_policy", policy=file, width=4, stem="cifar")
    assert net.architecture["hidden"] == [2, 1, 5, 8, 1, 16, 9, 32]


def test_with_all_channels_and_the_same_seed_it_learns_as_the_plain_one_would(tmp_path):
    """The same network: weights of the one fit the other, and so do the features."""
    plain = create_backbone("resnet18_plain", width=4, stem="cifar")
    hidden = [convolutions(block)[0][1].out_channels for block in plain.blocks]
    net = create_backbone("resnet18_policy", hidden=hidden, width=4, stem="cifar")
    net.load_state_dict(plain.state_dict())
    x = torch.randn(4, 3, 16, 16)
    assert torch.equal(net.train()(x), plain.train()(x))


def test_solo_learn_builds_it_with_its_own_stem(tmp_path):
    """As its `BaseMethod` does: by name, with the stem of 64 channels put in afterwards."""
    file = write_policy(tmp_path / "policy.json", width=8)
    net = BaseMethod._BACKBONES["resnet18_policy"]("vicreg", width=8, policy=str(file))
    assert net.inplanes == 64
    net.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=2, bias=False)
    net.maxpool, net.fc = nn.Identity(), nn.Identity()
    assert net(torch.randn(2, 3, 16, 16)).shape == (2, 64)


@pytest.mark.parametrize(
    ("kwargs", "parts"),
    [
        ({}, ["backbone.kwargs.policy: got no policy", "policy.json", "hidden"]),
        ({"policy": "FILE", "hidden": [1] * 8}, ["got a policy and hidden widths"]),
        ({"policy": "FILE", "width": 8}, ["'FILE'", "[4, 4, 8,", "expected [8, 8, 16,", "width"]),
        ({"policy": "absent.json"}, ["backbone.kwargs.policy", "absent.json"]),
        ({"policy": "DAMAGED"}, ["DAMAGED"]),
        ({"policy": "OTHER"}, ["is no policy"]),
        ({"hidden": [1] * 7}, ["hidden", "expected 8"]),
        ({"hidden": [0] * 8}, ["hidden", "≥ 1"]),
        ({"hidden": "abc"}, ["hidden"]),
        ({"hidden": 4}, ["hidden"]),
    ],
)
def test_what_is_no_policy_of_it_is_refused(kwargs, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_policy(tmp_path / "FILE")
    (tmp_path / "DAMAGED").write_text((tmp_path / "FILE").read_text()[:200])
    (tmp_path / "OTHER").write_text("{}")
    kwargs = {"width": 4, "stem": "cifar", **kwargs}
    assert_refused(lambda: create_backbone("resnet18_policy", **kwargs), *parts)


def test_a_policy_of_another_depth_is_refused(tmp_path):
    file = write_policy(tmp_path / "policy.json")
    for name in ("resnet34", "resnet50"):
        with pytest.raises(InputError, match=r"^backbone.kwargs.policy: .*policy.json"):
            BACKBONES[f"{name}_policy"](policy=str(file), width=4)


def test_residual_branches_start_at_zero_where_they_are_to():
    hidden = [4, 5, 7, 8, 16, 3, 32, 30]
    for zero in (True, False):
        net = create_backbone(
            "resnet18_policy", width=4, stem="cifar", hidden=hidden, zero_init_residual=zero
        )
        assert all(block.bn2.weight.eq(0).all() == zero for block in net.blocks)
        assert all(block.bn1.weight.eq(1).all() for block in net.blocks)
