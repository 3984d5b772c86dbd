"""Students of a frozen teacher: their losses by hand, the queue, and what happens to the teacher: nothing."""

import json
from functools import cache

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from solo_gating import METHODS
from solo_gating.checkpoints.encoder import encoder_of
from solo_gating.checkpoints.teacher import load_teacher
from solo_gating.config.pretraining import prepare_config, scale_learning_rates
from solo_gating.deploy.dense import solo_learn_args
from solo_gating.files import read_json
from solo_gating.losses import regression_loss, similarity_loss
from solo_gating.main_knn import evaluate_knn
from solo_gating.training import pretrain as training_pretrain

from ..backbones.test_policy_backbone import write_policy
from ..support.encoders import assert_refused, evaluation_config
from ..support.helpers import (
    copy_of,
    default_dtype,
    random_batch,
    student_config,
    tiny_model,
    write_teacher,
)
from ..training.test_randomness import assert_same, equal, small_config, trained, write_data
from .test_distributed import Step

STUDENTS = ("simreg", "seed")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher") / "dense.pt")


def one_view(batch):
    indices, views, targets = batch
    return [indices, views[:1], targets]


@cache
def built(method, teacher):
    with default_dtype(torch.float64):
        return tiny_model(student_config(method, teacher))


def student(method, teacher):
    """In float64, always the same."""
    return copy_of(built(method, teacher))


# The losses


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def seed_by_hand(s, t, queue, of_student, of_teacher):
    """Image by image; the softmaxes from their definitions."""
    s, t, losses = unit(s), unit(t), []
    for one, its in zip(s, t, strict=True):
        compared = np.concatenate([its[None], queue])
        target, own = compared @ its / of_teacher, compared @ one / of_student
        target = np.exp(target - target.max()) / np.exp(target - target.max()).sum()
        own = own - own.max()
        losses.append(-(target * (own - np.log(np.exp(own).sum()))).sum())
    return np.mean(losses)


@pytest.mark.parametrize(("of_student", "of_teacher"), [(0.2, 1e-4), (0.5, 0.1), (0.2, 0.01)])
def test_seed_s_loss_is_a_cross_entropy_over_the_queue(of_student, of_teacher):
    rng = np.random.RandomState(0)
    s, t, queue = (rng.standard_normal((n, 5)) for n in (6, 6, 8))
    queue = unit(queue)
    t[0] = 3 * queue[2] + 1e-5  # nearly one of the queue: its target is soft even at 1e-4
    found = similarity_loss(*map(torch.from_numpy, (s, t, queue)), of_student, of_teacher)
    assert found.dtype is torch.float64
    expected = seed_by_hand(s, t, queue, of_student, of_teacher)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_seed_s_loss_becomes_infonce_with_the_teacher_as_the_positive_one():
    rng = np.random.RandomState(1)
    s, t, queue = (torch.from_numpy(unit(rng.standard_normal((n, 16)))) for n in (6, 6, 8))
    logits = torch.cat([(s * t).sum(1)[:, None], s @ queue.T], dim=1) / 0.2
    expected = nn.functional.cross_entropy(logits, torch.zeros(6, dtype=torch.int64))
    torch.testing.assert_close(similarity_loss(s, t, queue, 0.2, 1e-4), expected)


def test_simreg_s_loss_is_the_squared_distance_of_directions():
    rng = np.random.RandomState(2)
    s, t = rng.standard_normal((6, 5)), rng.standard_normal((6, 5))
    found = regression_loss(torch.from_numpy(s), torch.from_numpy(t)).item()
    assert found == pytest.approx(((unit(s) - unit(t)) ** 2).sum(1).mean(), rel=1e-12)
    cosines = (unit(s) * unit(t)).sum(1)
    assert found == pytest.approx(np.mean(2 - 2 * cosines), rel=1e-12)
    assert regression_loss(torch.from_numpy(s), torch.from_numpy(3 * s)).item() < 1e-14


@pytest.mark.parametrize("loss", [regression_loss, similarity_loss])
def test_the_teacher_gets_no_gradient_and_half_precision_counts_as_single(loss):
    s, t = (torch.randn(4, 6, requires_grad=True) for _ in range(2))
    queue = [nn.functional.normalize(torch.randn(8, 6))] * (loss is similarity_loss)
    value = loss(s, t, *queue)
    value.backward()
    assert t.grad is None
    assert s.grad.any()
    assert loss(s.bfloat16(), t.bfloat16(), *queue).dtype is torch.float32


# Heads


def test_simreg_s_head_has_batchnorm_and_relu_after_layers_1_and_3_only(teacher):
    head = student("simreg", teacher).head
    kinds = [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert [type(layer) for layer in head] == [*kinds, nn.Linear]
    sizes = [(m.in_features, m.out_features) for m in head if isinstance(m, nn.Linear)]
    f, d = 32, 64  # of ResNet-18 of width 4, and of width 8
    assert sizes == [(f, 2 * f), (2 * f, f), (f, 2 * f), (2 * f, d)]
    assert [m.num_features for m in head if isinstance(m, nn.BatchNorm1d)] == [2 * f, 2 * f]


def test_seed_s_head_has_two_layers_and_no_batchnorm(teacher):
    head = student("seed", teacher).head
    assert [type(layer) for layer in head] == [nn.Linear, nn.ReLU, nn.Linear]
    assert [(m.in_features, m.out_features) for m in head if isinstance(m, nn.Linear)] == [
        (32, 32),
        (32, 64),
    ]


# Steps


def test_simreg_s_step(teacher):
    model, batch = student("simreg", teacher), one_view(random_batch())
    loss = model.training_step(batch, 0)
    with torch.no_grad():
        features = model.backbone(batch[1][0])  # in training mode its statistics are the batch's
        expected = regression_loss(model.head(features), model.teacher(batch[1][0]))
        logits = model.classifier(features)
    assert model.logged["train_simreg_loss"].item() == pytest.approx(expected.item(), rel=1e-9)
    online = nn.functional.cross_entropy(logits, batch[2])
    assert loss.item() == pytest.approx((expected + online).item(), rel=1e-9)


def test_the_queue_is_compared_with_before_the_batch_enters_and_turns_round(teacher):
    """16 places and batches of 8: the third overwrites the first."""
    model, held = student("seed", teacher), {}
    first = model.queue.clone()
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1)
    for number in range(3):
        batch, before = one_view(random_batch(seed=number)), model.queue.clone()
        model.training_step(batch, number).backward()
        with torch.no_grad():
            t = model.teacher(batch[1][0]).numpy()
            s = model.head(model.backbone(batch[1][0])).numpy()
        expected = seed_by_hand(s, t, before.numpy(), 0.2, 1e-4)
        assert model.logged["train_seed_loss"].item() == pytest.approx(expected, rel=1e-8)
        held |= {(8 * number + place) % 16: row for place, row in enumerate(unit(t))}
        places = [held.get(place, first[place].numpy()) for place in range(16)]
        np.testing.assert_allclose(model.queue, np.stack(places), rtol=1e-10)
        assert int(model.queue_place) == 8 * (number + 1) % 16


@pytest.mark.parametrize("method", STUDENTS)
def test_under_autocast_the_loss_is_in_single_precision(method, teacher):
    model = student(method, teacher).float()
    batch = one_view(random_batch(dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.training_step(batch, 0)
    assert model.logged[model.loss_name].dtype is torch.float32
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("method", STUDENTS)
def test_no_step_waits_for_a_gpu(method, teacher):
    """With tensors that have no values: what asks for one raises (as in test_no_waiting)."""
    model = student(method, teacher)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    indices, (view,), targets = one_view(random_batch())
    state = {f"model.{n}": mode.from_tensor(v) for n, v in model.state_dict().items()}
    with mode:
        batch = [indices, [mode.from_tensor(view)], mode.from_tensor(targets)]
        loss = torch.func.functional_call(Step(model), state, (batch,))
    with pytest.raises(DataDependentOutputException), mode:
        float(loss)


# The teacher


@pytest.mark.parametrize("method", STUDENTS)
def test_the_teacher_is_nowhere_but_goes_along(method, teacher):
    model = student(method, teacher).float()
    ours = {id(value) for value in model.teacher.state_dict(keep_vars=True).values()}
    trained_ones = [p for group in model.learnable_params for p in group["params"]]
    assert not ours & {id(value) for value in [*trained_ones, *model.parameters()]}
    assert not ours & {id(v) for v in model.state_dict(keep_vars=True).values()}
    assert {id(p) for p in trained_ones} == {id(p) for p in model.parameters()}
    model.train()
    assert not any(module.training for module in model.teacher.modules())
    assert next(model.double().teacher.parameters()).dtype is torch.float64
    weight = model.to(memory_format=torch.channels_last).teacher.backbone.layer1[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert next(model.to("meta").teacher.parameters()).is_meta


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images, a teacher's file, and a policy."""
    folder = tmp_path_factory.mktemp("students")
    write_data(folder)
    write_teacher(folder / "dense.pt")
    write_policy(folder / "policy.json", width=4)
    return folder


def run(folder, method, name, pipeline="workers"):
    cfg = small_config(
        folder, method, data={"pipeline": pipeline}, checkpoint={"dir": str(folder / name)}
    )
    kwargs = student_config(method, folder / "dense.pt").method_kwargs
    cfg.method_kwargs, cfg.augmentations[0].num_crops = kwargs, 1
    cfg.backbone.name = "resnet18_policy"
    cfg.backbone.kwargs.policy = str(folder / "policy.json")
    return cfg


@pytest.fixture(scope="module")
def runs(folder):
    """Of each method a run that was never killed, in each pipeline one of them; and its model."""
    found = {}
    for method, pipeline in zip(STUDENTS, ("workers", "device"), strict=True):
        models, build = [], training_pretrain.build_model
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "solo_gating.training.pretrain.build_model",
                lambda cfg, models=models, build=build: models.append(build(cfg)) or models[-1],
            )
            found[method] = (*trained(run(folder, method, f"{method}-whole", pipeline)), *models)
    return found


@pytest.mark.parametrize(("method", "pipeline"), [("simreg", "workers"), ("seed", "device")])
def test_a_continued_run_is_an_undisturbed_one(method, pipeline, folder, runs):
    """Bit for bit, the queue included."""
    content, logged, _ = runs[method]
    assert_same(
        trained(run(folder, method, f"{method}-killed", pipeline), (1, 1)), (content, logged)
    )
    names = {name.partition(".")[0] for name in content["state_dict"]}
    assert names == {"backbone", "classifier", "head"} | (
        {"queue", "queue_place"} if method == "seed" else set()
    )
    assert (content["state_dict"].get("queue_place", torch.tensor(0)) == 6 * 8 % 16).all()


@pytest.mark.parametrize("method", STUDENTS)
def test_a_run_leaves_the_teacher_as_it_is_bit_for_bit(method, folder, runs):
    model, before = runs[method][2], load_teacher(folder / "dense.pt").state_dict()
    assert equal(dict(model.teacher.state_dict()), dict(before))
    assert any(name.endswith("running_var") for name in before)
    assert any(name.endswith("num_batches_tracked") for name in before)
    assert int(model.backbone.bn1.num_batches_tracked) == 6


def test_a_checkpoint_needs_neither_policy_nor_teacher(folder, runs):
    """kNN with features of length 1, as in Table 3; both files are gone."""
    (checkpoint,) = (folder / "seed-whole").glob("*/*/last.ckpt")
    args = read_json(checkpoint.parent / "args.json")
    assert (
        args["backbone"]["kwargs"]["hidden"]
        == encoder_of(checkpoint).backbone.architecture["hidden"]
    )
    assert args["backbone"]["policy"] == {"target_budget": 0.3, "share": 0.25}
    for name in ("dense.pt", "policy.json"):
        (folder / name).rename(folder / f"{name}-away")
    try:
        cfg = evaluation_config("knn", checkpoint, "normalize=true", "data.num_workers=0")
        metrics = evaluate_knn(cfg)
        assert_refused(lambda: encoder_of(checkpoint, "projector"), "features", "has no projector")
        assert_refused(
            lambda: solo_learn_args(encoder_of(checkpoint)), "resnet18_policy", "has not"
        )
    finally:
        for name in ("dense.pt", "policy.json"):
            (folder / f"{name}-away").rename(folder / name)
    assert metrics["pretraining"]["policy"] == {"target_budget": 0.3, "share": 0.25}
    assert metrics["settings"]["normalize"] is True
    assert metrics["dense"]["flops"] > 0


def test_an_args_json_names_widths_and_no_file(folder, runs, tmp_path):
    """As solo-learn's own script would leave a policy in it: nothing in an args.json is opened."""
    (checkpoint,) = (folder / "seed-whole").glob("*/*/last.ckpt")
    args = read_json(checkpoint.parent / "args.json")
    args["backbone"]["kwargs"] = {"width": 4, "policy": str(folder / "policy.json")}
    (tmp_path / "args.json").write_text(json.dumps(args))
    (tmp_path / "last.ckpt").write_bytes(checkpoint.read_bytes())
    parts = ("backbone.kwargs.policy", "expected backbone.kwargs.hidden")
    assert_refused(lambda: encoder_of(tmp_path / "last.ckpt"), *parts)


def test_paths_may_begin_at_home(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    cfg = run(folder, "simreg", "home")
    cfg.method_kwargs.teacher, cfg.backbone.kwargs.policy = "~/dense.pt", "~/policy.json"
    prepare_config(cfg)
    assert cfg.method_kwargs.teacher == str(folder / "dense.pt")
    assert len(cfg.backbone.kwargs.hidden) == 8


# Configs that cannot be


@pytest.mark.parametrize("method", STUDENTS)
@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            {"augmentations": [{"crop_size": 16, "num_crops": 2}]},
            ["augmentations: got 2", "takes 1"],
        ),
        (
            {
                "augmentations": [
                    {"crop_size": 16, "num_crops": 1},
                    {"crop_size": 8, "num_crops": 2},
                ]
            },
            ["augmentations", "2 others"],
        ),
        ({"method_kwargs": {"teacher": None}}, ["method_kwargs.teacher: missing"]),
        ({"method_kwargs": {"teacher": 3}}, ["method_kwargs.teacher: got 3", "a path"]),
        ({"method_kwargs": {"teacher_path": "both"}}, ["method_kwargs.teacher_path", "gated"]),
        ({"method_kwargs": {"teacher_head": "yes"}}, ["method_kwargs.teacher_head"]),
        (
            {"backbone": {"kwargs": {"policy": "x"}}},
            ["backbone.kwargs.policy: got 'x'", "takes none"],
        ),
        ({"pretrained": __file__}, ["pretrained"]),
    ],
)
def test_a_config_that_cannot_be_is_refused(method, change, parts, teacher):
    cfg = OmegaConf.merge(student_config(method, teacher), change)
    assert_refused(lambda: prepare_config(cfg), *parts)


def test_a_queue_that_steps_do_not_fill_is_refused(teacher):
    change = {"method_kwargs": {"queue_size": 12}}
    cfg = OmegaConf.merge(student_config("seed", teacher), change)
    assert_refused(
        lambda: prepare_config(cfg), "method_kwargs.queue_size: got 12", "multiple of the 8"
    )
    cfg = prepare_config(student_config("seed", teacher, method_kwargs={"queue_size": 24}))
    assert_refused(lambda: scale_learning_rates(cfg, 2), "queue_size: got 24", "multiple of the 16")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"proj_output_dim": 128}, ["method_kwargs.proj_output_dim: got 128, expected 64"]),
        ({"teacher_path": "gated"}, ["method_kwargs.teacher_path: got gated", "expected dense"]),
        ({"teacher_head": True}, ["method_kwargs.teacher_head: got true", "expected false"]),
        ({"teacher": "absent.pt"}, ["method_kwargs.teacher: 'absent.pt' is not a file"]),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(change, parts, teacher):
    cfg = OmegaConf.merge(student_config("seed", teacher), {"method_kwargs": change})
    assert_refused(lambda: METHODS["seed"](prepare_config(cfg)), *parts)


def test_the_defaults_are_those_of_the_authors_code(teacher):
    cfg = student_config("seed", teacher)
    del cfg.method_kwargs.queue_size
    METHODS["seed"](cfg)
    assert cfg.method_kwargs.queue_size == 65536
    assert cfg.method_kwargs.student_temperature == 0.2
    assert cfg.method_kwargs.teacher_temperature == 1e-4
