"""What main_export writes: the dense encoder, and smaller networks from a channel policy."""

import copy
import functools
import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import nn
from torchvision.models import resnet18

from solo_gating import METHODS, InputError, deploy, main_export
from solo_gating.backbones import BACKBONES, SlicedResNet
from solo_gating.checkpoints.encoder import encoder_of
from solo_gating.deploy import export
from solo_gating.deploy.dense import dense_network, dense_state_dict
from solo_gating.deploy.onnx import openvino_runner, to_onnx
from solo_gating.deploy.others_int8 import gates_of, onnx_int8, openvino_int8
from solo_gating.deploy.static import kept_channels, slice_encoder, static_flops
from solo_gating.evaluate.extract import extract
from solo_gating.evaluate.policy import policy_of
from solo_gating.files import write_json
from solo_gating.flops import count_flops
from solo_gating.gates import ChannelGate
from solo_gating.main_export import main
from solo_gating.policies import read_policy

from ..support.encoders import digit_tensors, digits, enliven, run_config, save_run
from ..support.helpers import with_resnet10


def images(rows=slice(40)):
    return digit_tensors(rows)[0]


def gated(**kwargs):
    return copy.deepcopy(_gated(**kwargs))


@functools.cache
def _gated(name="resnet18_gated", **kwargs):
    torch.manual_seed(1)
    net = BACKBONES[name](width=8, stem="cifar", **kwargs)
    net.fc = torch.nn.Identity()
    return enliven(net)


def policy_on(net, x, threshold=0.0):
    net.threshold = threshold
    found = extract(net, [(x, torch.zeros(len(x), dtype=torch.long))], "gated")
    return policy_of(net, found, "resnet18_gated", {}, 0.3)


def on_gated_path(net, x):
    with torch.no_grad(), net.path("gated"):
        return net(x)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    with with_resnet10():
        yield save_run(run_config(folder, backbone={"name": "resnet10_gated"}), folder)


@pytest.mark.parametrize("kwargs", [{}, {"separate_bn": False}, {"name": "resnet18_two_encoders"}])
@pytest.mark.parametrize("multiple", [1, 4])
def test_with_gates_a_sliced_encoder_is_the_gated_path(kwargs, multiple):
    net, x = gated(**kwargs), images()
    policy = policy_on(net, x, threshold=0.5)
    assert any(block.always_off for block in policy.blocks)
    kept = kept_channels(policy, count_flops(net, (16, 16)), "dynamic", multiple)
    small = slice_encoder(net, kept, gates=True)
    torch.testing.assert_close(small(x), on_gated_path(net, x), rtol=1e-5, atol=1e-5)
    for block, indices in zip(policy.blocks, kept.channels, strict=True):
        used = set(np.flatnonzero(block.selected))
        assert used <= set(indices.tolist())
        assert len(indices) == min(block.channels, -(-max(1, len(used)) // multiple) * multiple)


def test_without_gates_all_kept_channels_are_computed():
    net, x = gated(), images()
    kept = kept_channels(policy_on(net, x), count_flops(net, (16, 16)), "always_on", 2)
    small = slice_encoder(net, kept, gates=False)

    for block, indices in zip(net.gated_blocks, kept.channels, strict=True):

        def mask(x, budget=None, indices=indices, block=block):
            open_ = torch.zeros(len(x), block.conv1.out_channels)
            open_[:, indices] = 1
            return open_

        block.gate.forward = mask
    torch.testing.assert_close(small(x), on_gated_path(net, x), rtol=1e-5, atol=1e-5)


def test_the_most_selected_channels_stay_within_the_share():
    net, x = gated(), images()
    policy, flops = policy_on(net, x), count_flops(net, (16, 16))
    kept = kept_channels(policy, flops, "top:0.4", 1)
    # Stem and shortcuts, and k²·H·W·(C_in + C_out) for each channel, of images of 16 pixels.
    stem, *parts = flops.parts.values()
    total, most = stem.dense, 0.0
    for part, gate, indices in zip(parts, flops.gates, kept.channels, strict=True):
        conv1, conv2, shortcut = (conv.macs for conv in part.convolutions)
        each = (conv1 + conv2) / gate.channels
        total += shortcut + each * len(indices)
        most = max(most, each)
    assert total / flops.dense == pytest.approx(kept.share)
    # The channel that comes next would be too much; single channels may stay for empty blocks.
    assert 0.4 - 2 * most / flops.dense < kept.share < 0.45
    least = min(
        policy.blocks[i].selected[c]
        for i, indices in enumerate(kept.channels)
        for c in indices.tolist()
        if len(indices) > 1
    )
    most = max(
        count
        for block, indices in zip(policy.blocks, kept.channels, strict=True)
        for c, count in enumerate(block.selected)
        if c not in indices.tolist()
    )
    assert least >= most
    small = slice_encoder(net, kept, gates=False)
    assert static_flops(small, (16, 16)) == total
    with_gates = slice_encoder(net, kept, gates=True)
    # A gate's first convolution stays, its second one has the kept outputs only.
    gates = sum(
        block.gate.reduce.out_channels * (block.conv1.in_channels + block.conv1.out_channels)
        for block in with_gates.blocks
    )
    assert static_flops(with_gates, (16, 16)) == total + gates


@pytest.mark.parametrize(
    ("keep", "words"),
    [("some", "got 'some'"), ("top:1.5", "got 'top:1.5'"), ("top:0.001", "shares from 0.0")],
)
def test_a_keep_that_is_not_accepted_is_refused(keep, words):
    net = gated()
    with pytest.raises(InputError, match="keep: ") as error:
        kept_channels(policy_on(net, images()), count_flops(net, (16, 16)), keep)
    assert words in str(error.value)


def test_a_policy_of_another_architecture_is_refused():
    other = BACKBONES["resnet34_gated"](width=8, stem="cifar")
    with pytest.raises(InputError, match="policy: got blocks of"):
        kept_channels(policy_on(gated(), images()), count_flops(other, (16, 16)), "dynamic")


def test_the_dense_export_fits_torchvision_strictly():
    torch.manual_seed(0)
    net = BACKBONES["resnet18_gated"]()
    net.fc = torch.nn.Identity()

    class Encoder:
        backbone = net.eval()

    weights = dense_state_dict(Encoder)
    reference = resnet18()
    reference.fc = torch.nn.Identity()
    assert reference.load_state_dict(weights, strict=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(reference.eval()(x), net(x))


def test_the_dense_network_is_the_dense_path(run):
    encoder = encoder_of(run.checkpoint)
    with torch.no_grad():
        assert torch.equal(dense_network(encoder)(images()), encoder.backbone(images()))


def write_policy(run, folder):
    encoder = encoder_of(run.checkpoint)
    file = folder / "policy.json"
    write_json(file, policy_on(encoder.backbone, images(), threshold=0.5).to_json())
    return file


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["main_export", *map(str, arguments)])
    main()


def test_exported_files_load_without_this_package(run, tmp_path, monkeypatch):
    policy = write_policy(run, tmp_path)
    call(
        monkeypatch,
        *(f"checkpoint={run.checkpoint}", f"policy={policy}", f"output={tmp_path}"),
        "evaluate=true",
    )
    report = json.loads((tmp_path / "export.json").read_text())
    assert report["knn_top1_before"] == pytest.approx(report["knn_top1_after"], abs=4)  # 31 images
    np.save(tmp_path / "x.npy", images().numpy())
    script = (
        "import sys, numpy, torch\n"
        "net = torch.export.load(sys.argv[1] + '/model.pt2').module()\n"
        "numpy.save(sys.argv[1] + '/y.npy', net(torch.from_numpy(numpy.load(sys.argv[1] + '/x.npy'))))\n"
        "assert not {'solo', 'solo_gating', 'lightning'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, cwd=tmp_path)
    backbone = encoder_of(run.checkpoint).backbone
    backbone.threshold = 0.5
    expected = on_gated_path(backbone, images()).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected, rtol=1e-4, atol=1e-5)

    content = torch.load(tmp_path / "model.pt", weights_only=True)
    small = SlicedResNet(**content["architecture"])
    small.fc = torch.nn.Identity()
    assert small.load_state_dict(content["state_dict"], strict=True)


@pytest.mark.parametrize("gates", ["keep", "drop"])
def test_a_smaller_network_in_int8_for_numpy(run, tmp_path, monkeypatch, gates):
    monkeypatch.setenv("SOLO_GATING_ISA", "pytorch")
    policy = write_policy(run, tmp_path)
    call(
        monkeypatch,
        *(f"checkpoint={run.checkpoint}", f"policy={policy}", f"gates={gates}", "format=sgx"),
        *("dtype=int8", "evaluate=true", f"output={tmp_path}"),
    )
    report = json.loads((tmp_path / "export.json").read_text())
    (path,) = report["rounding"]["paths"]
    assert path["path"] == {"keep": "gated", "drop": "dense"}[gates]
    backbone, x = encoder_of(run.checkpoint).backbone, images(slice(1400, 1431))
    backbone.threshold = 0.5
    kept = kept_channels(read_policy(policy), count_flops(backbone, (16, 16)), "dynamic", 8)
    fast = deploy.load(tmp_path / "encoder.sgx")
    assert fast.path == path["path"]
    assert fast.channels == tuple(report["hidden"]) == tuple(map(len, kept.channels))
    if gates == "drop":  # nothing decides, so that only roundings differ
        expected = slice_encoder(backbone, kept, gates=False)(x)
        assert 0 < (fast(x) - expected).norm() < 0.1 * expected.norm()
    else:
        assert fast.threshold == 0.5


def test_top_k_gates_choose_the_same_in_onnx():
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    net, x = gated(gate="top_k"), images(slice(12))
    net.budget = 0.3
    kept = kept_channels(policy_on(net, x), count_flops(net, (16, 16)), "dynamic", 1)
    small = slice_encoder(net, kept, gates=True).eval()
    session = ort.InferenceSession(to_onnx(small, x), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), small(x), rtol=1e-4, atol=1e-5)
    assert len(small(x).unique(dim=0)) > 3


def test_onnx_runs_without_torch(run, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    policy = write_policy(run, tmp_path)
    call(
        monkeypatch,
        *("--checkpoint", run.checkpoint, "--policy", policy, "--output", tmp_path),
        *("--format", "onnx"),
    )
    report = json.loads((tmp_path / "export.json").read_text())
    assert report["onnx_relative_difference"] < 1e-5
    np.save(tmp_path / "x.npy", images(slice(3)).numpy())
    script = (
        "import sys, numpy, onnxruntime\n"
        "net = onnxruntime.InferenceSession(sys.argv[1] + '/model.onnx')\n"
        "x = numpy.load(sys.argv[1] + '/x.npy')\n"
        "numpy.save(sys.argv[1] + '/y.npy', net.run(None, {'images': x})[0])\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, cwd=tmp_path)
    backbone = encoder_of(run.checkpoint).backbone
    backbone.threshold = 0.5
    expected = on_gated_path(backbone, images(slice(3))).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected, rtol=1e-4, atol=1e-5)


def quantisable(format):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    if format == "openvino-int8":
        pytest.importorskip("openvino")


@pytest.fixture(scope="module")
def dense_onnx(run):
    """The dense path, exported once: that takes longer than everything else here."""
    pytest.importorskip("onnxscript")
    return to_onnx(dense_network(encoder_of(run.checkpoint)), images())


@pytest.mark.parametrize("format", ["onnx-int8", "openvino-int8"])
def test_the_dense_path_in_int8_is_near_the_float_one(
    run, tmp_path, monkeypatch, format, dense_onnx
):
    quantisable(format)
    monkeypatch.setattr(export, "to_onnx", lambda *args: dense_onnx)
    call(
        monkeypatch,
        *("--checkpoint", run.checkpoint, "--path", "dense", "--output", tmp_path),
        *("--format", format, "--evaluate"),
    )
    report = json.loads((tmp_path / "export.json").read_text())
    assert report["calibration_images"] == 96
    assert 0 < report["feature_error"] < 0.1
    assert report["knn_top1_after"] == pytest.approx(report["knn_top1_before"], abs=10)  # 31 images

    # What a stranger gets out of the files, of images that were not calibrated on.
    x = images(slice(1400, 1431))
    if format == "onnx-int8":
        session = importlib.import_module("onnxruntime").InferenceSession(tmp_path / "model.onnx")
        (found,) = session.run(None, {"images": x.numpy()})
    else:
        core = importlib.import_module("openvino").Core()
        found = core.compile_model(core.read_model(tmp_path / "model.xml"), "CPU")(x.numpy())[0]
    with torch.no_grad():
        expected = run.model.backbone(x).numpy()
    assert 0 < np.linalg.norm(found - expected) < 0.1 * np.linalg.norm(expected)


def test_a_folder_of_photos_is_enough_to_quantise_on(run, tmp_path, monkeypatch, dense_onnx):
    quantisable("onnx-int8")
    monkeypatch.setattr(export, "to_onnx", lambda *args: dense_onnx)
    for index, image in enumerate(digits(slice(40))[0]):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    call(
        monkeypatch,
        *("--checkpoint", run.checkpoint, "--calibration", tmp_path, "--format", "onnx-int8"),
        *("--output", tmp_path / "out"),
    )
    report = json.loads((tmp_path / "out/export.json").read_text())
    assert report["calibration_images"] == 40
    assert report["feature_error_on"] == "40 calibration images"
    assert 0 < report["feature_error"] < 0.1
    assert "knn_top1_after" not in report


def test_without_nncf_onnx_runtime_quantises_for_openvino(run, monkeypatch, dense_onnx):
    quantisable("openvino-int8")
    monkeypatch.setitem(sys.modules, "nncf", None)
    files, quantiser = openvino_int8(dense_onnx, images())
    assert quantiser == "onnxruntime"
    with torch.no_grad():
        found, expected = openvino_runner(files)(images()), run.model.backbone(images())
    assert 0 < (found - expected).norm() < 0.1 * expected.norm()


class OneBlock(nn.Module):
    """A convolution whose channels a gate chooses."""

    def __init__(self):
        super().__init__()
        self.chooser = ChannelGate(3, 8)
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        return (self.conv(x).relu() * self.chooser(x)[:, :, None, None]).mean((2, 3))


def test_gates_stay_in_float_when_the_rest_becomes_int8():
    onnx = pytest.importorskip("onnx")
    quantisable("onnx-int8")
    net, x = OneBlock().eval(), images()
    assert gates_of(net) == {"chooser"}
    model = to_onnx(net, x)

    def weights(quantised, kind):
        return {
            tensor.name.partition(".weight")[0]
            for tensor in onnx.load_from_string(quantised).graph.initializer
            if tensor.data_type == kind and ".weight" in tensor.name and len(tensor.dims) == 4
        }

    apart, all_of_it = onnx_int8(model, x, gates_of(net)), onnx_int8(model, x)
    gate = {"chooser.reduce", "chooser.expand"}
    assert weights(apart, onnx.TensorProto.INT8) == {"conv"}
    assert weights(apart, onnx.TensorProto.FLOAT) == gate
    assert weights(all_of_it, onnx.TensorProto.INT8) == {"conv"} | gate

    core = pytest.importorskip("openvino").Core()

    def roundings(files):
        network = core.read_model(files["model.xml"], files["model.bin"])
        return sum(node.get_type_name() == "FakeQuantize" for node in network.get_ops())

    apart, all_of_it = (openvino_int8(model, x, names)[0] for names in (gates_of(net), frozenset()))
    # The weights of two convolutions, and between them one map at least.
    assert roundings(apart) <= roundings(all_of_it) - 3


def test_solo_learn_reads_the_dense_export_of_a_gated_run(tmp_path, monkeypatch):
    cfg = run_config(tmp_path, backbone={"kwargs": {"width": 64, "stem": "imagenet"}})
    run = save_run(cfg, tmp_path)
    out = tmp_path / "dense"
    call(
        monkeypatch,
        *("--checkpoint", run.checkpoint, "--format", "solo-learn", "--output", out),
    )
    args = OmegaConf.create(json.loads((out / "args.json").read_text()))
    assert (args.method, args.backbone.name, args.backbone.kwargs) == ("vicreg", "resnet18", {})
    assert "gating" not in args
    model = METHODS["vicreg"](args).eval()
    content = torch.load(out / "last.ckpt", weights_only=True)
    assert model.load_state_dict(content["state_dict"], strict=True)
    with torch.no_grad():
        assert torch.equal(model.backbone(images(slice(2))), run.model.backbone(images(slice(2))))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--path", "gated"), "policy: missing"),
        (("--format", "solo-learn"), "width 4"),
        (("--policy", "nowhere.json"), "policy: cannot read"),
        (("--format", "onnx-int8"), "calibration: missing, onnx-int8 needs images"),
        (("--calibration", "photos"), "calibration: got a folder for format=torch"),
        (("--format", "onnx-int8", "--calibration", "nowhere"), "nowhere' is no folder"),
        (
            ("--format", "onnx-int8", "--calibration", ".", "--resolution", 8),
            "resolution: got 8 with a folder of images, which have pre-training's 16",
        ),
    ],
)
def test_a_mistake_is_one_sentence(run, tmp_path, monkeypatch, capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        call(
            monkeypatch,
            *("--checkpoint", run.checkpoint, "--output", tmp_path / "out", *arguments),
        )
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("resolution", ["0", "-1", "100000"])
def test_a_senseless_resolution_is_refused(resolution, run, call):
    options = ("--path", "dense", "--resolution", resolution, "--output", "out")
    code, _, stderr = call(main_export, "--checkpoint", str(run.checkpoint), *options)
    assert code == 2
    assert stderr == f"error: resolution: got {resolution}, expected an integer from 1 to 4096\n"
    assert not Path("out").exists()


def test_a_mistyped_override_is_one_sentence(run, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        call(
            monkeypatch,
            *("--checkpoint", run.checkpoint, "--path", "dense", "--output", tmp_path / "out"),
            "no_such_key=1",
        )
    assert stop.value.code == 2
    assert capsys.readouterr().err.strip() == "error: no_such_key: no such key"
    assert not list(tmp_path.glob("out/*"))
