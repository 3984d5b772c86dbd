"""Linear evaluation against scikit-learn's, solo-learn's own, and its result files."""

import csv
import json
import statistics

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from omegaconf import OmegaConf
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.utils.data import DataLoader

from solo_gating.data import classification_loader, evaluation_loader
from solo_gating.evaluate import linear
from solo_gating.evaluate.evaluation import prepare_evaluation
from solo_gating.evaluate.extract import Extraction
from solo_gating.evaluate.linear import classifier_accuracy, train_on_features, train_on_images
from solo_gating.evaluate.tasks import linear as linear_task
from solo_gating.main_linear import evaluate_linear
from solo_gating.solo_learn import LinearModel

from ..support.encoders import (
    all_digits,
    assert_refused,
    digits,
    evaluation_config,
    flops_by_hand,
    nothing_twice,
    run_config,
    save_run,
    write_arrays,
)

CPU = torch.device("cpu")
TRAIN_IMAGES = 96


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with nothing_twice():
        yield


def set_of(features, targets):
    """Features as if an encoder had made them."""
    return Extraction(features, targets, (8, 8), None, (), None)


@pytest.fixture(scope="module")
def pixels():
    """The pixels of all digits as features: 1,400 to train on, 397 by other writers."""
    data = all_digits()
    features = torch.from_numpy(data.data / 16).float()
    targets = torch.from_numpy(data.target)
    return set_of(features[:1400], targets[:1400]), set_of(features[1400:], targets[1400:])


def linear_config(checkpoint="none", *overrides):
    """The shipped config, without a progress bar."""
    return evaluation_config("linear", checkpoint, "enable_progress_bar=false", *overrides)


def config_of_features(*overrides, classes=10):
    cfg = linear_config("none", *overrides)
    OmegaConf.set_struct(cfg, False)
    cfg.data.num_classes = classes
    return cfg


# Training on features


def test_the_accuracy_is_near_scikit_learn_s(pixels):
    train, val = pixels
    regression = LogisticRegression(max_iter=1000).fit(train.features, train.targets)
    expected = 100 * regression.score(val.features, val.targets)
    cfg = config_of_features("max_epochs=20", "optimizer.batch_size=128")
    found = train_on_features(cfg, train, val, 5, CPU)
    assert expected > 85
    assert found["top1"] == pytest.approx(expected, abs=3)
    assert found["top1"] < found["top5"] <= 100


def test_the_seed_decides(pixels):
    cfg = config_of_features("max_epochs=2")
    results = [train_on_features(cfg, *pixels, seed, CPU) for seed in (1, 1, 2)]
    assert results[0] == results[1] != results[2]


def test_unlabelled_features_have_no_part(pixels, monkeypatch):
    train, val = pixels
    seen = []
    monkeypatch.setattr(
        LinearModel,
        "on_train_batch_start",
        lambda self, batch, batch_idx: seen.append(batch[1]),
        raising=False,
    )
    hidden = torch.where(torch.arange(1400) % 10 == 0, -1, train.targets)
    few = torch.where(torch.arange(397) % 2 == 0, -1, val.targets)
    cfg = config_of_features("max_epochs=1", "optimizer.batch_size=100")
    found = train_on_features(
        cfg, set_of(train.features, hidden), set_of(val.features, few), 5, CPU
    )
    assert torch.equal(torch.cat(seen).sort().values, hidden[hidden >= 0].sort().values)
    labelled = torch.arange(1400) % 10 != 0
    odd = torch.arange(397) % 2 == 1
    expected = train_on_features(
        cfg,
        set_of(train.features[labelled], train.targets[labelled]),
        set_of(val.features[odd], val.targets[odd]),
        5,
        CPU,
    )
    assert found == expected


def test_every_epoch_has_every_image_once_in_an_order_of_its_own(pixels, monkeypatch):
    train, val = pixels
    numbered = set_of(torch.arange(1400.0)[:, None].repeat(1, 64), train.targets)
    seen = []
    monkeypatch.setattr(
        LinearModel,
        "on_train_batch_start",
        lambda self, batch, batch_idx: seen.append((self.current_epoch, *batch)),
        raising=False,
    )
    cfg = config_of_features("max_epochs=2", "optimizer.batch_size=512", "optimizer.lr=0")
    train_on_features(cfg, numbered, val, 5, CPU)
    assert [(epoch, len(targets)) for epoch, _, targets in seen] == [
        (epoch, size) for epoch in (0, 1) for size in (512, 512, 376)
    ]
    orders = [
        torch.cat([features[:, 0] for epoch, features, _ in seen if epoch == number]).long()
        for number in (0, 1)
    ]
    for order, number in zip(orders, (0, 1), strict=True):
        assert torch.equal(order.sort().values, torch.arange(1400))
        targets = torch.cat([targets for epoch, _, targets in seen if epoch == number])
        assert torch.equal(targets, train.targets[order])
    assert not torch.equal(*orders)


@pytest.mark.parametrize(("decay", "scaled"), [(None, False), ([1, 2], False), (None, True)])
def test_the_rate_is_as_given_and_falls_at_60_and_80_percent(decay, scaled, pixels, monkeypatch):
    rates = []

    def on_train_batch_start(self, batch, batch_idx):
        (optimizer,) = self.trainer.optimizers
        (group,) = optimizer.param_groups
        assert {len(p) for p in group["params"]} == {10}  # the classifier's weight and bias
        assert isinstance(optimizer, torch.optim.SGD)
        assert (group["momentum"], group["weight_decay"]) == (0.9, 0)
        rates.append((self.current_epoch, group["lr"]))

    monkeypatch.setattr(LinearModel, "on_train_batch_start", on_train_batch_start, raising=False)
    steps = [] if decay is None else [f"scheduler.lr_decay_steps={decay}"]
    words = [*steps, *(["optimizer.scale_lr=true"] if scaled else [])]
    cfg = config_of_features("max_epochs=10", "optimizer.batch_size=700", *words)
    train_on_features(cfg, *pixels, 5, CPU)
    base = 0.3 * 700 / 256 if scaled else 0.3
    first, second = decay or (6, 8)
    for epoch, rate in rates:
        expected = base * 0.1 ** ((epoch >= first) + (epoch >= second))
        assert rate == pytest.approx(expected)
    assert len(rates) == 20
    assert cfg.optimizer.lr == 0.3  # not scaled again for the next seed


def test_accuracies_are_those_of_the_sorted_logits():
    classifier = nn.Linear(4, 12)
    features, targets = torch.randn(9000, 4), torch.randint(-1, 12, (9000,))
    top1, top5 = classifier_accuracy(classifier, set_of(features, targets))
    with torch.no_grad():
        order = classifier(features).numpy().argsort(axis=1)[:, ::-1]
    labelled = targets.numpy() >= 0
    hits = (order == targets.numpy()[:, None])[labelled]
    assert top1 == pytest.approx(100 * hits[:, 0].mean())
    assert top5 == pytest.approx(100 * hits[:, :5].any(axis=1).mean())


# Training on images


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return save_run(run_config(folder, train=TRAIN_IMAGES), folder)


@pytest.fixture
def classifiers(monkeypatch):
    """The trained classifiers, in order."""
    found, accuracy = [], linear.classifier_accuracy

    def kept(classifier, val):
        found.append(classifier)
        return accuracy(classifier, val)

    monkeypatch.setattr(linear, "classifier_accuracy", kept)
    return found


def test_training_images_are_cropped_and_flipped(run):
    cfg = linear_config(run.checkpoint)
    prepare_evaluation(cfg, "linear", (), ("val",))
    loader = classification_loader(cfg)
    epochs = [next(iter(loader)) for _ in range(2)]  # one batch holds all
    plain, targets = next(iter(evaluation_loader(run.cfg, "train", TRAIN_IMAGES)))
    for images, labels in epochs:
        assert images.shape == (TRAIN_IMAGES, 3, 16, 16)
        assert torch.equal(labels.sort().values, targets.sort().values)
        assert images.min() >= plain.min() - 1e-6  # black and white of the same normalisation
        assert images.max() <= plain.max() + 1e-6
    totals = {round(images.double().sum().item(), 2) for images, _ in epochs}
    assert len(totals | {round(plain.double().sum().item(), 2)}) == 3


def own_config(epochs, batch_size, decay):
    """What the main_linear.py of solo-learn's modern line makes of a rate of 0.3."""
    optimizer = {"name": "sgd", "batch_size": batch_size, "lr": 0.3 * batch_size / 256}
    return OmegaConf.create(
        {
            "data": {"num_classes": 10},
            "max_epochs": epochs,
            "optimizer": {**optimizer, "weight_decay": 0.0, "kwargs": {"momentum": 0.9}},
            "scheduler": {"name": "step", "lr_decay_steps": decay},
        }
    )


def solo_learn(run, own, loader, seed, path="dense"):
    """solo-learn's classifier, trained on images by a plain Trainer."""
    seed_everything(seed, verbose=False)
    backbone = run.model.backbone
    model = LinearModel(backbone, cfg=own)
    trainer = pl.Trainer(
        max_epochs=own.max_epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with backbone.path(path):
        trainer.fit(model, loader)
    return model


@pytest.mark.parametrize("path", ["dense", "gated"])
def test_without_augmentation_images_and_features_train_the_same_classifier(
    path, run, classifiers, monkeypatch
):
    """With all images in one batch their order has no effect, and nothing else may differ.

    The third classifier is solo-learn's, trained on images as its main_linear.py does.
    """
    monkeypatch.setattr(
        "solo_gating.data.classification_transform",
        lambda dataset, views: evaluation_loader(run.cfg, "train").dataset.transform,
    )
    settings = ["max_epochs=8", f"optimizer.batch_size={TRAIN_IMAGES}", "optimizer.scale_lr=true"]
    cfg = linear_config(run.checkpoint, *settings)
    evaluation = prepare_evaluation(cfg, "linear", (), ("train", "val"))
    train, val = (evaluation.extract(split, path) for split in ("train", "val"))
    results = [
        train_on_images(evaluation, path, classification_loader(cfg), val, 3),
        train_on_features(cfg, train, val, 3, CPU),
    ]

    own = own_config(epochs=8, batch_size=TRAIN_IMAGES, decay=[5, 6])
    model = solo_learn(run, own, evaluation_loader(run.cfg, "train", TRAIN_IMAGES), 3, path)
    top1, top5 = classifier_accuracy(model.classifier, val)
    results.append({"top1": top1, "top5": top5})

    assert len(classifiers) > 2
    for classifier in classifiers:
        torch.testing.assert_close(classifier.weight, model.classifier.weight, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(classifier.bias, model.classifier.bias, rtol=1e-3, atol=1e-4)
    seed_everything(3, verbose=False)
    start = nn.Linear(32, 10)
    assert (model.classifier.weight - start.weight).abs().max() > 0.05  # it did learn
    for result in results[1:]:
        assert result["top1"] == pytest.approx(results[0]["top1"], abs=100 / 31 + 0.01)


def test_accuracies_agree_with_solo_learn_s_within_the_noise_of_seeds(run, tmp_path):
    """Small batches in whatever order, with and without the encoder in the loop.

    Measured on the training images: what an untrained encoder says of others is near chance.
    """
    cfg = linear_config(
        run.checkpoint,
        "path=dense",
        "augment=false",
        "seeds=4",
        "max_epochs=15",
        "optimizer.batch_size=16",
        "optimizer.scale_lr=true",
        f"data.val_path={run.folder / 'train.npz'}",
        f"output={tmp_path}",
    )
    ours = evaluate_linear(cfg)["dense"]
    train = evaluation_loader(run.cfg, "train").dataset
    images, targets = next(iter(DataLoader(train, batch_size=TRAIN_IMAGES)))
    own = own_config(epochs=15, batch_size=16, decay=[9, 12])
    model = solo_learn(run, own, DataLoader(train, batch_size=16, shuffle=True), seed=0)
    with torch.no_grad():
        correct = model.eval()(images)["logits"].argmax(dim=1) == targets
    theirs = 100 * correct.double().mean().item()
    assert ours["linear_top1"] > 60
    spread = max(3 * ours["linear_top1_std"], 5)
    assert theirs == pytest.approx(ours["linear_top1"], abs=spread)


@pytest.mark.parametrize("path", ["dense", "gated"])
def test_the_encoder_stays_as_it_was(path, run):
    cfg = linear_config(run.checkpoint, "max_epochs=2", "optimizer.batch_size=40")
    evaluation = prepare_evaluation(cfg, "linear", (), ("val",))
    backbone = evaluation.encoder.backbone
    val = evaluation.extract("val", path)
    train_on_images(evaluation, path, classification_loader(cfg), val, 5)
    saved = torch.load(run.checkpoint, weights_only=True)["state_dict"]
    state = backbone.state_dict()
    assert any("running_mean" in name for name in state)
    for name, value in state.items():
        assert torch.equal(value, saved[f"backbone.{name}"]), name
    again = evaluation.extract("val", path)
    torch.testing.assert_close(again.features, val.features, rtol=1e-4, atol=1e-5)
    with torch.no_grad(), backbone.path() as passes:
        backbone(torch.zeros(1, 3, 16, 16))
    assert passes[-1].path == "dense"  # the default path is back


# The command


def quick(run, *overrides):
    """Two classifiers for each path, trained on features."""
    return linear_config(
        run.checkpoint,
        "augment=false",
        "max_epochs=3",
        "optimizer.batch_size=32",
        "seeds=2",
        *overrides,
    )


@pytest.fixture
def trained(monkeypatch):
    """The seeds with which classifiers are trained, in order; `trained.fail_at` stops at one."""
    train = linear_task.train_on_features

    class Seeds(list):
        fail_at = None

    seeds = Seeds()

    def recording(cfg, features, val, seed, device):
        if seed == seeds.fail_at:
            raise KeyboardInterrupt
        seeds.append(seed)
        return train(cfg, features, val, seed, device)

    monkeypatch.setattr("solo_gating.evaluate.tasks.linear.train_on_features", recording)
    return seeds


def test_figures_are_those_of_the_seeds_files(run, tmp_path, trained):
    metrics = evaluate_linear(quick(run, "seeds=3", "seed=7", f"output={tmp_path}"))
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert trained == [7, 8, 9] * 2
    for path in ("dense", "gated"):
        results = [
            json.loads((tmp_path / f"{path}-seed{seed}.json").read_text()) for seed in (7, 8, 9)
        ]
        row, top1 = metrics[path], [result["top1"] for result in results]
        assert row["linear_top1_seeds"] == top1
        assert row["linear_top1"] == pytest.approx(statistics.mean(top1))
        assert row["linear_top1_std"] == pytest.approx(statistics.stdev(top1))
        top5 = statistics.mean(result["top5"] for result in results)
        assert row["linear_top5"] == pytest.approx(top5)
        assert all(result["seconds"] > 0 for result in results)
    assert metrics["dense"]["flops"] == flops_by_hand(None)
    cut = 1 - metrics["gated"]["flops"] / metrics["dense"]["flops"]
    assert metrics["gated"]["flops_cut"] == pytest.approx(cut)
    assert metrics["evaluation"] == "linear"
    assert metrics["data"]["train_images"] == TRAIN_IMAGES
    assert metrics["settings"]["max_epochs"] == 3
    assert metrics["settings"]["optimizer"]["lr"] == 0.3


def test_a_finished_seed_is_not_trained_again(run, tmp_path, trained):
    cfg = quick(run, "path=dense", f"output={tmp_path}")
    evaluate_linear(cfg.copy())
    files = [tmp_path / f"dense-seed{seed}.json" for seed in (5, 6)]
    first, second = (json.loads(file.read_text()) for file in files)
    files[0].write_text(json.dumps(first | {"top1": 12.5}))
    files[1].unlink()
    trained.clear()
    row = evaluate_linear(cfg.copy())["dense"]
    assert trained == [6]
    assert row["linear_top1_seeds"] == [12.5, second["top1"]]  # the same seed, the same result
    assert row["linear_top1"] == pytest.approx((12.5 + second["top1"]) / 2)
    more = cfg.copy()
    more.seeds = 3
    trained.clear()
    evaluate_linear(more)
    assert trained == [7]


def test_an_interrupted_evaluation_continues_where_it_was(run, tmp_path, trained):
    cfg = quick(run, f"output={tmp_path}")
    trained.fail_at = 6
    with pytest.raises(KeyboardInterrupt):
        evaluate_linear(cfg.copy())
    assert {file.name for file in tmp_path.iterdir()} == {"dense-seed5.json"}
    trained.fail_at = None
    assert trained == [5]
    metrics = evaluate_linear(cfg.copy())
    assert trained == [5, 6, 5, 6]
    assert set(metrics) >= {"dense", "gated"}


def test_other_settings_have_another_folder(run, trained):
    folder = run.folder / "evaluation"
    scaled = "optimizer.scale_lr=true"
    for override in ("max_epochs=3", "max_epochs=2", "optimizer.lr=0.1", scaled, "threshold=0.2"):
        evaluate_linear(quick(run, "path=gated", "seeds=1", override))
    assert trained == [5] * 5
    assert len(list(folder.glob("linear-custom-*/gated-seed5.json"))) == 5
    evaluate_linear(quick(run, "path=gated", "seeds=1"))
    assert trained == [5] * 5


def test_classifiers_of_other_settings_are_not_taken_for_these(run, tmp_path, trained):
    for override in ("max_epochs=1", "max_epochs=2"):
        evaluate_linear(quick(run, "path=dense", "seeds=1", override, f"output={tmp_path}"))
    assert trained == [5, 5]


def test_one_path_after_the_other_is_both(run, tmp_path, trained):
    outputs = [f"output={tmp_path / name}" for name in ("one", "both")]
    dense = evaluate_linear(quick(run, "path=dense", outputs[0]))
    assert "gated" not in dense
    one = evaluate_linear(quick(run, "path=gated", outputs[0]))
    both = evaluate_linear(quick(run, outputs[1]))
    assert one == both
    assert trained == [5, 6, 5, 6] * 2


def test_a_single_seed_has_no_deviation(run, tmp_path):
    row = evaluate_linear(quick(run, "path=dense", "seeds=1", f"output={tmp_path}"))["dense"]
    assert "linear_top1_std" not in row
    assert row["linear_top1"] == row["linear_top1_seeds"][0]


@pytest.mark.parametrize("bar", ["true", "false"])
def test_augmented_images_train_classifiers_too(bar, run, tmp_path, capsys):
    settings = ["max_epochs=2", "seeds=1", "path=gated", f"output={tmp_path}"]
    cfg = evaluation_config("linear", run.checkpoint, f"enable_progress_bar={bar}", *settings)
    row = evaluate_linear(cfg)["gated"]
    assert 0 <= row["linear_top1"] <= row["linear_top5"] <= 100
    with (tmp_path / "logs-gated/seed5/metrics.csv").open() as lines:
        logged = [float(line["val_acc1"]) for line in csv.DictReader(lines) if line["val_acc1"]]
    assert len(logged) == 2
    assert logged[-1] == pytest.approx(row["linear_top1"])
    printed = "".join(capsys.readouterr())
    assert ("epoch 2/2" in printed) == (bar == "true")
    assert "Epoch" not in printed  # Lightning's own bar


@pytest.mark.parametrize("augment", ["true", "false"])
def test_fewer_than_five_classes_are_enough(augment, tmp_path):
    images, labels = digits(slice(400))
    chosen = labels < 3
    cfg = run_config(tmp_path, data={"num_classes": 3})
    for split, rows in (("train", slice(80)), ("val", slice(80, None))):
        write_arrays(tmp_path / f"{split}.npz", images[chosen][rows], labels[chosen][rows])
    run = save_run(cfg, tmp_path)
    epochs = 1 if augment == "true" else 8
    overrides = [f"augment={augment}", f"max_epochs={epochs}", "seeds=1", "path=dense"]
    cfg = linear_config(run.checkpoint, "optimizer.batch_size=16", *overrides)
    row = evaluate_linear(cfg)["dense"]
    assert (0 if augment == "true" else 45) < row["linear_top1"] <= 100
    assert row["linear_top5"] == 100


def test_labels_outside_of_the_classes_are_refused(run, tmp_path):
    cfg = quick(run, "data.num_classes=5")
    assert_refused(lambda: evaluate_linear(cfg), "data.", "0 to 9", "data.num_classes=5", "0 to 4")
    file = write_arrays(tmp_path / "x.npz", digits(slice(12))[0], np.arange(12))
    cfg = quick(run, "dataset=cifar10", "data.format=npz", "data.num_workers=0")
    cfg.data.train_path = cfg.data.val_path = str(file)
    assert_refused(lambda: evaluate_linear(cfg), "0 to 11", "data.num_classes=10")


def test_another_number_of_class_folders_is_refused(run, tmp_path):
    for label in "01":
        (tmp_path / label).mkdir()
        Image.new("RGB", (16, 16)).save(tmp_path / label / "a.png")
    data = [f"data.{split}_path={tmp_path}" for split in ("train", "val")]
    cfg = quick(run, "data.format=image_folder", *data)
    assert_refused(lambda: evaluate_linear(cfg), "got 2 class folders", "data.num_classes=10")


@pytest.mark.parametrize(
    ("augment", "split", "hidden"),
    [
        ("false", "train", "file"),
        ("false", "train", "config"),
        ("false", "val", "file"),
        ("true", "val", "file"),
        ("true", "train", "file"),
        ("true", "train", "config"),
    ],
)
def test_unlabelled_images_are_refused(augment, split, hidden, run, tmp_path):
    if hidden == "config":
        override = "data.no_labels=true"
    else:
        override = f"data.{split}_path={write_arrays(tmp_path / 'x.npz', digits(slice(20))[0])}"
    cfg = quick(run, f"augment={augment}", override)
    assert_refused(lambda: evaluate_linear(cfg), f"data.{split}_path: no image has a label")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("seeds=0", ["seeds: got 0", "an integer from 1 to 10000"]),
        ("max_epochs=0", ["max_epochs: got 0"]),
        ("augment=no way", ["augment: got 'no way'", "true or false"]),
        ("optimizer.name=lion", ["optimizer.name: got 'lion'", "sgd"]),
        ("optimizer.lr=fast", ["optimizer.lr: got 'fast'"]),
        ("optimizer.batch_size=0", ["optimizer.batch_size: got 0"]),
        ("+optimizer.kwargs.eta=1", ["optimizer.kwargs.eta: sgd", "momentum"]),
    ],
)
def test_a_mistake_is_found_before_anything_is_read(override, parts):
    assert_refused(lambda: evaluate_linear(linear_config("nowhere.ckpt", override)), *parts)


@pytest.mark.parametrize("name", ["lars", "adamw"])
def test_other_optimisers_can_be_chosen(name, run, tmp_path):
    cfg = quick(run, f"optimizer.name={name}", "~optimizer.kwargs.momentum", f"output={tmp_path}")
    assert evaluate_linear(cfg)["dense"]["linear_top1"] >= 0
