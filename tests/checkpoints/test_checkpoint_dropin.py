"""A checkpoint as solo-learn's own scripts read it."""

import sys
from pathlib import Path
from unittest import mock

import pytest
import solo
import torch
import torchvision
from omegaconf import OmegaConf
from PIL import Image
from torch import nn

from solo_gating import BaseMethod, __main__
from solo_gating.main_pretrain import pretrain
from solo_gating.solo_learn import LINE, LinearModel

from ..support.helpers import (
    randomise_norms,
    student_config,
    tiny_config,
    tiny_model,
    write_images,
    write_teacher,
)


def test_the_dense_path_is_what_main_linear_loads_for_resnet18(tmp_path):
    """`main_linear.py` strips "backbone.", ignores other keys and loads without strictness."""
    cfg = tiny_config(
        max_epochs=1,
        backbone={"kwargs": {"width": 64}},
        data={"train_path": str(write_images(tmp_path / "train.npz", 8))},
        optimizer={"lr": 0.5},
        checkpoint={"enabled": True, "dir": str(tmp_path)},
    )
    pretrain(cfg)
    (file,) = tmp_path.glob("vicreg_dual/*/last.ckpt")
    state = torch.load(file, map_location="cpu")["state_dict"]
    assert not [key for key in state if "encoder" in key]  # which it would rename
    state = {k.replace("backbone.", ""): v for k, v in state.items() if "backbone" in k}

    linear = torchvision.models.resnet18()
    linear.fc = nn.Identity()
    linear.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=2, bias=False)
    linear.maxpool = nn.Identity()
    keys = linear.load_state_dict(state, strict=False)
    assert keys.missing_keys == []
    assert all(".gate" in key for key in keys.unexpected_keys)

    ours = BaseMethod._BACKBONES["resnet18_gated"]("vicreg_dual", **cfg.backbone.kwargs)
    ours.fc = nn.Identity()
    randomise_norms(ours)  # every statistic must come from the checkpoint
    ours.load_state_dict(state)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(linear.eval()(images), ours.eval()(images))
        with ours.path("gated"):
            assert not torch.equal(linear(images), ours(images))


@pytest.fixture(scope="module")
def small_stem(tmp_path_factory):
    """A checkpoint of vicreg_dual on custom images with the CIFAR stem, and images in folders."""
    folder = tmp_path_factory.mktemp("small_stem")
    model = tiny_model(tiny_config(), dtype=None)
    randomise_norms(model.backbone)
    torch.save({"state_dict": model.state_dict()}, folder / "last.ckpt")
    for number in range(5):  # solo-learn wants five classes
        (folder / f"images/{number}").mkdir(parents=True)
        Image.new("RGB", (16, 16), (50 * number, 90, 10)).save(folder / f"images/{number}/0.png")
    linear = {
        "name": "linear",
        "data": {"dataset": "custom", "num_workers": 0, "augmentations": {"crop_size": 16}},
        "backbone": {"name": "???"},
        "optimizer": {"name": "sgd", "batch_size": 5, "lr": 0.3, "weight_decay": 0},
        "scheduler": {"name": "step", "lr_decay_steps": [60, 80]},
        "performance": {"disable_channel_last": True},
        "max_epochs": 1,
        "devices": "1",
        "accelerator": "cpu",
        "strategy": "auto",
        "enable_progress_bar": False,
        "pretrained_feature_extractor": str(folder / "last.ckpt"),
    }
    linear["data"] |= {key: str(folder / "images") for key in ("train_path", "val_path")}
    OmegaConf.save(OmegaConf.create(linear), folder / "linear.yaml")
    return folder, model.backbone.eval()


def by_main_linear(folder, monkeypatch, path, *words):
    """The backbone that solo-learn's `main_linear.py` loads, through the plugin."""
    script = Path(solo.__file__).parents[1] / "main_linear.py"
    if not script.is_file():
        pytest.skip("solo-learn is installed without its scripts")
    trained = []
    monkeypatch.setattr(
        LinearModel, "on_fit_end", lambda self: trained.append(self.backbone), raising=False
    )
    words = (*words, "+backbone.kwargs.stem=cifar", "+backbone.kwargs.width=4")
    arguments = [str(script), "--config-path", str(folder), "--config-name", "linear", *words]
    monkeypatch.setattr("sys.argv", ["solo_gating", "--path", path, *arguments])
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.chdir(folder)
    with mock.patch.dict(BaseMethod._BACKBONES):
        __main__.main()
    (found,) = trained
    return found.eval()


@pytest.mark.skipif(LINE == "legacy", reason="1.0.2's scripts are not bridged")
@pytest.mark.parametrize(
    ("path", "backbone"),
    [("dense", "resnet18_plain"), ("dense", "resnet18_gated"), ("gated", "resnet18_gated")],
)
def test_solo_learn_s_main_linear_is_told_the_stem(path, backbone, small_stem, monkeypatch):
    """docs/guide/solo_learn.md: `backbone.name=... +backbone.kwargs.stem=cifar`, through the plugin."""
    folder, expected = small_stem
    found = by_main_linear(folder, monkeypatch, path, f"backbone.name={backbone}")
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad(), expected.path(path):
        torch.testing.assert_close(found(images), expected(images))


@pytest.mark.skipif(LINE == "legacy", reason="1.0.2's scripts are not bridged")
def test_solo_learn_s_main_linear_is_told_a_student_s_widths(small_stem, monkeypatch, tmp_path):
    folder, _ = small_stem
    hidden = [2, 4, 5, 8, 1, 16, 9, 32]
    teacher = write_teacher(tmp_path / "teacher.pt")
    backbone = {"name": "resnet18_policy", "kwargs": {"hidden": hidden}}
    student = tiny_model(student_config("simreg", teacher, backbone=backbone), dtype=None)
    randomise_norms(student.backbone)
    torch.save({"state_dict": student.state_dict()}, tmp_path / "last.ckpt")
    words = ["backbone.name=resnet18_policy", f"+backbone.kwargs.hidden={hidden}"]
    words.append(f"pretrained_feature_extractor={tmp_path / 'last.ckpt'}")
    found = by_main_linear(folder, monkeypatch, "dense", *words)
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(found(images), student.backbone.eval()(images))
