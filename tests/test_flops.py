"""FLOPs against the published figures and against the formula written out."""

import pytest
import torch

from solo_gating import BACKBONES
from solo_gating.flops import count_flops, count_parameters, selected_channels

DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}


@pytest.mark.parametrize("kind", ["gated", "two_encoders", "plain"])
@pytest.mark.parametrize(
    ("stem", "resolution", "expected"),
    [
        ("cifar", 32, 703_560_448),
        ("imagenet", 96, 333_103_104),
        ("imagenet", 224, 1_813_561_344),
    ],
)
def test_reference_figures(kind, stem, resolution, expected):
    backbone = BACKBONES[f"resnet18_{kind}"](stem=stem)
    assert count_flops(backbone, (resolution, resolution)).dense == expected


def test_gates_of_resnet18_have_the_published_size():
    backbone = BACKBONES["resnet18_gated"]()
    gates = sum(count_parameters(block.gate) for block in backbone.gated_blocks)
    separate = 2 * 2 * sum(block.conv1.out_channels for block in backbone.gated_blocks)
    backbone.fc = torch.nn.Identity()
    dense = count_parameters(backbone) - gates - separate
    assert gates == 241_376
    assert count_flops(backbone, (32, 32)).decisions == 240_640
    assert round(100 * gates / (dense + gates), 2) == 2.11


def formula(depth, width, stem, height, image_width, selected, reduction=4):
    """Multiply-accumulates of the gated and of the dense path, block by block."""
    kernel, stride, padding = (3, 1, 2) if stem == "cifar" else (7, 2, 3)

    def after(size, kernel, stride, padding):
        return (size + 2 * padding - kernel) // stride + 1

    h, w = (after(size, kernel, stride, padding) for size in (height, image_width))
    gated = dense = kernel**2 * 3 * width * h * w
    if stem == "imagenet":
        h, w = (after(size, 3, 2, 1) for size in (h, w))
    channels, index = width, 0
    for stage, blocks in enumerate(DEPTHS[depth]):
        out = width * 2**stage
        for block in range(blocks):
            if stage > 0 and block == 0:
                h, w = (after(size, 3, 2, 1) for size in (h, w))
            shortcut = h * w * channels * out if channels != out else 0
            hidden = max(1, channels // reduction)
            gated += 9 * h * w * selected[index] * (channels + out) + shortcut
            gated += channels * hidden + hidden * out
            dense += 9 * h * w * out * (channels + out) + shortcut
            channels, index = out, index + 1
    return gated, dense


@pytest.mark.parametrize(
    ("depth", "width", "stem", "size"),
    [
        ("resnet18", 1, "cifar", (16, 16)),
        ("resnet18", 7, "imagenet", (61, 45)),
        ("resnet34", 5, "cifar", (33, 20)),
        ("resnet34", 64, "imagenet", (224, 224)),
    ],
)
def test_any_width_depth_and_resolution_follow_the_formula(depth, width, stem, size):
    backbone = BACKBONES[f"{depth}_gated"](width=width, stem=stem)
    flops = count_flops(backbone, size)
    outs = [width * 2**stage for stage, blocks in enumerate(DEPTHS[depth]) for _ in range(blocks)]
    selected = torch.stack([torch.randint(0, out + 1, (4,)) for out in outs], dim=1)
    for row, counted in zip(selected.tolist(), flops.gated(selected).tolist(), strict=True):
        gated, dense = formula(depth, width, stem, *size, row)
        assert (counted, flops.dense) == (gated, dense)


def test_the_ends_of_the_share_are_gates_extra_and_the_fixed_part():
    flops = count_flops(BACKBONES["resnet18_gated"](width=8), (64, 64))
    full = flops.all_channels.double()
    # 64 pixels, width 8: the stem gives 32², the shortcuts 8², 4² and 2².
    stem = 7 * 7 * 3 * 8 * 32 * 32
    shortcuts = sum(8 * 2**i * 8 * 2 ** (i + 1) * (8 // 2**i) ** 2 for i in range(3))
    assert flops.share(full).item() == (flops.dense + flops.decisions) / flops.dense
    assert flops.gated(0 * full).item() == stem + shortcuts + flops.decisions
    assert flops.fixed == stem + shortcuts + flops.decisions


def test_a_batch_s_share_is_the_mean_of_its_images_shares():
    backbone = BACKBONES["resnet18_gated"](width=4, stem="cifar").double().eval()
    images = torch.randn(5, 3, 16, 16, dtype=torch.float64)
    flops = count_flops(backbone, (16, 16))
    with torch.no_grad(), backbone.path("gated") as passes:
        backbone(images)
        channels = selected_channels(passes[-1].masks)
    each = [flops.share(image).item() for image in channels]
    assert len(set(each)) > 1
    assert flops.share(channels.mean(dim=0)).item() == pytest.approx(sum(each) / 5, rel=1e-13)


def test_counting_leaves_the_backbone_alone():
    backbone = BACKBONES["resnet18_gated"](width=4).train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    count_flops(backbone, (32, 32))
    assert backbone.training
    for name, value in backbone.state_dict().items():
        assert value.device.type == "cpu", name
        assert torch.equal(value, before[name]), name
