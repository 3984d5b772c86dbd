"""The two-path ResNets against torchvision's, and how a path is chosen."""

import copy
import re

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from solo_gating import BACKBONES, BaseMethod, InputError
from solo_gating.backbones import ForwardPass

from ..support.helpers import randomise_norms, tiny_config, tiny_model

torchvision_nets = pytest.mark.parametrize("depth", ["resnet18", "resnet34"])


def tiny(name="resnet18_gated", **kwargs):
    backbone = BaseMethod._BACKBONES[name]("vicreg_dual", **{"width": 4, "stem": "cifar", **kwargs})
    backbone.fc = nn.Identity()
    randomise_norms(backbone)
    return backbone.double().eval()


def images(number=4, size=16):
    return torch.randn(number, 3, size, size, dtype=torch.float64)


@torchvision_nets
@pytest.mark.parametrize("kind", ["gated", "two_encoders", "plain"])
def test_the_same_seed_gives_torchvision_s_weights(depth, kind):
    torch.manual_seed(3)
    expected = getattr(torchvision.models, depth)().state_dict()
    torch.manual_seed(3)
    weights = BACKBONES[f"{depth}_{kind}"]().state_dict()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


@torchvision_nets
@pytest.mark.parametrize("training", [True, False])
def test_the_dense_path_is_torchvision_s_bit_for_bit(depth, training):
    ours = BACKBONES[f"{depth}_gated"]().train(training)
    randomise_norms(ours)
    theirs = getattr(torchvision.models, depth)().train(training)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    x = torch.randn(2, 3, 48, 48)
    with torch.no_grad(), ours.path("dense"):
        assert torch.equal(ours(x), theirs(x))
    for name, value in theirs.state_dict().items():  # running statistics too
        assert torch.equal(ours.state_dict()[name], value), name


@pytest.mark.parametrize("path", ["dense", "gated"])
def test_narrow_channels_last_networks_learn_from_the_right_gradients(path):
    """oneDNN's own gradient of a strided shortcut of few channels writes past its memory."""
    reference = tiny(path=path).train()
    for block in reference.gated_blocks:
        block.gate.eval()  # no noise
    net = copy.deepcopy(reference).float().to(memory_format=torch.channels_last)
    x = images(16)
    reference(x).square().sum().backward()
    for _ in range(20):  # one call too many does not always show
        net.zero_grad()
        net(x.float().to(memory_format=torch.channels_last)).square().sum().backward()
    for (name, expected), found in zip(reference.named_parameters(), net.parameters(), strict=True):
        if expected.grad is not None:
            scale = expected.grad.abs().max().item()
            torch.testing.assert_close(
                found.grad.double(), expected.grad, rtol=0, atol=1e-3 * scale, msg=name
            )


@torchvision_nets
@pytest.mark.parametrize("kind", ["gated", "two_encoders"])
def test_torchvision_loads_the_weights(depth, kind):
    weights = BACKBONES[f"{depth}_{kind}"]().state_dict()
    keys = getattr(torchvision.models, depth)().load_state_dict(weights, strict=False)
    own = ("gated_net",) if kind == "two_encoders" else ("gate", "gated_bn1", "gated_bn2")
    assert keys.missing_keys == []
    assert keys.unexpected_keys
    assert all(set(own) & set(key.split(".")) for key in keys.unexpected_keys)


def test_without_separate_batchnorms_only_gates_are_added():
    ours = BACKBONES["resnet18_gated"](separate_bn=False).state_dict()
    extra = set(ours) - set(torchvision.models.resnet18().state_dict())
    assert extra
    assert all(".gate." in key for key in extra)


def test_the_gated_batchnorms_start_as_the_dense_path_s():
    block = BACKBONES["resnet18_gated"](width=4, zero_init_residual=True).layer2[0]
    assert torch.equal(block.gated_bn1.weight, torch.ones(8))
    assert torch.equal(block.gated_bn2.weight, torch.zeros(8))
    assert torch.equal(block.bn2.weight, torch.zeros(8))


# Choosing a path


def test_successive_passes_take_the_named_paths_over_and_over():
    backbone = tiny()
    with torch.no_grad(), backbone.path("gated", "dense", "dense") as passes:
        for number in range(4):
            backbone(images(size=16 + number))
    # As many as there are names are kept, the oldest first.
    assert [(p.path, p.resolution) for p in passes] == [
        ("dense", (17, 17)),
        ("dense", (18, 18)),
        ("gated", (19, 19)),
    ]
    assert [len(p.masks) for p in passes] == [0, 0, 8]


@pytest.mark.parametrize("default", ["gated", "dense"])
def test_a_scope_ends_and_the_default_path_is_back(default):
    backbone, x = tiny(path=default), images()

    def taken():
        features = backbone(x)
        return next(path for path, known in reference.items() if torch.equal(features, known))

    with torch.no_grad():
        reference = {}
        for path in ("gated", "dense"):
            with backbone.path(path):
                reference[path] = backbone(x)
        assert not torch.equal(*reference.values())
        assert taken() == default
        with backbone.path("gated"):
            assert taken() == "gated"
            with backbone.path("dense") as inner:
                assert taken() == "dense"
            assert len(inner) == 1
            assert taken() == "gated"
        with pytest.raises(RuntimeError), backbone.path("gated"):
            raise RuntimeError
        assert taken() == default
        with backbone.path() as passes:
            backbone(x)
        assert passes[-1].path == default


def test_a_pass_holds_what_forward_returned():
    backbone, x = tiny(), images()
    with torch.no_grad(), backbone.path("gated") as passes:
        features = backbone(x)
    assert isinstance(passes[-1], ForwardPass)
    assert passes[-1].features is features


# The gated path


def test_an_image_s_gated_features_do_not_depend_on_its_batch():
    backbone, x = tiny(), images(6)
    with torch.no_grad(), backbone.path("gated") as passes:
        together = backbone(x)
        masks = passes[-1].masks
        for index in range(6):
            alone = backbone(x[index : index + 1])
            torch.testing.assert_close(alone[0], together[index], rtol=1e-10, atol=1e-12)
            for mask, own in zip(masks, passes[-1].masks, strict=True):
                assert torch.equal(mask[index], own[0])


@pytest.mark.parametrize("name", ["resnet18_gated", "resnet18_two_encoders"])
def test_weights_of_a_channel_that_is_off_do_not_matter(name):
    backbone, x = tiny(name), images(1)
    changed = 0
    with torch.no_grad(), backbone.path("gated") as passes:
        features, masks = backbone(x), passes[-1].masks
        for block, mask in zip(backbone.gated_blocks, masks, strict=True):
            off = mask[0] == 0
            block.conv1.weight[off] += 100
            block.conv2.weight[:, off] -= 100
            changed += int(off.sum())
        assert changed > 0
        assert torch.equal(backbone(x), features)
        on = masks[0][0] == 1
        backbone.gated_blocks[0].conv1.weight[on] += 1
        assert not torch.equal(backbone(x), features)


def test_the_two_encoders_share_nothing():
    backbone, x = tiny("resnet18_two_encoders"), images()
    with torch.no_grad():
        dense = backbone(x)
        with backbone.path("gated"):
            gated = backbone(x)
        for parameter in backbone.gated_net.parameters():
            parameter.add_(torch.randn_like(parameter))
        assert torch.equal(backbone(x), dense)
        with backbone.path("gated"):
            assert not torch.equal(backbone(x), gated)


# The stem that solo-learn puts in on CIFAR


@pytest.mark.parametrize("name", ["resnet18_gated", "resnet18_two_encoders", "resnet18_plain"])
@pytest.mark.parametrize("width", [1, 24, 64])
def test_solo_learn_s_cifar_stem_fits_any_width(name, width):
    cfg = tiny_config(
        "vicreg" if "plain" in name else "vicreg_dual",
        backbone={"name": name, "kwargs": {"width": width, "stem": "imagenet"}},
        data={"dataset": "cifar10", "num_classes": 10},
    )
    backbone = tiny_model(cfg, dtype=torch.float32).backbone
    nets = [backbone, *([backbone.gated_net] if "two" in name else [])]
    for net in nets:
        conv = net.conv1
        assert (conv.out_channels, conv.kernel_size, conv.stride) == (width, (3, 3), (1, 1))
        assert conv.padding == (2, 2)
        assert conv.bias is None
        assert isinstance(net.maxpool, nn.Identity)
    if len(nets) == 2:
        assert not torch.equal(nets[0].conv1.weight, nets[1].conv1.weight)
    assert torch.isfinite(backbone(torch.randn(2, 3, 8, 8))).all()


def test_a_stem_of_the_right_width_is_kept_as_it_is():
    backbone = tiny(width=64)
    stem = nn.Conv2d(3, 64, 3, 1, 2)
    backbone.conv1 = stem
    assert backbone.conv1 is stem


def test_a_stem_keeps_everything_but_its_width():
    backbone = tiny(width=5)
    backbone.conv1 = nn.Conv2d(3, 64, 3, 1, 2)
    conv = backbone.conv1
    assert (conv.out_channels, conv.stride, conv.padding) == (5, (1, 1), (2, 2))
    assert conv.bias.shape == (5,)


def test_a_narrow_net_is_initialised_as_torchvision_does():
    backbone = BACKBONES["resnet18_gated"](width=48, zero_init_residual=True)
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
    zero = [
        n for n, m in backbone.named_modules() if isinstance(m, _BatchNorm) and not m.weight.any()
    ]
    assert len(zero) == 16
    assert all(name.endswith("bn2") for name in zero)


@pytest.mark.parametrize(
    ("kwargs", "key"),
    [
        ({"path": "sparse"}, "backbone.kwargs.path"),
        ({"width": 0}, "backbone.kwargs.width"),
        ({"width": 3.5}, "backbone.kwargs.width"),
        ({"width": True}, "backbone.kwargs.width"),
        ({"stem": "mnist"}, "backbone.kwargs.stem"),
        ({"groups": 32}, "backbone.kwargs.groups"),
        ({"width_per_group": 128}, "backbone.kwargs.width_per_group"),
        (
            {"replace_stride_with_dilation": (False, True, True)},
            "backbone.kwargs.replace_stride_with_dilation",
        ),
    ],
)
def test_what_is_not_accepted_is_named(kwargs, key):
    (found,) = kwargs.values()
    with pytest.raises(InputError, match=re.escape(f"{key}: got {found!r}, expected")):
        tiny(**kwargs)


def test_an_unknown_path_is_refused():
    with pytest.raises(InputError, match=r"'sparse'.*gated.*dense"), tiny().path("sparse"):
        pass
