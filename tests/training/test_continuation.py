"""What continuing a run means: which one, with what, and what stays."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import time
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from omegaconf import OmegaConf

from solo_gating import METHODS, InputError, main_pretrain
from solo_gating.cli import one_sentence_errors
from solo_gating.config.defaults import DEFAULTS
from solo_gating.main_pretrain import pretrain
from solo_gating.training import pretrain as training_pretrain
from solo_gating.training.continuation import changes, find_checkpoint, locked
from solo_gating.training.processes import CONTINUE

from ..support.helpers import STEPS, run_config, run_folder, tiny_config, write_images

pytestmark = pytest.mark.usefixtures("no_pictures")


def named(folder, method="vicreg", **overrides):
    """The config that goes on from the only run's checkpoint."""
    checkpoint = str(run_folder(folder) / "last.ckpt")
    return run_config(folder, method, resume_from_checkpoint=checkpoint, **overrides)


def contents(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


class Killed(RuntimeError):
    pass


class Recorder(pl.Callback):
    """The settings of every step's optimizer groups; kills the run before step `kill_at`."""

    def __init__(self):
        self.groups, self.kill_at = [], None

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.kill_at:
            raise Killed
        groups = trainer.optimizers[0].param_groups
        self.groups.append([{k: v for k, v in g.items() if k != "params"} for g in groups])

    def of(self, key):
        return [[group[key] for group in groups] for groups in self.groups]


@pytest.fixture
def recorder(monkeypatch):
    recorder, build = Recorder(), training_pretrain.build_trainer

    def build_trainer(cfg):
        trainer = build(cfg)
        trainer.callbacks.append(recorder)
        return trainer

    monkeypatch.setattr("solo_gating.training.pretrain.build_trainer", build_trainer)
    return recorder


def rates_of_whole_run(recorder, folder, *args, **overrides):
    """The rates of an undisturbed run of a config."""
    folder.mkdir()
    recorder.groups.clear()
    pretrain(run_config(folder, *args, **overrides))
    rates = recorder.of("lr")
    recorder.groups.clear()
    return rates


# The schedule


@pytest.mark.parametrize(
    "kind",
    [
        "warmup_cosine",
        pytest.param("by epoch", marks=pytest.mark.slow),
        pytest.param("step", marks=pytest.mark.slow),
        pytest.param("simsiam", marks=pytest.mark.slow),
        "smaller batches",
    ],
)
def test_a_continued_run_is_on_the_schedule_of_its_config(kind, recorder, tmp_path):
    """With more epochs, and with whatever else: the rates of a run that had it from the start."""
    method = "simsiam" if kind == "simsiam" else "vicreg"
    scheduler = {
        "by epoch": {"interval": "epoch"},
        "step": {"name": "step", "lr_decay_steps": [1, 2, 3]},
    }.get(kind, {})
    optimizer = {"batch_size": 8} if kind == "smaller batches" else {"lr": 0.16}
    longer = {"max_epochs": 4, "optimizer": optimizer, "scheduler": scheduler}
    expected = rates_of_whole_run(recorder, tmp_path / "whole", method, **longer)
    pretrain(run_config(tmp_path, method, scheduler=scheduler))
    recorder.groups.clear()
    pretrain(named(tmp_path, method, **longer))
    assert recorder.of("lr") == expected[len(expected) // 2 :]
    assert len({rates[0] for rates in expected}) >= 4


@pytest.mark.parametrize(
    "scheduler", [pytest.param("warmup_cosine", marks=pytest.mark.slow), "step"]
)
def test_killed_runs_keep_to_the_schedule(scheduler, recorder, tmp_path):
    """Bit for bit, at the ends of epochs and in them."""
    settings = {
        "max_epochs": 5,
        "scheduler": {"name": scheduler, "lr_decay_steps": [1, 3, 4]},
        "auto_resume": {"enabled": True},
    }
    expected = rates_of_whole_run(recorder, tmp_path / "whole", **settings)
    for kill_at in (STEPS, 3 * STEPS + 1, None):
        recorder.kill_at = kill_at
        if kill_at is None:
            pretrain(run_config(tmp_path, **settings))
        else:
            with pytest.raises(Killed):
                pretrain(run_config(tmp_path, **settings))
    found = recorder.of("lr")
    del found[3 * STEPS]  # the step that was lost
    assert found == expected


# What is used, recorded, refused


def test_rate_and_weight_decay_of_the_config_are_used_and_recorded(recorder, tmp_path):
    pretrain(run_config(tmp_path, scheduler={"name": "none"}, max_epochs=1))
    momenta = torch.load(run_folder(tmp_path) / "last.ckpt", weights_only=True)["optimizer_states"]
    assert momenta[0]["state"]
    recorder.groups.clear()
    optimizer = {"lr": 0.08, "weight_decay": 0.5, "classifier_lr": 0.4, "kwargs": {"momentum": 0.3}}
    metrics = pretrain(named(tmp_path, scheduler={"name": "none"}, optimizer=optimizer))
    args = json.loads((run_folder(tmp_path) / "args.json").read_text())["optimizer"]
    backbone, classifier, *_ = recorder.groups[-1]
    assert backbone["lr"] == args["lr"] == 0.005
    assert classifier["lr"] == args["classifier_lr"] == 0.025
    assert backbone["weight_decay"] == args["weight_decay"] == 0.5
    assert backbone["momentum"] == args["kwargs"]["momentum"] == 0.3
    assert metrics["continued"] == [
        {
            "epoch": 1,
            "step": STEPS,
            "changed": {
                "max_epochs": [1, 2],
                "optimizer.lr": [0.02, 0.005],
                "optimizer.classifier_lr": [0.00625, 0.025],
                "optimizer.weight_decay": [1e-4, 0.5],
                "optimizer.kwargs.momentum": [0.9, 0.3],
            },
        }
    ]
    assert json.loads((run_folder(tmp_path) / "metrics.json").read_text()) == metrics


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of two epochs."""
    folder = tmp_path_factory.mktemp("finished")
    pretrain(run_config(folder))
    return folder


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            {"optimizer": {"name": "adamw", "kwargs": {"betas": [0.9, 0.999]}}},
            "optimizer.name: got 'adamw', checkpoint .* is of a run with 'sgd'",
        ),
        ({"method": "simclr"}, "method: got 'simclr', .* 'vicreg'"),
        ({"max_epochs": 1}, "max_epochs: got 1, .* has 2 epochs behind it; expected .* ≥ 2"),
        (
            {"backbone": {"kwargs": {"width": 5}}},
            r"another architecture: .*; it has backbone.kwargs.width 4 \(here 5\)",
        ),
        (
            {"optimizer": {"exclude_bias_n_norm_wd": True}},
            r"checkpoint's optimizer has 3 groups of .* parameters, this config's 6 groups",
        ),
    ],
)
def test_what_cannot_change_is_refused_and_nothing_is_written(finished, overrides, sentence):
    before = contents(finished)
    cfg = named(finished, **{"max_epochs": 3, **overrides})
    if cfg.optimizer.name == "adamw":
        del cfg.optimizer.kwargs.momentum
    with pytest.raises(InputError, match=sentence):
        pretrain(cfg)
    assert contents(finished) == before


@pytest.mark.parametrize("missing", ["optimizer_states", "lr_schedulers", "loops"])
def test_weights_without_the_state_of_their_training_are_refused(finished, missing, tmp_path):
    checkpoint = torch.load(run_folder(finished) / "last.ckpt", weights_only=True)
    del checkpoint[missing]
    torch.save(checkpoint, tmp_path / "weights.ckpt")
    cfg = run_config(finished, resume_from_checkpoint=str(tmp_path / "weights.ckpt"))
    with pytest.raises(InputError, match=f"has no `{missing}`"):
        pretrain(cfg)


@pytest.mark.parametrize("loops", [{}, {"fit_loop": {}}, {"fit_loop": 1}, None])
def test_a_checkpoint_that_does_not_say_how_far_it_is_is_refused(finished, loops, tmp_path):
    checkpoint = torch.load(run_folder(finished) / "last.ckpt", weights_only=True)
    torch.save({**checkpoint, "loops": loops}, tmp_path / "odd.ckpt")
    cfg = run_config(finished, resume_from_checkpoint=str(tmp_path / "odd.ckpt"))
    with pytest.raises(InputError, match="does not say how far it is"):
        pretrain(cfg)


def test_another_optimizer_is_refused_without_args_json(finished, tmp_path):
    checkpoint = tmp_path / "last.ckpt"
    checkpoint.write_bytes((run_folder(finished) / "last.ckpt").read_bytes())
    cfg = run_config(finished, max_epochs=3, resume_from_checkpoint=str(checkpoint))
    cfg.optimizer.name = "lars"
    with pytest.raises(InputError, match=r"optimizer.name: the checkpoint's optimizer has .*eta"):
        pretrain(cfg)


# Where nothing is left to do


def test_a_finished_run_keeps_its_results(finished, capsys):
    before = contents(finished)
    metrics = pretrain(named(finished, optimizer={"lr": 0.9}))
    assert contents(finished) == before
    assert metrics == json.loads((run_folder(finished) / "metrics.json").read_text())
    assert metrics["logged"]
    assert metrics["finished"]
    assert "nothing left to train after 2 epochs" in capsys.readouterr().out


def test_a_run_killed_during_its_final_table_keeps_what_it_logged(tmp_path, monkeypatch, recorder):
    write_images(tmp_path / "val.npz", 23, seed=1)
    settings = {
        "data": {"val_path": str(tmp_path / "val.npz")},
        "final_knn": {"enabled": True, "labels_per_class": 3, "draws": 2},
        "check_val_every_n_epoch": 2,
        "max_epochs": 3,
        "auto_resume": {"enabled": True},
    }

    def killed(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("solo_gating.training.pretrain.final_table", killed)
        with pytest.raises(Killed):
            pretrain(run_config(tmp_path, **settings))
    steps = len(recorder.groups)
    metrics = pretrain(run_config(tmp_path, **settings))
    assert len(recorder.groups) == steps == 3 * STEPS
    folder = run_folder(tmp_path)
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert {"val_acc1", "train_vicreg_loss", "train_class_loss_epoch"} <= set(metrics["logged"])
    assert metrics["dense"]["knn_top1"] > 0
    last = (folder / "logs/version_0/metrics.csv").read_text().splitlines()[-1].split(",")
    assert str(metrics["logged"]["train_vicreg_loss_epoch"]) in last


@pytest.mark.parametrize(
    ("limit", "steps"),
    [
        ({"max_steps": 2 * STEPS}, 2 * STEPS),
        ({"max_steps": STEPS + 2}, STEPS + 2),
        ({"max_time": {"milliseconds": 1}}, 1),
    ],
)
def test_a_run_that_a_limit_stopped_goes_on(limit, steps, recorder, tmp_path):
    """At the end of an epoch or in it: all its steps, on the schedule of the whole."""
    settings = {"max_epochs": 3, "auto_resume": {"enabled": True}}
    expected = rates_of_whole_run(recorder, tmp_path / "whole", **settings)
    metrics = pretrain(run_config(tmp_path, **settings, **limit))
    assert (metrics["epochs"], metrics["steps"]) == (steps // STEPS, steps)
    assert metrics["finished"] is False
    again = pretrain(run_config(tmp_path, **settings, **limit))
    assert again == metrics  # the limit is still reached: nothing was done
    seen = len(recorder.groups)
    metrics = pretrain(run_config(tmp_path, **settings))
    assert recorder.of("lr")[seen:] == expected[seen:]
    assert (metrics["epochs"], metrics["steps"], metrics["finished"]) == (3, 3 * STEPS, True)


# auto_resume


def test_what_keeps_a_run_from_being_continued_is_said(finished, tmp_path, capsys):
    cfg = run_config(finished, auto_resume={"enabled": True})
    training_pretrain.prepare_config(cfg)
    folder = run_folder(finished)
    args = json.loads((folder / "args.json").read_text())
    cfg = OmegaConf.create(args)
    cfg.auto_resume.enabled = True
    assert find_checkpoint(cfg) == (None, f"{folder} has this config and is finished")
    other = tmp_path / "runs" / "vicreg" / "other"
    other.mkdir(parents=True)
    (other / "args.json").write_text(json.dumps(args))
    (other / "last.ckpt").touch()
    cfg.checkpoint.dir = str(tmp_path / "runs")
    assert find_checkpoint(cfg) == (other / "last.ckpt", "")
    cfg.data.num_workers = 7  # changes nothing
    assert find_checkpoint(cfg).checkpoint == other / "last.ckpt"
    cfg.optimizer.lr = 0.125
    cfg.scheduler.warmup_epochs = 3
    checkpoint, why = find_checkpoint(cfg)
    assert checkpoint is None
    assert why == (
        f"the unfinished run in {other} has optimizer.lr 0.02 (here 0.125), "
        "scheduler.warmup_epochs 1 (here 3)"
    )
    cfg = OmegaConf.merge(args, {"checkpoint": {"dir": cfg.checkpoint.dir}})
    cfg.auto_resume.max_hours = 0
    assert "older than auto_resume.max_hours=0" in find_checkpoint(cfg).why


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", "null", '"x"', "1", "[" * 100_000, '{"data": 1}', '{"name": "${oc.env:HOME"}'],
)
def test_a_broken_args_json_stops_no_start(finished, text, tmp_path):
    args = json.loads((run_folder(finished) / "args.json").read_text())
    cfg = OmegaConf.merge(args, {"checkpoint": {"dir": str(tmp_path)}})
    for name, content in {"a": text, "b": json.dumps(args), "c": text}.items():
        (tmp_path / "vicreg" / name).mkdir(parents=True)
        (tmp_path / "vicreg" / name / "args.json").write_text(content)
        (tmp_path / "vicreg" / name / "last.ckpt").touch()
    assert find_checkpoint(cfg).checkpoint == tmp_path / "vicreg" / "b" / "last.ckpt"
    cfg.seed = 77
    assert "/b has seed 0 (here 77)" in find_checkpoint(cfg).why


def test_a_version_s_new_key_had_its_default():
    cfg = training_pretrain.prepare_config(run_config_without_files())
    args = OmegaConf.to_container(cfg)
    del args["data"]["pipeline"]
    assert changes(args, cfg) == {}
    args["data"]["pipeline"] = "device"
    assert changes(args, cfg) == {"data.pipeline": ["device", "workers"]}


def run_config_without_files():
    return tiny_config("vicreg")


# The lock


def hold(folder, held):
    """In another process: has the lock until it is killed."""
    with locked(folder):
        held.put(os.getpid())
        time.sleep(600)


@pytest.fixture
def holder(finished, tmp_path):
    """Another process that has the lock of an unfinished run, in `tmp_path / "runs"`."""
    folder = tmp_path / "runs" / "vicreg" / "going"
    folder.mkdir(parents=True)
    (folder / "args.json").write_bytes((run_folder(finished) / "args.json").read_bytes())
    context = multiprocessing.get_context("fork")
    held = context.SimpleQueue()
    process = context.Process(target=hold, args=(folder, held), daemon=True)
    process.start()
    assert held.get() == process.pid
    yield SimpleNamespace(folder=folder, process=process)
    process.kill()
    process.join()


def test_a_run_has_one_process_until_that_ends_in_whatever_way(
    finished, holder, recorder, tmp_path
):
    """Named or found, with a checkpoint or before the first; then SIGKILL."""
    settings = {"max_epochs": 2, "checkpoint": {"dir": str(tmp_path / "runs")}}
    found = run_config(finished, **settings, auto_resume={"enabled": True})
    who = f"is in use by process {holder.process.pid} on "
    with pytest.raises(InputError, match=who):
        pretrain(found.copy())
    last = holder.folder / "last.ckpt"
    last.write_bytes((run_folder(finished) / "last.ckpt").read_bytes())
    named = OmegaConf.merge(found, {"max_epochs": 3, "resume_from_checkpoint": str(last)})
    for cfg in (found, named):
        with pytest.raises(InputError, match=who):
            pretrain(cfg.copy())
    assert not recorder.groups
    holder.process.kill()
    holder.process.join()
    assert pretrain(named)["epochs"] == 3
    assert [folder.name for folder in holder.folder.parent.iterdir()] == ["going"]
    with locked(holder.folder):  # and it let go of it
        pass


def test_a_file_system_without_locks_is_no_hindrance(tmp_path, monkeypatch):
    def refused(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refused)
    with (
        pytest.warns(UserWarning, match="cannot lock .* \\(No locks available\\)"),
        locked(tmp_path),
    ):
        pass


# Signals


@pytest.mark.parametrize(
    ("evaluation", "how"),
    [
        ("linear", "the same command continues after what was finished"),
        ("knn", "the same command begins again"),
    ],
)
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_ends_a_command_with_its_code_and_one_sentence(name, evaluation, how, capsys):
    number = signal.Signals[name]
    before = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
    outer = signal.signal(number, before)  # ignored, where the tests were started in the background
    with pytest.raises(SystemExit) as stop, one_sentence_errors(evaluation):
        os.kill(os.getpid(), number)
    assert stop.value.code == 128 + number
    said = "interrupted" if name == "SIGINT" else f"ended by {name}"
    assert capsys.readouterr().err == f"error: {said}; {how}\n"
    assert signal.signal(number, outer) is before


def test_a_signal_that_is_ignored_stays_so(monkeypatch):
    """As by nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with one_sentence_errors():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("name", "when"),
    [
        ("SIGTERM", "on_train_batch_start"),
        ("SIGTERM", "on_validation_start"),
        ("SIGTERM", "on_train_epoch_end"),
        ("SIGTERM", "final_table"),
        ("SIGHUP", "on_train_batch_start"),
    ],
)
def test_a_signal_ends_a_run_at_any_time(name, when, call, monkeypatch, tmp_path):
    number = signal.Signals[name]
    outer = signal.signal(number, signal.SIG_DFL)  # ignored under nohup

    def send(*args, **kwargs):
        os.kill(os.getpid(), number)

    if when == "final_table":
        monkeypatch.setattr("solo_gating.training.pretrain.final_table", send)
    else:
        monkeypatch.setattr(METHODS["vicreg"], when, send, raising=False)
    write_images(tmp_path / "val.npz", 23, seed=1)
    cfg = run_config(
        tmp_path,
        data={"val_path": str(tmp_path / "val.npz")},
        final_knn={"enabled": True, "labels_per_class": 3, "draws": 2},
    )
    OmegaConf.save(cfg, tmp_path / "run.yaml")
    code, _, errors = call(main_pretrain, "--config-path", str(tmp_path), "--config-name", "run")
    assert code == 128 + number
    assert errors.splitlines()[-1] == f"error: ended by {name}; {CONTINUE}"
    assert "Traceback" not in errors
    assert not list(tmp_path.glob("runs/*/*/metrics.json"))
    assert signal.signal(number, outer) is signal.SIG_DFL


def test_the_size_of_all_views_is_no_second_difference():
    view = {"crop_size": "${image_size}", "num_crops": 2, "horizontal_flip": {"prob": 0.5}}
    before = OmegaConf.merge(DEFAULTS, tiny_config("vicreg"))
    now = OmegaConf.merge(before, {"image_size": 16, "augmentations": [view]})
    args = OmegaConf.to_container(before)
    assert changes(args, now) == {}
    now.image_size = 24
    assert changes(args, now) == {"augmentations.0.crop_size": [16, 24]}
