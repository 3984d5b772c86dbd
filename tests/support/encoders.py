"""Encoders in checkpoints, on real digits: what the tests of all evaluations use."""

import copy
import json
import math
from contextlib import ExitStack, contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest import mock
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from solo_gating import (
    METHODS,
    BaseMethod,
    InputError,
    main_pretrain,
)
from solo_gating.backbones import BACKBONES
from solo_gating.checkpoints.encoder import encoder_of
from solo_gating.config.defaults import configs_folder
from solo_gating.config.pretraining import prepare_config
from solo_gating.evaluate import calibrate as dial
from solo_gating.evaluate import evaluation, policy
from solo_gating.evaluate import extract as features
from solo_gating.flops import count_flops
from solo_gating.gates import ScoringGate
from solo_gating.training import pretrain as training_pretrain
from solo_gating_runtime.encoder import Kernel
from solo_gating_runtime.library import supported_engines

from .helpers import tiny_config

VAL = slice(1400, 1431)  # digits by other writers than the first 1,400

# What the tests of all evaluations use


all_digits = cache(load_digits)


def digits(rows):
    """Handwritten digits, doubled in size: uint8 N × 16 × 16 × 3, and labels."""
    images, labels = all_digits().images[rows], all_digits().target[rows].copy()
    images = np.uint8(np.rint(images * (255 / 16))).repeat(2, axis=1).repeat(2, axis=2)
    return images[..., None].repeat(3, axis=3), labels


def digit_tensors(rows):
    """The same, standardised: float N × 3 × 16 × 16, and labels."""
    images, labels = digits(rows)
    images = torch.from_numpy(images).float().permute(0, 3, 1, 2)
    return (images - images.mean()) / images.std(), torch.from_numpy(labels)


def write_arrays(file, images, labels=None):
    """An .npz as `data.format=npz` reads it."""
    np.savez(file, images=images, **({} if labels is None else {"labels": labels}))
    return file


def run_config(folder, method="vicreg_dual", train=96, **overrides):
    """A pre-training config of a network of width 4, on digits that are written to the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {
        "train_path": str(write_arrays(folder / "train.npz", *digits(slice(train)))),
        "val_path": str(write_arrays(folder / "val.npz", *digits(VAL))),
        "num_classes": 10,
    }
    return OmegaConf.merge(tiny_config(method, data=data), overrides)


def enliven(backbone):
    """Gates whose decisions depend on the image, and statistics as after some training."""
    norms = [m for m in backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    images, _ = digit_tensors(slice(200, 264))
    for gate in backbone.gates:
        if isinstance(gate, ScoringGate):
            nn.init.ones_(gate.norm.bias)  # else all hidden units of a small gate are often off
            nn.init.normal_(gate.expand.weight)
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad(), backbone.train().path("dense", "gated"):
        for _ in range(2):
            backbone(images)
    for norm in norms:
        norm.momentum = 0.1
    return backbone.eval()


def save_run(cfg, folder):
    """An untrained network with lively gates in solo-learn's layout."""
    cfg = prepare_config(cfg)
    torch.manual_seed(0)
    model = METHODS[cfg.method](cfg).eval()
    if hasattr(model.backbone, "gated_blocks"):
        enliven(model.backbone)
    checkpoint = folder / "last.ckpt"
    torch.save({"state_dict": model.state_dict(), "epoch": 6}, checkpoint)
    (folder / "args.json").write_text(json.dumps(OmegaConf.to_container(cfg, resolve=True)))
    return SimpleNamespace(model=model, checkpoint=checkpoint, cfg=cfg, folder=folder)


@cache
def composed(name, *overrides):
    with initialize_config_dir(str(configs_folder()), version_base="1.2"):
        return compose(name, overrides=["accelerator=cpu", *overrides])


def evaluation_config(name, checkpoint, *overrides):
    """A shipped evaluation config for a checkpoint."""
    cfg = composed(name, *overrides).copy()
    cfg.checkpoint = str(checkpoint)
    return cfg


@contextmanager
def nothing_twice():
    """Every checkpoint is loaded once, every network's FLOPs are counted once, to save time."""
    counted = WeakKeyDictionary()

    def count(backbone, resolution):
        known = counted.setdefault(backbone, {})
        if resolution not in known:
            known[resolution] = count_flops(backbone, resolution)
        return known[resolution]

    with ExitStack() as stack:
        for module in (dial, evaluation, features, policy):
            stack.enter_context(mock.patch.object(module, "count_flops", count))
        stack.enter_context(mock.patch.object(evaluation, "encoder_of", cache(encoder_of)))
        yield


def assert_refused(task, *parts):
    """An InputError of one line that holds all the parts."""
    with pytest.raises(InputError) as error:
        task()
    message = str(error.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


@cache
def built(name, **kwargs):
    torch.manual_seed(0)
    backbone = BaseMethod._BACKBONES[name]("x", **{"width": 4, "stem": "cifar", **kwargs})
    backbone.fc = nn.Identity()
    return enliven(backbone)


def tiny_backbone(name="resnet18_gated", **kwargs):
    """An encoder of width 4 with lively gates, always the same."""
    return copy.deepcopy(built(name, **kwargs))


def loader(images, targets=None, batch_size=8):
    """Batches `[images, targets]`."""
    targets = torch.zeros(len(images), dtype=torch.long) if targets is None else targets
    return DataLoader(TensorDataset(images, targets), batch_size=batch_size)


def flops_by_hand(selected, width=4, size=16):
    """Multiply-accumulates of one image, stem and gates included, for the channels of 8 blocks.

    Without `selected`: of the dense path.
    """
    side = size + 2  # 3×3 with a padding of 2
    total = 3 * 3 * 3 * width * side**2
    c_in = width
    for index in range(8):
        c_out = width * 2 ** (index // 2)
        if index in (2, 4, 6):
            side = math.ceil(side / 2)
            total += c_in * c_out * side**2
        n = c_out
        if selected is not None:
            n = int(selected[index])
            hidden = max(1, c_in // 4)
            total += c_in * hidden + hidden * c_out
        total += 3 * 3 * side**2 * (c_in * n + n * c_out)
        c_in = c_out
    return total


# Encoders from checkpoints


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An epoch of vicreg_dual: its checkpoint, and the model as it was in memory."""
    folder = tmp_path_factory.mktemp("trained")
    cfg = run_config(
        folder,
        max_epochs=1,
        checkpoint={"enabled": True, "dir": str(folder / "runs")},
        optimizer={"batch_size": 16},
    )
    build, models = training_pretrain.build_model, []

    def kept(cfg):
        models.append(build(cfg))
        return models[0]

    with mock.patch("solo_gating.training.pretrain.build_model", kept):
        main_pretrain.pretrain(cfg)
    (checkpoint,) = (folder / "runs").glob("*/*/last.ckpt")
    return SimpleNamespace(model=models[0].eval(), checkpoint=checkpoint)


@pytest.fixture(scope="module")
def dual(tmp_path_factory):
    """A run of vicreg_dual whose gates decide by the image."""
    folder = tmp_path_factory.mktemp("dual")
    return save_run(run_config(folder), folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run of vicreg without gates."""
    folder = tmp_path_factory.mktemp("plain")
    return save_run(run_config(folder, "vicreg"), folder)


def lively_encoder() -> Any:
    """A small gated encoder whose gates choose; the same at each call."""
    torch.manual_seed(0)
    net = BACKBONES["resnet18_gated"](width=8, stem="cifar")
    net.fc = nn.Identity()
    return enliven(net)


def engines_here(dtype: str = "float32") -> list[Any]:
    """The engines that this CPU has; those between the best and the portable one are slow to build."""
    best, *others = supported_engines(dtype)
    *between, portable = others or [best]
    slow = [pytest.param(engine, marks=pytest.mark.slow) for engine in between]
    return [best, *slow, *([portable] if others else [])]


def assert_no_split_matters(fast: Kernel, x: np.ndarray) -> None:
    """Threads and parts of a batch of five images give what one thread gives of all, bit for bit."""
    decisions = fast.decide(0.0, None)
    expected = fast.run(x, decisions, 1, True)
    for threads in (2, 3, 4):
        for part in (slice(0, 5), slice(1, 2), slice(3, 5)):
            got = fast.run(x[part].copy(), decisions, threads, True)
            np.testing.assert_array_equal(got.features, expected.features[part])
            np.testing.assert_array_equal(got.masks, expected.masks[part])
            for one, other in zip(got.maps, expected.maps, strict=True):
                np.testing.assert_array_equal(one, other[part])
