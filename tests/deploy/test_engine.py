"""The engine against the same network in float64, in PyTorch, and against itself."""

import copy
import functools
import math
import multiprocessing
import resource
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import parametrizations, prune
from torchvision.models import resnet18, resnext50_32x4d
from torchvision.models.resnet import BasicBlock
from torchvision.tv_tensors import Image

from solo_gating import InputError, deploy
from solo_gating.backbones import BACKBONES, GatedResNet
from solo_gating.deploy.static import Kept, slice_encoder
from solo_gating_runtime.encoder import MOST_THREADS
from solo_gating_runtime.library import supported_engines

from ..support.encoders import digit_tensors, engines_here, enliven, run_config, save_run
from ..support.helpers import randomise_norms

ENGINES = (*supported_engines(), "pytorch")
ANY = pytest.mark.parametrize("engine", [*engines_here(), "pytorch"])


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
@pytest.mark.parametrize(
    ("stem", "value"),
    [
        *product(["cifar", "imagenet"], [math.nan, math.inf, -math.inf, 1e38, -2e20]),
        ("cifar", 3e38),  # whether sums of the other stem's pixels overflow is up to their order
    ],
)
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
def test_arrays_and_tensors_that_are_not_what_lies_in_memory(engine):
    fast = deploy.compile(encoder(), engine=engine)
    x = images(4)
    expected, array = fast(x), x.numpy()
    bytes_ = np.empty(array.nbytes + 1, np.uint8)[1:]
    unaligned = bytes_.view(np.float32).reshape(array.shape)
    unaligned[:] = array
    same = {
        "reversed": array[::-1, :, ::-1].copy()[::-1, :, ::-1],
        "unaligned": unaligned,
        "Fortran's order": np.asfortranarray(array),
        "in a larger one": np.pad(array, 1)[1:-1, 1:-1, 1:-1, 1:-1],
    }
    for name, value in same.items():
        np.testing.assert_array_equal(fast(value), expected.numpy(), err_msg=name)
    assert torch.equal(fast(Image(x[:1])), expected[:1])
    assert torch.equal(fast(torch.complex(x, -x).conj().imag), expected)
    assert torch.equal(fast(nn.Parameter(x)), expected)
    repeated = np.broadcast_to(array[:1, :1, :1, :1], array.shape)
    np.testing.assert_array_equal(fast(repeated), fast(repeated.copy()))
    read_only = array.copy()
    read_only.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast(read_only)


def test_traced_images_are_refused():
    fast = deploy.compile(encoder(), engine="pytorch")
    with FakeTensorMode(), pytest.raises(InputError, match="images: got a FakeTensor"):
        fast(torch.empty(2, 3, 16, 16))
    with pytest.raises(InputError, match="images: got a Tensor without memory of its own"):
        torch.func.vmap(fast)(images(4)[:, None])


def test_there_is_no_gradient_and_it_says_so():
    fast, x = deploy.compile(encoder(), engine="pytorch"), images(1).requires_grad_()
    with pytest.warns(RuntimeWarning, match="they require a gradient, and .* gives none"):
        assert not fast(x).requires_grad
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        fast(x)


def test_it_cannot_be_copied():
    for engine in (ENGINES[0], "pytorch"):
        with pytest.raises(TypeError, match="cannot be copied or pickled; compile the backbone"):
            copy.deepcopy(deploy.compile(encoder(), engine=engine))


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


@pytest.mark.parametrize("engine", ["portable", "pytorch"])
def test_stored_bfloat16_rounds_the_weights_and_nothing_else(engine):
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
    engines = [
        deploy.compile(net, dtype=dtype)._encoder.backend for dtype in ("float32", "bfloat16")
    ]
    assert 4 * convolutions < engines[0].nbytes < 4.1 * convolutions
    assert 2 * convolutions < engines[1].nbytes < 2.2 * convolutions


def test_the_threshold_of_the_backbone_and_of_later():
    net, x = encoder(threshold=0.7), images(4)
    fast = deploy.compile(net)
    assert fast.threshold == 0.7
    assert deploy.compile(net, threshold=-0.2).threshold == -0.2
    net.threshold = fast.threshold = 0.3
    assert_same(fast, net, x)
    with pytest.raises(InputError, match="threshold: got nan"):
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
        (images(2).double(), "images: got float64, expected float32"),
        (images(2).numpy().astype(np.uint8), "images: got uint8, expected float32"),
        (images(2)[:, :1], r"images: got the shape \(2, 1, 16, 16\), expected B × 3 × H × W"),
        (images(2)[0], r"images: got the shape \(3, 16, 16\)"),
        (torch.zeros(2, 3, 0, 4), r"images: got the shape \(2, 3, 0, 4\)"),
        ([[1.0]], "images: got list, expected tensors and NumPy arrays"),
        (torch.empty(1, 3, 8, 8, device="meta"), "images: got the device meta"),
        (images(2).numpy().astype(">f4"), "images: got >f4, expected float32"),
        (images(2).to(torch.complex64), "images: got complex64, expected float32"),
        (images(2).to_sparse(), "images: got a sparse or nested tensor"),
        (torch.nested.nested_tensor([images(1)[0]] * 2), "images: got a sparse or nested tensor"),
    ],
)
def test_images_of_another_kind_are_refused(x, message):
    with pytest.raises(InputError, match=message):
        deploy.compile(encoder())(x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((resnet18(),), r"path: got gated, this ResNet has dense only"),
        ((nn.Linear(2, 2),), "backbone: got Linear"),
        (
            (resnext50_32x4d(), "dense"),
            "backbone: got groups=32, expected 1 for layer1.0.conv2",
        ),
        ((encoder(), "gatd"), "path: got 'gatd'"),
        (("no/such/file.ckpt",), "no/such/file.ckpt"),
        ((3,), "source: got 3, expected a module or a checkpoint"),
    ],
)
def test_sources_that_cannot_be_compiled(arguments, message):
    with pytest.raises(InputError, match=message):
        deploy.compile(*arguments)


def test_options_that_are_not_accepted(monkeypatch):
    net = encoder()
    with pytest.raises(InputError, match="dtype: got 'float16', expected one of"):
        deploy.compile(net, dtype="float16")
    with pytest.raises(InputError, match="engine: got 'avx1024', expected here are"):
        deploy.compile(net, engine="avx1024")
    monkeypatch.setenv("SOLO_GATING_ISA", "sse9")
    with pytest.raises(InputError, match="SOLO_GATING_ISA: got 'sse9'"):
        deploy.compile(net)


@pytest.mark.parametrize("threads", [0, -1, 2.0, True, "2", MOST_THREADS + 1, 100_000, 2**32, None])
def test_numbers_of_threads_that_are_not_accepted(threads):
    fast = deploy.compile(encoder())
    fast.threads = threads
    with pytest.raises(InputError, match=f"threads: got .*, expected .* 1 to {MOST_THREADS}"):
        fast(images(1))


def test_numbers_of_numpy():
    net, x = encoder(budget_range=(0.1, 0.9)), images(3)
    fast = deploy.compile(net, threshold=np.float32(0.25), budget=np.float32(0.5))
    expected = deploy.compile(net, threshold=0.25, budget=0.5)(x)
    fast.threads = np.int64(2)
    assert torch.equal(fast(x), expected)
    fast.budget, fast.threshold, fast.threads = np.float64(0.5), np.int32(0), np.uint8(1)
    assert torch.equal(fast(x), deploy.compile(net, threshold=0, budget=0.5)(x))
    for value in (np.bool_(True), True, np.float32("nan"), np.array([0.5])):
        with pytest.raises(InputError, match="budget: got"):
            fast.budget = value
        with pytest.raises(InputError, match="threshold: got"):
            fast.threshold = value


def test_a_checkpoint_without_gates(tmp_path):
    run = save_run(run_config(tmp_path, "vicreg"), tmp_path)
    with pytest.raises(InputError, match="path: got gated, this ResNet has dense only"):
        deploy.compile(run.checkpoint)


@ANY
def test_the_environment_chooses_the_engine(engine, monkeypatch):
    monkeypatch.setenv("SOLO_GATING_ISA", engine)
    fast = deploy.compile(encoder())
    assert fast.engine == engine
    assert f"engine={engine}" in repr(fast)


def in_a_fork(function):
    """What a function returns in a forked process; its exit code if that ended otherwise."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    child = context.Process(target=lambda: results.put(function()))
    child.start()
    child.join(timeout=30)
    if child.is_alive():
        child.kill()
        return "hung"
    return results.get() if child.exitcode == 0 else child.exitcode


def with_default_dtype(dtype, function):
    torch.set_default_dtype(dtype)
    return function()


def with_default_device(device, function):
    torch.set_default_device(device)
    return function()


def with_little_memory(function):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**26,) * 2)
    return function()


def test_no_state_of_the_process_and_no_size_is_deadly():
    net, x = encoder(width=12, budget_range=(0.1, 0.9)), images(4)
    fast = deploy.compile(net)
    fast.threads = 2
    slow = deploy.compile(net, engine="pytorch")
    expected, masks = (
        fast(x).numpy(),
        [mask.numpy() for mask in fast.features_and_masks(x)[1]],
    )

    def same():
        """Whether all is as before, in what is there and in what is made now."""
        own = [deploy.compile(net), deploy.compile(net, engine="pytorch")]
        own[0].threads = 2
        for engine in (fast, slow, *own):
            engine.budget = 0.5
            for images_ in (x, x.numpy()):
                features, found = engine.features_and_masks(images_)
                if isinstance(images_, torch.Tensor):
                    assert features.device.type == "cpu"
                    features, found = features.numpy(), [mask.numpy() for mask in found]
                np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)
                assert features.dtype == np.float32
                assert all((a == b).all() for a, b in zip(found, masks, strict=True))
            assert engine(x[:0]).shape == (0, expected.shape[1])
        return "right"

    big = np.zeros((1, 3, 3000, 3000), np.float32)

    def no_memory():
        try:
            return str(fast(big))
        except MemoryError as error:
            np.testing.assert_array_equal(fast(x.numpy()), expected)
            return str(error)

    def too_many_pixels():
        engine = fast._encoder.backend
        nothing = (None,) * 5
        return engine._library.gated_run(engine._opened, None, 1, 2**16, 2**15, *nothing, 1)

    results = {
        **{
            str(dtype): in_a_fork(lambda dtype=dtype: with_default_dtype(dtype, same))
            for dtype in (torch.float16, torch.bfloat16, torch.float64)
        },
        "meta": in_a_fork(lambda: with_default_device("meta", same)),
        "autocast": in_a_fork(lambda: torch.autocast("cpu", torch.bfloat16)(same)()),
        "inference": in_a_fork(lambda: torch.inference_mode()(same)()),
        "no memory": in_a_fork(lambda: with_little_memory(no_memory)),
        "too many pixels": in_a_fork(too_many_pixels),
    }
    assert results == {
        **dict.fromkeys(list(results)[:6], "right"),
        "no memory": "there is not enough memory for images of 3000 × 3000 pixels",
        "too many pixels": 2,
    }


def test_a_checkpoint_is_read_in_float32_whatever_the_default(tmp_path):
    run = save_run(run_config(tmp_path), tmp_path)
    x = images(2)
    expected = deploy.compile(run.checkpoint)(x)

    def same():
        return torch.equal(deploy.compile(run.checkpoint)(x), expected)

    assert in_a_fork(lambda: with_default_dtype(torch.float16, same)) is True
    assert in_a_fork(lambda: with_default_device("meta", same)) is True


def test_a_forked_process_may_call_it_and_compile_its_own():
    net, x = encoder(width=32), images(4)
    fast = deploy.compile(net)
    fast.threads = 2
    expected = fast(x).numpy()
    torch.set_num_threads(2)
    try:  # PyTorch's own threads do not survive a fork either
        net(x)
        torch.zeros(2**20).exp_()

        def again(engine=None):
            own = deploy.compile(net, engine=engine)
            own.threads = 2
            return own(x).numpy()

        np.testing.assert_array_equal(in_a_fork(lambda: fast(x.numpy())), expected)
        np.testing.assert_array_equal(in_a_fork(again), expected)
        assert np.allclose(in_a_fork(lambda: again("pytorch")), expected, rtol=1e-4, atol=1e-5)
    finally:
        torch.set_num_threads(1)
    np.testing.assert_array_equal(fast(x).numpy(), expected)


class Features(torch.utils.data.Dataset):
    """A dataset that computes features, as workers of a DataLoader do."""

    def __init__(self, net, fast, x):
        self.net, self.fast, self.x = net, fast, x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        own = deploy.compile(self.net)
        own.threads = 2
        one = self.x[index : index + 1]
        return self.fast(one)[0], own(one)[0]


def test_in_the_workers_of_a_data_loader():
    net, x = encoder(), images(4)
    fast = deploy.compile(net)
    fast.threads = 2
    expected = fast(x)
    loader = torch.utils.data.DataLoader(
        Features(net, fast, x), 2, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    for inherited, own in loader:
        assert torch.equal(inherited, own)
        assert torch.equal(inherited, expected[: len(own)])
        expected = expected[len(own) :]


def conv(block, name, **changes):
    """Another convolution in a block's place of one."""
    old = block.get_submodule(name)
    arguments = {"kernel_size": old.kernel_size, "stride": old.stride, "padding": old.padding}
    arguments |= {"bias": False, **changes}
    setattr(block, name, nn.Conv2d(old.in_channels, old.out_channels, **arguments))


class Subclass(GatedResNet):
    def forward(self, x):
        return super().forward(2 * x)


class Doubled(BasicBlock):
    def forward(self, x):
        return 2 * super().forward(x)


class DoubledConvolution(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def set_class(module, cls):
    module.__class__ = cls


def set_weight(conv, change):
    with torch.no_grad():
        conv.weight = nn.Parameter(change(conv.weight), requires_grad=False)


def double(_, arguments, output=None):
    return 2 * (arguments[0] if output is None else output)


ALTERATIONS = {
    "conv1 of 5 × 5": lambda n, b: conv(b, "conv1", kernel_size=5, padding=2),
    "conv1 of 1 × 1": lambda n, b: conv(b, "conv1", kernel_size=1, padding=0),
    "conv2 of 1 × 3": lambda n, b: conv(b, "conv2", kernel_size=(1, 3), padding=(0, 1)),
    "padding": lambda n, b: conv(b, "conv2", padding="same"),
    "no padding": lambda n, b: set_padding(b),
    "dilation": lambda n, b: conv(b, "conv1", dilation=2, padding=2),
    "groups": lambda n, b: conv(b, "conv1", groups=2),
    "reflected": lambda n, b: conv(b, "conv2", padding_mode="reflect"),
    "a longer stride": lambda n, b: [conv(b, "conv1", stride=4), conv3(b, 1, 0, 4)],
    "two strides": lambda n, b: conv(b, "conv1", stride=(2, 1)),
    "shortcut of 3 × 3": lambda n, b: conv3(b, 3, 1, 2),
    "shortcut that pools": lambda n, b: b.downsample.insert(0, nn.AvgPool2d(1)),
    "shortcut with an activation": lambda n, b: b.downsample.append(nn.ReLU()),
    "shortcut that is none": lambda n, b: setattr(b, "downsample", nn.Identity()),
    "no shortcut": lambda n, b: setattr(b, "downsample", None),
    "GELU": lambda n, b: setattr(b, "relu", nn.GELU()),
    "ReLU6": lambda n, b: setattr(b, "relu", nn.ReLU6()),
    "GELU after the stem": lambda n, b: setattr(n, "relu", nn.GELU()),
    "group norm": lambda n, b: setattr(b, "bn2", nn.GroupNorm(2, 16)),
    "batch statistics": lambda n, b: setattr(
        b, "bn2", nn.BatchNorm2d(16, track_running_stats=False)
    ),
    "no norm": lambda n, b: setattr(b, "bn1", nn.Identity()),
    "a stem of several parts": lambda n, b: n._modules.update(
        conv1=nn.Sequential(n.conv1, nn.Conv2d(8, 8, 3))
    ),
    "oblong stem": lambda n, b: set_stem(n, kernel_size=(3, 5), padding=(1, 2)),
    "dilated stem": lambda n, b: set_stem(n, kernel_size=3, padding=2, dilation=2),
    "stem with circular padding": lambda n, b: set_stem(
        n, kernel_size=3, padding=1, padding_mode="circular"
    ),
    "a stem's stride": lambda n, b: set_stem(n, kernel_size=3, padding=1, stride=(1, 2)),
    "average pooling": lambda n, b: setattr(n, "maxpool", nn.AvgPool2d(3, 2, 1)),
    "another max-pool": lambda n, b: setattr(n, "maxpool", nn.MaxPool2d(2)),
    "a max-pool that rounds up": lambda n, b: setattr(
        n, "maxpool", nn.MaxPool2d(3, 2, 1, ceil_mode=True)
    ),
    "a dilated max-pool": lambda n, b: setattr(n, "maxpool", nn.MaxPool2d(3, 2, 1, dilation=2)),
    "max over the map": lambda n, b: setattr(n, "avgpool", nn.AdaptiveMaxPool2d(1)),
    "4 means": lambda n, b: setattr(n, "avgpool", nn.AdaptiveAvgPool2d(2)),
    "a head of two layers": lambda n, b: setattr(
        n, "fc", nn.Sequential(nn.Linear(64, 4), nn.ReLU())
    ),
    "dropout as fc": lambda n, b: setattr(n, "fc", nn.Dropout()),
    "fc of another width": lambda n, b: setattr(n, "fc", nn.Linear(32, 4)),
    "a hook": lambda n, b: b.conv1.register_forward_hook(double),
    "a hook of a stage": lambda n, b: n.layer3.register_forward_hook(double),
    "a hook of the network": lambda n, b: n.register_forward_pre_hook(double),
    "a hook with keywords": lambda n, b: b.relu.register_forward_hook(
        lambda _, x, kwargs, out: 2 * out, with_kwargs=True
    ),
    "weight norm": lambda n, b: parametrizations.weight_norm(b.conv1),
    "weight norm of old": lambda n, b: nn.utils.weight_norm(b.conv2),
    "spectral norm": lambda n, b: parametrizations.spectral_norm(b.downsample[0]),
    "pruning": lambda n, b: prune.l1_unstructured(b.conv1, "weight", 0.5),
    "a subclass of the network": lambda n, b: set_class(n, Subclass),
    "a subclass of a block": lambda n, b: set_class(b, Doubled),
    "a subclass of a convolution": lambda n, b: set_class(b.conv1, DoubledConvolution),
    "a forward of its own": lambda n, b: setattr(b, "forward", lambda x: x),
    "a stage left out": lambda n, b: setattr(n, "layer2", nn.Identity()),
    "no blocks": lambda n, b: [setattr(n, f"layer{i}", nn.Sequential()) for i in (1, 2, 3, 4)],
    "another block": lambda n, b: n.layer1.append(nn.Dropout2d()),
    "too few input channels": lambda n, b: set_weight(b.conv2, lambda w: w[:, :8]),
    "too many output channels": lambda n, b: set_weight(b.conv2, lambda w: torch.cat([w, w])),
    "whole numbers": lambda n, b: set_weight(b.conv1, lambda w: w.long()),
    "complex weights": lambda n, b: set_weight(b.conv1, lambda w: w.to(torch.complex64)),
    "float8": lambda n, b: set_weight(b.conv1, lambda w: w.to(torch.float8_e4m3fn)),
    "no values": lambda n, b: set_weight(b.conv1, lambda w: w.to("meta")),
    "sparse weights": lambda n, b: set_weight(b.conv1, lambda w: w.to_sparse()),
    "NaN": lambda n, b: set_weight(b.conv1, lambda w: w * float("nan")),
    "infinity": lambda n, b: b.bn1.bias.data.fill_(float("inf")),
    "a negative variance": lambda n, b: b.bn2.running_var.fill_(-1),
    "an overflow in folding": lambda n, b: set_weight(b.conv2, lambda w: w * 0 + 3e38),
}


def conv3(block, size, padding, stride):
    block.downsample[0] = nn.Conv2d(8, 16, size, stride, padding, bias=False)


def set_padding(block):
    block.conv1.padding = (0, 0)


def set_stem(net, **arguments):
    net.conv1 = nn.Conv2d(3, 8, bias=False, **arguments)


@pytest.mark.parametrize("alteration", ALTERATIONS)
def test_networks_that_fold_does_not_know_are_refused(alteration):
    net = encoder(separate_bn=False)
    ALTERATIONS[alteration](net, net.layer2[0])
    if alteration == "an overflow in folding":
        net.layer2[0].bn2.weight.data.fill_(10)
    for path in ("gated", "dense"):
        with pytest.raises(InputError, match=r"^backbone: got .*, expected [^\n]*$"):
            deploy.compile(net, path, engine="pytorch")


def gate(net):
    return net.layer2[0].gate


GATES = {
    "another gate": lambda n: setattr(n.layer2[0], "gate", nn.Identity()),
    "no gate": lambda n: delattr(n.layer2[0], "gate"),
    "sigmoid": lambda n: setattr(gate(n), "relu", nn.Sigmoid()),
    "no norm": lambda n: setattr(gate(n), "norm", nn.Identity()),
    "a gate's hook": lambda n: gate(n).expand.register_forward_hook(double),
    "logits of its own": lambda n: setattr(gate(n), "logits", lambda x, budget=None: x),
    "too many channels": lambda n: set_weight(gate(n).expand, lambda w: torch.cat([w, w])),
    "another embedding": lambda n: setattr(gate(n), "embedding", nn.Linear(1, 16)),
    "no embedding": lambda n: setattr(gate(n), "embedding", None),
    "an embedding's hook": lambda n: gate(n).embedding.register_forward_hook(double),
    "no range": lambda n: setattr(n, "budget_range", None),
    "a bias of NaN": lambda n: gate(n).expand.bias.data.fill_(float("nan")),
    "own norms": lambda n: setattr(n.layer2[0], "gated_bn1", nn.InstanceNorm2d(16)),
    "thresholds": lambda n: setattr(gate(n), "threshold", 0.5),
}


@pytest.mark.parametrize("alteration", GATES)
def test_gates_that_fold_does_not_know_are_refused_but_the_dense_path_is_not_theirs(alteration):
    net = encoder(budget_range=(0.1, 0.9))
    expected = deploy.compile(net, "dense", engine="pytorch")(images(1))
    GATES[alteration](net)
    with pytest.raises(InputError, match=r"(backbone|threshold): got .*, expected .*$"):
        deploy.compile(net, engine="pytorch")
    assert torch.equal(deploy.compile(net, "dense", engine="pytorch")(images(1)), expected)


def test_other_parts_that_are_refused():
    net = encoder(name="resnet18_two_encoders")
    net.gated_net.fc = nn.Linear(64, 64)
    with pytest.raises(InputError, match=r"got Linear, expected Identity for gated_net.fc"):
        deploy.compile(net, engine="pytorch")
    net = encoder()
    kept = Kept(tuple(torch.arange(n) for n in deploy.compile(net).channels), 0.5)
    small = slice_encoder(net, kept, gates=False)
    small.blocks[0].gate = net.layer1[0].gate
    with pytest.raises(InputError, match="path: got dense, this SlicedResNet has gated only"):
        deploy.compile(small, "dense", engine="pytorch")
    handle = nn.modules.module.register_module_forward_hook(double)
    try:
        with pytest.raises(InputError, match="got forward hooks, expected none"):
            deploy.compile(net, engine="pytorch")
    finally:
        handle.remove()


def no_affine(net):
    net.layer1[0].bn1 = nn.BatchNorm2d(8, affine=False).eval()


def with_biases(net):
    for block in net.gated_blocks:
        for name in ("conv1", "conv2"):
            conv(block, name, bias=True)


def tied(net):
    net.layer1[1].bn1, net.layer1[1].conv1 = net.layer1[0].bn1, net.layer1[0].conv1
    net.layer3[1].conv2.weight = net.layer3[1].conv1.weight


KNOWN = {
    "no affine": no_affine,
    "biases": with_biases,
    "tied": tied,
    "synchronised norms": lambda n: nn.SyncBatchNorm.convert_sync_batchnorm(n),
    "training": lambda n: n.train(),
    "float64": lambda n: n.double(),
    "stem 5": lambda n: set_stem(n, kernel_size=5, stride=2, padding=1),
    "stem 4": lambda n: set_stem(n, kernel_size=4, stride=3, padding=0),
    "stem 1": lambda n: set_stem(n, kernel_size=1, padding=1),
    "stem 2": lambda n: set_stem(n, kernel_size=2, padding=2),
    "a pool after a small stem": lambda n: setattr(n, "maxpool", nn.MaxPool2d((3, 3), 2, 1)),
    "one block a stage": lambda n: [
        setattr(n, f"layer{i}", getattr(n, f"layer{i}")[:1]) for i in (1, 2, 3, 4)
    ],
}


@pytest.mark.parametrize("engine", [ENGINES[0], "pytorch"])
def test_unusual_networks_that_are_known(engine):
    for name, alter in KNOWN.items():
        net, x = encoder(separate_bn=False), images(6, 13, 18)
        alter(net)
        fast = {path: deploy.compile(net, path, engine=engine) for path in ("gated", "dense")}
        net.eval()
        for path in fast:
            try:
                assert_same(fast[path], net, x, path)
            except AssertionError as error:
                raise AssertionError(f"{name}, {path}") from error


@ANY
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_an_image_that_overflows_inside_harms_no_other(engine, stem):
    net, x = encoder(stem=stem), images(5)
    with torch.no_grad():
        for block in net.gated_blocks:
            block.conv2.weight.mul_(1e3)
    fast = deploy.compile(net, "dense", engine=engine)
    fast.threads = 2
    alone = fast(x)
    assert alone.isfinite().all()
    bad = x.clone()
    bad[1::2] *= 1e16  # finite, and no extreme image by itself
    for _ in range(2):
        features = fast(bad)
        assert torch.equal(features[::2], alone[::2])
        assert not features[1::2].isfinite().all(1).any()
    assert torch.equal(fast(x), alone)
