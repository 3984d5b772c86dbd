"""Teachers from all kinds of files: the same features as the network that was saved, or one sentence."""

import json
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from solo_gating import create_backbone, load_encoder
from solo_gating.checkpoints.teacher import load_teacher

from ..support.encoders import (
    assert_refused,
    digit_tensors,
    dual,  # noqa: F401 (a fixture)
    run_config,
    save_run,
)
from ..support.helpers import randomise_norms, write_teacher

KEY = "method_kwargs.teacher"


def images(size=16):
    return torch.randn(2, 3, size, size)


def narrow(name="resnet18_plain", **kwargs):
    net = create_backbone(name, **{"width": 8, "stem": "cifar", **kwargs})
    randomise_norms(net)
    return net.eval()


def moco(net, head):
    """As MoCo's pre-training saves it, before PyTorch 1.6: query encoder, key encoder and queue."""
    state = {f"module.encoder_q.{n}": v for n, v in net.state_dict().items()}
    state |= {f"module.encoder_q.fc.{n}": v for n, v in head.state_dict().items()}
    state |= {
        name.replace("encoder_q", "encoder_k"): torch.zeros_like(v) for name, v in state.items()
    }
    queue = {"module.queue": torch.randn(4, 8), "module.queue_ptr": torch.zeros(1).long()}
    return {"epoch": 800, "arch": "resnet18", "state_dict": state | queue, "optimizer": {}}


@pytest.mark.parametrize(
    ("build", "features"),
    [(resnet18, 512), (partial(narrow, name="resnet50_plain", stem="imagenet"), 256)],
)
def test_torchvision_s_weights(build, features, tmp_path):
    """Depth and blocks are recognised; the classifier is no head."""
    net, x = build().eval(), images(32)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    teacher = load_teacher(tmp_path / "net.pt")
    net.fc = nn.Identity()
    found = teacher(x)
    assert torch.equal(found, net(x))
    assert found.shape == (2, features)
    assert not found.requires_grad
    assert not any(module.training for module in teacher.modules())


@pytest.mark.parametrize("zipped", [True, False])
def test_moco_s_file_with_its_head(zipped, tmp_path):
    net, head, x = narrow(), nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5)), images()
    net.fc = nn.Identity()
    file = tmp_path / "moco_v2_800ep_pretrain.pth.tar"
    torch.save(moco(net, head), file, _use_new_zipfile_serialization=zipped)
    assert torch.equal(load_teacher(file)(x), head(net(x)))
    assert torch.equal(load_teacher(file, head=True)(x), head(net(x)))
    assert torch.equal(load_teacher(file, head=False)(x), net(x))


def test_moco_v1_s_head_and_none(tmp_path):
    net, head, x = narrow(), nn.Linear(64, 5), images()
    net.fc = nn.Identity()
    torch.save(moco(net, head), tmp_path / "moco.pt")
    assert torch.equal(load_teacher(tmp_path / "moco.pt")(x), head(net(x)))
    torch.save(moco(net, nn.Identity()), tmp_path / "bare.pt")
    assert torch.equal(load_teacher(tmp_path / "bare.pt")(x), net(x))
    refused = lambda: load_teacher(tmp_path / "bare.pt", head=True)  # noqa: E731
    assert_refused(refused, "method_kwargs.teacher_head: got true", "expected false")


@pytest.mark.parametrize("prefix", ["backbone.", "encoder."])
def test_solo_learn_s_checkpoints_without_a_modern_args_json(prefix, tmp_path):
    """Of 1.0.2, whose args.json has another schema, or with none beside them."""
    net, x = narrow(), images()
    net.fc = nn.Identity()
    state = {prefix + name: value for name, value in net.state_dict().items()}
    torch.save(
        {"state_dict": state | {"projector.0.weight": torch.ones(2, 2)}}, tmp_path / "a.ckpt"
    )
    assert torch.equal(load_teacher(tmp_path / "a.ckpt")(x), net(x))
    (tmp_path / "args.json").write_text(json.dumps({"encoder": "resnet18", "dataset": "cifar10"}))
    assert torch.equal(load_teacher(tmp_path / "a.ckpt")(x), net(x))


def test_our_runs_by_either_path_with_the_projector_or_without(dual):  # noqa: F811
    x, _ = digit_tensors(slice(8))
    backbone = load_encoder(dual.checkpoint)
    dense = backbone(x)
    backbone.path = "gated"
    gated = backbone(x)
    assert not torch.equal(gated, dense)
    assert torch.equal(load_teacher(dual.checkpoint)(x), dual.model.projector(dense))
    assert torch.equal(load_teacher(dual.checkpoint, "gated", head=False)(x), gated)


def test_a_path_that_was_not_trained_is_refused(tmp_path):
    run = save_run(run_config(tmp_path, "vicreg_gated"), tmp_path)
    assert load_teacher(run.checkpoint, "gated")(digit_tensors(slice(8))[0]).shape == (8, 16)
    key = f"{KEY}_path: got "
    assert_refused(lambda: load_teacher(run.checkpoint), f"{key}dense", "trained gated only")
    (tmp_path / "args.json").unlink()
    assert_refused(lambda: load_teacher(run.checkpoint, "gated"), f"{key}gated", "expected dense")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda s: s.pop("layer4.1.conv2.weight") is None or s, ["lacks layer4.1.conv2.weight"]),
        (lambda s: s | {"layer3.9.conv1.weight": torch.ones(1)}, ["layer3.9.conv1.weight"]),
        (lambda s: s | {"conv1.weight": torch.ones(8, 3, 5, 5)}, ["(8, 3, 5, 5)", "7×7 or 3×3"]),
        (lambda s: s | {"conv1.weight": torch.ones(8)}, ["conv1.weight is (8,)"]),
        (lambda s: s | {"bn1.running_var": -torch.ones(8)}, ["variances below 0"]),
        (lambda s: s | {"layer1.0.bn1.bias": torch.full((8,), torch.nan)}, ["infinite or NaN"]),
        (lambda s: {n: v for n, v in s.items() if "layer2" not in n}, ["lacks layer2"]),
        (
            lambda s: s | {"layer1.0.conv1.weight": torch.ones(9, 8, 3, 3)},
            ["(9, 8, 3, 3)", "(8, 8,"],
        ),
        (lambda s: {"fc.weight": torch.ones(2, 2)}, ["has no weights of a ResNet"]),
        (lambda s: s | {"fc.0.weight": torch.ones(4, 3)}, ["fc.0"]),
        (lambda s: [1, 2], ["holds no `state_dict` but a list"]),
    ],
)
def test_a_file_that_is_no_teacher_is_refused(change, parts, tmp_path):
    state = {n: v for n, v in narrow().state_dict().items() if not n.startswith("fc.")}
    head = {"fc.0.weight": torch.ones(8, 64), "fc.0.bias": torch.ones(8)}
    head |= {"fc.2.weight": torch.ones(4, 8), "fc.2.bias": torch.ones(4)}
    torch.save(change(state | head), tmp_path / "net.pt")
    assert_refused(lambda: load_teacher(tmp_path / "net.pt"), f"{KEY}: ", "net.pt", *parts)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_is_cut_short_is_refused(zipped, tmp_path):
    file = write_teacher(tmp_path / "net.pt")
    torch.save(torch.load(file), file, _use_new_zipfile_serialization=zipped)
    content = file.read_bytes()
    for length in (0, 20, len(content) // 2, len(content) - 3):
        file.write_bytes(content[:length])
        assert_refused(lambda: load_teacher(file), f"{KEY}: cannot read", "damaged")


class _Code:
    def __reduce__(self):
        return pytest.fail, ("code of a file was run",)


def test_a_pickle_of_something_else_is_not_run(tmp_path):
    file = tmp_path / "net.pt"
    file.write_bytes(pickle.dumps(_Code()))
    assert_refused(lambda: load_teacher(file), f"{KEY}: cannot read")
    for zipped in (True, False):
        torch.save({"state_dict": _Code()}, file, _use_new_zipfile_serialization=zipped)
        assert_refused(lambda: load_teacher(file), f"{KEY}: cannot read", "holds code")
