"""What config keys accept: each key has its check, and each setting one place."""

import os
import re
import warnings
from contextlib import suppress
from unittest import mock

import numpy as np
import pytest
from omegaconf import OmegaConf

from solo_gating import InputError
from solo_gating.checkpoints.reading import as_text
from solo_gating.config.compose import composed
from solo_gating.config.defaults import DEFAULTS
from solo_gating.config.pretraining import prepare_config
from solo_gating.config.schema import EVALUATIONS, PRETRAINING, own_copy
from solo_gating.data import training_loader
from solo_gating.training.model import build_method
from solo_gating.training.trainer import build_trainer

from ..fuzz import keys_of
from ..support.helpers import tiny_config, write_images


def has_its_check(key, table):
    above = [key.rsplit(".", n)[0] for n in range(key.count(".") + 1)]
    return any(name in table for name in above) or any(n.startswith(f"{key}.") for n in table)


def test_every_default_has_its_check():
    for key in keys_of(OmegaConf.create(DEFAULTS)):
        assert has_its_check(key, PRETRAINING), key


@pytest.mark.parametrize("name", ["vicreg_dual_cifar100", "vicreg_any_digits", *EVALUATIONS])
def test_every_key_of_a_shipped_config_has_its_check(name):
    table = EVALUATIONS.get(name, PRETRAINING)
    cfg = composed(name, [])
    assert all(has_its_check(key, table) for key in keys_of(cfg))


def refused(key, value, *parts, method="vicreg_dual"):
    cfg = tiny_config(method)
    OmegaConf.update(cfg, key, value, force_add=True)

    def construct():
        prepare_config(cfg)
        build_trainer(cfg)
        build_method(cfg)

    with pytest.raises(InputError) as error:
        construct()
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in (key.split("[")[0], *parts)), message


NONSENSE = {
    "knn_eval.distance_func": "abc",
    "knn_eval.k": 0,
    "method_kwargs.sim_loss_weight": -1.0,
    "method_kwargs.proj_hidden_dim": 0,
    "limit_train_batches": 0,
    "log_every_n_steps": 0,
    "check_val_every_n_epoch": 0,
    "val_check_interval": 0,
    "gradient_clip_val": -1,
    "final_knn.draws": 0,
    "final_knn.labels_per_class": "x",
    "flops.images": 0,
    "data.fraction": "half",
    "data.num_workers": 10**9,
    "data.split": "test",
    "seed": None,
    "devices": 0,
    "accelerator": "quantum",
    "num_nodes": -(2**63),
    "precision": "12-mixed",
    "sync_batchnorm": "yes",
    "accumulate_grad_batches": 0,
    "optimizer.weight_decay": -1,
    "optimizer.lr": float("inf"),
    "optimizer.classifier_lr": float("nan"),
    "optimizer.kwargs": {"momentum": "much"},
    "scheduler.name": "cosine",
    "scheduler.warmup_epochs": -1,
    "scheduler.min_lr": [],
    "checkpoint.dir": "",
    "checkpoint": None,
    "wandb": 3,
    "auto_resume.max_hours": "abc",
    "auto_resume.enabled": 1,
    "max_epochs": 1.0,
    "backbone.kwargs": {"width": 8.0},
    "augmentations": "none",
    "name": None,
}


@pytest.mark.parametrize("key", NONSENSE)
def test_nonsense_is_refused(key):
    refused(key, NONSENSE[key])


@pytest.mark.parametrize(
    "name",
    ["../up", "a/b", "/abs", "..", ".", " ", "", "a\0b", "a\nb", "a\x1b[2J", 300 * "x", 150 * "ü"],
)
def test_names_that_are_no_file_s_are_refused(name):
    refused("name", name, "expected a name")


@pytest.mark.parametrize(
    "name", ["run [1]", "it's", "a=b", "ünï 日本", "100% {x}", "back\\slash", 5]
)
def test_names_that_a_file_can_have_are_accepted(name):
    assert prepare_config(tiny_config(name=name)).name == str(name)


def test_view_probabilities_are_checked():
    cfg = tiny_config()
    cfg.augmentations[0].grayscale = {"prob": 2}
    with pytest.raises(InputError, match=r"^augmentations\[0\].grayscale.prob: got 2"):
        prepare_config(cfg)


def test_a_schedule_of_steps_needs_them():
    with pytest.raises(InputError, match=r"^scheduler.lr_decay_steps: missing"):
        prepare_config(tiny_config(scheduler={"name": "step"}))
    assert prepare_config(tiny_config(scheduler={"name": "step", "lr_decay_steps": [1]}))


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("nonsense", None),
        ("max_epoch", "max_epochs"),
        ("batch_size", "optimizer.batch_size"),
        ("limit_train_batch", "limit_train_batches"),
        ("checkpoint.frequenzy", "checkpoint.frequency"),
        ("method_kwargs.proj_hiden_dim", "method_kwargs.proj_hidden_dim"),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest(key, nearest):
    parts = [f"{key}: no such key"] + ([f"the nearest is {nearest}"] if nearest else [])
    refused(key, 1, *parts)


def test_keys_that_others_refer_to_are_the_user_s_own():
    cfg = OmegaConf.merge(tiny_config(), {"mine": 5, "max_epochs": "${mine}"})
    assert prepare_config(prepare_config(cfg)).max_epochs == 5


@pytest.mark.parametrize("value", ["${absent}", "${oc.env:ABSENT_VARIABLE}", "${max_epochs}"])
def test_an_interpolation_that_leads_nowhere_is_refused(value):
    refused("max_epochs", value)


# One setting, one place


@pytest.mark.parametrize(
    ("key", "value", "place"),
    [
        ("backbone.kwargs.reduction", 8, "gating.reduction alone"),
        ("backbone.kwargs.temperature", 1.0, "gating.temperature alone"),
        ("backbone.kwargs.separate_bn", False, "gating.separate_bn alone"),
        ("backbone.kwargs.budget_range", [0.1, 0.5], "gating.target_budget alone"),
        ("backbone.kwargs.gate", "top_k", "gating.gate alone"),
        ("enable_checkpointing", True, "checkpoint.enabled alone"),
        ("default_root_dir", "elsewhere", "checkpoint.dir alone"),
        ("logger", False, "expected"),
        ("callbacks", [1], "expected null"),
        ("min_epochs", 3, "max_epochs"),
        ("optimizer.kwargs.lr", 1.0, "optimizer.lr alone"),
        ("optimizer.kwargs.weight_decay", 0.0, "optimizer.weight_decay alone"),
        ("flops.budget", "x", "a number"),
    ],
)
def test_a_setting_s_other_source_is_refused(key, value, place):
    refused(key, value, place)


@pytest.mark.parametrize(
    ("key", "value"),
    [("backbone.kwargs.reduction", 4), ("enable_checkpointing", False), ("logger", True)],
)
def test_another_source_that_agrees_is_accepted(key, value):
    cfg = tiny_config()
    OmegaConf.update(cfg, key, value, force_add=True)
    prepare_config(prepare_config(cfg))


def test_trainer_arguments_that_were_overridden_silently_count():
    cfg = prepare_config(tiny_config(num_sanity_val_steps=2, enable_model_summary=True))
    trainer = build_trainer(cfg)
    assert trainer.num_sanity_val_steps == 2


@pytest.mark.parametrize(
    ("asked", "found", "unused"),
    [
        ({"strategy": "ddp"}, "DDPStrategy", False),
        ({"strategy": "auto"}, "SingleDeviceStrategy", None),
        ({"strategy": "auto", "devices": 2}, "DDPStrategy", False),
        ({"strategy": None, "devices": 2, "gating": {"warmup_epochs": 1}}, "DDPStrategy", True),
        ({"strategy": "auto", "devices": [0]}, "SingleDeviceStrategy", None),
        ({"strategy": "ddp", "gating": {"gate": "fbs"}}, "DDPStrategy", False),
        (
            {
                "strategy": "ddp",
                "gating": {"gate": "fbs"},
                "backbone": {"name": "resnet18_two_encoders"},
            },
            "DDPStrategy",
            True,
        ),
        ({"strategy": "ddp", "method": "vicreg"}, "DDPStrategy", False),
        (
            {"strategy": "ddp", "method": "vicreg", "backbone": {"name": "resnet18_gated"}},
            "DDPStrategy",
            True,
        ),
    ],
)
def test_which_strategy_expects_parameters_without_gradient(asked, found, unused):
    cfg = prepare_config(tiny_config(asked.pop("method", "vicreg_dual"), **asked))
    with mock.patch("solo_gating.training.trainer.pl.Trainer") as trainer:
        build_trainer(cfg)
    strategy = trainer.call_args.kwargs["strategy"]
    if unused is None:
        assert strategy == "auto"
    else:
        assert type(strategy).__name__ == found
        assert strategy._ddp_kwargs == {"find_unused_parameters": unused}


@pytest.mark.parametrize(
    ("view", "parts"),
    [
        ({"rrc": {"enabled": True}}, ["crop_min_scale"]),
        ({"rrc": {"enabled": True, "crop_min_scale": 0.9, "crop_max_scale": 0.1}}, ["0.9", "0.1"]),
        ({"color_jitter": {"prob": 0.8, "brightness": 0.4}}, ["contrast"]),
        ({"affine": {"degrees": 20, "translate": [2, 2]}}, ["translation"]),
        ({"affine": {"degrees": -5}}, ["degrees"]),
        ({"erasing": {"prob": 0.5, "scale": [0.5, 2]}}, ["cale"]),
        ({"mean": [0.5], "std": [0.5]}, ["3 numbers"]),
        ({"std": [0.5, 0.5, 0]}, ["3 numbers > 0"]),
    ],
)
def test_a_view_that_cannot_be_made_is_refused(view, parts):
    cfg = tiny_config()
    cfg.augmentations = [{"crop_size": 16, "num_crops": 2, **view}]
    with pytest.raises(InputError, match=r"^augmentations\[0\]\.") as error:
        prepare_config(cfg)
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("gating", "epochs", "warning"),
    [
        ({"warmup_epochs": 2}, 2, r"gating.warmup_epochs: got 2 with max_epochs=2"),
        ({"budget_anneal": 1.0}, 10, r"still 0.37 in the last of 10 epochs, and 0.3 never"),
        ({"budget_hold": 0.9, "budget_anneal": 0.1}, 10, r"still 1.00"),
        ({"budget_anneal": 0.5, "warmup_epochs": 6}, 10, r"still 0.58"),
        ({"budget_anneal": 0.5}, 10, None),
        ({"warmup_epochs": 1}, 2, None),
    ],
)
def test_a_run_too_short_for_its_gates_is_warned_of(gating, epochs, warning):
    cfg = tiny_config(max_epochs=epochs, gating={"target_budget": 0.3, **gating})
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        prepare_config(cfg)
    found = [str(one.message) for one in found if "gating." in str(one.message)]
    assert len(found) == (warning is not None)
    assert all(re.search(warning, one) for one in found)


# Copies


def test_a_copy_is_checked_and_the_config_stays():
    cfg = OmegaConf.create({"checkpoint": "~/last.ckpt"}, flags={"struct": True})
    own = own_copy(cfg, EVALUATIONS["knn"])
    own.new = 1
    assert own.checkpoint.endswith("/last.ckpt")
    assert not own.checkpoint.startswith("~")
    assert cfg == {"checkpoint": "~/last.ckpt"}


def test_numbers_of_numpy_s_are_numbers():
    given = OmegaConf.to_container(tiny_config())
    given["gating"] = {"target_budget": np.float32(0.25), "reduction": np.int64(2)}
    cfg = prepare_config(own_copy(given))
    assert (cfg.gating.target_budget, cfg.gating.reduction) == (0.25, 2)
    assert type(cfg.gating.target_budget) is float


@pytest.mark.parametrize("text", ["${seed}", r"\${seed}", "~/${seed}", "a ${oc.env:HOME}"])
def test_an_escaped_interpolation_stays_text(text):
    """However often the config is completed."""
    escaped = as_text(text)
    overrides = {
        "name": as_text(text.replace("/", "")),
        "checkpoint": {"dir": escaped},
        "data": {"val_path": [escaped]},
    }
    cfg = prepare_config(own_copy(prepare_config(tiny_config(**overrides))))
    assert cfg.name == text.replace("/", "")
    assert cfg.checkpoint.dir == os.path.expanduser(text)
    assert list(cfg.data.val_path) == [os.path.expanduser(text)]


def test_lists_and_groups_of_kwargs_may_hold_interpolations(tmp_path):
    write_images(tmp_path / "a.npz", 20)
    cfg = tiny_config(
        "vicreg",
        where=str(tmp_path),
        data={"train_path": ["${where}/a.npz"]},
        optimizer={"kwargs": {"momentum": "${optimizer.lr}"}},
    )
    assert len(training_loader(prepare_config(cfg)).dataset) == 20


def test_a_group_or_list_that_is_something_else_ends_in_a_run_or_one_sentence():
    whole = OmegaConf.merge(DEFAULTS, tiny_config(), {"gating": {}, "momentum": {}})
    views = [f"augmentations.0.{name}" for name in ("rrc", "affine", "mean", "gaussian_blur")]
    groups = [key for key in keys_of(whole) if OmegaConf.is_config(OmegaConf.select(whole, key))]
    assert len(groups) > 10
    for key in groups + views:
        for value in (5, "x", [1], {"a": 1}):
            cfg = tiny_config()
            OmegaConf.update(cfg, key, value, merge=False, force_add=True)
            with suppress(InputError):
                prepare_config(own_copy(cfg))
