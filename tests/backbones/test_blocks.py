"""Residual blocks: torchvision's Bottleneck gated, and a block from outside of the package."""

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock

from solo_gating import BACKBONES, BaseMethod, InputError, create_backbone
from solo_gating.backbones import GatedResNet, TwoEncoderResNet, register_resnet
from solo_gating.deploy import compile as compile_encoder
from solo_gating.deploy.static import kept_channels, slice_encoder
from solo_gating.evaluate.extract import extract
from solo_gating.evaluate.policy import policy_of
from solo_gating.flops import count_flops, selected_channels
from solo_gating.main_pretrain import pretrain

from ..support.encoders import loader, run_config
from ..support.helpers import randomise_norms

SIZE = (37, 29)  # odd, so that every stride rounds


def lively(cls=GatedResNet, block="bottleneck", **kwargs):
    """A short network whose BatchNorms differ."""
    torch.manual_seed(0)
    backbone = cls([1, 2, 1, 1], block=block, width=8, **kwargs).double().eval()
    backbone.fc = nn.Identity()
    randomise_norms(backbone)
    for gate in backbone.gates:
        if hasattr(gate, "norm"):
            nn.init.ones_(gate.norm.bias)  # else all hidden units of a small gate are often off
    return backbone


def multiplications(module, run):
    """Of each convolution that runs, by hooks on modules: k² · C_in · C_out · H · W of one image."""
    found = {}

    def note(conv, inputs, out):
        k = conv.kernel_size[0] * conv.kernel_size[1]
        found[conv] = k * conv.in_channels * conv.out_channels * out.shape[2] * out.shape[3]

    hooks = [
        conv.register_forward_hook(note) for conv in module.modules() if isinstance(conv, nn.Conv2d)
    ]
    run()
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("cls", [GatedResNet, TwoEncoderResNet])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_flops_of_bottlenecks_are_a_count_by_hooks_for_every_image(cls, stem):
    backbone = lively(cls, stem=stem)
    x = (
        torch.randn(3, 3, *SIZE, dtype=torch.float64)
        * torch.tensor([1, 4, 16])[:, None, None, None]
    )
    with torch.no_grad(), backbone.path("gated") as passes:
        macs = multiplications(backbone, lambda: backbone(x))
    masks = passes[-1].masks
    encoder = backbone.gated_net if cls is TwoEncoderResNet else backbone
    spent = torch.zeros(3, dtype=torch.float64)
    dense = 0
    remaining = list(masks)
    for module in encoder.modules():
        if type(module).__name__ == "GatedBottleneck":
            (first, second), remaining = remaining[:2], remaining[2:]
            a, b = first.mean(1), second.mean(1)
            shares = {module.conv1: a, module.conv2: a * b, module.conv3: b}
            for conv, share in shares.items():
                spent += macs[conv] * share
                dense += macs[conv]
            if module.downsample is not None:
                spent += macs[module.downsample[0]]
                dense += macs[module.downsample[0]]
            for gate in (module.gate, module.gate2):
                spent += macs[gate.reduce] + macs[gate.expand]
    spent, dense = spent + macs[encoder.conv1], dense + macs[encoder.conv1]
    flops = count_flops(backbone, SIZE)
    channels = selected_channels(masks)
    assert flops.dense == dense
    assert flops.gated(channels.long()).double().tolist() == pytest.approx(
        spent.tolist(), rel=1e-12
    )
    assert len(spent.unique()) == 3
    # A mean over images has another cost than the images have on average.
    assert abs(float(flops.share(channels.mean(0)) - flops.share(channels).mean())) > 1e-9


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("resnet50", 4_087_136_256),
        pytest.param("resnet101", 7_801_405_440 - 2_048_000, marks=pytest.mark.slow),
    ],
)
def test_the_dense_path_is_torchvision_s(name, flops):
    """FLOPs: torchvision counts the classifier, too."""
    torch.manual_seed(0)
    backbone = create_backbone(f"{name}_gated").eval()
    reference = getattr(torchvision.models, name)()
    reference.fc = nn.Identity()
    reference.load_state_dict(backbone.dense_state_dict())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(backbone(x), reference.eval()(x))
    if flops is not None:
        assert count_flops(backbone, (224, 224)).dense == flops


def test_with_all_channels_and_shared_norms_both_paths_are_one():
    backbone = lively(gate="fixed", separate_bn=False, budget_range=[0.1, 1.0])
    x = torch.randn(2, 3, *SIZE, dtype=torch.float64)
    with torch.no_grad(), backbone.path("gated", budget=1.0):
        gated = backbone(x)
    torch.testing.assert_close(gated, backbone(x), rtol=0, atol=0)


def test_the_gated_path_of_a_bottleneck_by_hand():
    backbone = lively().train()
    block = backbone.layer2[0].eval()
    x = torch.randn(4, block.conv1.in_channels, 9, 7, dtype=torch.float64)
    with torch.no_grad():
        out, (first, second) = block.forward_gated(x)
        hidden = torch.relu(block.gated_bn1(block.conv1(x))) * first[:, :, None, None]
        hidden = torch.relu(block.gated_bn2(block.conv2(hidden))) * second[:, :, None, None]
        expected = torch.relu(block.gated_bn3(block.conv3(hidden)) + block.downsample(x))
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert 0 < float(first.mean()) < 1
    assert not torch.equal(first, second)


def test_masks_of_a_bottleneck_have_gradients():
    backbone = lively().train()
    with backbone.path("gated") as passes:
        backbone(torch.randn(3, 3, 16, 16, dtype=torch.float64))
    flops = count_flops(backbone, (16, 16))
    flops.share(selected_channels(passes[-1].masks)).mean().backward()
    assert all(float(gate.expand.weight.grad.abs().sum()) > 0 for gate in backbone.gates)


@pytest.mark.parametrize("gates", [True, False])
def test_a_bottleneck_is_sliced(gates):
    backbone = lively(stem="cifar").float()
    x = torch.randn(12, 3, 16, 16)
    found = extract(backbone, loader(x), "gated")
    flops = count_flops(backbone, (16, 16))
    policy = policy_of(backbone, found, "resnet50_gated", {}, None)
    assert policy.blocks[1].name == "layer1.0.conv2"
    kept = kept_channels(policy, flops, "dynamic", 1)
    small = slice_encoder(backbone, kept, gates)
    with torch.no_grad():
        if gates:
            torch.testing.assert_close(small(x), found.features, rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in small.parameters()) < sum(
        p.numel() for p in backbone.parameters()
    )
    half = kept_channels(policy, flops, "top:0.4", 1)
    assert 0.38 < half.share <= 0.4 + 0.01


# From outside


class Triple(BasicBlock):
    """Three 3×3 convolutions, as a user would write them."""

    def __init__(self, inplanes, planes, *args, **kwargs):
        super().__init__(inplanes, planes, *args, **kwargs)
        self.conv3 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


def test_a_block_from_outside_is_gated_counted_and_trained(tmp_path):
    register_resnet("resnet_triple", Triple, [1, 1, 1, 1])
    try:
        backbone = lively(block=Triple, gate="fixed", separate_bn=False, stem="cifar")
        x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
        with torch.no_grad(), backbone.path("gated", budget=1.0) as passes:
            torch.testing.assert_close(backbone(x), backbone.forward_dense(x), rtol=0, atol=0)
        assert len(passes[-1].masks) == 2 * 5
        with torch.no_grad():
            macs = multiplications(backbone, lambda: backbone(x))
        assert count_flops(backbone, (16, 16)).dense == sum(macs.values())
        network = lively(block=Triple, stem="cifar").float()
        x = x.float()
        fast = compile_encoder(network)  # in the kernel: nothing warns
        with torch.no_grad(), network.path("gated"):
            torch.testing.assert_close(fast(x), network(x), rtol=1e-4, atol=1e-4)
        with pytest.raises(InputError, match="got GatedTriple, expected GatedBasicBlock"):
            compile_encoder(network, "dense")  # whose forward may be anything
        metrics = pretrain(
            run_config(tmp_path, max_epochs=1, backbone={"name": "resnet_triple_gated"})
        )
        assert metrics["finished"]
    finally:
        for kind in ("gated", "two_encoders", "plain"):
            del BACKBONES[f"resnet_triple_{kind}"]
            del BaseMethod._BACKBONES[f"resnet_triple_{kind}"]
