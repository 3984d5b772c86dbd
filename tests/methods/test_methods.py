"""The methods: which path a view takes, and that their losses add up."""

import copy
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from solo.losses.barlow import barlow_loss_func
from solo.losses.nnclr import nnclr_loss_func
from solo.losses.vicreg import vicreg_loss_func
from solo.losses.wmse import wmse_loss_func

from solo_gating import METHODS, InputError
from solo_gating.config.pretraining import prepare_config
from solo_gating.methods import GatedMethod
from solo_gating.solo_learn import fixes

from ..support.helpers import (
    METHOD_KWARGS,
    copy_of,
    default_dtype,
    fixed_noise,
    random_batch,
    tiny_config,
    tiny_model,
)
from ..support.reference import Reference, bound, budget
from ..support.reference import vicreg as vicreg_by_hand

GATING = {"target_budget": 0.3, "sparsity_weight": 50.0, "bound_weight": 2.0}


@pytest.fixture(autouse=True)
def _float64():
    with default_dtype(torch.float64):  # Barlow Twins' loss makes a BatchNorm of its own
        yield


def vicreg(model, z1, z2):
    return vicreg_loss_func(z1, z2, sim_loss_weight=25.0, var_loss_weight=25.0, cov_loss_weight=1.0)


def barlow(model, z1, z2):
    return barlow_loss_func(z1, z2, lamb=0.0051, scale_loss=0.1)


def simsiam(model, z1, z2):
    p1, p2 = model.predictor(z1), model.predictor(z2)
    similarity = [F.cosine_similarity(p, z.detach()).mean() for p, z in ((p1, z2), (p2, z1))]
    return -sum(similarity) / 2


def simclr(model, z1, z2):
    z = F.normalize(torch.cat([z1, z2]))
    logits = z @ z.T / METHOD_KWARGS["simclr"]["temperature"]
    logits = logits - torch.diag(torch.full((len(z),), torch.inf))
    other_view = torch.arange(len(z)).roll(len(z1))
    return F.cross_entropy(logits, other_view)


def nearest(model, z):
    return model.queue[(F.normalize(z) @ model.queue.T).argmax(dim=1)]


def nnclr(model, z1, z2):
    p1, p2 = model.predictor(z1), model.predictor(z2)
    pairs = ((z1, p2), (z2, p1))
    return sum(nnclr_loss_func(nearest(model, z), p, temperature=0.2) for z, p in pairs) / 2


def nnsiam(model, z1, z2):
    p1, p2 = model.predictor(z1), model.predictor(z2)
    pairs = ((z1, p2), (z2, p1))
    return -sum(F.cosine_similarity(p, nearest(model, z)).mean() for z, p in pairs) / 2


def wmse(model, z1, z2):
    z1, z2 = model.whitening(z1), model.whitening(z2)  # the whole batch at once
    return wmse_loss_func(z1, z2)


def vibcreg(model, z1, z2):
    from solo.losses.vibcreg import vibcreg_loss_func

    return vibcreg_loss_func(
        z1, z2, sim_loss_weight=25.0, var_loss_weight=25.0, cov_loss_weight=8.0
    )


SSL = {f.__name__: f for f in (vicreg, barlow, simsiam, simclr, nnclr, nnsiam, wmse, vibcreg)}


def by_hand(model, batch, views, epoch, gating=GATING):
    """The total loss of a step, and each view's masks."""
    _, images, targets = batch
    features, masks = [], []
    for image, path in zip(images, views, strict=True):
        if path is None:  # a backbone without paths
            features.append(model.backbone(image))
            continue
        with model.backbone.path(path) as passes:
            features.append(model.backbone(image))
        masks.append(passes[-1].masks)
    ssl = SSL[model.cfg.method.split("_")[0]]
    total = ssl(model, *(model.projector(f) for f in features))
    for f in features:
        total = total + F.cross_entropy(model.classifier(f.detach()), targets) / 2
    reference = Reference(model.backbone.state_dict(), "cifar")
    for image, mask in zip(images, masks, strict=False):
        if mask:
            share = reference.flops_share(mask, image)
            total = total + budget(share, gating["target_budget"], gating["sparsity_weight"])
            s = gating["target_budget"] ** 0.5
            total = total + gating["bound_weight"] * bound(mask, s, epoch)
    return total, masks


def step(model, batch):
    with fixed_noise(11):
        return model.training_step(batch, 0)


@pytest.mark.parametrize("method", [f"{name}_{kind}" for name in SSL for kind in ("dual", "gated")])
def test_the_loss_is_that_of_the_method_plus_classifier_budget_and_bound(method):
    if method not in METHODS:
        pytest.skip(f"solo-learn 1.0.2 has no {method.split('_')[0]} that runs today")
    model = tiny_model(tiny_config(method, gating=GATING), epoch=9)
    copied, batch = copy_of(model), random_batch()
    views = ("gated", "dense" if method.endswith("_dual") else "gated")
    loss = step(model, batch)
    with fixed_noise(11):
        expected, masks = by_hand(copied, batch, views, epoch=9)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-8)
    loss.backward()
    expected.backward()
    largest = max(p.grad.abs().max().item() for p in copied.parameters() if p.grad is not None)
    for (name, p), q in zip(model.named_parameters(), copied.parameters(), strict=True):
        ours, theirs = (torch.zeros_like(x) if x.grad is None else x.grad for x in (p, q))
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10 * largest, msg=name)
    assert any(p.grad.any() for n, p in model.named_parameters() if ".gate." in n)
    assert masks[0]


@pytest.mark.parametrize("method", ["vicreg", "simsiam"])
def test_a_method_of_solo_learn_s_own_is_left_as_it_is(method):
    model = tiny_model(tiny_config(method))
    copied, batch = copy_of(model), random_batch()
    expected, _ = by_hand(copied, batch, (None, None), 0)
    assert model.training_step(batch, 0).item() == pytest.approx(expected.item(), rel=1e-10)
    assert "train_budget_loss" not in model.logged


def test_what_is_logged_is_what_is_added():
    model = tiny_model(tiny_config("vicreg_gated", gating=GATING), epoch=3)
    copied, batch = copy_of(model), random_batch()
    step(model, batch)
    with fixed_noise(11):
        _, masks = by_hand(copied, batch, ("gated", "gated"), 3)
    reference = Reference(copied.backbone.state_dict(), "cifar")
    shares = [reference.flops_share(m, x) for m, x in zip(masks, batch[1], strict=True)]
    expected = {
        "train_budget_loss": sum(budget(share, 0.3, 50.0) for share in shares),
        "train_bound_loss": sum(2 * bound(mask, 0.3**0.5, 3) for mask in masks),
        "train_flops_share": sum(shares) / 2,
    }
    for name, value in expected.items():
        assert model.logged[name].item() == pytest.approx(value.item(), rel=1e-10), name
    assert model.logged["train_vicreg_loss"] > 0


def batches_seen(model):
    return {
        name.removesuffix(".num_batches_tracked").removeprefix("backbone."): int(value)
        for name, value in model.state_dict().items()
        if name.endswith("num_batches_tracked") and name.startswith("backbone.")
    }


def test_dual_gives_view_1_to_the_gated_batchnorms_and_view_2_to_the_dense_ones():
    model = tiny_model(tiny_config("vicreg_dual"))
    batch = random_batch()
    backbone = copy.deepcopy(model.backbone)
    step(model, batch)
    for name, number in batches_seen(model).items():
        shared = name == "bn1" or ".downsample." in name
        assert number == (2 if shared else 1), name
    block = model.backbone.layer1[0]
    for norm, view in ((block.gated_bn1, 0), (block.bn1, 1)):
        inputs = backbone.layer1[0].conv1(F.relu(backbone.bn1(backbone.conv1(batch[1][view]))))
        mean = 0.1 * inputs.mean(dim=(0, 2, 3))
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-10, atol=1e-12)


def test_gated_gives_both_views_to_one_set_of_batchnorms():
    model = tiny_model(tiny_config("vicreg_gated"))
    step(model, random_batch())
    seen = batches_seen(model)
    assert set(seen.values()) == {2}
    assert not [name for name in seen if "gated_bn" in name]


@pytest.mark.parametrize("views", [["dense", "gated"], ["gated", "gated"]])
def test_the_config_may_choose_the_views(views):
    cfg = tiny_config("vicreg_dual", gating={**GATING, "views": views})
    model = tiny_model(cfg)
    copied, batch = copy_of(model), random_batch()
    loss = step(model, batch)
    with fixed_noise(11):
        expected, masks = by_hand(copied, batch, views, 0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert [bool(mask) for mask in masks] == [path == "gated" for path in views]


@pytest.mark.parametrize("method", ["vicreg_dual", "simsiam_gated"])
def test_gates_rest_during_warm_up(method):
    gating = {**GATING, "warmup_epochs": 2, "separate_bn": method == "vicreg_dual"}
    model = tiny_model(tiny_config(method, gating=gating), epoch=1)
    copied, batch = copy_of(model), random_batch()
    loss = step(model, batch)
    expected, _ = by_hand(copied, batch, ("dense", "dense"), 0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert "train_budget_loss" not in model.logged
    loss.backward()
    for name, parameter in model.named_parameters():
        if "gate." in name or "gated_bn" in name:
            assert parameter.grad is None, name


def test_bounds_decay_from_the_end_of_warm_up():
    gating = {**GATING, "warmup_epochs": 2}
    model = tiny_model(tiny_config("vicreg_dual", gating=gating), epoch=7)
    copied, batch = copy_of(model), random_batch()
    loss = step(model, batch)
    with fixed_noise(11):
        expected, _ = by_hand(copied, batch, ("gated", "dense"), epoch=5)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("method", ["vicreg_dual", "simsiam_gated", "vicreg"])
def test_an_unlabelled_batch_leaves_the_classifier_alone(method):
    model = tiny_model(tiny_config(method))
    copied, batch = copy_of(model), random_batch()
    unlabelled = [*batch[:2], torch.full_like(batch[2], -1)]
    loss = step(model, unlabelled)
    loss.backward()
    assert torch.isfinite(loss)
    assert not model.classifier.weight.grad.any()
    assert model.logged["train_class_loss"] == 0
    labelled = step(copied, batch)
    labelled.backward()
    assert (labelled - copied.logged["train_class_loss"]).item() == pytest.approx(
        loss.item(), rel=1e-10
    )
    for (name, p), q in zip(model.named_parameters(), copied.parameters(), strict=True):
        if p.grad is not None and "classifier" not in name:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-10, msg=name)


def test_some_labels_train_the_classifier_on_those_images():
    model = tiny_model(tiny_config("vicreg_dual"))
    copied, batch = copy_of(model), random_batch()
    batch[2][3:] = -1
    step(model, batch)
    with fixed_noise(11):
        losses = []
        for image, path in zip(batch[1], ("gated", "dense"), strict=True):
            with copied.backbone.path(path):
                logits = copied.classifier(copied.backbone(image))
            losses.append(F.cross_entropy(logits[:3], batch[2][:3]).item())
    assert model.logged["train_class_loss"].item() == pytest.approx(sum(losses) / 2, rel=1e-10)


def test_each_path_has_a_bank_of_neighbours_of_its_own():
    model = tiny_model(tiny_config("vicreg_dual", knn_eval={"enabled": True, "k": 1}))
    copied, batch = copy_of(model), random_batch()
    batch[2][5:] = -1
    step(model, batch)
    with fixed_noise(11), torch.no_grad():
        for image, path in zip(batch[1], ("gated", "dense"), strict=True):
            with copied.backbone.path(path):
                features = copied.backbone(image)
            bank = model.path_knn[path]
            torch.testing.assert_close(torch.cat(bank.train_features), features[:5])
            assert torch.equal(torch.cat(bank.train_targets), batch[2][:5])


def test_a_gated_method_needs_a_backbone_with_gates():
    with pytest.raises(InputError, match=r"backbone.name: got 'resnet18'.*resnet18_gated"):
        METHODS["vicreg_dual"](tiny_config(backbone={"name": "resnet18"}))


def test_validation_measures_every_trained_path():
    model = tiny_model(tiny_config("vicreg_dual")).eval()
    _, (images, _), targets = random_batch()
    with torch.no_grad():
        model.validation_step([images, targets], 0)
        model.on_validation_epoch_end()
        for path in ("dense", "gated"):
            with model.backbone.path(path) as passes:
                correct = model.classifier(model.backbone(images)).argmax(dim=1) == targets
            accuracy = 100 * correct.double().mean().item()
            assert float(model.logged[f"val_{path}_acc1"]) == pytest.approx(accuracy)
    share = Reference(model.backbone.state_dict(), "cifar").flops_share(passes[-1].masks, images)
    assert model.logged["val_flops_share"].item() == pytest.approx(share.item(), rel=1e-10)


@pytest.mark.parametrize("method", ["vicreg_dual", "vicreg"])
def test_validation_figures_are_those_of_the_labelled_images(method):
    """Batches with 3, 0 and 6 labels: every labelled image counts once."""
    knn = {"enabled": True, "k": 1, "distance_func": "euclidean"}
    model = tiny_model(tiny_config(method, knn_eval=knn)).eval()
    paths = ("dense", "gated") if method == "vicreg_dual" else (None,)
    batches = []
    for seed, labelled in enumerate((3, 0, 6)):
        _, (images, _), targets = random_batch(seed=seed)
        targets[labelled:] = -1
        batches.append((images, targets))
    images, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    bank = random_batch(size=6, seed=9)
    labels = bank[2].clone()
    labels[0] = -1
    expected = {}
    with torch.no_grad():
        for path in paths:
            with model.backbone.path(path) if path else nullcontext():
                features = model.backbone(images)[targets >= 0]
                train = model.backbone(bank[1][0])
            knn = model.path_knn[path] if path else model.knn
            knn(train_features=train, train_targets=labels)
            logits, truth = model.classifier(features), targets[targets >= 0]
            accuracy = 100 * (logits.argmax(dim=1) == truth).double().mean().item()
            expected[f"val_{path}_acc1" if path else "val_acc1"] = accuracy
            nearest = labels[1:][torch.cdist(features, train[1:]).argmin(dim=1)]
            accuracy = 100 * (nearest == truth).double().mean().item()
            expected[f"val_{path}_knn_acc1" if path else "val_knn_acc1"] = accuracy
            if path != "gated":
                expected["val_loss"] = F.cross_entropy(logits, truth).item()
        for index, batch in enumerate(batches):
            model.validation_step(list(batch), index)
        model.on_validation_epoch_end()
    logged = {name: float(model.logged[name]) for name in expected}
    assert logged == pytest.approx(expected)
    assert float(model.logged["val_acc5"]) == 100  # of three classes


@pytest.mark.parametrize("method", ["vicreg_dual", "vicreg"])
def test_without_a_label_there_is_no_validation_figure(method):
    model = tiny_model(tiny_config(method, knn_eval={"enabled": True, "k": 1})).eval()
    _, (images, _), targets = random_batch()
    with torch.no_grad():
        model.validation_step([images, torch.full_like(targets, -1)], 0)
        model.on_validation_epoch_end()
    assert set(model.logged) == ({"val_flops_share"} if method == "vicreg_dual" else set())


def test_validation_means_are_those_of_all_processes(monkeypatch):
    """The other process has 6 labelled images, this one 2 and 1."""
    monkeypatch.setattr(fixes, "rank_and_processes", lambda: (0, 2))
    other = torch.tensor([6.0, 6 * 50.0, 6 * 2.0])
    monkeypatch.setattr(fixes.dist, "all_reduce", lambda tensor: tensor.add_(other))
    outputs = [
        {"batch_size": torch.tensor(n), "val_acc1": torch.tensor([a]), "val_loss": torch.tensor(b)}
        for n, a, b in ((2, 100.0, 1.0), (1, 0.0, 4.0))
    ]
    found = {name: float(value) for name, value in fixes.labelled_means(outputs).items()}
    assert found == pytest.approx({"val_acc1": (200 + 300) / 9, "val_loss": (2 + 4 + 12) / 9})


def test_training_accuracy_is_that_of_the_labelled_images():
    model = tiny_model(tiny_config("vicreg"))
    batch = random_batch()
    batch[2][3:] = -1
    copied = copy_of(model)
    model.training_step(batch, 0)
    with torch.no_grad():
        hits = [
            copied.classifier(copied.backbone(view))[:3].argmax(dim=1) == batch[2][:3]
            for view in batch[1]
        ]
    accuracy = 100 * torch.cat(hits).double().mean().item()
    assert float(model.logged["train_acc1"]) == pytest.approx(accuracy)


# VICReg's statistics


@pytest.mark.parametrize(
    ("method", "images", "parts"),
    [
        ("vicreg_dual", 4, 2),
        ("vicreg", 4, 2),
        ("vicreg", 2, 4),
        ("vicreg_dual", 16, 1),
        ("vicreg", None, 1),
    ],
)
def test_statistics_of_so_many_images(method, images, parts):
    """Of 4 of 8 images: what two processes with 4 each, and statistics of their own, average."""
    model = tiny_model(tiny_config(method, method_kwargs={"statistics_images": images}))
    copied, batch = copy_of(model), random_batch()
    step(model, batch).backward()
    with fixed_noise(11), torch.no_grad():
        z = []
        for image, path in zip(batch[1], ("gated", "dense"), strict=True):
            if method == "vicreg":
                features = copied.backbone(image)
            else:
                with copied.backbone.path(path):
                    features = copied.backbone(image)
            z.append(copied.projector(features))
    losses = [
        vicreg_by_hand(*part) for part in zip(*(each.chunk(parts) for each in z), strict=True)
    ]
    assert model.logged["train_vicreg_loss"].item() == pytest.approx(
        sum(losses).item() / parts, rel=1e-10
    )
    assert abs(losses[0] - losses[-1]) > 1e-3 or parts == 1


@pytest.mark.parametrize(
    ("method", "images", "message"),
    [
        (
            "vicreg_dual",
            3,
            "got 3, expected a divisor or a multiple of optimizer.batch_size=8",
        ),
        ("vicreg_dual", 1, "got 1, expected an integer ≥ 2"),
        ("vicreg", "half", "got 'half', expected an integer ≥ 2"),
        ("barlow_dual", 4, "got 4, method 'barlow_dual' is no VICReg; expected null"),
    ],
)
def test_statistics_that_cannot_be_are_refused(method, images, message):
    with pytest.raises(InputError) as error:
        prepare_config(tiny_config(method, method_kwargs={"statistics_images": images}))
    assert str(error.value) == f"method_kwargs.statistics_images: {message}"


@pytest.mark.parametrize("images", [2, 4, 8, 16])
def test_statistics_of_parts_or_of_several_processes_are_accepted(images):
    cfg = prepare_config(tiny_config("vicreg", method_kwargs={"statistics_images": images}))
    assert cfg.method_kwargs.statistics_images == images


def test_statistics_of_all_images_are_recorded_as_ever():
    cfg = prepare_config(tiny_config(method_kwargs={"statistics_images": None}))
    assert cfg == prepare_config(tiny_config())


# The optimiser's groups

OPTIMIZERS = {
    "sgd": {"name": "sgd"},
    "lars": {"name": "lars", "kwargs": {"exclude_bias_n_norm": True}},
    "adamw": {"name": "adamw", "kwargs": {"betas": [0.9, 0.999], "momentum": None}},
}
TOLD = {"target_budget": [0.05, 0.9], "gate_kwargs": {"bias": 4.0}}


def with_optimizer(name, method="vicreg_dual", **overrides):
    cfg = tiny_config(method, optimizer=OPTIMIZERS[name], scheduler={"name": "none"}, **overrides)
    if name == "adamw":
        del cfg.optimizer.kwargs.momentum
    return cfg


@pytest.mark.parametrize(
    ("optimizer", "method", "overrides", "kinds"),
    [
        ("lars", "vicreg_dual", {}, 4),
        ("lars", "vicreg_dual", {"backbone": {"name": "resnet18_two_encoders"}}, 4),
        ("adamw", "barlow_gated", {"gating": TOLD}, 8),
        ("sgd", "simsiam_gated", {}, 4),
        ("lars", "vicreg_gated", {"gating": {"weight_decay": 0.02}}, 4),
        ("adamw", "simclr_dual", {"gating": {"weight_decay": 0.02}}, 4),
    ],
)
def test_gates_have_the_weight_decay_that_the_config_gives_them(
    optimizer, method, overrides, kinds
):
    cfg = with_optimizer(optimizer, method, **overrides)
    decay = cfg.get("gating", {}).get("weight_decay", 0)
    model = tiny_model(cfg)
    groups = model.configure_optimizers().param_groups
    of = {p: group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    gates = {n: p for n, p in model.named_parameters() if ".gate." in n}
    assert len(gates) == 8 * kinds
    for name, p in model.named_parameters():
        expected = 1e-4
        if name in gates:
            expected = decay
        elif name.startswith("classifier"):
            expected = 0
        assert of[p]["weight_decay"] == expected, name
        assert of[p]["lr"] == 0.1


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_step_without_gradients_shrinks_all_but_the_gates(optimizer):
    model = tiny_model(with_optimizer(optimizer))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    model.configure_optimizers().step()
    for name, p in model.named_parameters():
        rests = ".gate." in name or name.startswith("classifier") or not before[name].any()
        assert torch.equal(p, before[name]) == rests, name


@pytest.mark.parametrize(("method", "exclude"), [("vicreg_dual", True), ("simsiam_gated", False)])
def test_an_optimiser_from_before_the_gates_had_a_group_goes_on(method, exclude):
    cfg = tiny_config(method, optimizer={"exclude_bias_n_norm_wd": exclude}, max_epochs=4)

    def run(steps, model, optimizer, scheduler):
        rates = []
        for number in range(steps):
            torch.manual_seed(number)
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            rates.append(
                {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
            )
            optimizer.step()
            scheduler.step()
        return [{name: at[p] for name, p in model.named_parameters()} for at in rates]

    def started(model):
        (optimizer,), (scheduler,) = model.configure_optimizers()
        return model, optimizer, scheduler["scheduler"]

    one_group = property(lambda self: super(GatedMethod, self).learnable_params)
    with mock.patch.object(GatedMethod, "learnable_params", one_group):
        old, optimizer, scheduler = started(tiny_model(cfg))
    run(4, old, optimizer, scheduler)
    states = {
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [scheduler.state_dict()],
    }
    old.on_save_checkpoint(states)

    new, resumed, schedule = started(tiny_model(cfg))
    states = copy.deepcopy(states)
    for _ in range(2):  # the second time there is nothing to do
        new.on_load_checkpoint(states)
    resumed.load_state_dict(states["optimizer_states"][0])
    schedule.load_state_dict(states["lr_schedulers"][0])
    for (name, p), q in zip(new.named_parameters(), old.parameters(), strict=True):
        ours, theirs = resumed.state[p]["momentum_buffer"], optimizer.state[q]["momentum_buffer"]
        assert torch.equal(ours, theirs), name
    _, whole, _ = fresh = started(tiny_model(cfg))
    decays, expected = ([g["weight_decay"] for g in o.param_groups] for o in (resumed, whole))
    assert decays == expected
    rates = run(8, *fresh)[4:]
    for ours, theirs in zip(run(4, new, resumed, schedule), rates, strict=True):
        assert ours == pytest.approx(theirs)
