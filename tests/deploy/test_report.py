"""Reports of rounding, against numbers that are known or computed in another way."""

import copy
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.model_selection import LeaveOneOut, cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from solo_gating import InputError, create_backbone, deploy
from solo_gating.deploy.engine.fold import fold
from solo_gating.deploy.report import path_report

from ..support.encoders import digit_tensors, lively_encoder


@pytest.fixture(scope="module")
def encoder():
    return lively_encoder()


@pytest.fixture(scope="module")
def images():
    return digit_tensors(slice(0, 60))


@pytest.fixture(scope="module")
def int8(encoder, images):
    return deploy.compile(encoder, dtype="int8", calibration=images[0], engine="pytorch")


@dataclass
class Changed:
    """The backbone itself, but for what is done to its features and masks."""

    backbone: Any
    change: Any
    path: str = "gated"
    threshold: float = 0.0
    budget: float | None = None

    @torch.no_grad()
    def features_and_masks(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        with self.backbone.path(self.path) as passes:
            features = self.backbone(images)
        masks = tuple(mask > 0 for mask in passes[-1].masks)
        if self.path == "dense":
            masks = tuple(
                torch.ones(len(images), c, dtype=torch.bool) for c in (8, 8, 16, 16, 32, 32, 64, 64)
            )
        return self.change(features, masks)


def test_nothing_changed(encoder, images):
    x, labels = images
    for path in ("gated", "dense"):
        same = Changed(encoder, lambda f, m: (f, m), path)
        found = path_report(fold(encoder, path).network, same, x, labels)
        assert found.path == path
        assert found.flipped == (0 if path == "gated" else None)
        assert found.images_with_flip == found.flipped
        assert found.feature_error < 1e-5
        assert found.same_masks_error < 1e-5
        assert found.density == found.density_float
        assert (found.density == 1) == (path == "dense")
        assert found.knn_top1 == found.knn_top1_float


def test_features_and_decisions_that_changed_are_counted(encoder, images):
    x, _ = images

    def change(features, masks):
        first = masks[0].clone()
        first[:3, 0] = ~first[:3, 0]
        first[0, 1] = ~first[0, 1]
        return 1.1 * features, (first, *masks[1:])

    found = path_report(fold(encoder, "gated").network, Changed(encoder, change), x)
    channels = 8 * 2 + 16 * 2 + 32 * 2 + 64 * 2
    assert found.flipped == pytest.approx(4 / (60 * channels))
    assert found.images_with_flip == pytest.approx(3 / 60)
    assert found.feature_error == pytest.approx(0.1, rel=1e-4)
    assert found.same_masks_error != found.feature_error
    assert found.knn_top1 is found.knn_top1_float is None


@pytest.mark.parametrize("path", ["gated", "dense"])
def test_int8_changes_little_and_the_masks_explain_the_rest(int8, images, path):
    report = int8.report(*images)
    assert [found.path for found in report.paths] == ["gated", "dense"]
    assert report.calibration_images == report.images == 60
    found = {found.path: found for found in report.paths}[path]
    assert 0 < found.same_masks_error < 0.06  # of a narrow, untrained network
    if path == "dense":
        assert found.same_masks_error == found.feature_error
        assert found.flipped is None
    else:
        assert found.same_masks_error < found.feature_error
        assert 0 < found.flipped < 0.05
        assert found.density == pytest.approx(found.density_float, abs=0.02)


def test_the_other_path_is_rounded_alike(encoder, images, int8):
    dense = deploy.compile(encoder, "dense", dtype="int8", calibration=images[0], engine="pytorch")
    assert dense.report(*images) == int8.report(*images)


def test_bfloat16_is_reported_too(encoder, images):
    fast = deploy.compile(encoder, dtype="bfloat16", engine="pytorch")
    report = fast.report(images[0])
    assert report.dtype == "bfloat16"
    assert report.calibration_images is None
    assert all(0 < found.same_masks_error < 0.02 for found in report.paths)


@pytest.mark.parametrize("kind", ["cgnet", "dgc"])
@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_a_dense_path_is_reported_alone_where_only_pytorch_runs_the_gates(kind, dtype, images):
    torch.manual_seed(0)
    net = create_backbone("resnet18_gated", width=8, stem="cifar", gate=kind).eval()
    calibration = {"calibration": images[0]} if dtype == "int8" else {}
    fast = deploy.compile(net, "dense", dtype=dtype, engine="pytorch", **calibration)
    (found,) = fast.report(*images).paths
    assert found.path == "dense"
    assert 0 < found.feature_error < 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 0.3}, "budget: got 0.3, the network's gates are told no budget"),
        ({"path": "dense", "budget": 0.3}, "budget: got 0.3 for the dense path"),
        ({"path": "dense", "threshold": 0.5}, "threshold: got 0.5 for the dense path"),
        ({"threshold": "high"}, "threshold: got 'high', expected a number"),
    ],
)
def test_a_dial_that_the_network_has_not_is_named(arguments, message, encoder):
    with pytest.raises(InputError, match=re.escape(message)):
        deploy.compile(encoder, **arguments, engine="pytorch")


def test_thresholds_are_those_of_the_moment(encoder, images):
    x = images[0]
    fast = deploy.compile(encoder, dtype="int8", calibration=x, engine="pytorch")
    fast.threshold = -1e6
    gated, _ = fast.report(x).paths
    assert gated.flipped == 0
    assert gated.density == gated.density_float == 1


def test_neighbours_are_those_of_scikit_learn(int8, images):
    x, labels = images
    found = int8.report(x, labels).paths[0]
    knn = KNeighborsClassifier(1)
    scores = cross_val_score(knn, int8(x).double().numpy(), labels.numpy(), cv=LeaveOneOut())
    assert found.knn_top1 == pytest.approx(100 * scores.mean())
    some = labels.clone()
    some[::2] = -1
    half = int8.report(x, some).paths[0]
    scores = cross_val_score(knn, int8(x[1::2]).double(), labels[1::2], cv=LeaveOneOut())
    assert half.knn_top1 == pytest.approx(100 * scores.mean())


def test_arrays_and_lists_are_taken(int8, images):
    x, labels = images
    assert int8.report(x.numpy(), labels.tolist()) == int8.report(x, labels)


def test_it_is_a_table(int8, images):
    text = str(int8.report(*images))
    lines = text.splitlines()
    assert lines[0] == "60 images, scales from 60"
    assert lines[1].startswith("float32 → int8")
    assert [line.split()[0] for line in lines[2:]] == ["gated", "dense"]
    assert "1-NN" in lines[1]
    assert "1-NN" not in str(int8.report(images[0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x[:, :1], y), "^images: got the shape"),
        (lambda x, y: (x[:0], None), "^images: got none, expected at least one"),
        (lambda x, y: (x * torch.nan, y), "^images: got NaN or infinity"),
        (lambda x, y: (x.double(), y), "^images: got float64"),
        (lambda x, y: (x, y[1:]), r"^labels: got int64 of shape \(59,\), expected 60 integers"),
        (lambda x, y: (x, y.float()), "^labels: got float32"),
        (lambda x, y: (x, ["a"] * 60), "^labels: got list, expected integers"),
        (lambda x, y: (x.numpy()[:, :1], y), "^images: got the shape"),
    ],
)
def test_what_cannot_be_used_is_refused(int8, images, change, message):
    x, labels = change(*(value.clone() for value in images))
    with pytest.raises(InputError, match=message):
        int8.report(x, labels)


def test_encoders_without_an_origin_are_refused(encoder, images, int8, tmp_path):
    with pytest.raises(InputError, match=r"^report: the encoder is in float32"):
        deploy.compile(encoder, engine="pytorch").report(images[0])
    int8.save(tmp_path / "encoder.sgx")
    with pytest.raises(InputError, match=r"^report: the encoder comes from a file"):
        deploy.load(tmp_path / "encoder.sgx", engine="pytorch").report(images[0])


def test_later_changes_to_the_backbone_change_nothing(encoder, images):
    backbone = copy.deepcopy(encoder)
    fast = deploy.compile(backbone, dtype="int8", calibration=images[0], engine="pytorch")
    before = fast.report(images[0])
    for parameter in backbone.parameters():
        nn.init.zeros_(parameter)
    assert fast.report(images[0]) == before
    assert np.isfinite(before.paths[0].feature_error)
