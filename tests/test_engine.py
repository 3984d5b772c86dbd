"""The engine against the same network in float64, in PyTorch, and against itself."""

import copy
import functools
import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import resnet18, resnet50

from solo_gating import InputError, deploy
from solo_gating.backbones import BACKBONES
from solo_gating.deploy.engine.library import supported_isas
from solo_gating.deploy.static import Kept, slice_encoder

from .helpers import randomise_norms
from .test_evaluation import digit_tensors, enliven, run_config, save_run

ENGINES = (*supported_isas(), "pytorch")
ANY = pytest.mark.parametrize("engine", ENGINES)


def encoder(**kwargs):
    return copy.deepcopy(lively_encoder(**kwargs))


@functools.cache
def lively_encoder(name="resnet18_gated", **kwargs):
    torch.manual_seed(0)
    net = BACKBONES[name](**{"width": 8, "stem": "cifar", **kwargs})
    net.fc = nn.Identity()
    return enliven(net)


def images(number, height=16, width=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, 3, height, width or height, generator=generator)


@torch.no_grad()
def rounding(net, x, path, exact):
    """How much float32 changes PyTorch's own features, of each image."""
    with net.path(path):
        return (net(x) - exact).abs().amax(1)


@torch.no_grad()
def reference(net, x, path="gated"):
    """Features and masks in float64, and how far each logit is from the threshold, relatively."""
    gates = [block.gate for block in net.gated_blocks]
    logits = []
    hooks = [
        gate.expand.register_forward_hook(lambda _, __, out: logits.append(out.flatten(1)))
        for gate in gates
    ]
    try:
        with net.double().path(path) as passes:
            features = net(x.double())
    finally:
        net.float()
        for hook in hooks:
            hook.remove()
    if path == "dense":
        return features, None, None
    margins = [
        (logit - gate.threshold).abs() / logit.abs().max()
        for logit, gate in zip(logits, gates, strict=True)
    ]
    masks = torch.cat(passes[-1].masks, 1) > 0
    return features, masks, torch.cat(margins, 1)


def assert_same(fast, net, x, path="gated"):
    """Features to 1e-5 of the largest (or as exactly as PyTorch); masks, except within rounding."""
    expected, masks, margins = reference(net, x, path)
    features, found = fast.features_and_masks(x)
    found = torch.cat(found, 1)
    surely = torch.ones(len(x), dtype=torch.bool)
    if masks is None:
        assert found.all()
    else:
        assert (found == masks)[margins > 1e-4].all()
        surely = (found == masks).all(1)
    assert surely.float().mean() > 0.8
    difference = (features - expected).abs().amax(1)
    accepted = 1e-5 * expected.abs().max() + 2 * rounding(net, x, path, expected)
    assert (difference <= accepted)[surely].all()


@ANY
@pytest.mark.parametrize(
    ("stem", "width", "size", "number"),
    [
        ("cifar", 8, (16, 16), 17),
        ("cifar", 10, (13, 7), 3),
        ("cifar", 24, (1, 1), 3),
        ("cifar", 64, (32, 32), 1),
        ("imagenet", 8, (33, 50), 3),
        ("imagenet", 12, (7, 7), 64),
        ("imagenet", 40, (1, 9), 3),
        ("imagenet", 16, (112, 112), 1),
    ],
)
def test_it_computes_what_the_backbone_computes(engine, stem, width, size, number):
    net, x = encoder(width=width, stem=stem), images(number, *size)
    for path in ("gated", "dense"):
        assert_same(deploy.compile(net, path, engine=engine), net, x, path)


@pytest.mark.parametrize("engine", [ENGINES[0], "pytorch"])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"separate_bn": False},
        {"name": "resnet34_gated"},
        {"name": "resnet18_two_encoders"},
        {"name": "resnet34_two_encoders", "stem": "imagenet"},
        {"width": 1},
        {"reduction": 1},
        {"threshold": 1.0},
    ],
)
def test_every_kind_of_gated_encoder(engine, kwargs):
    net, x = encoder(**kwargs), images(5)
    for path in ("gated", "dense"):
        assert_same(deploy.compile(net, path, engine=engine), net, x, path)


@ANY
def test_all_off_all_on_and_exactly_one_on(engine):
    net, x = encoder(), images(3)
    fast = deploy.compile(net, engine=engine)
    for threshold, share in ((1e9, 0.0), (-1e9, 1.0)):
        net.threshold = fast.threshold = threshold
        assert torch.cat(fast.features_and_masks(x)[1], 1).float().mean() == share
        assert_same(fast, net, x)
    with torch.no_grad():
        for index, block in enumerate(net.gated_blocks):
            block.gate.norm.bias.fill_(1.0)
            block.gate.norm.weight.zero_()
            block.gate.expand.weight.fill_(-1.0)
            block.gate.expand.weight[index % len(block.gate.expand.weight)] = 1.0
    net.threshold = 0.0
    fast = deploy.compile(net, engine=engine)
    assert all((mask.sum(1) == 1).all() for mask in fast.features_and_masks(x)[1])
    assert_same(fast, net, x)


@ANY
def test_nothing_depends_on_the_batch_or_the_threads(engine):
    net, x = encoder(width=20), images(17, 20)
    fast = deploy.compile(net, engine=engine)
    whole, masks = fast.features_and_masks(x)
    for threads in (1, 2, 3, 5):
        fast.threads = threads
        for split in (1, 3, 16, 17):
            parts = torch.cat([fast(part) for part in x.split(split)])
            assert torch.equal(parts, whole)
    assert 0 < torch.cat(masks, 1).float().mean() < 1
    assert fast(x[:0]).shape == (0, whole.shape[1])


@ANY
def test_sizes_may_change_between_calls(engine):
    net = encoder()
    fast = deploy.compile(net, engine=engine)
    for size in (16, 9, 24, 16):
        assert_same(fast, net, images(2, size))


@ANY
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38, -2e20])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_an_extreme_image_gives_what_pytorch_gives_and_harms_no_other(engine, value, stem):
    net, x = encoder(stem=stem), images(3)
    fast = deploy.compile(net, engine=engine)
    alone = fast(x)
    x[1, 2, 5, 5] = value
    with torch.no_grad(), net.path("gated") as passes:
        expected = net(x)[1]
    features, masks = fast.features_and_masks(x)
    assert torch.equal(features[[0, 2]], alone[[0, 2]])
    assert torch.equal(torch.cat(masks, 1)[1], torch.cat(passes[-1].masks, 1)[1] > 0)
    torch.testing.assert_close(features[1], expected, rtol=1e-3, atol=1e-5, equal_nan=True)


@ANY
def test_python_threads_may_share_it(engine):
    fast = deploy.compile(encoder(), engine=engine)
    fast.threads = 2
    batches = [images(4, 8 + 4 * (seed % 3), seed=seed) for seed in range(12)]
    expected = [fast(batch) for batch in batches]
    start = threading.Barrier(4)

    def work(first):
        start.wait()
        return [torch.equal(fast(batches[i]), expected[i]) for i in range(first, 12, 4)]

    with ThreadPoolExecutor(4) as pool:
        assert all(all(right) for right in pool.map(work, range(4)))


@ANY
def test_arrays_and_tensors_of_any_memory_layout(engine):
    fast = deploy.compile(encoder(), engine=engine)
    x = images(4)
    expected = fast(x)
    array = fast(x.numpy())
    assert isinstance(array, np.ndarray)
    np.testing.assert_array_equal(array, expected.numpy())
    assert torch.equal(fast(x.to(memory_format=torch.channels_last)), expected)
    assert torch.equal(fast(images(8)[::2]), fast(images(8)[::2].clone()))
    read_only = x.numpy().copy()
    read_only.setflags(write=False)
    np.testing.assert_array_equal(fast(read_only), expected.numpy())
    assert torch.equal(nn.Sequential(fast, nn.Identity()).train()(x.requires_grad_()), expected)


@ANY
def test_torchvision_and_a_classifier(engine):
    torch.manual_seed(0)
    net = resnet18(num_classes=10).eval()
    randomise_norms(net)
    with torch.no_grad():
        expected = net.double()(images(2, 64).double())
    fast = deploy.compile(net.float(), path="dense", engine=engine)
    difference = (fast(images(2, 64)) - expected).abs().max() / expected.abs().max()
    assert difference < 1e-5
    assert fast.features == 10


@ANY
@pytest.mark.parametrize("gates", [True, False])
def test_a_sliced_encoder(engine, gates):
    net, x = encoder(), images(5)
    kept = Kept(tuple(torch.arange(0, n, 2 + n % 3) for n in deploy.compile(net).channels), 0.5)
    small = slice_encoder(net, kept, gates)
    fast = deploy.compile(small, path="gated" if gates else "dense", engine=engine)
    expected = small(x)
    assert (fast(x) - expected).abs().max() / expected.abs().max() < 1e-5
    assert fast.channels == tuple(len(indices) for indices in kept.channels)


@pytest.mark.parametrize("engine", [ENGINES[0], "pytorch"])
def test_bfloat16_rounds_the_weights_and_nothing_else(engine):
    net, x = encoder(), images(4)
    fast = deploy.compile(net, "dense", dtype="bfloat16", engine=engine)
    exact = deploy.compile(net, "dense", engine=engine)
    # The same with weights that are rounded after folding.
    slow = deploy.compile(net, "dense", dtype="bfloat16", engine="pytorch")
    assert (fast(x) - slow(x)).abs().max() / slow(x).abs().max() < 1e-5
    assert 1e-4 < (fast(x) - exact(x)).abs().max() / exact(x).abs().max() < 3e-2


def test_weights_are_held_once_and_in_half_the_memory_with_bfloat16():
    net = encoder(width=64, stem="imagenet")
    convolutions = sum(m.weight.numel() for m in net.modules() if isinstance(m, nn.Conv2d))
    engines = [deploy.compile(net, dtype=dtype)._engine for dtype in ("float32", "bfloat16")]
    assert 4 * convolutions < engines[0].nbytes < 4.1 * convolutions
    assert 2 * convolutions < engines[1].nbytes < 2.2 * convolutions


def test_the_threshold_of_the_backbone_and_of_later():
    net, x = encoder(threshold=0.7), images(4)
    fast = deploy.compile(net)
    assert fast.threshold == 0.7
    assert deploy.compile(net, threshold=-0.2).threshold == -0.2
    net.threshold = fast.threshold = 0.3
    assert_same(fast, net, x)
    with pytest.raises(InputError, match="threshold: found nan"):
        fast.threshold = float("nan")


def test_a_checkpoint_on_real_images(tmp_path):
    run = save_run(run_config(tmp_path), tmp_path)
    x, _ = digit_tensors(slice(40))
    for source in (run.checkpoint, str(run.checkpoint)):
        net = run.model.backbone
        assert_same(deploy.compile(source), net, x)
        assert_same(deploy.compile(source, "dense"), net, x, "dense")


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (images(2).double(), "images: found float64, accepted is float32"),
        (images(2).numpy().astype(np.uint8), "images: found uint8, accepted is float32"),
        (images(2)[:, :1], r"images: found the shape \(2, 1, 16, 16\), accepted is B × 3 × H × W"),
        (images(2)[0], r"images: found the shape \(3, 16, 16\)"),
        (torch.zeros(2, 3, 0, 4), r"images: found the shape \(2, 3, 0, 4\)"),
        ([[1.0]], "images: found list, accepted are tensors and NumPy arrays"),
        (torch.empty(1, 3, 8, 8, device="meta"), "images: found the device meta"),
    ],
)
def test_images_of_another_kind_are_refused(x, message):
    with pytest.raises(InputError, match=message):
        deploy.compile(encoder())(x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((resnet18(),), r"path: found gated, this ResNet has dense only"),
        ((nn.Linear(2, 2),), "backbone: found Linear"),
        ((resnet50(), "dense"), "backbone: found Bottleneck, accepted is BasicBlock"),
        ((encoder(), "gatd"), "path: found 'gatd'"),
        (("no/such/file.ckpt",), "no/such/file.ckpt"),
        ((3,), "source: found 3, accepted is a module or a checkpoint"),
    ],
)
def test_sources_that_cannot_be_compiled(arguments, message):
    with pytest.raises(InputError, match=message):
        deploy.compile(*arguments)


def test_options_that_are_not_accepted(monkeypatch):
    net = encoder()
    with pytest.raises(InputError, match="dtype: found 'float16', accepted is one of"):
        deploy.compile(net, dtype="float16")
    with pytest.raises(InputError, match="engine: found 'avx1024', accepted here are"):
        deploy.compile(net, engine="avx1024")
    monkeypatch.setenv("SOLO_GATING_ISA", "sse9")
    with pytest.raises(InputError, match="SOLO_GATING_ISA: found 'sse9'"):
        deploy.compile(net)
    fast = deploy.compile(net, engine="pytorch")
    fast.threads = 0
    with pytest.raises(InputError, match="threads: found 0"):
        fast(images(1))


def test_a_checkpoint_without_gates(tmp_path):
    run = save_run(run_config(tmp_path, "vicreg"), tmp_path)
    with pytest.raises(InputError, match="path: found gated, this ResNet has dense only"):
        deploy.compile(run.checkpoint)


def test_the_environment_chooses_the_engine(monkeypatch):
    for engine in ENGINES:
        monkeypatch.setenv("SOLO_GATING_ISA", engine)
        assert deploy.compile(encoder()).engine == engine
        assert f"engine={engine}" in repr(deploy.compile(encoder()))


def test_a_forked_process_may_call_it():
    fast, x = deploy.compile(encoder()), images(4)
    fast.threads = 2
    expected = fast(x)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=lambda: results.put(fast(x.numpy())))
    child.start()
    np.testing.assert_array_equal(results.get(timeout=60), expected.numpy())
    child.join()
