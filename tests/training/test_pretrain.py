"""Whole runs, tiny ones: what they write, how they continue and how they stop."""

import csv
import json
import resource
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from solo_gating import METHODS, BaseMethod, InputError
from solo_gating.config.pretraining import prepare_config
from solo_gating.data import evaluation_loader
from solo_gating.evaluate.knn import knn_top1, knn_top1_few_labels
from solo_gating.evaluate.table import format_table
from solo_gating.flops import count_flops
from solo_gating.main_flops import report_flops
from solo_gating.main_pretrain import pretrain
from solo_gating.methods import gated
from solo_gating.training.callbacks import NonFiniteLossError
from solo_gating.training.checkpoints import WholeFiles
from solo_gating.training.trainer import attach_outputs

from ..support import helpers
from ..support.helpers import METHOD_KWARGS, STEPS, run_folder, tiny_config, write_images
from ..support.reference import Reference

pytestmark = pytest.mark.usefixtures("no_pictures")


def run_config(folder, method="vicreg_dual", **overrides):
    """Three epochs with validation, whose last batch has 7 images."""
    val = str(write_images(folder / "val.npz", 23, seed=1))
    cfg = helpers.run_config(folder, method, max_epochs=3, data={"val_path": val})
    return OmegaConf.merge(cfg, overrides)


def load(file):
    return torch.load(file, weights_only=True)


@pytest.fixture(scope="module")
def dual(tmp_path_factory):
    """A finished run of vicreg_dual, with kNN and the final table."""
    folder = tmp_path_factory.mktemp("dual")
    cfg = run_config(
        folder,
        knn_eval={"enabled": True, "k": 1},
        final_knn={"enabled": True, "labels_per_class": 3, "draws": 2},
    )
    given = cfg.copy()
    metrics = pretrain(cfg)
    cfg = prepare_config(cfg)
    return SimpleNamespace(cfg=cfg, given=given, metrics=metrics, folder=run_folder(folder))


@pytest.fixture(scope="module")
def encoder(dual):
    """The trained backbone of that run, from its checkpoint."""
    backbone = BaseMethod._BACKBONES["resnet18_gated"]("x", **dual.cfg.backbone.kwargs)
    backbone.fc = torch.nn.Identity()
    weights = load(dual.folder / "last.ckpt")["state_dict"]
    backbone.load_state_dict(
        {k.removeprefix("backbone."): v for k, v in weights.items() if k.startswith("backbone.")}
    )
    return backbone.eval()


def test_a_run_writes_what_it_says(dual):
    folder = dual.folder
    assert json.loads((folder / "metrics.json").read_text()) == dual.metrics
    args = json.loads((folder / "args.json").read_text())
    assert args["method"] == "vicreg_dual"
    assert args["gating"]["views"] == ["gated", "dense"]
    assert args["optimizer"]["lr"] == pytest.approx(0.02)
    checkpoint = load(folder / "last.ckpt")
    assert (checkpoint["epoch"], checkpoint["global_step"]) == (2, 3 * STEPS)
    with Image.open(folder / "training.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10
    with (folder / "logs/version_0/metrics.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    losses = [float(row["train_vicreg_loss_step"]) for row in rows if row["train_vicreg_loss_step"]]
    assert len(losses) == 3 * STEPS
    assert np.isfinite(losses).all()


def test_both_paths_and_every_loss_are_logged(dual):
    logged = dual.metrics["logged"]
    for name in (
        "train_vicreg_loss",
        "train_class_loss",
        "train_budget_loss",
        "train_bound_loss",
        "train_flops_share",
        *(f"val_{path}_{kind}" for path in ("dense", "gated") for kind in ("acc1", "knn_acc1")),
        "val_flops_share",
    ):
        assert np.isfinite(logged[name]), name


def test_validation_figures_are_those_of_the_whole_set(dual, encoder):
    weights = load(dual.folder / "last.ckpt")["state_dict"]
    images, targets = zip(*evaluation_loader(dual.cfg, "val"), strict=True)
    assert [len(batch) for batch in targets] == [16, 7]
    images, targets = torch.cat(images), torch.cat(targets)
    reference = Reference(encoder.double().state_dict(), "cifar")
    with torch.no_grad():
        _, masks, flops = reference.evaluate(images.double())
        share = reference.flops_share([mask.double() for mask in masks], images)
        dense = reference.dense_flops(images.double())
        encoder.float()
        logged = dual.metrics["logged"]
        assert logged["val_flops_share"] == pytest.approx(share.item(), rel=1e-6)
        assert logged["val_flops_share"] == pytest.approx(
            flops.double().mean().item() / dense, rel=1e-6
        )
        for path in ("dense", "gated"):
            with encoder.path(path):
                features = encoder(images)
            logits = features @ weights["classifier.weight"].T + weights["classifier.bias"]
            accuracy = 100 * (logits.argmax(dim=1) == targets).double().mean().item()
            assert logged[f"val_{path}_acc1"] == pytest.approx(accuracy, abs=1e-3)


def test_the_final_table_is_scikit_learn_s(dual, encoder):
    sets = {}
    for split in ("train", "val"):
        images, targets = zip(*evaluation_loader(dual.cfg, split), strict=True)
        sets[split] = torch.cat(images), torch.cat(targets)

    def accuracy(encode):
        with torch.no_grad():
            knn = KNeighborsClassifier(1).fit(encode(sets["train"][0]), sets["train"][1])
            return 100 * knn.score(encode(sets["val"][0]), sets["val"][1])

    def through(path):
        def encode(images):
            with encoder.path(path):
                return encoder(images)

        return encode

    table = dual.metrics
    assert table["raw"]["knn_top1"] == pytest.approx(accuracy(lambda images: images.flatten(1)))
    for path in ("dense", "gated"):
        assert table[path]["knn_top1"] == pytest.approx(accuracy(through(path)))
    dense = count_flops(encoder, (16, 16)).dense
    assert table["untrained"]["flops"] == table["dense"]["flops"] == dense
    cut = 1 - table["logged"]["val_flops_share"]
    assert table["gated"]["flops_cut"] == pytest.approx(cut, rel=1e-6)
    assert table["gated"]["flops"] == pytest.approx((1 - cut) * dense, rel=1e-6)
    for row in ("raw", "untrained", "dense", "gated"):
        assert 0 <= table[row]["knn_top1_3_per_class"] <= 100


def test_main_flops_measures_a_checkpoint(dual, tmp_path):
    cfg = dual.given.copy()
    cfg.flops = {"checkpoint": str(dual.folder / "last.ckpt"), "output": str(tmp_path)}
    measured = report_flops(cfg)
    assert json.loads((tmp_path / "metrics.json").read_text()) == measured
    assert measured["flops"]["share"] == pytest.approx(
        dual.metrics["logged"]["val_flops_share"], rel=1e-6
    )
    blocks = sum(block["gated"] for block in measured["blocks"]) + measured["flops"]["stem"]
    assert blocks == pytest.approx(measured["flops"]["gated"])


def test_main_flops_needs_the_backbone_alone(dual, tmp_path):
    flops = {"checkpoint": str(dual.folder / "last.ckpt"), "output": str(tmp_path)}
    cfg = OmegaConf.merge(dual.given, {"flops": flops})
    expected = report_flops(cfg)
    for other in (
        {"method_kwargs": {"proj_hidden_dim": 24}},
        {"method_kwargs": {"proj_output_dim": 24}, "data": {"num_classes": 7}},
        {"method": "barlow_dual", "method_kwargs": METHOD_KWARGS["barlow"]},
    ):
        assert report_flops(OmegaConf.merge(cfg, other)) == expected
    cfg.backbone.kwargs.width = 5
    with pytest.raises(InputError, match=r"another architecture: backbone\.conv1\.weight"):
        report_flops(cfg)


@pytest.mark.parametrize("method", ["simsiam_gated", "simsiam"])
def test_simsiam_s_checkpoint_loads_without_running_code_and_continues(method, tmp_path):
    gating = {"gating": {"warmup_epochs": 1}} if method == "simsiam_gated" else {}
    cfg = run_config(tmp_path, method, max_epochs=2, **gating)
    metrics = pretrain(cfg.copy())
    last = run_folder(tmp_path) / "last.ckpt"
    assert load(last)["epoch"] == 1
    names = set(metrics["logged"])
    assert "train_neg_cos_sim" in names
    assert ("val_gated_acc1" in names) == ("val_flops_share" in names) == bool(gating)
    assert "val_dense_acc1" not in names
    cfg = OmegaConf.merge(cfg, {"max_epochs": 3, "resume_from_checkpoint": str(last)})
    assert pretrain(cfg)["steps"] == 3 * STEPS


@pytest.mark.parametrize("hidden", [True, False])
def test_images_without_labels_train_too(hidden, tmp_path):
    """Hidden labels with labelled validation images; or no label and no validation at all."""
    cfg = run_config(tmp_path, max_epochs=1, knn_eval={"enabled": True, "k": 1})
    if hidden:
        cfg.data.no_labels = True
    else:
        write_images(tmp_path / "train.npz", 50, labels=False)
        cfg.data.val_path = None
    logged = pretrain(cfg)["logged"]
    assert logged["train_class_loss"] == 0
    assert np.isfinite(logged["train_vicreg_loss"])
    assert ("val_gated_acc1" in logged) == hidden
    assert not [name for name in logged if "knn" in name]
    weights = load(run_folder(tmp_path) / "last.ckpt")["state_dict"]
    assert all(torch.isfinite(value).all() for value in weights.values())


# Stopping and continuing


class Killed(RuntimeError):
    pass


def recorded_steps(monkeypatch):
    """What each step trains with: its number, learning rates, and the bounds' epoch and target.

    `steps.kill_at` kills the run in the middle of an epoch, `steps.spoil_at` ruins that step's
    images.
    """
    record = SimpleNamespace(rates=[], bounds=[], kill_at=None, spoil_at=None)
    bound_loss = gated.bound_loss

    def on_train_batch_start(self, batch, batch_idx):
        step = self.trainer.global_step
        if step == record.kill_at:
            raise Killed
        if step == record.spoil_at:
            batch[1][0].fill_(torch.nan)
        rates = [group["lr"] for group in self.trainer.optimizers[0].param_groups]
        record.rates.append((step, self.current_epoch, rates))

    def recording(shares, *args):
        record.bounds.append(args)
        return bound_loss(shares, *args)

    monkeypatch.setattr(
        METHODS["vicreg_dual"], "on_train_batch_start", on_train_batch_start, raising=False
    )
    monkeypatch.setattr(gated, "bound_loss", recording)
    return record


@pytest.fixture
def steps(monkeypatch):
    """As `recorded_steps`."""
    return recorded_steps(monkeypatch)


def killed_config(folder, **overrides):
    cfg = run_config(
        folder,
        max_epochs=4,
        optimizer={"name": "adamw", "lr": 0.03, "kwargs": {"betas": [0.9, 0.999]}},
        scheduler={"warmup_epochs": 1},
        **{"gating": {"bound_decay": 0.3}, "auto_resume": {"enabled": True}, **overrides},
    )
    del cfg.optimizer.kwargs.momentum
    return cfg


@pytest.fixture(scope="module")
def killed_once(tmp_path_factory):
    """A run that was killed in its third epoch, one step after the checkpoint of the second."""
    folder, kept = (tmp_path_factory.mktemp(name) for name in ("killed", "kept"))
    with pytest.MonkeyPatch.context() as patch:
        steps = recorded_steps(patch)
        steps.kill_at = 2 * STEPS + 1
        with pytest.raises(Killed):
            pretrain(killed_config(folder))
    shutil.copytree(folder, kept, dirs_exist_ok=True)
    return SimpleNamespace(folder=folder, kept=kept, steps=steps)


@pytest.fixture
def killed(killed_once, steps):
    """The folder of that run, as it was left; `steps` has all of its steps but the lost one."""
    shutil.rmtree(killed_once.folder)
    shutil.copytree(killed_once.kept, killed_once.folder)
    steps.rates += killed_once.steps.rates[:-1]
    steps.bounds += killed_once.steps.bounds[:-1]
    return killed_once.folder


def test_a_continued_run_has_the_schedule_of_one_that_was_never_killed(killed, steps, tmp_path):
    metrics = pretrain(killed_config(killed))
    folder = run_folder(killed)  # the same folder, and no other
    rates, bounds = steps.rates.copy(), steps.bounds.copy()
    steps.rates.clear()
    steps.bounds.clear()
    assert pretrain(killed_config(tmp_path))["steps"] == metrics["steps"] == 4 * STEPS
    assert [step[:2] for step in rates] == [step[:2] for step in steps.rates]
    assert bounds == steps.bounds
    for ours, theirs in zip(rates, steps.rates, strict=True):
        assert ours[2] == pytest.approx(theirs[2], rel=1e-9)
    assert len({rate[2][0] for rate in rates}) > 3 * STEPS  # the rate does change
    for run in (folder, run_folder(tmp_path)):
        (states,) = load(run / "last.ckpt")["optimizer_states"]
        used = {int(state["step"]) for state in states["state"].values()}
        assert used == {4 * STEPS}
    logs = sorted(file.parent.name for file in folder.glob("logs/*/metrics.csv"))
    assert logs == ["version_0", "version_1"]


def test_only_a_run_of_the_same_config_is_continued(killed, steps):
    folder, seen = run_folder(killed), len(steps.rates)
    other = killed_config(killed)
    other.gating.target_budget = 0.4
    pretrain(other)
    first_of_other = steps.rates[seen]
    assert first_of_other[:2] == (0, 0)
    assert not (folder / "metrics.json").exists()
    # The other run is finished: what is continued is still the one that was killed.
    seen = len(steps.rates)
    pretrain(killed_config(killed))
    assert steps.rates[seen][:2] == (2 * STEPS, 2)
    assert (folder / "metrics.json").exists()


def test_a_run_from_before_a_key_came_is_continued(killed, steps):
    file = run_folder(killed) / "args.json"
    args = json.loads(file.read_text())
    del args["data"]["pipeline"]
    file.write_text(json.dumps(args))
    seen = len(steps.rates)
    pretrain(killed_config(killed))
    assert steps.rates[seen][:2] == (2 * STEPS, 2)


def test_a_run_from_before_the_gates_had_a_group_is_continued_as_it_was(
    steps, tmp_path, monkeypatch
):
    """Its record lacks their weight decay and the bound's gradient; now a config must name them."""
    as_it_was = {"bound_decay": 0.3, "bound_gradient": "all", "weight_decay": 1e-4}
    one_group = property(lambda self: super(gated.GatedMethod, self).learnable_params)
    steps.kill_at = 2 * STEPS + 1
    with monkeypatch.context() as before:
        before.setattr(gated.GatedMethod, "learnable_params", one_group)
        with pytest.raises(Killed):
            pretrain(killed_config(tmp_path, gating=as_it_was))
    args = json.loads((run_folder(tmp_path) / "args.json").read_text())
    del args["gating"]["bound_gradient"], args["gating"]["weight_decay"]
    (run_folder(tmp_path) / "args.json").write_text(json.dumps(args))
    steps.kill_at, seen = None, len(steps.rates)
    pretrain(killed_config(tmp_path, gating=as_it_was))
    assert steps.rates[seen][:2] == (2 * STEPS, 2)
    groups = load(run_folder(tmp_path) / "last.ckpt")["optimizer_states"][0]["param_groups"]
    assert [group["name"] for group in groups[:2]] == ["backbone", "gates"]


def test_old_runs_are_not_continued(killed, steps):
    seen = len(steps.rates)
    steps.kill_at = 1
    with pytest.raises(Killed):
        pretrain(killed_config(killed, auto_resume={"enabled": True, "max_hours": 0}))
    assert steps.rates[seen][:2] == (0, 0)


def test_a_named_checkpoint_of_another_width_is_refused(killed):
    last = run_folder(killed) / "last.ckpt"
    cfg = killed_config(killed, resume_from_checkpoint=str(last))
    cfg.backbone.kwargs.width = 5
    before = {file: file.stat().st_mtime_ns for file in killed.rglob("*")}
    with pytest.raises(InputError, match="is of another architecture"):
        pretrain(cfg)
    assert {file: file.stat().st_mtime_ns for file in killed.rglob("*")} == before


# Losses that are not finite


def is_finite(checkpoint):
    return all(torch.isfinite(value).all() for value in checkpoint["state_dict"].values())


@pytest.mark.parametrize("interval", [1, 100])
def test_ruined_images_stop_the_run_and_the_last_good_checkpoint_stays(interval, steps, tmp_path):
    """Whether the check falls on the step itself or on the end of its epoch."""
    steps.spoil_at = STEPS + 1
    with pytest.raises(NonFiniteLossError) as error:
        pretrain(run_config(tmp_path, log_every_n_steps=interval))
    assert f"is not finite at step {STEPS + 2};" in str(error.value)
    assert "in epoch 1: train_" in str(error.value)
    checkpoint = load(run_folder(tmp_path) / "last.ckpt")
    assert checkpoint["epoch"] == 0
    assert is_finite(checkpoint)


def test_the_part_that_is_not_finite_is_named(steps, tmp_path, monkeypatch):
    budget_loss, calls = gated.budget_loss, []

    def ruined(*args):
        calls.append(args)
        return budget_loss(*args) * (torch.inf if len(calls) == STEPS + 2 else 1)

    monkeypatch.setattr(gated, "budget_loss", ruined)
    with pytest.raises(NonFiniteLossError, match=rf"train_budget_loss .* at step {STEPS + 2};"):
        pretrain(run_config(tmp_path))


@pytest.fixture
def spoil_gradient_of(monkeypatch):
    """Makes one gradient of a step infinite, after its loss."""

    def spoil(step):
        def on_after_backward(self):
            if self.trainer.global_step == step - 1:
                next(self.backbone.parameters()).grad[0, 0] = torch.inf

        monkeypatch.setattr(METHODS["vicreg"], "on_after_backward", on_after_backward)

    return spoil


def test_a_gradient_that_is_not_finite_in_an_epoch_s_last_step_spoils_no_checkpoint(
    spoil_gradient_of, tmp_path
):
    spoil_gradient_of(2 * STEPS)
    with pytest.raises(
        NonFiniteLossError, match=rf"in epoch 1: backbone.conv1.weight .* at step {2 * STEPS};"
    ):
        pretrain(helpers.run_config(tmp_path, max_epochs=2))
    folder = run_folder(tmp_path)
    checkpoint = load(folder / "last.ckpt")
    assert checkpoint["epoch"] == 0
    assert is_finite(checkpoint)
    assert sorted(file.name for file in folder.iterdir()) == [
        *("args.json", "last.ckpt", "logs", "run.lock")
    ]


def test_a_run_whose_last_gradient_is_not_finite_has_no_results(spoil_gradient_of, tmp_path):
    spoil_gradient_of(STEPS)
    with pytest.raises(NonFiniteLossError, match=r"in epoch 0: backbone.conv1.weight is not"):
        pretrain(helpers.run_config(tmp_path, max_epochs=1, checkpoint={"enabled": False}))
    assert {file.name for file in run_folder(tmp_path).iterdir()} == {"logs", "run.lock"}


@pytest.mark.parametrize("where", ["weight", "buffer", "optimizer", None])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_everything_that_is_saved_is_checked(where, value, tmp_path):
    model = torch.nn.BatchNorm1d(2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3, 2)).sum().backward()
    optimizer.step()
    checkpoint = {
        "epoch": 3,
        "global_step": 7,
        "state_dict": model.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
    }
    file = tmp_path / "last.ckpt"
    WholeFiles().save_checkpoint(checkpoint, file)
    before = file.read_bytes()
    named = {
        "weight": (model.bias.data, "bias"),
        "buffer": (model.running_var, "running_var"),
        "optimizer": (optimizer.state[model.bias]["exp_avg"], "the optimizer's exp_avg"),
    }
    if where is None:
        WholeFiles().save_checkpoint(checkpoint, file)
    else:
        tensor, name = named[where]
        tensor[1] = value
        with pytest.raises(NonFiniteLossError, match=f"in epoch 3: {name} .*at step 7;"):
            WholeFiles().save_checkpoint(checkpoint, file)
        assert file.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


# What is saved, and when


class Stop(Callback):
    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step == STEPS + 1


@pytest.mark.parametrize(
    ("frequency", "limit", "saved"),
    [
        (2, {"max_epochs": 3}, {1: 2 * STEPS, 2: 3 * STEPS}),
        (0, {"max_epochs": 2}, {1: 2 * STEPS}),
        (10, {"max_steps": STEPS + 1}, {1: STEPS + 1}),
        (1, {"callback": Stop()}, {0: STEPS, 1: STEPS + 1}),
    ],
)
def test_the_end_of_a_run_is_saved(frequency, limit, saved, tmp_path, monkeypatch):
    """Whatever the frequency is, and whatever ends the run."""
    if "callback" in limit:

        def attach(trainer, *args):
            attach_outputs(trainer, *args)
            trainer.callbacks.append(limit["callback"])

        monkeypatch.setattr("solo_gating.training.pretrain.attach_outputs", attach)
    cfg = helpers.run_config(
        tmp_path, max_epochs=3, checkpoint={"frequency": frequency, "keep_prev": True}
    )
    cfg.merge_with({key: value for key, value in limit.items() if key != "callback"})
    metrics = pretrain(cfg)
    folder = run_folder(tmp_path)
    last = folder / "last.ckpt"
    assert metrics["pretraining"]["checkpoint"] == str(last)
    assert load(last)["global_step"] == metrics["steps"] == max(saved.values())
    files = {file.name: load(file) for file in folder.glob("*.ckpt") if file != last}
    assert {name: content["global_step"] for name, content in files.items()} == {
        f"tiny-ep={epoch}.ckpt": step for epoch, step in saved.items()
    }
    assert all(name == f"tiny-ep={content['epoch']}.ckpt" for name, content in files.items())
    assert last.stat().st_nlink == 2  # the space of one


def test_a_full_disk_stops_a_run_with_one_sentence_and_the_checkpoint_before(tmp_path, monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = {}

    def fill(self):
        if self.current_epoch == 1:
            before["bytes"] = (run_folder(tmp_path) / "last.ckpt").read_bytes()
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["bytes"]) // 2, limits[1]))

    monkeypatch.setattr(METHODS["vicreg"], "on_train_epoch_start", fill)
    try:
        with pytest.raises(InputError, match=r"^cannot write '.*tiny-ep=1.ckpt' \(File too large"):
            pretrain(helpers.run_config(tmp_path, max_epochs=3, checkpoint={"keep_prev": True}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    folder = run_folder(tmp_path)
    assert sorted(file.name for file in folder.iterdir()) == [
        "args.json",
        "last.ckpt",
        "logs",
        "run.lock",
        "tiny-ep=0.ckpt",
    ]
    assert (folder / "last.ckpt").read_bytes() == before["bytes"]
    assert load(folder / "last.ckpt")["epoch"] == 0


def test_results_name_no_checkpoint_that_holds_something_else(tmp_path):
    """Neither one that was never written nor that of an earlier session."""
    cfg = helpers.run_config(tmp_path, max_epochs=2)
    pretrain(cfg.copy())
    last = run_folder(tmp_path) / "last.ckpt"
    cfg.merge_with(
        {
            "max_epochs": 3,
            "checkpoint": {"enabled": False},
            "resume_from_checkpoint": str(last),
        }
    )
    assert pretrain(cfg)["pretraining"]["checkpoint"] is None
    assert load(last)["epoch"] == 1


@pytest.mark.parametrize("unlabelled", ["train", "val"])
@pytest.mark.parametrize("data", [{}, {"pipeline": "device"}, {"fraction": 0.8}])
def test_a_final_table_without_labels_is_refused_before_the_run(unlabelled, data, tmp_path):
    cfg = run_config(tmp_path, "vicreg", data=data, final_knn={"enabled": True})
    write_images(tmp_path / f"{unlabelled}.npz", 50, labels=False)
    with pytest.raises(InputError, match=f"data.{unlabelled}_path: no image has a label"):
        pretrain(cfg)
    assert not (tmp_path / "runs").exists()


def test_a_figure_that_does_not_exist_is_a_dash():
    unlabelled = torch.randn(4, 2), torch.full((4,), -1)
    labelled = torch.randn(4, 2), torch.arange(4)
    for train, test in ((labelled, unlabelled), (unlabelled, labelled)):
        assert np.isnan(knn_top1(train, test))
        assert np.isnan(knn_top1_few_labels(train, test, 2, 2))
    row = {"knn_top1": np.nan, "knn_top1_2_per_class": np.nan}
    assert format_table({"raw": row}).splitlines()[1].split() == ["raw", "–", "–", "–", "–"]


def test_a_run_without_checkpoints_still_writes_its_figures(tmp_path):
    cfg = run_config(tmp_path, "vicreg", max_epochs=1, checkpoint={"enabled": False})
    pretrain(cfg)
    names = {file.name for file in run_folder(tmp_path).iterdir()}
    assert "metrics.json" in names
    assert "last.ckpt" not in names


def test_a_config_is_complete_after_one_pass():
    """`prepare_config` twice is `prepare_config` once: a continued run finds the same config."""
    once = prepare_config(tiny_config())
    assert prepare_config(once.copy()) == once
