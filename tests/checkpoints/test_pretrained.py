"""A dense encoder that exists, made gated."""

import pickle

import pytest
import torch
from lightning.pytorch import Trainer
from omegaconf import OmegaConf
from torchvision.models import resnet18, resnet34

from solo_gating import METHODS, InputError, create_backbone
from solo_gating.checkpoints.pretrained import load_pretrained
from solo_gating.config.pretraining import prepare_config
from solo_gating.training.model import build_model
from solo_gating.training.pretrain import pretrain

from ..support.helpers import (
    randomise_norms,
    run_config,
    run_folder,
    tiny_config,
    tiny_model,
    write_images,
)


@pytest.fixture(autouse=True)
def _single():
    torch.manual_seed(0)


def gated(**kwargs):
    return create_backbone("resnet18_gated", **{"width": 8, "stem": "cifar", **kwargs}).eval()


def dense(**kwargs):
    net = create_backbone("resnet18_plain", **{"width": 8, "stem": "cifar", **kwargs})
    randomise_norms(net)
    return net.eval()


def images(size=16):
    return torch.randn(3, 3, size, size)


def saved(content, tmp_path):
    torch.save(content, tmp_path / "dense.pt")
    return tmp_path / "dense.pt"


@pytest.mark.parametrize("prefix", ["", "backbone.", "encoder.", "module.encoder_q.", "module."])
@pytest.mark.parametrize("bare", [True, False])
def test_both_paths_begin_as_the_dense_encoder(prefix, bare, tmp_path):
    """With all channels on, the gated path too: its BatchNorms are copies."""
    source, x = dense(), images()
    state = {prefix + k: v for k, v in source.state_dict().items()}
    if prefix:
        state |= {"projector.0.weight": torch.ones(3), "momentum_backbone.conv1.weight": x}
    net = gated()
    load_pretrained(net, saved(state if bare else {"state_dict": state}, tmp_path))
    source.fc, net.fc = torch.nn.Identity(), torch.nn.Identity()
    expected = source(x)
    assert torch.equal(net(x), expected)
    net.threshold = -torch.inf
    with net.path("gated"):
        torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize(
    ("build", "name"), [(resnet18, "resnet18_gated"), (resnet34, "resnet34_gated")]
)
def test_torchvision_s_weights(build, name, tmp_path):
    source, x = build().eval(), images(32)
    net = create_backbone(name, stem="imagenet").eval()
    load_pretrained(net, saved(source.state_dict(), tmp_path))
    source.fc = net.fc = torch.nn.Identity()
    assert torch.equal(net(x), source(x))


def test_a_gated_run_s_dense_path(tmp_path):
    model = tiny_model(tiny_config("vicreg_dual"), dtype=torch.float32)
    net = gated(width=4, reduction=2)
    load_pretrained(net, saved({"state_dict": model.state_dict()}, tmp_path))
    model.eval()
    x = images()
    with net.path("dense"), model.backbone.path("dense"):
        net.fc = torch.nn.Identity()
        assert torch.equal(net(x), model.backbone(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layer4.1.conv2.weight") is None or s, "lacks layer4.1.conv2.weight"),
        (lambda s: s | {"layer3.2.conv1.weight": torch.ones(1)}, "has layer3.2.conv1.weight"),
        (lambda s: s | {"conv1.weight": torch.ones(8, 3, 7, 7)}, r"\(8, 3, 7, 7\), expected"),
        (lambda s: s | {"bn1.running_var": -torch.ones(8)}, "variances below 0"),
        (lambda s: s | {"bn1.weight": torch.full((8,), torch.nan)}, "infinite or NaN"),
        (lambda s: {"fc.weight": torch.ones(2, 2)}, "has no weights of a ResNet"),
        (lambda s: {"model": s}, "is a OrderedDict|is a dict"),
        (lambda s: s | {"conv1.weight": 1}, "is a int"),
        (lambda s: [1, 2], "holds no `state_dict` but a list"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(change, message, tmp_path):
    file = saved(change(dense().state_dict()), tmp_path)
    with pytest.raises(InputError, match=f"^pretrained: .*{message}") as caught:
        load_pretrained(gated(), file)
    assert "\n" not in str(caught.value)


def test_a_pickle_of_something_else_is_not_run(tmp_path):
    file = tmp_path / "dense.pt"
    file.write_bytes(pickle.dumps(print))
    with pytest.raises(InputError, match=r"^pretrained: cannot read"):
        load_pretrained(gated(), file)


def learning(folder, file, train, **overrides):
    cfg = run_config(folder, "vicreg_distilled", pretrained=str(file), **overrides)
    gating = {"train": train, "target_budget": [0.1, 0.9], "budget_per_image": True}
    return OmegaConf.merge(cfg, {"gating": gating, "optimizer": {"weight_decay": 0.1}})


@pytest.mark.parametrize("train", ["gates", "all"])
def test_gates_learn_and_the_dense_path_stays_bit_for_bit(train, tmp_path):
    source = dense(width=4)
    file = saved(source.state_dict(), tmp_path)
    pretrain(learning(tmp_path, file, train))
    content = torch.load(run_folder(tmp_path) / "last.ckpt", weights_only=True)["state_dict"]
    kept = {
        name: torch.equal(content[f"backbone.{name}"], value)
        for name, value in source.state_dict().items()
        if not name.startswith("fc.")
    }
    assert all(kept.values()) == (train == "gates"), [n for n, same in kept.items() if not same]
    assert any(n.endswith("num_batches_tracked") for n in kept)
    norm = content["backbone.layer1.0.gated_bn1.running_mean"]
    assert not torch.equal(norm, source.layer1[0].bn1.running_mean)
    net = METHODS["vicreg_distilled"](prepare_config(learning(tmp_path, file, train))).backbone
    net.load_state_dict({k[9:]: v for k, v in content.items() if k.startswith("backbone.")})
    source.fc, x = torch.nn.Identity(), images()
    with net.eval().path("dense"):
        assert torch.equal(net(x), source(x)) == (train == "gates")


def test_the_table_has_the_encoder_that_the_run_began_with(tmp_path, monkeypatch):
    """Its file may be gone by then; the dense path of gates alone is the same."""
    file = saved(dense(width=4).state_dict(), tmp_path)
    images_file = write_images(tmp_path / "train.npz", 50)
    knn = {"enabled": True, "labels_per_class": 1}
    cfg = learning(tmp_path, file, "gates", final_knn=knn, data={"val_path": str(images_file)})
    fit = Trainer.fit

    def fit_without_file(*args, **kwargs):
        file.unlink()
        fit(*args, **kwargs)

    monkeypatch.setattr(Trainer, "fit", fit_without_file)
    table = pretrain(cfg)
    assert table["pretrained"] == table["dense"]
    assert "untrained" not in table


@pytest.mark.parametrize(
    ("method", "overrides", "message"),
    [
        ("vicreg_distilled", {"gating": {"train": "gates"}}, "no pretrained, expected"),
        ("vicreg_distilled", {"gating": {"train": "some"}}, "expected one of all, gates"),
        ("vicreg_dual", {"gating": {"train": "gates"}}, "expected one that is .*_distilled"),
        ("vicreg_distilled", {"pretrained": "/no/such"}, "pretrained: '/no/such' is not a file"),
        ("vicreg", {"pretrained": __file__}, "has no gates to learn"),
        (
            "vicreg_distilled",
            {"pretrained": __file__, "backbone": {"name": "resnet18_two_encoders"}},
            "backbone.name: got 'resnet18_two_encoders' with pretrained",
        ),
        (
            "vicreg_distilled",
            {"pretrained": __file__, "gating": {"train": "gates", "separate_bn": False}},
            "gating.separate_bn=false",
        ),
        (
            "vicreg_distilled",
            {"pretrained": __file__, "gating": {"train": "gates", "warmup_epochs": 1}},
            "gating.warmup_epochs=1, expected 0",
        ),
    ],
)
def test_a_config_that_cannot_be_is_refused(method, overrides, message):
    with pytest.raises(InputError, match=message):
        prepare_config(OmegaConf.merge(tiny_config(method), overrides))


def test_gates_that_train_with_all_weights_are_recorded_as_ever():
    assert "train" not in prepare_config(tiny_config("vicreg_distilled")).gating


@pytest.mark.parametrize("method", ["byol_distilled", "us3l"])
def test_a_teacher_begins_as_the_encoder_too(method, tmp_path):
    source = dense()
    overrides = {"momentum": {"base_tau": 0.99, "final_tau": 0.99}}
    if method == "us3l":
        overrides["optimizer"] = {"weight_decay": 0}
    cfg = tiny_config(method, backbone={"kwargs": {"width": 8}}, **overrides)
    cfg.pretrained = str(saved(source.state_dict(), tmp_path))
    model = build_model(prepare_config(cfg))
    expected = {k: v for k, v in source.state_dict().items() if not k.startswith("fc.")}
    for net in (model.backbone, model.momentum_backbone):
        found = net.dense_state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
