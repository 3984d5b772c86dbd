"""Nearest neighbours against scikit-learn's, and the command that evaluates with them."""

import hashlib
import json

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from sklearn import preprocessing
from sklearn.neighbors import KNeighborsClassifier

from solo_gating import InputError, main_knn
from solo_gating.checkpoints.encoder import encoder_of
from solo_gating.data import evaluation_loader
from solo_gating.evaluate.knn import knn_top1
from solo_gating.main_knn import evaluate_knn
from solo_gating.solo_learn import WeightedKNNClassifier, fixes

from ..support.encoders import (
    VAL,
    assert_refused,
    digits,
    evaluation_config,
    flops_by_hand,
    nothing_twice,
    run_config,
    save_run,
    write_arrays,
)


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with nothing_twice():
        yield


def features(number, seed, classes=6):
    """Classes that overlap, lengths that differ tenfold."""
    rng = np.random.RandomState(seed)
    targets = rng.randint(0, classes, number)
    centres = np.random.RandomState(9).standard_normal((classes, 8))
    points = centres[targets] + 1.1 * rng.standard_normal((number, 8))
    return (points * rng.uniform(0.3, 3, (number, 1))).astype(np.float32), targets


def tensors(arrays):
    return tuple(map(torch.from_numpy, arrays))


def scikit_learn(train, test, k, distance, temperature=0.07, normalize=False):
    """The same vote with scikit-learn's own neighbours, in percent."""
    if normalize:
        train, test = ((preprocessing.normalize(x), y) for x, y in (train, test))
    if distance == "cosine":

        def weights(distances):
            return np.exp((1 - distances) / temperature)
    else:
        weights = "distance"
    knn = KNeighborsClassifier(k, weights=weights, metric=distance)
    return 100 * knn.fit(*train).score(*test)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("k", "distance", "temperature"),
    [
        (1, "euclidean", 0.07),
        (5, "euclidean", 0.07),
        (50, "euclidean", 0.07),
        (5, "cosine", 0.07),
        (50, "cosine", 0.07),
        (50, "cosine", 1.0),
        (1, "cosine", 0.07),
    ],
)
def test_the_accuracy_is_scikit_learn_s(k, distance, temperature, normalize):
    train, test = features(500, 0), features(400, 1)
    settings = {"k": k, "distance": distance, "temperature": temperature, "normalize": normalize}
    expected = scikit_learn(train, test, **settings)
    assert 40 < expected < 95
    assert knn_top1(tensors(train), tensors(test), **settings) == pytest.approx(expected)


def test_the_settings_make_a_difference():
    """So that the agreement above says something about each of them."""
    train, test = tensors(features(500, 0)), tensors(features(400, 1))
    settings = [
        {"k": 1},
        {"k": 1, "normalize": True},
        {"k": 5},
        {"k": 50, "normalize": True},
        {"k": 50, "distance": "cosine"},
        {"k": 50, "distance": "cosine", "temperature": 1.0},
    ]
    assert len({knn_top1(train, test, **s) for s in settings}) == len(settings)


def test_more_neighbours_than_images_are_all_of_them():
    train, test = features(30, 0), features(200, 1)
    expected = scikit_learn(train, test, 30, "euclidean")
    assert knn_top1(tensors(train), tensors(test), k=200) == pytest.approx(expected)


def test_unlabelled_training_images_are_no_neighbours():
    train, test = features(200, 0), features(200, 1)
    expected = scikit_learn(train, test, 3, "euclidean")
    x, y = tensors(train)
    # Of every test image an unlabelled copy, which would be the nearest of all.
    x = torch.cat([x, torch.from_numpy(test[0])])
    y = torch.cat([y, torch.full((200,), -1)])
    assert knn_top1((x, y), tensors(test), k=3) == pytest.approx(expected)


def test_unlabelled_validation_images_are_left_out():
    train, test = features(200, 0), features(200, 1)
    expected = scikit_learn(train, test, 1, "euclidean")
    x, y = tensors(test)
    unlabelled = (torch.cat([x, x]), torch.cat([y, torch.full((200,), -1)]))
    assert knn_top1(tensors(train), unlabelled) == pytest.approx(expected)


def test_a_low_temperature_is_the_nearest_neighbour():
    """The limit: the nearest neighbour outvotes all others together."""
    train, test = tensors(features(300, 0)), tensors(features(300, 1))
    nearest = knn_top1(train, test, k=1, distance="cosine")
    found = knn_top1(train, test, k=20, distance="cosine", temperature=1e-4)
    assert found == pytest.approx(nearest, abs=1)


# In pieces


def accuracies(train, test, matrix, **kwargs):
    knn = WeightedKNNClassifier(max_distance_matrix_size=matrix, **kwargs)
    knn(train_features=train[0], train_targets=train[1])
    knn(test_features=test[0], test_targets=test[1])
    return knn.compute()


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("k", [1, 20])
@pytest.mark.parametrize("matrix", [1, 900, 7001])
def test_pieces_change_nothing(matrix, k, distance, monkeypatch):
    train, test = tensors(features(331, 0)), tensors(features(107, 1))
    expected = accuracies(train, test, int(5e6), k=k, distance_fx=distance)
    monkeypatch.setattr(fixes, "_QUERIES_AT_ONCE", 50)
    found = accuracies(train, test, matrix, k=k, distance_fx=distance)
    assert found == pytest.approx(expected)
    assert expected[0] < expected[1] if k > 1 else expected[0] > 50


def test_no_piece_is_larger_than_allowed(monkeypatch):
    train, test = tensors(features(3000, 0)), tensors(features(2100, 1))
    sizes, cdist = [], torch.cdist

    def recording(queries, bank):
        sizes.append(len(queries) * len(bank))
        return cdist(queries, bank)

    monkeypatch.setattr(torch, "cdist", recording)
    accuracies(train, test, 300_000, k=1, distance_fx="euclidean")
    assert max(sizes) <= 300_000
    assert sum(sizes) == 3000 * 2100


# The command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return save_run(run_config(folder), folder)


def sets_of(run, path, head="backbone"):
    """Features and targets of the run's images, straight from its model."""
    sets = []
    for split in ("train", "val"):
        images, targets = zip(*evaluation_loader(run.cfg, split), strict=True)
        with torch.no_grad(), run.model.backbone.path(path):
            found = run.model.backbone(torch.cat(images))
            found = run.model.projector(found) if head == "projector" else found
        sets.append((found.numpy(), torch.cat(targets).numpy()))
    return sets


def test_every_combination_of_lists_is_evaluated(run):
    cfg = evaluation_config(
        "knn", run.checkpoint, "k=[1,5]", "distance=[euclidean,cosine]", "temperature=[0.07,0.5]"
    )
    metrics = evaluate_knn(cfg)
    (file,) = run.folder.glob("evaluation/knn-*/metrics.json")
    assert json.loads(file.read_text()) == metrics
    combinations = [
        {"k": 1, "distance": "euclidean"},
        {"k": 1, "distance": "cosine", "temperature": 0.07},
        {"k": 1, "distance": "cosine", "temperature": 0.5},
        {"k": 5, "distance": "euclidean"},
        {"k": 5, "distance": "cosine", "temperature": 0.07},
        {"k": 5, "distance": "cosine", "temperature": 0.5},
    ]
    for path in ("dense", "gated"):
        row, sets = metrics[path], sets_of(run, path)
        assert [{**r, "knn_top1": None} for r in row["knn"]] == [
            {**c, "knn_top1": None} for c in combinations
        ]
        for result, settings in zip(row["knn"], combinations, strict=True):
            assert result["knn_top1"] == pytest.approx(scikit_learn(*sets, **settings))
        assert row["knn_top1"] == row["knn"][0]["knn_top1"]


def test_metrics_say_what_was_evaluated(run, tmp_path):
    cfg = evaluation_config("knn", run.checkpoint, f"output={tmp_path}", "normalize=true")
    metrics = evaluate_knn(cfg)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert metrics["evaluation"] == "knn"
    assert metrics["pretraining"] == encoder_of(run.checkpoint).description()
    assert metrics["pretraining"]["epochs"] == 7
    assert metrics["data"] == {
        "dataset": "custom",
        "train_images": 96,
        "val_images": 31,
        "resolution": [16, 16],
    }
    settings = {"k": 1, "distance": "euclidean", "normalize": True, "threshold": 0.0}
    assert metrics["settings"] | settings == metrics["settings"]
    dense, gated = metrics["dense"], metrics["gated"]
    assert dense["flops"] == flops_by_hand(None)
    assert "flops_cut" not in dense
    sets = sets_of(run, "gated")
    with torch.no_grad(), run.model.backbone.path("gated") as passes:
        run.model.backbone(torch.cat([images for images, _ in evaluation_loader(run.cfg, "val")]))
    masks = passes[-1].masks
    channels = torch.stack([mask.sum(dim=1) for mask in masks], dim=1)
    flops = np.mean([flops_by_hand(image) for image in channels])
    assert gated["flops"] == pytest.approx(flops)
    assert gated["flops_cut"] == pytest.approx(1 - flops / dense["flops"])
    assert gated["knn_top1"] == pytest.approx(scikit_learn(*sets, 1, "euclidean", normalize=True))


def test_the_projector_s_features_can_be_classified(run):
    cfg = evaluation_config("knn", run.checkpoint, "features=projector", "path=gated")
    metrics = evaluate_knn(cfg)
    expected = scikit_learn(*sets_of(run, "gated", "projector"), 1, "euclidean")
    assert metrics["gated"]["knn_top1"] == pytest.approx(expected)
    assert "dense" not in metrics
    assert metrics["settings"]["features"] == "projector"


def test_one_path_after_the_other_is_both(run, tmp_path):
    paths = [
        evaluate_knn(evaluation_config("knn", run.checkpoint, f"output={tmp_path}", f"path={path}"))
        for path in ("dense", "gated")
    ]
    assert "gated" not in paths[0]
    both = evaluate_knn(evaluation_config("knn", run.checkpoint))
    assert paths[1] == both


def test_images_without_a_label_are_refused(run, tmp_path):
    file = write_arrays(tmp_path / "unlabelled.npz", digits(VAL)[0])
    for split in ("train", "val"):
        cfg = evaluation_config("knn", run.checkpoint, f"data.{split}_path={file}")
        assert_refused(
            lambda cfg=cfg: evaluate_knn(cfg), f"data.{split}_path: no image has a label"
        )


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("k=0", ["k: got 0", "an integer ≥ 1, or a list"]),
        ("k=[1,0]", ["k: got 0"]),
        ("k=true", ["k: got True"]),
        ("k=2.5", ["k: got 2.5"]),
        ("distance=manhattan", ["distance: got 'manhattan'", "euclidean or cosine"]),
        ("distance=[cosine,dot]", ["distance: got 'dot'"]),
        ("temperature=0", ["temperature: got 0", "a number > 0"]),
        ("normalize=maybe", ["normalize: got 'maybe'", "true or false"]),
        ("k=[]", ["k: got []"]),
    ],
)
def test_a_mistake_is_found_before_anything_is_read(override, parts):
    cfg = evaluation_config("knn", "nowhere.ckpt", override)
    assert_refused(lambda: evaluate_knn(cfg), *parts)


EARLIER = ("pretrained_feature_extractor", "normalise")


def test_earlier_names_of_keys_mean_today_s(run, tmp_path, call):
    assert run_knn(call, f"checkpoint={run.checkpoint}", "--normalize", "output=today")[1] == ""
    typed = (f"--pretrained_feature_extractor={run.checkpoint}", "normalise=true", "output=then")
    _, stderr = run_knn(call, *typed)
    lines = [line for line in stderr.splitlines() if "is called" in line]
    assert [line.split()[0] for line in lines] == list(EARLIER)
    today, then = (
        json.loads((tmp_path / f"{name}/metrics.json").read_text()) for name in ("today", "then")
    )
    assert today == then
    assert today["settings"]["normalize"] is True


def run_knn(call, *arguments):
    code, stdout, stderr = call(main_knn, *arguments, "accelerator=cpu", "path=dense")
    assert code == 0, stderr
    return stdout, "".join(line for line in stderr.splitlines(True) if "is called" in line)


def test_earlier_names_in_a_config_mean_today_s(run, tmp_path, capsys):
    cfg = evaluation_config("knn", "???", f"output={tmp_path}", "path=dense")
    OmegaConf.set_struct(cfg, False)
    cfg.pretrained_feature_extractor, cfg.normalise = str(run.checkpoint), True
    metrics = evaluate_knn(cfg)
    assert [line.split()[0] for line in capsys.readouterr().err.splitlines()[:2]] == list(EARLIER)
    assert metrics["settings"]["normalize"] is True
    cfg.checkpoint = "another.ckpt"
    with pytest.raises(InputError, match=r"checkpoint: got 'another.ckpt', and pretrained_"):
        evaluate_knn(cfg)


def test_an_evaluation_of_an_earlier_version_is_the_same(run, tmp_path):
    """Its identity was that of the settings by their names of then."""
    found = evaluate_knn(evaluation_config("knn", run.checkpoint, f"output={tmp_path}"))
    data = {
        key: value
        for key, value in OmegaConf.to_container(run.cfg.data).items()
        if key not in ("num_workers", "on_damaged", "num_large_crops", "num_small_crops")
    } | {"split": "train"}
    settings = {key: found["settings"][key] for key in ("threshold", "features", "precision")}
    settings |= {"k": 1, "distance": "euclidean", "temperature": 0.07, "normalise": False}
    text = json.dumps([settings, data, 16, 7], sort_keys=True)
    assert found["identity"] == hashlib.sha1(text.encode()).hexdigest()[:6]
