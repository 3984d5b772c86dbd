"""Encoders from files, without PyTorch, against the module that saved them."""

import functools
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch

import solo_gating_runtime
from solo_gating import InputError, deploy
from solo_gating.gates import GATES, register_gate

from ..deploy.test_engine_kinds import CASES, EverySecond, images, lively, settings
from ..support.encoders import engines_here

ROOT = Path(solo_gating_runtime.__file__).parents[1]
NAMES = ("resnet18_gated", "resnet50_gated")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_a_saved_encoder_is_the_same(case, name, tmp_path):
    net, x, file = lively(name, **CASES[case]), images(3), tmp_path / "encoder.sgx"
    fast = deploy.compile(net)
    expected = fast.features_and_masks(x)
    fast.save(file)
    own, module = solo_gating_runtime.load(file), deploy.load(file)
    for key in ("path", "dtype", "engine", "features", "channels", "threshold", "budget"):
        assert getattr(own, key) == getattr(module, key) == getattr(fast, key)
    features, masks = own.features_and_masks(x.numpy())
    np.testing.assert_array_equal(features, expected[0].numpy())
    for mask, wanted in zip(masks, expected[1], strict=True):
        np.testing.assert_array_equal(mask, wanted.numpy())
    assert torch.equal(module(x), expected[0])
    for key, value in settings(net):
        setattr(fast, key, value)
        setattr(own, key, value)
        np.testing.assert_array_equal(own(x.numpy()), fast(x).numpy())
        fast.save(file)
        assert getattr(solo_gating_runtime.load(file), key) == value


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernel_decides_as_pytorch_does(dtype, tmp_path):
    for case in CASES.values():
        net = lively(**case)
        kernel, slow = (deploy.compile(net, dtype=dtype, engine=e) for e in (None, "pytorch"))
        for key, value in [*settings(net), ("threshold", 0.0)]:
            setattr(kernel, key, value)
            setattr(slow, key, value)
            one, other = (fast._encoder._decisions for fast in (kernel, slow))
            np.testing.assert_array_equal(one.counts, other.counts)
            np.testing.assert_allclose(one.thresholds, other.thresholds, rtol=1e-6, atol=1e-6)


def append(outputs, module, arguments, output):
    outputs.append(output)


@pytest.mark.parametrize("engine", [*engines_here(), "pytorch"])
@pytest.mark.parametrize(
    ("name", "stem", "size"),
    [
        ("resnet18_gated", "cifar", (16, 16)),
        ("resnet18_gated", "imagenet", (33, 50)),
        ("resnet50_gated", "cifar", (9, 13)),
    ],
)
def test_feature_maps_are_the_stages_outputs(engine, name, stem, size):
    net = lively(name, stem=stem, width=12)
    x = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(0))
    for path in ("gated", "dense"):
        expected = []
        encoder = net.encoder(path)
        stages = [getattr(encoder, f"layer{i}") for i in (1, 2, 3, 4)]
        note = functools.partial(append, expected)
        hooks = [stage.register_forward_hook(note) for stage in stages]
        with torch.no_grad(), net.path(path):
            net(x)
        for hook in hooks:
            hook.remove()
        fast = deploy.compile(net, path, engine=engine)
        for fast.threads in (1, 2):
            maps = fast.feature_maps(x)
            assert [tuple(m.shape) for m in maps] == [tuple(m.shape) for m in expected]
            for own, wanted in zip(maps, expected, strict=True):
                assert (own - wanted).abs().max() < 2e-5 * wanted.abs().max()
        arrays = fast.feature_maps(x.numpy())
        assert all((a == m.numpy()).all() for a, m in zip(arrays, maps, strict=True))
        assert [m.shape[0] for m in fast.feature_maps(x[:0])] == [0] * 4


def test_an_encoder_that_only_pytorch_runs_is_not_saved(tmp_path):
    register_gate("every_second")(EverySecond)
    try:
        with pytest.warns(RuntimeWarning, match="runs on PyTorch"):
            fast = deploy.compile(lively(gate="every_second"))
        with pytest.raises(InputError, match="encoder: got one that only PyTorch can run"):
            fast.save(tmp_path / "encoder.sgx")
    finally:
        del GATES["every_second"]
    deploy.compile(lively(), engine="pytorch").save(tmp_path / "encoder.sgx")
    assert deploy.load(tmp_path / "encoder.sgx", "pytorch").engine == "pytorch"


def test_images_and_settings_that_are_not_accepted(tmp_path):
    deploy.compile(lively()).save(tmp_path / "encoder.sgx")
    encoder = solo_gating_runtime.load(tmp_path / "encoder.sgx", "portable")
    assert encoder.engine == "portable"
    with pytest.raises(InputError, match="images: got Tensor, expected NumPy arrays"):
        encoder(images(1))
    with pytest.raises(InputError, match="images: got float64, expected float32"):
        encoder(images(1).double().numpy())
    with pytest.raises(InputError, match=r"images: got the shape \(3, 16, 16\)"):
        encoder(images(1)[0].numpy())
    with pytest.raises(InputError, match="threshold: got 'x', expected a number"):
        encoder.threshold = "x"
    with pytest.raises(
        InputError, match=r"budget: got 0\.5, the network's gates are told no budget"
    ):
        encoder.budget = 0.5
    with pytest.raises(InputError, match="engine: got 'pytorch', expected here are"):
        solo_gating_runtime.load(tmp_path / "encoder.sgx", "pytorch")


SCRIPT = """
import sys
import numpy as np
import solo_gating_runtime
encoder = solo_gating_runtime.load(sys.argv[1])
encoder.threads = 1
np.testing.assert_array_equal(encoder(np.load(sys.argv[2])), np.load(sys.argv[3]))
print(*sorted({"torch", "lightning", "hydra", "solo", "solo_gating"} & set(sys.modules)))
"""


@pytest.fixture
def saved(tmp_path):
    """Arguments for the script."""
    fast, x = deploy.compile(lively()), images(2)
    fast.save(tmp_path / "encoder.sgx")
    np.save(tmp_path / "x.npy", x.numpy())
    np.save(tmp_path / "y.npy", fast(x).numpy())
    return [str(tmp_path / name) for name in ("encoder.sgx", "x.npy", "y.npy")]


def run(python, saved, **environment):
    return subprocess.run(
        [python, "-c", SCRIPT, *saved],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_nothing_of_pytorch_is_imported(saved):
    done = run(sys.executable, saved, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


@pytest.mark.slow
def test_where_there_is_only_numpy(saved, tmp_path):
    """NumPy is this environment's own, by a link, so that nothing is downloaded."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    (packages,) = (tmp_path / "venv").glob("lib/python3*/site-packages")
    own = Path(sysconfig.get_paths()["platlib"])
    for name in [*own.glob("numpy"), *own.glob("numpy.libs")]:
        (packages / name.name).symlink_to(name)
    (packages / "solo_gating_runtime").symlink_to(ROOT / "solo_gating_runtime")
    python = str(tmp_path / "venv" / "bin" / "python")
    done = run(python, saved, PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    missing = subprocess.run([python, "-c", "import torch"], capture_output=True, text=True)
    assert "No module named 'torch'" in missing.stderr
