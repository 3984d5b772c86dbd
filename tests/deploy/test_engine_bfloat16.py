"""The engine that computes in bfloat16 gives the bits of the slow reference, near those of float64."""

import functools
from dataclasses import replace

import numpy as np
import pytest

from solo_gating import deploy
from solo_gating_runtime.encoder import Decisions, Encoder, Kernel
from solo_gating_runtime.file import to_bytes
from solo_gating_runtime.library import computes, supported_engines
from solo_gating_runtime.network import BUDGET

from ..support.bfloat16_reference import LARGEST, in_bfloat16, run
from ..support.encoders import assert_no_split_matters, lively_encoder
from ..support.integer_reference import BASIC, BOTTLENECK, images, random_network

ENGINE = "avx512_bf16"

native = pytest.mark.skipif(
    ENGINE not in supported_engines("bfloat16"), reason="this CPU has no AVX512-BF16"
)


@functools.cache
def network(**options):
    net = in_bfloat16(random_network(**options))
    return net if net.budget_range is None else replace(net, budget=0.5)


@functools.cache
def kernel(**options):
    net = network(**options)
    return Kernel(net, to_bytes(net), ENGINE)


def check(x, threshold=0.0, budget=None, **options):
    """Features, masks and the last map are the reference's; returns the masks."""
    net, fast = network(**options), kernel(**options)
    expected = run(net, x, threshold, budget)
    got = fast.run(x, fast.decide(threshold, budget), 1, True)
    masks = np.concatenate(expected.masks, 1)
    np.testing.assert_array_equal(got.masks, masks)
    np.testing.assert_array_equal(got.maps[-1], expected.maps[-1])
    np.testing.assert_array_equal(got.features, expected.features)
    return masks


@native
@pytest.mark.parametrize("width", [8, 13, 64])
def test_basic_blocks(width):
    assert 0.1 < check(images(1, 3, 9, 13), width=width, blocks=BASIC).mean() < 0.9


@native
@pytest.mark.parametrize("blocks", [BOTTLENECK, ((3, 3, 3),) * 3, ((3, 1),) * 3, ((1, 1),) * 2])
@pytest.mark.parametrize("path", ["gated", "dense"])
def test_other_blocks(blocks, path):
    for width in (16, 13):
        check(images(1, 3, 7, 9), width=width, blocks=blocks, path=path)


@native
@pytest.mark.parametrize("imagenet_stem", [False, True])
def test_stems(imagenet_stem):
    check(images(2, 3, 27, 33), width=24, blocks=BASIC[:2], imagenet_stem=imagenet_stem)


@native
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (3, 1), (5, 40), (12, 11)])
@pytest.mark.parametrize("path", ["gated", "dense"])
def test_sizes(size, path):
    check(images(1, 3, *size), width=16, blocks=BASIC, path=path, classes=5)


@native
def test_what_lies_in_the_border_is_left_out():
    for width in range(2, 12, 3):
        for height in (1, 2, 5):
            check(images(1, 3, height, width), width=32, blocks=BASIC[:2])


@native
@pytest.mark.parametrize("density", [0.0, 0.02, 0.3, 1.0])
def test_masks_of_every_density(density):
    for options in ({"width": 64, "blocks": BASIC[:3]}, {"width": 16, "blocks": BOTTLENECK}):
        net, fast, x = network(**options), kernel(**options), images(1, 3, 8, 9)
        rng = np.random.default_rng(int(100 * density))
        masks = [rng.random((1, channels)) < density for channels in net.hidden]
        mask = np.concatenate(masks, 1)[0]
        thresholds = np.where(mask, np.float32(-1e30), np.float32(1e30))
        got = fast.run(x, Decisions(thresholds, np.full(len(mask), -1, np.int64), None), 1)
        np.testing.assert_array_equal(got.masks[0], mask)
        np.testing.assert_array_equal(got.features, run(net, x, masks=masks).features)


@native
def test_dials():
    x, basic = images(1, 3, 8, 8), {"width": 16, "blocks": BASIC}
    densities = [check(x, threshold, **basic).mean() for threshold in (-1.0, 1.0)]
    assert densities[0] > densities[1]
    check(x, count=3, **basic)
    for budget in (0.1, 0.8):
        check(x, budget=budget, count=BUDGET, embedding=True, **basic)


@native
@pytest.mark.parametrize("blocks", [BASIC, BOTTLENECK])
@pytest.mark.parametrize("width", [13, 16])
def test_boosts(blocks, width):
    for budget in (0.05, 0.3, 0.7, 1.0):
        masks = check(images(1, 3, 7, 9), budget=budget, width=width, blocks=blocks, boosting=True)
        assert (masks.mean() == 1) == (budget == 1)


@native
@pytest.mark.parametrize("blocks", [BASIC, BOTTLENECK])
@pytest.mark.parametrize("path", ["gated", "dense"])
def test_it_is_near_sums_in_float64(blocks, path):
    options = {"width": 64, "blocks": blocks, "path": path}
    net, fast, x = network(**options), kernel(**options), images(4, 3, 16, 16)
    got = fast.run(x, fast.decide(0.0, None), 1)
    own = run(net, x, exact=False)
    assert (got.masks != np.concatenate(own.masks, 1)).mean() < 2e-3
    masks = np.split(got.masks, np.cumsum(net.hidden)[:-1], axis=1)
    expected = run(net, x, masks=masks, exact=False).features
    assert np.linalg.norm(got.features - expected) < 1e-3 * np.linalg.norm(expected)


@native
@pytest.mark.parametrize("path", ["gated", "dense"])
def test_images_that_are_not_finite_or_huge_harm_no_other(path):
    options = {"width": 16, "blocks": BASIC, "path": path}
    x, fast = images(6, 3, 8, 8), kernel(**options)
    x[1, 0, 3, 3], x[2, 1, 0, 0], x[3, 2, 7, 7] = np.nan, np.inf, -np.inf
    x[4] *= np.float32(1e38)
    x[4, 0, 0, :2] = np.finfo(np.float32).max, -np.finfo(np.float32).max
    got = fast.run(x, fast.decide(0.0, None), 1, True)
    assert np.isnan(got.features[1:4]).all()
    assert np.isnan(got.maps[-1][1:4]).all()
    assert (got.masks[1:4] == (path == "dense")).all()
    # What does not fit saturates, in each map.
    assert got.maps[-1][4].max() <= LARGEST
    others = [0, 4, 5]
    expected = run(network(**options), x[others])
    np.testing.assert_array_equal(got.masks[others], np.concatenate(expected.masks, 1))
    np.testing.assert_array_equal(got.maps[-1][others], expected.maps[-1])
    np.testing.assert_array_equal(got.features[others], expected.features)


@native
@pytest.mark.parametrize("blocks", [BASIC, BOTTLENECK])
@pytest.mark.parametrize("stem", [{}, {"imagenet_stem": True}])
def test_threads_and_batches_change_nothing(blocks, stem):
    x, fast = images(5, 3, 19, 22), kernel(width=64, blocks=blocks, **stem)
    assert_no_split_matters(fast, x)


@native
def test_a_file_of_version_1_has_weights_to_be_rounded():
    net = network(width=8, blocks=BASIC)
    unrounded = replace(net, stem=replace(net.stem, weight=net.stem.weight * np.float32(1.001)))
    x = images(2, 3, 9, 9)
    expected = Encoder(net, kernel(width=8, blocks=BASIC), ENGINE)(x)
    found = Encoder(net, Kernel(unrounded, to_bytes(unrounded), ENGINE), ENGINE)(x)
    np.testing.assert_array_equal(found, expected)


def test_engines_say_what_they_compute_in():
    assert computes(ENGINE, "bfloat16") == computes("neon_bf16", "bfloat16") == "bfloat16"
    assert computes("avx512", "bfloat16") == computes("pytorch", "bfloat16") == "float32"
    assert computes("pytorch", "int8") == computes("avx2", "int8") == "int8"
    fast = deploy.compile(lively_encoder(), dtype="bfloat16", engine="pytorch")
    assert fast.computes == "float32"
    assert "dtype=bfloat16 (stored; computes in float32)" in repr(fast)
    assert "dtype=int8," not in repr(fast)


@native
def test_it_is_what_compile_takes_and_reports():
    fast = deploy.compile(lively_encoder(), dtype="bfloat16")
    assert (fast.engine, fast.computes) == (ENGINE, "bfloat16")
    assert "dtype=bfloat16, engine=avx512_bf16" in repr(fast)
    report = fast.report(np.float32(images(8, 3, 16, 16)))
    assert [path.path for path in report.paths] == ["gated", "dense"]
    assert all(0 < path.same_masks_error < 0.03 for path in report.paths)
