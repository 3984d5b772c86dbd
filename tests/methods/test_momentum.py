"""Momentum methods with gates: the student's views take their paths, the teacher its own."""

import itertools
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import torchvision
from omegaconf import OmegaConf
from torch import nn

from solo_gating import GATED_METHODS, METHODS, InputError
from solo_gating.backbones.paths import scope_of
from solo_gating.checkpoints.encoder import encoder_of
from solo_gating.config.pretraining import prepare_config, scale_learning_rates
from solo_gating.deploy.dense import dense_state_dict, solo_learn_checkpoint
from solo_gating.flops import count_flops
from solo_gating.main_pretrain import pretrain
from solo_gating.methods import REFUSED, plain_method, register_gated
from solo_gating.solo_learn import LINE, SOLO_METHODS, BaseMethod, BaseMomentumMethod

from ..support.helpers import (
    copy_of,
    default_dtype,
    fixed_noise,
    random_batch,
    tiny_config,
    tiny_model,
    write_images,
)
from ..training.test_randomness import assert_same, small_config, trained, write_data

GATING = {"target_budget": 0.3, "sparsity_weight": 50.0, "bound_weight": 2.0}
PLAIN = {  # solo-learn's name of every method that is gated
    name.removesuffix("_dual"): next(n for n, c in METHODS.items() if c is plain_method(cls))
    for name, cls in GATED_METHODS.items()
    if name.endswith("_dual")
}
# One for each way in which solo-learn's steps are written; the others are tested with `-m slow`.
_OFTEN = ("byol", "mocov2plus", "nnclr", "simsiam", "vicreg")
EVERY = [n if n in _OFTEN else pytest.param(n, marks=pytest.mark.slow) for n in PLAIN]
MOMENTUM = sorted(n for n in PLAIN if issubclass(METHODS[PLAIN[n]], BaseMomentumMethod))


@pytest.fixture(autouse=True)
def _float64():
    with default_dtype(torch.float64):
        yield


def follow(model):
    """What Lightning calls after a step of the optimiser's."""
    model._trainer.global_step += 1
    model.on_train_batch_end(None, None, 0)


# Every method is the plain one where gates are open


def pair(name, kind, gating):
    """A gated method and the plain one, with the same weights in everything that both have."""
    gated = tiny_model(tiny_config(f"{name}_{kind}", gating=gating, max_epochs=5))
    cfg = tiny_config(f"{name}_{kind}", max_epochs=5)
    cfg.method, cfg.backbone.name = PLAIN[name], "resnet18_plain"
    plain = tiny_model(cfg, seed=1)
    state = {k: v for k, v in gated.state_dict().items() if k in plain.state_dict()}
    assert {k for k in plain.state_dict() if k not in state} == set()
    plain.load_state_dict(state)
    for model in (gated, plain):
        model.on_train_start()
        model.on_train_epoch_start()
    return gated, plain


def losses_of_two_steps(model):
    """With SGD and the teacher's update in between, so that queue and teacher take part."""
    found = []
    for number in range(2):
        torch.manual_seed(number)  # All4One has dropout
        loss = model.training_step(random_batch(seed=number), number)
        weights = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss, weights, allow_unused=True)
        with torch.no_grad():
            for weight, grad in zip(weights, grads, strict=True):
                if grad is not None:
                    weight -= 0.01 * grad
        if isinstance(model, BaseMomentumMethod):
            follow(model)
        found.append(loss.item())
    return found


@pytest.mark.parametrize("name", EVERY)
def test_with_open_gates_a_gated_method_is_the_plain_one(name):
    """The gated path is then the dense one, where BatchNorms are shared: views of both kinds."""
    kind = "gated" if name == "byol" else "dual"
    gating = {"separate_bn": False, "sparsity_weight": 0.0, "bound_weight": 0.0}
    gated, plain = pair(name, kind, gating)
    always = mock.patch(
        "solo_gating.gates.channel.logistic_noise", lambda x: torch.full_like(x, 1e9)
    )
    with always:
        found = losses_of_two_steps(gated)
    assert gated.logged["train_flops_share"] > 0.99
    assert found == pytest.approx(losses_of_two_steps(plain), rel=1e-8)
    assert len(set(found)) == 2


@pytest.mark.parametrize("name", ["byol", "mocov2plus", "simsiam"])
def test_while_all_views_are_dense_a_gated_method_is_the_plain_one(name):
    gated, plain = pair(name, "dual", {"warmup_epochs": 1})
    found = losses_of_two_steps(gated)
    assert "train_budget_loss" not in gated.logged
    assert found == pytest.approx(losses_of_two_steps(plain), rel=1e-8)


# The losses, by hand


def byol(model, student, teacher):
    p = [model.predictor(model.projector(f)) for f in student]
    z = [model.momentum_projector(f) for f in teacher]
    similarity = [F.cosine_similarity(p[i], z[1 - i]).mean() for i in range(2)]
    return sum(2 - 2 * s for s in similarity)


def mocov2plus(model, student, teacher):
    q = [F.normalize(model.projector(f)) for f in student]
    k = [F.normalize(model.momentum_projector(f)) for f in teacher]
    total = 0
    for i in range(2):
        positive = (q[i] * k[1 - i]).sum(dim=1, keepdim=True)
        logits = torch.cat([positive, q[i] @ model.queue[1 - i]], dim=1) / 0.2
        total = total - F.log_softmax(logits, dim=1)[:, 0].mean() / 2
    return total


PATHS = {"dense": ("dense", "dense"), "gated": ("gated", "gated"), "same": ("gated", "dense")}


@pytest.mark.parametrize("momentum_path", PATHS)
@pytest.mark.parametrize("ssl", [byol, mocov2plus])
def test_the_student_is_compared_with_a_teacher_on_its_path(ssl, momentum_path):
    gating = {**GATING, "momentum_path": momentum_path}
    cfg = tiny_config(f"{ssl.__name__}_dual", gating=gating, momentum={"classifier": True})
    model = tiny_model(cfg)
    copied, batch = copy_of(model), random_batch()
    with fixed_noise(11):
        loss = model.training_step(batch, 0)
    gates = sum(float(model.logged[f"train_{name}_loss"]) for name in ("budget", "bound"))
    _, images, targets = batch
    with fixed_noise(11):
        student, teacher = [], []
        for x, path in zip(images, ("gated", "dense"), strict=True):
            with copied.backbone.path(path):
                student.append(copied.backbone(x))
        for x, path in zip(images, PATHS[momentum_path], strict=True):
            with copied.momentum_backbone.path(path), torch.no_grad():
                teacher.append(copied.momentum_backbone(x))
        expected = ssl(copied, student, teacher)
    for classifier, features in (
        (copied.classifier, student),
        (copied.momentum_classifier, teacher),
    ):
        for f in features:
            expected = expected + F.cross_entropy(classifier(f.detach()), targets) / 2
    assert loss.item() - gates == pytest.approx(expected.item(), rel=1e-9)
    assert gates > 0
    loss.backward()
    assert all(p.grad is None for p in model.momentum_backbone.parameters())
    assert any(p.grad.any() for n, p in model.named_parameters() if ".gate." in n)


@pytest.mark.parametrize("momentum_path", PATHS)
def test_the_teacher_s_batchnorms_are_those_of_its_path(momentum_path):
    model = tiny_model(tiny_config("byol_dual", gating={"momentum_path": momentum_path}))
    model.training_step(random_batch(), 0)
    block = model.momentum_backbone.layer2[0]
    paths = PATHS[momentum_path]
    assert int(block.bn1.num_batches_tracked) == paths.count("dense")
    assert int(block.gated_bn1.num_batches_tracked) == paths.count("gated")
    assert int(block.downsample[1].num_batches_tracked) == 2


def test_the_teacher_s_gates_are_told_what_the_student_s_are():
    gating = {"target_budget": [0.05, 0.9], "budget_per_image": True, "momentum_path": "gated"}
    model = tiny_model(tiny_config("byol_dual", gating=gating))
    model.flops((16, 16))  # counted on a copy, which would have the hooks
    told: dict[str, list[Any]] = {"backbone": [], "momentum_backbone": []}
    for name, seen in told.items():
        gate = getattr(model, name).layer1[0].gate
        gate.register_forward_hook(lambda m, args, out, seen=seen: seen.append(args[1]))
    model.training_step(random_batch(), 0)
    (student,) = told["backbone"]
    assert student.shape == (8,)
    assert len(set(student.tolist())) == 8
    assert [torch.equal(budget, student) for budget in told["momentum_backbone"]] == [True, True]


def test_a_teacher_s_paths_follow_the_step_s_views_and_rest_with_the_gates(monkeypatch):
    gating = {"momentum_path": "same", "warmup_epochs": 1}
    model = tiny_model(tiny_config("byol_dual", gating=gating), epoch=1)
    order = [("gated", "dense"), ("dense", "gated")]
    monkeypatch.setattr(model, "views_of_step", lambda: order[model.global_step % 2])
    paths = []
    model.momentum_backbone.register_forward_hook(
        lambda teacher, *_: paths.append(scope_of(teacher).passes[-1].path)
    )
    for step in range(6):
        model._trainer.global_step = step
        model.training_step(random_batch(), 0)
        assert tuple(paths[-2:]) == model.views_of_step()
    assert len({tuple(paths[i : i + 2]) for i in range(0, 12, 2)}) == 2
    model._trainer.current_epoch = 0
    model.training_step(random_batch(), 0)
    assert paths[-2:] == ["dense", "dense"]


# The teacher follows


@pytest.mark.parametrize("name", MOMENTUM)
def test_every_weight_of_the_teacher_follows_the_student_s(name):
    """Of the gated path, too, whatever the teacher's path is."""
    cfg = tiny_config(f"{name}_dual", momentum={"base_tau": 0.9})
    model = tiny_model(cfg, steps=10)
    model.on_train_start()
    with torch.no_grad():
        for p in model.backbone.parameters():
            p += torch.randn_like(p)
    before = {k: v.clone() for k, v in model.momentum_backbone.named_parameters()}
    follow(model)
    for key, weight in model.momentum_backbone.named_parameters():
        student = model.backbone.get_parameter(key)
        torch.testing.assert_close(
            weight, 0.9 * before[key] + 0.1 * student, rtol=1e-12, atol=1e-15
        )
        assert not weight.requires_grad
    assert any(".gate." in key for key in before)
    assert any("gated_bn" in key for key in before)
    # The rate has gone a tenth of a half cosine from 0.9 to 1.
    expected = 1 - 0.1 * (torch.cos(torch.tensor(torch.pi / 10)).item() + 1) / 2
    assert model.momentum_updater.cur_tau == pytest.approx(expected, rel=1e-12)


def test_the_optimiser_has_the_student_only():
    model = tiny_model(tiny_config("byol_dual", momentum={"classifier": True}))
    held = {p for group in model.learnable_params for p in group["params"]}
    names = {n for n, p in model.named_parameters() if p in held}
    parts = {name.split(".")[0] for name in names}
    assert parts == {"backbone", "classifier", "momentum_classifier", "projector", "predictor"}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == names


# Metrics


@pytest.mark.parametrize("momentum_path", PATHS)
def test_validation_measures_every_path_and_the_teacher(momentum_path):
    cfg = tiny_config(
        "byol_dual",
        gating={"momentum_path": momentum_path},
        momentum={"classifier": True},
        knn_eval={"enabled": True, "k": 1},
    )
    model = tiny_model(cfg)
    model.training_step(random_batch(seed=3), 0)
    assert 0 <= float(model.logged["train_momentum_acc1"]) <= 100
    model.eval()
    batches = [random_batch(seed=4), random_batch(size=5, seed=5)]
    images, targets = (
        torch.cat([b[1][0] for b in batches]),
        torch.cat([b[2] for b in batches]),
    )
    with torch.no_grad():
        for number, batch in enumerate(batches):
            model.validation_step([batch[1][0], batch[2]], number)
        banks = {path: torch.cat(knn.test_features) for path, knn in model.path_knn.items()}
        model.on_validation_epoch_end()

    def accuracy(logits):
        return 100 * (logits.argmax(dim=1) == targets).double().mean().item()

    with torch.no_grad():
        for path in ("dense", "gated"):
            with model.backbone.path(path):
                features = model.backbone(images)
            found = float(model.logged[f"val_{path}_acc1"])
            assert found == pytest.approx(accuracy(model.classifier(features)))
            torch.testing.assert_close(banks[path], features, rtol=1e-9, atol=1e-9)
            assert 0 <= model.logged[f"val_{path}_knn_acc1"] <= 100
        with model.momentum_backbone.path("gated" if momentum_path == "gated" else "dense"):
            logits = model.momentum_classifier(model.momentum_backbone(images))
    assert float(model.logged["momentum_val_acc1"]) == pytest.approx(accuracy(logits))
    loss = F.cross_entropy(logits, targets).item()
    assert float(model.logged["momentum_val_loss"]) == pytest.approx(loss, rel=1e-9)
    assert model.validation_step_outputs == []
    for knn in model.path_knn.values():  # nothing is left for the next epoch
        assert knn.train_features == knn.test_features == []


def test_flops_are_the_student_s():
    model = tiny_model(tiny_config("byol_dual"))
    expected = tiny_model(tiny_config("vicreg_dual")).flops((16, 16))
    assert model.flops((16, 16)) == expected == count_flops(model.backbone, (16, 16))


# Whole runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("momentum")
    write_data(folder)
    return folder


RUNS: dict[str, Any] = {
    "byol_dual": {"momentum": {"base_tau": 0.9, "classifier": True}},
    "mocov2plus_gated": {
        "gating": {"momentum_path": "gated", "target_budget": [0.1, 0.9]},
        "knn_eval": {"enabled": True, "k": 1},
    },
}


@pytest.mark.parametrize("method", RUNS)
def test_a_continued_run_goes_on_with_its_teacher(method, folder, tmp_path):
    with default_dtype(torch.float32):
        cfg = small_config(folder, method, checkpoint={"dir": str(tmp_path)})
        cfg = OmegaConf.merge(cfg, RUNS[method])
        ours = trained(cfg, (1, 1))
        cfg.checkpoint.dir += "/whole"
        assert_same(ours, trained(cfg))
    logged = ours[1]
    assert "val_gated_acc1" in logged
    assert ("val_gated_knn_acc1" in logged) == (method == "mocov2plus_gated")
    assert ("momentum_val_acc1" in logged) == (method == "byol_dual")


def test_no_export_holds_the_teacher(tmp_path):
    with default_dtype(torch.float32):
        cfg = tiny_config(
            "byol_dual",
            max_epochs=1,
            backbone={"kwargs": {"width": 64}},
            data={"train_path": str(write_images(tmp_path / "train.npz", 8))},
            optimizer={"lr": 5.0},
            momentum={"base_tau": 0.5},
            checkpoint={"enabled": True, "dir": str(tmp_path)},
        )
        pretrain(cfg)
        (file,) = tmp_path.glob("byol_dual/*/last.ckpt")
        state = torch.load(file, map_location="cpu")["state_dict"]
        student, teacher = (
            {k.removeprefix(part): v for k, v in state.items() if k.startswith(part)}
            for part in ("backbone.", "momentum_backbone.")
        )
        assert student.keys() == teacher.keys()
        assert not torch.equal(student["conv1.weight"], teacher["conv1.weight"])

        encoder = encoder_of(file)
        for key, value in encoder.backbone.state_dict().items():
            assert torch.equal(value, student[key]), key
        for key, value in dense_state_dict(encoder).items():
            assert torch.equal(value, student[key]), key
        exported = solo_learn_checkpoint(encoder)["state_dict"]
        assert not [key for key in exported if "momentum" in key]
        assert {key.split(".")[0] for key in exported} == {
            *("backbone", "classifier", "projector", "predictor")
        }

        # What solo-learn's main_linear.py makes of both.
        for content in (state, exported):
            stripped = dict(content)
            for k in list(stripped):
                if "encoder" in k:
                    stripped[k.replace("encoder", "backbone")] = stripped[k]
                if "backbone" in k:
                    stripped[k.replace("backbone.", "")] = stripped[k]
                del stripped[k]
            linear = torchvision.models.resnet18()
            linear.fc = nn.Identity()
            linear.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=2, bias=False)
            linear.maxpool = nn.Identity()
            assert linear.load_state_dict(stripped, strict=False).missing_keys == []
            for key, value in linear.state_dict().items():
                assert torch.equal(value, student[key]), key


# Configs


def config(method="byol_dual", **overrides):
    return tiny_config(method, data={"train_path": "absent.npz"}, **overrides)


def test_what_a_momentum_config_leaves_out_is_solo_learn_s():
    assert prepare_config(config()).momentum == {
        "base_tau": 0.99,
        "final_tau": 1.0,
        "classifier": False,
    }
    cfg = prepare_config(config(momentum={"base_tau": 0.5}))
    assert cfg.momentum == {"base_tau": 0.5, "final_tau": 1.0, "classifier": False}
    assert "momentum_path" not in cfg.gating
    cfg = prepare_config(config(gating={"momentum_path": "same"}))
    assert cfg.gating.momentum_path == "same"
    assert "momentum" not in prepare_config(config("vicreg_dual"))


@pytest.mark.parametrize("method", ["byol", "byol_gated", "mocov2plus_dual"])
def test_a_method_without_the_group_momentum_is_built_as_it_is(method):
    assert tiny_model(tiny_config(method)).momentum_updater.base_tau == 0.99


@pytest.mark.parametrize(
    ("method", "overrides", "message"),
    [
        ("byol_dual", {"momentum": {"base_tau": 0.9, "final_tau": 0.5}}, "momentum.base_tau: got 0.9"),
        ("byol_dual", {"momentum": {"base_tau": 2}}, "momentum.base_tau"),
        ("byol_dual", {"momentum": {"tau": 0.9}}, "momentum.tau: no such key"),
        ("byol_dual", {"momentum": 3}, "momentum: got 3"),
        ("vicreg_dual", {"momentum": {"base_tau": 0.9}}, "'vicreg_dual' has no momentum encoder"),
        ("byol_dual", {"gating": {"momentum_path": "both"}}, "gating.momentum_path.*both.*dense"),
        ("vicreg_dual", {"gating": {"momentum_path": "same"}}, "no momentum encoder; expected dense"),
        ("byol_distilled", {"gating": {"momentum_path": "gated"}}, "momentum_path: got gated with no gated view"),
        ("mocov2plus_dual", {"method_kwargs": {"queue_size": 30}}, "queue_size: got 30.*multiple of the 8"),
        ("nnclr", {"method_kwargs": {"queue_size": 12}}, "queue_size: got 12"),
    ],
)  # fmt: skip
def test_a_config_is_refused_in_one_sentence(method, overrides, message):
    with pytest.raises(InputError, match=message) as caught:
        prepare_config(config(method, **overrides))
    assert "\n" not in str(caught.value)


def test_a_queue_is_filled_by_the_steps_of_all_processes():
    cfg = prepare_config(config("mocov2plus_dual", method_kwargs={"queue_size": 32}))
    scale_learning_rates(cfg, 4)
    with pytest.raises(InputError, match=r"queue_size: got 32.*multiple of the 24"):
        scale_learning_rates(cfg, 3)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        (name, key)
        for name, keys in {
            "byol_dual": ("proj_hidden_dim", "proj_output_dim", "pred_hidden_dim"),
            "mocov2plus_gated": ("proj_hidden_dim", "proj_output_dim", "temperature"),
            "barlow_dual": ("proj_output_dim",),
            "byol": ("pred_hidden_dim",),
        }.items()
        for key in keys
    ],
)
def test_a_config_is_asked_for_what_its_method_needs(name, key):
    cfg = config(name)
    if name == "byol":
        cfg.backbone.name = "resnet18_plain"
    del cfg.method_kwargs[key]
    with pytest.raises(InputError, match=f"method_kwargs.{key}: missing, '{name}' needs it"):
        prepare_config(cfg)


# Which methods


def test_which_methods_of_solo_learn_s_are_gated_is_said_of_each():
    """Each of this line's is gated, or refused with a reason; students are our own, without gates."""
    known = {PLAIN[name] for name in PLAIN} | set(REFUSED) | {"base", "simreg", "seed"}
    not_bridged = {"deepclusterv2", "dino", "ressl", "swav", "wmse"} if LINE == "legacy" else set()
    assert {n for n in SOLO_METHODS if n not in GATED_METHODS} <= known | not_bridged
    assert {"byol", "mocov2plus", "nnbyol"} <= set(MOMENTUM)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_method_that_cannot_be_gated_is_refused_by_name(name):
    reason = REFUSED[name].split(":")[0]
    with pytest.raises(InputError, match=f"method: got '{name}_dual'.*{name}.*{reason}"):
        prepare_config(config(f"{name}_dual"))
    if name not in SOLO_METHODS:
        pytest.skip(f"this line has no {name}")
    with pytest.raises(InputError, match=f"mine: method '{name}' cannot be gated: {reason}"):
        register_gated("mine", SOLO_METHODS[name])
    assert "mine_dual" not in METHODS


class WithoutBase(BaseMethod):
    def training_step(self, batch, batch_idx):
        return self(batch[1][0])["feats"].mean()


class Heir(WithoutBase):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("method", [WithoutBase, Heir])
def test_a_step_that_does_not_call_its_base_s_is_refused(method):
    with pytest.raises(InputError, match=r"WithoutBase\.training_step does not call its base's"):
        register_gated("mine", method)
    assert "mine_gated" not in GATED_METHODS


def test_what_is_no_method_is_refused():
    with pytest.raises(InputError, match=r"mine: got .*Linear.*expected a subclass of BaseMethod"):
        register_gated("mine", nn.Linear)


def test_a_class_of_one_s_own_may_be_gated(monkeypatch):
    class Mine(METHODS["byol"]):  # type: ignore[misc]
        """BYOL with a longer name."""

    for registry, kind in itertools.product(
        (SOLO_METHODS, METHODS, GATED_METHODS), ("dual", "gated", "distilled")
    ):
        monkeypatch.setitem(registry, f"mine_{kind}", None)
    dual, gated = register_gated("mine", Mine, gated="Mine, gated.")
    assert (METHODS["mine_dual"], METHODS["mine_gated"]) == (dual, gated)
    assert (dual.__name__, gated.__name__) == ("MineDual", "MineGated")
    assert "one view gated and one dense" in dual.__doc__
    assert gated.__doc__ == "Mine, gated."
    model = tiny_model(tiny_config("mine_dual", method_kwargs={"pred_hidden_dim": 8}))
    assert torch.isfinite(model.training_step(random_batch(), 0))
