"""UMAP of features: which images, what is written, and what is refused."""

import builtins
import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from solo_gating.data import evaluation_loader
from solo_gating.evaluate.embed import embed
from solo_gating.evaluate.extract import extract
from solo_gating.evaluate.tasks.umap import choose, evaluate_umap
from solo_gating.plots import embeddings as embedding
from solo_gating.plots.embeddings import draw_embeddings

from ..support.encoders import (
    VAL,
    assert_refused,
    digits,
    evaluation_config,
    run_config,
    save_run,
    write_arrays,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return save_run(run_config(folder), folder)


@pytest.fixture
def projected(monkeypatch):
    """The features that are embedded; the embedding is their first two columns."""
    seen = []

    def fake(features, neighbors, min_dist, seed):
        seen.append((features, neighbors, min_dist, seed))
        return features[:, :2].numpy()

    monkeypatch.setattr("solo_gating.evaluate.tasks.umap.embed", fake)
    monkeypatch.setattr("solo_gating.evaluate.tasks.umap.load_umap", lambda: None)
    return seen


def rows_of(folder):
    with (folder / "umap.csv").open() as lines:
        return list(csv.DictReader(lines))


def test_digits_are_embedded(run, tmp_path):
    pytest.importorskip("umap")
    cfg = evaluation_config(
        "umap", run.checkpoint, "classes=3", "path=gated", f"output={tmp_path}", "neighbors=5"
    )
    metrics = evaluate_umap(cfg)
    _, labels = digits(VAL)
    rows = rows_of(tmp_path)
    assert [int(row["label"]) for row in rows] == labels[labels < 3].tolist()
    points = np.array([[float(row["gated_x"]), float(row["gated_y"])] for row in rows])
    assert np.isfinite(points).all()
    assert (points.std(axis=0) > 0.01).all()
    with Image.open(tmp_path / "umap.png") as picture:
        assert picture.format == "PNG"
        assert np.asarray(picture.convert("L")).std() > 5
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics


def test_umap_keeps_neighbours_together():
    """Two clouds far apart stay two, and the seed decides the rest."""
    pytest.importorskip("umap")
    rng = np.random.RandomState(0)
    cloud = np.arange(24) % 2
    features = torch.from_numpy(rng.standard_normal((24, 10)) + 20 * cloud[:, None]).float()
    points, again = (embed(features, 5, 0.1, seed=3) for _ in range(2))
    assert points.shape == (24, 2)
    assert np.array_equal(points, again)
    distances = np.linalg.norm(points[:, None] - points, axis=2) + 1e9 * np.eye(24)
    assert (cloud[distances.argmin(axis=1)] == cloud).all()


def test_both_paths_are_beside_each_other(run, projected, tmp_path):
    overrides = ["images=20", "classes=7", "neighbors=4", "min_dist=0.3", "seed=9"]
    metrics = evaluate_umap(
        evaluation_config("umap", run.checkpoint, f"output={tmp_path}", *overrides)
    )
    _, labels = digits(VAL)
    rows = rows_of(tmp_path)
    assert len(rows) == 20
    images = [int(row["image"]) for row in rows]
    assert images == sorted(set(images))
    assert [int(row["label"]) for row in rows] == labels[images].tolist()
    assert max(labels[images]) == 6
    for path, (features, *settings) in zip(("dense", "gated"), projected, strict=True):
        assert settings == [4, 0.3, 9]
        found = extract(run.model.backbone, evaluation_loader(run.cfg, "val"), path)
        torch.testing.assert_close(features, found.features[images])
        points = [[float(row[f"{path}_x"]), float(row[f"{path}_y"])] for row in rows]
        np.testing.assert_allclose(points, features[:, :2], rtol=1e-6)
    assert 0 < metrics["gated"]["flops_cut"] < 1
    assert metrics["settings"]["images"] == 20
    assert metrics["data"]["train_images"] == 0


def test_unlabelled_images_are_embedded_too(run, projected, tmp_path):
    file = write_arrays(tmp_path / "unlabelled.npz", digits(VAL)[0])
    overrides = [f"data.val_path={file}", f"output={tmp_path}", "path=dense"]
    evaluate_umap(evaluation_config("umap", run.checkpoint, *overrides))
    rows = rows_of(tmp_path)
    assert [row["label"] for row in rows] == ["-1"] * 31
    assert (tmp_path / "umap.png").is_file()


@pytest.mark.parametrize("images", [7, 40, 1000])
@pytest.mark.parametrize("classes", [1, 4, 10])
def test_the_first_classes_and_at_most_so_many_images(classes, images):
    targets = torch.from_numpy(np.random.RandomState(0).randint(0, 10, 300))
    chosen, found = choose(targets, classes, images)
    possible = [index for index, target in enumerate(targets.tolist()) if target < classes]
    assert len(chosen) == min(images, len(possible))
    assert found.tolist() == targets[chosen].tolist()
    assert set(chosen) <= set(possible)
    assert (np.diff(chosen) > 0).all()
    assert (chosen[0], chosen[-1]) == (possible[0], possible[-1])
    if images < len(possible):  # spread evenly
        gaps = np.diff([possible.index(index) for index in chosen])
        assert gaps.max() - gaps.min() <= 1


def test_labels_need_not_begin_at_zero():
    targets = torch.tensor([9, -1, 4, 9, 7, -1, 4])
    chosen, found = choose(targets, 2, 100)
    assert chosen.tolist() == [1, 2, 5, 6]
    assert found.tolist() == [-1, 4, -1, 4]


def test_the_picture_has_a_panel_for_each_entry(tmp_path):
    rng = np.random.RandomState(0)
    targets = np.arange(200) % 10
    points = rng.standard_normal((200, 2))
    names = [f"class {label}" for label in range(10)]
    sizes = []
    for panels in (1, 2):
        file = tmp_path / f"{panels}.png"
        headings = {f"panel {panel}": points for panel in range(panels)}
        draw_embeddings(headings, targets, names, file, "title")
        with Image.open(file) as picture:
            sizes.append(picture.size)
            colours = picture.convert("RGB").getcolors(1 << 24)
            assert len(colours) > 20
    assert sizes[1][0] == pytest.approx(2 * sizes[0][0], abs=2)
    assert sizes[1][1] == sizes[0][1]


def test_no_two_classes_look_alike():
    looks = set(zip(embedding._COLOURS, embedding._MARKERS, strict=True))
    assert len(looks) == embedding.MOST_CLASSES == 10


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("classes=11", ["classes: got 11", "1 to 10"]),
        ("classes=0", ["classes: got 0"]),
        ("images=9", ["images: got 9", "an integer ≥ 10"]),
        ("neighbors=1", ["neighbors: got 1"]),
        ("min_dist=-1", ["min_dist: got -1", "a number ≥ 0"]),
    ],
)
def test_a_mistake_is_found_before_anything_is_read(override, parts):
    cfg = evaluation_config("umap", "nowhere.ckpt", override)
    assert_refused(lambda: evaluate_umap(cfg), *parts)


def test_without_umap_the_package_to_install_is_named(run, monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.split(".")[0] == "umap":
            raise ImportError("No module named 'umap'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    cfg = evaluation_config("umap", run.checkpoint)
    assert_refused(lambda: evaluate_umap(cfg), "pip install umap-learn", "solo-gating[umap]")
    assert not (run.folder / "evaluation").exists()
