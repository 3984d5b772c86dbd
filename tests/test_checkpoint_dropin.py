"""A checkpoint as solo-learn's own scripts read it."""

import torch
import torchvision
from torch import nn

from solo_gating import BaseMethod
from solo_gating.main_pretrain import pretrain

from .helpers import randomise_norms, tiny_config, write_images


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
