"""The int8 engine gives the bits of the slow integer reference, with every instruction set."""

import functools
from dataclasses import replace

import numpy as np
import pytest

from solo_gating.deploy.engine.integer import IntegerEngine
from solo_gating_runtime import InputError
from solo_gating_runtime.encoder import Decisions, Kernel
from solo_gating_runtime.file import to_bytes
from solo_gating_runtime.library import ENGINES, supported_engines
from solo_gating_runtime.network import BUDGET, Block, Convolution, Network

from ..support.encoders import assert_no_split_matters, engines_here
from ..support.integer_reference import BASIC, BOTTLENECK, images, random_network, run

ENGINES_HERE = supported_engines("int8")


@functools.cache
def network(**options):
    net = random_network(**options)
    return net if net.budget_range is None else replace(net, budget=0.5)


@functools.cache
def kernel(engine, **options):
    net = network(**options)
    if engine == "pytorch":
        return IntegerEngine(replace(net, stages=(len(net.blocks),)))
    return Kernel(net, to_bytes(net), engine)


def forced(mask):
    """Decisions whose masks do not depend on logits."""
    thresholds = np.where(mask, np.float32(-1e30), np.float32(1e30))
    return Decisions(thresholds, np.full(len(mask), -1, np.int64), None)


def check(engine, x, threshold=0.0, budget=None, threads=1, **options):
    """Features, masks and the last map are the reference's; returns the masks."""
    net, fast = network(**options), kernel(engine, **options)
    expected = run(net, x, threshold, budget)
    got = fast.run(x, fast.decide(threshold, budget), threads, True)
    masks = np.concatenate(expected.masks, 1)
    np.testing.assert_array_equal(got.masks, masks)
    np.testing.assert_array_equal(got.features, expected.features)
    scale = np.float32(net.blocks[-1].scales[-1])
    np.testing.assert_array_equal(got.maps[-1], expected.maps[-1] * scale)
    return masks


@pytest.mark.parametrize("engine", engines_here("int8"))
@pytest.mark.parametrize("width", [8, 13, 24, 64])
def test_basic_blocks(engine, width):
    masks = check(engine, images(2, 3, 9, 13), width=width, blocks=BASIC)
    assert 0.1 < masks.mean() < 0.9


@pytest.mark.parametrize("engine", engines_here("int8"))
@pytest.mark.parametrize("blocks", [BOTTLENECK, ((3, 3, 3),) * 3, ((3, 1),) * 3, ((1, 1),) * 2])
@pytest.mark.parametrize("path", ["gated", "dense"])
def test_other_blocks(engine, blocks, path):
    for width in (16, 13):
        check(engine, images(2, 3, 7, 9), width=width, blocks=blocks, path=path)


@pytest.mark.parametrize("engine", engines_here("int8"))
@pytest.mark.parametrize("float_stem", [False, True])
@pytest.mark.parametrize("imagenet_stem", [False, True])
def test_stems(engine, float_stem, imagenet_stem):
    options = {
        "width": 24,
        "blocks": BASIC[:2],
        "float_stem": float_stem,
        "imagenet_stem": imagenet_stem,
    }
    check(engine, images(2, 3, 27, 33), **options)


@pytest.mark.parametrize("engine", engines_here("int8"))
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (3, 1), (5, 40), (12, 11)])
def test_sizes(engine, size):
    for path in ("gated", "dense"):
        check(engine, images(1, 3, *size), width=16, blocks=BASIC, path=path, classes=5)


@pytest.mark.parametrize("engine", engines_here("int8"))
def test_what_lies_in_the_border_is_left_out(engine):
    for width in range(1, 13):
        for height in (1, 2, 3, 5):
            check(engine, images(1, 3, height, width), width=64, blocks=BASIC[:2])


@pytest.mark.parametrize("engine", engines_here("int8"))
@pytest.mark.parametrize("density", [0.0, 0.02, 0.1, 0.3, 0.5, 1.0])
def test_masks_of_every_density(engine, density):
    for options in ({"width": 64, "blocks": BASIC[:3]}, {"width": 16, "blocks": BOTTLENECK}):
        net, fast, x = network(**options), kernel(engine, **options), images(2, 3, 8, 9)
        rng = np.random.default_rng(int(100 * density))
        masks = [rng.random((2, channels)) < density for channels in net.hidden]
        expected = run(net, x, masks=masks)
        for i, mask in enumerate(np.concatenate(masks, 1)):
            got = fast.run(x[i : i + 1], forced(mask), 1)
            np.testing.assert_array_equal(got.masks[0], mask)
            np.testing.assert_array_equal(got.features[0], expected.features[i])


@pytest.mark.parametrize("engine", engines_here("int8"))
def test_dials(engine):
    x = images(2, 3, 8, 8)
    basic = {"width": 16, "blocks": BASIC}
    densities = [check(engine, x, threshold, **basic).mean() for threshold in (-1.0, 1.0)]
    assert densities[0] > densities[1]
    for count in (1, 3, 16):
        check(engine, x, count=count, **basic)
    for budget in (0.1, 0.8):
        check(engine, x, budget=budget, count=BUDGET, embedding=True, **basic)
        check(engine, x, budget=budget, embedding=True, **basic)


@pytest.mark.parametrize("engine", [*engines_here("int8"), "pytorch"])
@pytest.mark.parametrize("blocks", [BASIC, BOTTLENECK])
@pytest.mark.parametrize("width", [13, 16])
def test_boosts(engine, blocks, width):
    for budget in (0.05, 0.3, 0.7, 1.0):
        options = {"width": width, "blocks": blocks, "boosting": True}
        masks = check(engine, images(2, 3, 8, 9), budget=budget, **options)
        assert (masks.mean() == 1) == (budget == 1)


@pytest.mark.parametrize("engine", engines_here("int8"))
def test_sums_may_be_as_large_as_they_can(engine):
    check(engine, 100 * images(2, 3, 9, 9), width=64, blocks=BASIC, extreme=True)


@pytest.mark.parametrize("engine", engines_here("int8"))
@pytest.mark.parametrize("path", ["gated", "dense"])
def test_images_that_are_not_finite_harm_no_other(engine, path):
    options = {"width": 16, "blocks": BASIC, "path": path}
    x = images(5, 3, 8, 8)
    x[1, 0, 3, 3], x[2, 1, 0, 0], x[3, 2, 7, 7] = np.nan, np.inf, -np.inf
    x[4] *= 1e38
    net, fast = network(**options), kernel(engine, **options)
    got, expected = fast.run(x, fast.decide(0.0, None), 1, True), run(net, x)
    assert np.isnan(got.features[1:4]).all()
    assert np.isnan(got.maps[-1][1:4]).all()
    assert np.isfinite(got.features[[0, 4]]).all()
    np.testing.assert_array_equal(got.features, expected.features)
    np.testing.assert_array_equal(got.masks, np.concatenate(expected.masks, 1))
    assert (got.masks[1:4] == (path == "dense")).all()


@pytest.mark.parametrize("blocks", [BASIC, BOTTLENECK])
@pytest.mark.parametrize("stem", [{}, {"imagenet_stem": True}, {"float_stem": True}])
def test_threads_and_batches_change_nothing(blocks, stem):
    options = dict(width=64, blocks=blocks, **stem)
    x, fast = images(5, 3, 19, 22), kernel(ENGINES_HERE[0], **options)
    assert_no_split_matters(fast, x)


def test_a_cpu_without_vnni_falls_back(monkeypatch):
    names = list(ENGINES["int8"])
    assert names.index("avx512_vnni") < names.index("avx512") < names.index("avx2")
    monkeypatch.setattr(
        "solo_gating_runtime.library.cpu_features", lambda: frozenset(("avx2", "fma"))
    )
    assert supported_engines("int8") == ("avx2", "portable")


def test_sums_that_could_overflow_are_refused():
    def convolution(inputs, outputs, kernel):
        weight = np.zeros((outputs, inputs, kernel, kernel), np.int8)
        numbers = np.ones(outputs, np.float32)
        return Convolution(weight, numbers, 1, kernel // 2, numbers)

    most = (2**31 - 1) // (255 * 127 * 9)
    for channels in (most, most + 1):
        convolutions = convolution(channels, 8, 3), convolution(8, channels, 1)
        net = Network(
            path="dense",
            stem=convolution(3, channels, 3),
            max_pool=False,
            blocks=(Block(convolutions, None, (), (1.0, 1.0)),),
            linear=None,
            dial=None,
            image_scale=1.0,
            stem_scale=1.0,
        )
        if channels == most:
            Kernel(net, to_bytes(net), ENGINES_HERE[0])
            continue
        with pytest.raises(InputError, match="input channels"):
            Kernel(net, to_bytes(net), ENGINES_HERE[0])
