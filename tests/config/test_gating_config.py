"""The config group `gating`: what is refused, and what its defaults are."""

import math
from dataclasses import fields

import pytest
from omegaconf import OmegaConf

from solo_gating import InputError
from solo_gating.config.gating import GatingConfig, as_it_was
from solo_gating.config.pretraining import prepare_config

from ..support.helpers import tiny_config


def read(gating, crops=2):
    cfg = OmegaConf.create({"gating": gating, "data": {"num_large_crops": crops}})
    return GatingConfig.from_config(cfg, ("gated", "dense"))


SHARES = [0, -1, 1.5, math.nan, math.inf, "a", True]
NO_RANGES = [[], [0.3], [0.3, 0.3], [0.9, 0.05], [0, 0.5], [0.5, 1.1], [0.1, "b"], [0.1, 0.2, 0.3]]
BUDGET = "a number in (0, 1] or a range like [0.05, 0.9]"


@pytest.mark.parametrize(
    ("key", "value", "accepted"),
    [
        *(("target_budget", value, BUDGET) for value in [*SHARES, *NO_RANGES]),
        *(("bound_target", value, "sqrt, budget or a number in (0, 1]") for value in [0, 2, "x"]),
        *(("sparsity_weight", value, "a number ≥ 0") for value in [-1, math.nan, "5", False]),
        ("bound_weight", -0.1, "a number ≥ 0"),
        ("bound_decay", math.inf, "a number ≥ 0"),
        *(("weight_decay", value, "a number ≥ 0") for value in [-1e-4, math.nan, "0", True]),
        *(("bound_gradient", value, "one of all, selected") for value in ["on", True, 1]),
        ("temperature", 0, "a number > 0"),
        ("reduction", 0, "an integer ≥ 1"),
        ("reduction", 4.0, "an integer ≥ 1"),
        ("warmup_epochs", -1, "an integer ≥ 0"),
        ("warmup_epochs", 1.5, "an integer ≥ 0"),
        ("separate_bn", "yes", "true or false"),
        ("views", "gated", "a list like [gated, dense]"),
        ("budget_anneal", 1.5, "a number from 0 to 1"),
        ("budget_hold", -0.1, "a number from 0 to 1"),
        ("budget_per_image", "yes", "true or false"),
        ("budget_embedding", 1, "true or false"),
        ("relative_budget_loss", "yes", "true or false"),
    ],
)
def test_a_value_is_refused_in_one_sentence(key, value, accepted):
    with pytest.raises(InputError) as error:
        read({key: value})
    assert str(error.value) == f"gating.{key}: got {value!r}, expected {accepted}"


@pytest.mark.parametrize(
    ("gating", "message"),
    [
        (
            {"budget": 0.3},
            "gating.budget: no such key, expected "
            + ", ".join(item.name for item in fields(GatingConfig)),
        ),
        (
            {"views": ["gated", "sparse"]},
            "gating.views: got 'sparse', expected ('gated', 'dense')",
        ),
        (
            {"views": ["gated"]},
            "gating.views: got 1 (gated), augmentations make 2 crops, and each needs its path",
        ),
        (
            {"views": ["gated", "dense", "dense"]},
            "gating.views: got 3 (gated, dense, dense), augmentations make 2 crops, and each "
            "needs its path",
        ),
        (
            {"views": ["dense", "dense"]},
            "gating.views: got no gated view, expected at least one",
        ),
        (
            {"budget_hold": 0.5, "budget_anneal": 0.6},
            "gating.budget_hold: got 0.5 beside gating.budget_anneal=0.6, expected at most 1 together, "
            "so that the budget is reached",
        ),
        (
            {"budget_hold": 1},
            "gating.budget_hold: got 1 beside gating.budget_anneal=0.0, expected at most 1 together, "
            "so that the budget is reached",
        ),
        (
            {"gate": "cgnet", "target_budget": [0.1, 0.9]},
            "gating.target_budget: got [0.1, 0.9], gates of kind 'cgnet' are told no budget; expected "
            "a number",
        ),
        (
            {"gate_kwargs": {"told": True}},
            "gating.gate_kwargs.told: got True, expected gating.target_budget alone",
        ),
        (
            {"gate_kwargs": {"temperature": 0}},
            "gating.gate_kwargs.temperature: got 0, expected gating.temperature alone",
        ),
        (
            {"gate_kwargs": {"bias": "4"}},
            "gating.gate_kwargs.bias: got '4', expected a number",
        ),
        *(
            (
                {"gate": kind, "gate_kwargs": {key: value}},
                f"gating.gate_kwargs.{key}: got {value!r}, expected {accepted}",
            )
            for kind, key, value, accepted in [
                ("cdg", "alpha", None, "a number"),
                ("cdg", "target", "x", "a number"),
                ("cdg", "hard", "maybe", "true or false"),
                ("cdg", "inference", 1, "a text"),
                ("scdg", "groups", 4.0, "an integer"),
                ("dgc", "penalty_weight", "x", "a number"),
                ("top_k", "count", 2.5, "an integer"),
            ]
        ),
        (
            {"separate_bn": True, "views": ["gated", "gated"]},
            "gating.separate_bn: got true with no dense view in gating.views, which would leave "
            "the dense path's BatchNorms untrained; expected false",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(gating, message):
    with pytest.raises(InputError) as error:
        read(gating)
    assert str(error.value) == message


def test_a_group_that_is_no_group_is_refused():
    with pytest.raises(InputError, match=r"^gating: got \['target_budget'\], expected a group"):
        read(["target_budget"])


@pytest.mark.parametrize("value", [1, 1.0, 0.001])
def test_the_budget_may_be_all_of_it(value):
    assert read({"target_budget": value}).target_budget == value


@pytest.mark.parametrize(
    ("views", "separate"), [(["gated", "dense"], True), (["gated", "gated"], False)]
)
def test_batchnorms_are_separate_where_a_view_is_dense(views, separate):
    assert read({"views": views, "separate_bn": None}).separate_bn is separate
    if separate:
        assert read({"views": views, "separate_bn": False}).separate_bn is False


def test_the_config_then_holds_the_complete_group():
    cfg = tiny_config("simsiam_gated", gating={"target_budget": 0.3, "views": None})
    prepare_config(cfg)
    assert OmegaConf.to_container(cfg.gating) == {
        "target_budget": 0.3,
        "sparsity_weight": 5.0,
        "bound_weight": 1.0,
        "bound_decay": 0.02,
        "bound_target": "sqrt",
        "bound_gradient": "selected",
        "gate": "channel",
        "gate_kwargs": {},
        "reduction": 4,
        "temperature": 2 / 3,
        "weight_decay": 0.0,
        "separate_bn": False,
        "warmup_epochs": 0,
        "views": ["gated", "gated"],
    }


def test_small_crops_are_views_too():
    crops = [{"crop_size": 16, "num_crops": 2}, {"crop_size": 8, "num_crops": 1}]
    cfg = tiny_config(augmentations=crops)
    with pytest.raises(InputError, match=r"gating.views: got 2 .* make 3 crops"):
        prepare_config(cfg)
    cfg = tiny_config(augmentations=crops, gating={"views": ["gated", "dense", "gated"]})
    assert prepare_config(cfg).data.num_small_crops == 1


def test_absent_keys_of_an_older_record_mean_what_they_meant():
    """A run with the gates' decay of the optimiser is none without; new records say which."""
    new = read({})._written()
    old = {key: new[key] for key in new if key not in ("bound_gradient", "weight_decay")}
    assert as_it_was(new, 1e-4) == new
    assert as_it_was(old, 1e-4) == {**old, "bound_gradient": "all", "weight_decay": 1e-4}
    assert as_it_was(old, 0.0) == read({"bound_gradient": "all"})._written()


RETIRED = {"open_start": False, "shuffle_views": False, "budget_sampling": "uniform"}


def test_keys_of_earlier_versions_at_their_defaults_say_nothing():
    assert read(RETIRED) == read({})
    assert as_it_was(RETIRED, 0.0) == as_it_was({}, 0.0)


@pytest.mark.parametrize(
    ("key", "value", "instead"),
    [
        ("open_start", True, "expected is gating.gate_kwargs.bias=4"),
        ("shuffle_views", True, "research/ablations.py has methods that do it"),
        ("shuffle_views", 0, "research/ablations.py has methods that do it"),
        (
            "budget_sampling",
            "sandwich",
            "research/ablations.py has methods that do it",
        ),
    ],
)
def test_what_earlier_versions_did_besides_is_refused(key, value, instead):
    with pytest.raises(InputError) as error:
        read({key: value})
    assert str(error.value) == f"gating.{key}: no such key, {instead}"
