"""The integer reference against PyTorch: where nothing is rounded exactly, else up to the rounding."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from solo_gating_runtime.network import Network

from ..support.integer_reference import _sums, random_network, run

KINDS = {
    "basic": {},
    "bottleneck": {"blocks": ((1, 3, 1),) * 4, "classes": 5},
    "mixed": {"blocks": ((3, 1), (1, 1), (1, 3), (3, 3, 3), (3, 3)), "float_stem": True},
    "imagenet": {"imagenet_stem": True, "classes": 3},
}
EACH = pytest.mark.parametrize("kind", KINDS)


def images(number: int = 3, height: int = 17, width: int = 13) -> np.ndarray:
    generator = np.random.default_rng(1)
    return generator.normal(size=(number, 3, height, width)).astype(np.float32)


def in_float64(
    net: Network, x: np.ndarray, masks: tuple[np.ndarray, ...]
) -> tuple[torch.Tensor, list[float]]:
    """Features of the same network without rounding any activation, and the maps' maxima."""
    largest = []

    def convolved(conv, x):
        weight = torch.from_numpy(conv.weight).double()
        if conv.scale is not None:
            weight = weight * torch.from_numpy(conv.scale).double()[:, None, None, None]
        return F.conv2d(x, weight, torch.from_numpy(conv.bias).double(), conv.stride, conv.padding)

    y, chosen = convolved(net.stem, torch.from_numpy(x).double()).relu(), iter(masks)
    largest.append(float(y.max()))
    if net.max_pool:
        y = F.max_pool2d(y, 3, 2, 1)
    for block in net.blocks:
        out = y
        for conv in block.convolutions[:-1]:
            mask = torch.from_numpy(next(chosen))[:, :, None, None]
            out = convolved(conv, out).relu() * mask
            largest.append(float(out.max()))
        shortcut = y if block.shortcut is None else convolved(block.shortcut, y)
        y = (convolved(block.convolutions[-1], out) + shortcut).relu()
        largest.append(float(y.max()))
    features = y.mean((2, 3))
    if net.linear is not None:
        features = F.linear(features, *(torch.from_numpy(a).double() for a in net.linear))
    return features, largest


@EACH
@pytest.mark.parametrize("stride", [1, 2])
def test_sums_are_those_of_integer_convolutions(kind, stride):
    net = random_network(**KINDS[kind])
    rng = np.random.default_rng(0)
    for conv in net.blocks[1].convolutions:
        conv = replace(conv, stride=stride)
        x = rng.integers(0, 256, (conv.weight.shape[1], 7, 9)).astype(np.uint8)
        unfolded = F.unfold(
            torch.from_numpy(x).double()[None],
            conv.weight.shape[-1],
            padding=conv.padding,
            stride=stride,
        )[0].long()
        expected = torch.from_numpy(conv.weight).long().flatten(1) @ unfolded
        assert (torch.from_numpy(_sums(conv, x)).flatten(1) == expected).all()


def with_integers(net: Network) -> Network:
    """Every scale is 1 and weights are few and small: nothing is rounded, and no map saturates."""
    rng = np.random.default_rng(3)

    def integers(conv):
        fan_in = conv.weight[0].size
        weight = rng.integers(-1, 2, conv.weight.shape) * (
            rng.random(conv.weight.shape) < 2 / fan_in
        )
        bias = np.float32(rng.integers(0, 3, conv.bias.shape))
        scale = None if conv.scale is None else np.ones_like(conv.scale)
        return replace(conv, weight=weight.astype(conv.weight.dtype), bias=bias, scale=scale)

    blocks = tuple(
        replace(
            block,
            convolutions=tuple(map(integers, block.convolutions)),
            shortcut=None if block.shortcut is None else integers(block.shortcut),
            scales=(1.0,) * len(block.scales),
        )
        for block in net.blocks
    )
    return replace(net, stem=integers(net.stem), blocks=blocks, image_scale=1.0, stem_scale=1.0)


@EACH
def test_nothing_is_lost_where_nothing_is_rounded(kind):
    net = with_integers(random_network(**KINDS[kind]))
    x = np.rint(2 * images())
    found = run(net, x)
    assert max(int(map_.max()) for map_ in found.maps) < 255  # nothing saturated
    assert max(int(map_.max()) for map_ in found.maps) > 5
    expected = in_float64(net, x, found.masks)[0].numpy()
    np.testing.assert_allclose(found.features, expected, rtol=1e-6, atol=1e-5)


@EACH
@pytest.mark.parametrize("path", ["gated", "dense"])
def test_maps_lose_no_more_than_their_rounding(kind, path):
    net = random_network(path=path, **KINDS[kind], width=16)
    x = images()
    ones = [np.ones((len(x), channels), bool) for channels in net.hidden]
    masks = run(net, x).masks if path == "gated" else ones
    net = fitted(net, in_float64(net, x, masks)[1])
    found = run(net, x, masks=masks)
    expected = in_float64(net, x, masks)[0].numpy()
    error = np.linalg.norm(found.features - expected) / np.linalg.norm(expected)
    assert error < 0.02


def fitted(net: Network, largest: list[float]) -> Network:
    """The same network with scales with which no map saturates."""
    scales = iter(np.float32(largest) / np.float32(255))
    stem = float(next(scales))
    blocks = tuple(
        replace(block, scales=tuple(float(next(scales)) for _ in block.scales))
        for block in net.blocks
    )
    return replace(net, blocks=blocks, stem_scale=stem)


def test_masks_can_be_forced():
    net, x = random_network(), images()
    own = run(net, x)
    again = run(net, x, masks=own.masks)
    assert (again.features == own.features).all()
    none = [np.zeros_like(mask) for mask in own.masks]
    assert (run(net, x, masks=none).features != own.features).any()
    every = [np.ones_like(mask) for mask in own.masks]
    dense = replace(net, blocks=tuple(replace(block, gates=()) for block in net.blocks))
    assert (run(net, x, masks=every).features == run(dense, x).features).all()


def test_threshold_budget_and_counts_decide():
    x = images(1)
    assert not any(mask.any() for mask in run(random_network(), x, threshold=1e6).masks)
    assert all(mask.all() for mask in run(random_network(), x, threshold=-1e6).masks)
    told = random_network(embedding=True)
    low, high = (run(told, x, budget=budget).masks for budget in (0.05, 0.9))
    assert [m.tolist() for m in low] != [m.tolist() for m in high]
    counted = run(random_network(count="budget"), x, budget=0.3).masks
    assert [int(m.sum()) for m in counted] == [3, 3, 5, 5, 10, 10, 20, 20]
    assert all(int(m.sum()) == 2 for m in run(random_network(count=2), x).masks)


@pytest.mark.parametrize("float_stem", [False, True])
def test_images_without_finite_pixels(float_stem):
    net, x = random_network(float_stem=float_stem), images()
    expected = run(net, x)
    for value in (np.nan, np.inf, -np.inf):
        x[1, 2, 3, 4] = value
        found = run(net, x)
        assert np.isnan(found.features[1]).all()
        assert not any(mask[1].any() for mask in found.masks)
        assert (found.features[[0, 2]] == expected.features[[0, 2]]).all()
    x[1, 2, 3, 4] = 3e38
    assert np.isfinite(run(net, x).features).all()
