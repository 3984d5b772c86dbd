"""int8: scales from calibration images, and PyTorch's computation against the integer reference."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from solo_gating import InputError, deploy
from solo_gating.backbones import BACKBONES
from solo_gating.deploy.calibration import calibration_images
from solo_gating.deploy.engine.fold import fold
from solo_gating.deploy.engine.integer import IntegerEngine
from solo_gating.deploy.masked import MaskedNetwork
from solo_gating.deploy.quantise import quantise
from solo_gating_runtime.network import Block, Convolution, Network

from ..support.encoders import (
    all_digits,
    digit_tensors,
    enliven,
    lively_encoder,
    run_config,
    save_run,
)
from ..support.integer_reference import random_network, run

NETWORKS = {
    "basic": {},
    "mixed": {"blocks": ((1, 3, 1), (3, 3), (1, 3, 1), (3, 1), (1, 1), (3, 3, 3)), "classes": 5},
    "float stem": {"float_stem": True, "imagenet_stem": True},
    "budget": {"count": "budget"},
    "embedding": {"embedding": True},
    "count": {"count": 2},
    "dense": {"path": "dense", "imagenet_stem": True},
    "extreme": {"extreme": True},
}


@pytest.fixture(scope="module")
def encoder():
    return lively_encoder()


@pytest.fixture(scope="module")
def images():
    return digit_tensors(slice(0, 64))[0]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return save_run(run_config(folder), folder).checkpoint


# What PyTorch computes of an int8 network


def engine_results(net: Network, x: np.ndarray, threshold: float = 0.0, budget: float | None = 0.3):
    engine = IntegerEngine(net)
    return engine.run(x, engine.decide(threshold, budget), 1, maps=True)


@pytest.mark.parametrize("kind", NETWORKS)
def test_pytorch_gives_the_bits_of_the_reference(kind):
    net = random_network(**NETWORKS[kind], seed=len(kind))
    net = replace(net, stages=(1, len(net.blocks) - 1))
    x = np.random.default_rng(1).normal(size=(4, 3, 15, 18)).astype(np.float32)
    x[1, 2, 3, 4], x[2, 0, 1, 2], x[3] = np.nan, 3e38, 100 * x[3]
    expected = run(net, x, budget=0.3)
    found = engine_results(net, x)
    assert np.array_equal(found.features, expected.features, equal_nan=True)
    assert np.array_equal(found.masks, np.concatenate(expected.masks, axis=1))
    ends, scales = [0, -1], [net.blocks[0].scales[-1], net.blocks[-1].scales[-1]]
    for stage, end, scale in zip(found.maps, ends, scales, strict=True):
        kept = [0, 2, 3]
        assert np.array_equal(stage[kept], expected.maps[end][kept] * np.float32(scale))
        assert np.isnan(stage[1]).all()


def test_gates_without_hidden_units_choose_the_first_channels():
    net = random_network(count="budget")

    def without(gate):
        empty = np.zeros((0, gate.reduce.shape[1]), np.float32)
        none, expand = np.zeros(0, np.float32), np.zeros((len(gate.shift), 0), np.float32)
        return replace(
            gate, reduce=empty, bias=none, expand=expand, shift=np.zeros_like(gate.shift)
        )

    blocks = tuple(replace(b, gates=tuple(map(without, b.gates))) for b in net.blocks)
    net = replace(net, blocks=blocks)
    x = np.random.default_rng(1).normal(size=(2, 3, 9, 9)).astype(np.float32)
    expected, found = run(net, x, budget=0.3), engine_results(net, x)
    assert np.array_equal(found.features, expected.features)
    assert np.array_equal(found.masks, np.concatenate(expected.masks, axis=1))
    assert found.masks[0, :8].tolist() == [True] * 3 + [False] * 5


def test_threshold_decides():
    net = random_network(embedding=True)
    x = np.random.default_rng(1).normal(size=(2, 3, 9, 9)).astype(np.float32)
    for threshold, budget in ((0.7, 0.05), (-1.0, 0.9)):
        expected = np.concatenate(run(net, x, threshold, budget).masks, axis=1)
        assert np.array_equal(engine_results(net, x, threshold, budget).masks, expected)


# Scales


def test_weights_are_rounded_to_the_nearest_of_255_steps(encoder, images):
    net = fold(encoder, "gated").network
    made = quantise(net, images)
    pairs = [(net.stem, made.stem)]
    for block, other in zip(net.blocks, made.blocks, strict=True):
        pairs += zip(block.convolutions, other.convolutions, strict=True)
        if block.shortcut is not None:
            pairs.append((block.shortcut, other.shortcut))
    for conv, rounded in pairs:
        assert rounded.weight.dtype == np.int8
        assert (np.abs(rounded.weight.astype(int)).max(axis=(1, 2, 3)) == 127).all()
        steps = rounded.scale[:, None, None, None]
        assert (np.abs(rounded.weight * steps - conv.weight) <= 0.501 * steps).all()
    assert made.gates == net.gates


@torch.no_grad()
def test_scales_are_those_of_the_largest_numbers(encoder, images):
    seen: dict[str, float] = {}

    def hook(name):
        def noted(module, inputs, out):
            seen[name] = max(seen.get(name, 0.0), float(out.relu().max()))

        return noted

    backbone = copy.deepcopy(encoder)
    hooked = {"stem": backbone.bn1}
    for number, block in enumerate(backbone.gated_blocks):
        hooked[f"out{number}"] = block
        hooked[f"hidden{number}"] = block.bn1
    for name, module in hooked.items():
        module.register_forward_hook(hook(name))
    with backbone.path("dense"):
        backbone(images)
    made = quantise(fold(encoder, "dense").network, images)
    assert made.image_scale == pytest.approx(float(images.abs().max()) / 127)
    assert made.stem_scale == pytest.approx(seen["stem"] / 255, rel=1e-4)
    for number, block in enumerate(made.blocks):
        expected = [seen[f"hidden{number}"] / 255, seen[f"out{number}"] / 255]
        assert block.scales == pytest.approx(expected, rel=1e-4)


def test_hidden_maps_are_measured_with_all_channels(encoder, images):
    """Else another threshold would saturate them."""
    net = fold(encoder, "gated").network
    none = quantise(replace(net, threshold=1e6), images)
    masks = [torch.zeros(len(images), channels, dtype=torch.bool) for channels in net.hidden]
    seen = {}
    MaskedNetwork(net).run(
        images, 0.0, None, masks=masks, note=lambda n, x, mask: seen.update({n: float(x.max())})
    )
    assert none.blocks[0].scales[0] >= seen[1] / 255 * 0.999


def test_both_ends_of_the_range_are_measured(images):
    torch.manual_seed(0)
    backbone = BACKBONES["resnet18_gated"](width=8, stem="cifar", budget_range=(0.05, 0.9))
    backbone.fc = nn.Identity()
    net = fold(enliven(backbone), "gated").network
    alone = quantise(replace(net, budget_range=None), images)
    both = quantise(net, images)
    pairs = [
        (a, b)
        for one, other in zip(alone.blocks, both.blocks, strict=True)
        for a, b in zip(one.scales, other.scales, strict=True)
    ]
    assert all(b >= a for a, b in pairs)
    assert any(b > a for a, b in pairs)


def one_convolution(weight, bias=0.0) -> Network:
    """A dense network of one block, whose weights are given and whose convolutions are 1×1."""
    weight = np.float32(weight)
    zeros = np.full(len(weight), bias, np.float32)
    conv = Convolution(weight[:, :, None, None], zeros)
    block = Block((conv, conv), None)
    return Network("dense", conv, False, (block,), None)


def test_rows_and_maps_of_zeros_are_defined(images):
    weight = np.eye(3)
    weight[1] = 0
    net = one_convolution(weight)
    made = quantise(net, images)
    assert (made.stem.weight[1] == 0).all()
    assert made.stem.scale[1] > 0
    dead = quantise(one_convolution(np.zeros((3, 3)), bias=-1.0), images)
    assert dead.stem_scale == pytest.approx(1 / 255)
    found = engine_results(dead, images.numpy())
    assert (found.features == 0).all()


def test_biases_make_up_for_what_rounding_adds_on_average():
    """Constant images: the mean is all there is."""
    x = torch.ones(32, 3, 4, 4)
    rng = np.random.default_rng(0)
    weight = np.abs(rng.normal(size=(3, 3)))
    net = one_convolution(weight)
    made = quantise(net, x)
    exact, _ = MaskedNetwork(net).run(x, 0.0, None)
    kept = replace(made, stem=replace(made.stem, bias=net.stem.bias))
    # The stem's sums are exact for such an image, up to its own step of 1 / 255.
    stem = (made.stem.weight[:, :, 0, 0] * made.stem.scale[:, None]).sum(1) + made.stem.bias
    np.testing.assert_allclose(stem, weight.sum(1), rtol=1e-6)
    error = [np.abs(engine_results(n, x.numpy()).features - exact.numpy()) for n in (made, kept)]
    assert error[0].max() < 0.01 * exact.max()
    assert error[0].sum() <= error[1].sum()


def test_sums_that_could_overflow_are_refused(images):
    size = 66_400  # · 255 · 127 > 2³¹
    conv = Convolution(np.zeros((1, size, 1, 1), np.float32), np.zeros(1, np.float32))
    net = replace(one_convolution(np.eye(3)), stem=conv)
    with pytest.raises(InputError, match="66400 products in the stem, expected at most 66311"):
        quantise(replace(net, blocks=()), torch.zeros(1, size, 1, 1))


def test_maps_that_overflow_are_refused(images):
    with pytest.raises(InputError, match="maps overflow"):
        quantise(one_convolution(1e30 * np.eye(3)), 1e10 * images)


# compile


def test_compiled_on_pytorch_is_the_network_that_calibration_gives(encoder, images):
    fast = deploy.compile(encoder, dtype="int8", calibration=images, engine="pytorch")
    expected = run(quantise(fold(encoder, "gated").network, images), images[:5].numpy())
    features, masks = fast.features_and_masks(images[:5])
    assert (features.numpy() == expected.features).all()
    for mask, wanted in zip(masks, expected.masks, strict=True):
        assert (mask.numpy() == wanted).all()
    assert "dtype=int8" in repr(fast)
    assert "calibrated on 64 images" in repr(fast)


@pytest.mark.parametrize("path", ["gated", "dense"])
@pytest.mark.parametrize("float_stem", [False, True])
def test_features_stay_near(encoder, images, path, float_stem):
    fast = deploy.compile(
        encoder,
        path,
        dtype="int8",
        calibration=images,
        float_stem=float_stem,
        engine="pytorch",
    )
    net = fold(encoder, path).network
    others = digit_tensors(slice(100, 130))[0]
    found, masks = fast.features_and_masks(others)
    exact, _ = MaskedNetwork(net).run(others, 0.0, None, masks=masks)
    assert (found - exact).norm() / exact.norm() < 0.06  # of a narrow, untrained network


def test_a_file_keeps_it(encoder, images, tmp_path):
    fast = deploy.compile(encoder, dtype="int8", calibration=images, engine="pytorch")
    fast.save(tmp_path / "encoder.sgx")
    again = deploy.load(tmp_path / "encoder.sgx", engine="pytorch")
    assert torch.equal(again(images[:4]), fast(images[:4]))


# Calibration images as users have them


def kinds_of(checkpoint, tmp_path):
    pixels = np.uint8(all_digits().images[:40] * 15)
    (tmp_path / "images" / "below").mkdir(parents=True)
    for number, image in enumerate(pixels):
        place = tmp_path / "images" / ("below" if number % 2 else "") / f"{number:02}.png"
        Image.fromarray(image).resize((16, 16)).save(place)
    return {
        "folder": tmp_path / "images",
        "overrides": [f"data.train_path={checkpoint.parent / 'train.npz'}"],
        "pre-training's": [],
    }


def test_folders_and_configs_are_prepared_as_in_training(checkpoint, tmp_path):
    kinds = kinds_of(checkpoint, tmp_path)
    found = {kind: calibration_images(given, checkpoint, 3) for kind, given in kinds.items()}
    assert {kind: tuple(images.shape) for kind, images in found.items()} == {
        "folder": (40, 3, 16, 16),
        "overrides": (96, 3, 16, 16),
        "pre-training's": (96, 3, 16, 16),
    }
    assert torch.equal(found["overrides"], found["pre-training's"])
    array = np.load(checkpoint.parent / "train.npz")["images"][0]
    mean, std = (np.array(v) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    expected = (array / 255 - mean) / std
    np.testing.assert_allclose(found["overrides"][0].permute(1, 2, 0).numpy(), expected, atol=1e-5)


def test_a_checkpoint_is_compiled_with_its_own_images(checkpoint):
    fast = deploy.compile(checkpoint, dtype="int8", calibration=[], engine="pytorch")
    assert "calibrated on 96 images" in repr(fast)


def test_no_more_than_256_images_are_used_from_all_over():
    given = torch.arange(1000.0)[:, None, None, None].expand(-1, 3, 4, 4)
    found = calibration_images(given, None, 3)[:, 0, 0, 0]
    assert len(found) == 256
    assert found[0] == 0
    assert found[-1] > 990
    assert found.diff().min() >= 3
    assert torch.equal(found, calibration_images(given.numpy(), None, 3)[:, 0, 0, 0])


BAD = SimpleNamespace(
    few=torch.zeros(31, 3, 8, 8),
    none=torch.zeros(0, 3, 8, 8),
    shape=torch.zeros(40, 1, 8, 8),
    flat=torch.zeros(40, 3),
    small=torch.zeros(40, 3, 0, 8),
    dtype=torch.zeros(40, 3, 8, 8, dtype=torch.uint8),
    nan=torch.full((40, 3, 8, 8), torch.nan),
    number=3,
    objects=np.full((40, 3, 8, 8), None),
    no_folder="absent",
    folder=".",
    overrides=["data.train_path=x"],
    mixed=["x", 1],
)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("few", "got 31 images, expected at least 32"),
        ("none", "got 0 images, expected at least 32"),
        ("shape", r"got the shape \(40, 1, 8, 8\), expected N × 3 × H × W"),
        ("flat", r"got the shape \(40, 3\)"),
        ("small", r"got the shape \(40, 3, 0, 8\)"),
        ("dtype", "got uint8, expected float32, normalised"),
        ("nan", "got NaN or infinity, expected finite"),
        ("number", "got int, expected a tensor or an array"),
        ("objects", "got object, expected float32"),
        ("no_folder", "'absent' is no folder"),
        ("folder", "got a folder, which needs a checkpoint as source"),
        ("overrides", "got data to read, which needs a checkpoint as source"),
        ("mixed", "got list, expected a tensor or an array"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_sentence(encoder, name, message):
    with pytest.raises(InputError, match=f"^calibration: .*{message}") as error:
        deploy.compile(encoder, dtype="int8", calibration=getattr(BAD, name))
    assert "\n" not in str(error.value)


def test_an_empty_folder_is_refused(checkpoint, tmp_path):
    with pytest.raises(
        InputError, match=r"^calibration: got no images in .*, expected at least 32"
    ):
        deploy.compile(checkpoint, dtype="int8", calibration=tmp_path)


def test_int8_needs_calibration_and_nothing_else_does(encoder, images):
    with pytest.raises(InputError, match=r"^calibration: missing, dtype=int8 needs"):
        deploy.compile(encoder, dtype="int8")
    with pytest.raises(InputError, match=r"^calibration: got one for dtype=bfloat16"):
        deploy.compile(encoder, dtype="bfloat16", calibration=images)
    with pytest.raises(InputError, match=r"^float_stem: got one for dtype=float32"):
        deploy.compile(encoder, float_stem=True)
