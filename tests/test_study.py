"""What the studies share (research/study.py, research/picture.py)."""

import importlib
import json
import sys
from unittest import mock

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from solo_gating import GATED_METHODS, METHODS

from .support.helpers import ROOT


@pytest.fixture(scope="module", autouse=True)
def research():
    """Its modules can be imported; what they register and import is forgotten afterwards."""
    with (
        mock.patch.dict(METHODS),
        mock.patch.dict(GATED_METHODS),
        mock.patch.dict(sys.modules),
        mock.patch.object(sys, "path", [str(ROOT / "research"), *sys.path]),
    ):
        yield


def test_logistic_regression_is_scikit_learns():
    torch.manual_seed(0)
    features = 3 * torch.randn(400, 12) + torch.arange(12)
    features[:, 5] = 7  # of no use to anybody
    targets = (features[:, :4] + torch.randn(400, 4)).argmax(dim=1)
    train, test = ((features[part], targets[part]) for part in (slice(0, 300), slice(300, 400)))
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.03, max_iter=3000, tol=1e-9))
    probe.fit(*(tensor.double().numpy() for tensor in train))
    expected = 100 * probe.score(*(tensor.double().numpy() for tensor in test))
    found = importlib.import_module("study").logistic_regression(train, test)
    assert found == pytest.approx(expected)
    assert 40 < found < 95


def test_the_picture_shows_means_over_seeds_at_their_flops(tmp_path):
    def write(variant, seed, **columns):
        folder = tmp_path / variant / f"seed_{seed}"
        folder.mkdir(parents=True)
        rows = {name: {"flops": f, "linear": a} for name, (f, a) in columns.items()}
        (folder / "accuracies.json").write_text(json.dumps(rows))

    picture = importlib.import_module("picture")
    for seed in (0, 1):
        write("dense", seed, dense=(200.0, 50.0 + seed))
        write("dense_0.3", seed, dense=(60.0, 40.0))
        write("any", seed, dense=(200.0, 48.0), **{"gated at 30%": (60.0 + 2 * seed, 44.0 + seed)})
        write("fbs_0.3", seed, dense=(200.0, 41.0), **{picture.OWN: (70.0, 43.0)})
        write("fbs_0.5", seed, dense=(200.0, 42.0), **{picture.OWN: (100.0, 44.0)})
        write("dual_0.3", seed, dense=(200.0, 41.0), **{picture.OWN: (70.0, 39.0 + 2 * seed)})
    drawn, bars = {}, []

    def keep(path, figure):
        (axis,) = figure.axes
        drawn.update({line.get_label(): line.get_xydata().tolist() for line in axis.lines})
        bars.extend(end.tolist() for group in axis.collections for end in group.get_segments())

    with mock.patch.object(picture, "write_picture", keep):
        picture.picture(tmp_path, tmp_path / "unused.png")
    assert drawn == {
        "dense networks, one training each": [[30.0, 40.0], [100.0, 50.5]],
        "any": [[30.5, 44.5], [100.0, 48.0]],
        "fbs": [[35.0, 43.0], [50.0, 44.0]],
        "dual_0.3": [[35.0, 40.0]],
    }
    deviation = 0.5**0.5  # of two seeds a point apart
    expected = [(100, 50.5, deviation), (30.5, 44.5, deviation), (35, 40, 2 * deviation)]
    for bar, (x, mean, by) in zip(bars, expected, strict=True):
        assert bar == [[x, pytest.approx(mean - by)], [x, pytest.approx(mean + by)]]
