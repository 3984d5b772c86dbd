"""The package in float64 against the reference in `reference.py`."""

import pytest
import torch

from solo_gating import BACKBONES
from solo_gating.flops import count_flops, selected_channels
from solo_gating.losses import bound_loss, budget_loss

from ..support.helpers import (
    METHOD_KWARGS,
    default_dtype,
    fixed_noise,
    random_batch,
    randomise_norms,
    tiny_config,
    tiny_model,
)
from ..support.reference import (
    Reference,
    barlow,
    bound,
    budget,
    descend,
    mlp,
    noise_table,
    simsiam,
    vicreg,
)

BUDGET, WEIGHT, EPOCH = 0.3, 40.0, 7
SIZE = 19  # odd, so that every stride rounds
TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}

networks = pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("resnet18_gated", {"separate_bn": True, "stem": "cifar"}),
        ("resnet18_gated", {"separate_bn": False, "stem": "imagenet"}),
        ("resnet34_gated", {"separate_bn": True, "stem": "imagenet"}),
        ("resnet18_two_encoders", {"stem": "cifar"}),
    ],
    ids=["separate", "shared", "resnet34", "two_encoders"],
)


def network(name, kwargs):
    """The package's network, and the reference of its gated and of its dense encoder."""
    backbone = BACKBONES[name](width=8, **kwargs).double()
    backbone.fc = torch.nn.Identity()
    randomise_norms(backbone)
    weights = {key: value.clone() for key, value in backbone.state_dict().items()}
    learnt = {key for key, _ in backbone.named_parameters()}
    for key in learnt:
        weights[key].requires_grad_()
    depth = (3, 4, 6, 3) if "34" in name else (2, 2, 2, 2)
    dense = Reference(weights, kwargs["stem"], depth)
    gated = dense
    if "two_encoders" in name:
        inner = {k.removeprefix("gated_net."): v for k, v in weights.items() if "gated_net." in k}
        gated = Reference(inner, kwargs["stem"], depth)
    return backbone, gated, dense, {key: weights[key] for key in learnt}


def images(number=6):
    return torch.randn(number, 3, SIZE, SIZE, dtype=torch.float64)


@networks
def test_evaluation_gives_the_masks_features_and_flops_of_the_reference(name, kwargs):
    backbone, gated, dense, _ = network(name, kwargs)
    backbone.eval()
    x = images()
    with torch.no_grad():
        features, masks, flops = gated.evaluate(x)
        with backbone.path("gated") as passes:
            backbone(x)
        dense_features, _ = dense.forward(x, "dense", training=False)
        with backbone.path("dense"):
            torch.testing.assert_close(backbone(x), dense_features, **TOLERANCE)
    torch.testing.assert_close(passes[-1].features, features, **TOLERANCE)
    for ours, theirs in zip(passes[-1].masks, masks, strict=True):
        assert torch.equal(ours.bool(), theirs)
    assert torch.cat(masks, dim=1).double().mean(dim=1).std() > 0  # the images differ
    cost = count_flops(backbone, (SIZE, SIZE))
    assert torch.equal(cost.gated(selected_channels(passes[-1].masks).long()), flops)
    assert cost.dense == dense.dense_flops(x)


@networks
def test_training_gives_the_losses_and_gradients_of_the_reference(name, kwargs):
    backbone, gated, dense, weights = network(name, kwargs)
    backbone.train()
    x1, x2 = images(), images()
    direction = torch.randn(6, 64, dtype=torch.float64)

    with fixed_noise(5), backbone.path("gated", "dense") as passes:
        ours = ((backbone(x1) + 0.5 * backbone(x2)) * direction).sum()
    masks = passes[0].masks
    channels = selected_channels(masks).mean(dim=0)
    selected = selected_channels(masks, "selected").mean(dim=0)
    cost = count_flops(backbone, (SIZE, SIZE))
    total = cost.all_channels
    our_budget = budget_loss(cost.share(channels), BUDGET, WEIGHT)
    our_bound = bound_loss(selected / total, BUDGET**0.5, EPOCH)
    our_natural_bound = bound_loss(channels / total, BUDGET**0.5, EPOCH)
    (ours + our_budget + our_bound + 3 * our_natural_bound).backward()

    noises = noise_table([tuple(mask.shape) for mask in masks], seed=5)
    features, their_masks = gated.forward(x1, "gated", noises)
    dense_features, _ = dense.forward(x2, "dense")
    theirs = ((features + 0.5 * dense_features) * direction).sum()
    share = gated.flops_share(their_masks, x1)
    their_budget, their_bound, their_natural_bound = (
        budget(share, BUDGET, WEIGHT),
        bound(their_masks, BUDGET**0.5, EPOCH),
        bound(their_masks, BUDGET**0.5, EPOCH, gradient="all"),
    )
    (theirs + their_budget + their_bound + 3 * their_natural_bound).backward()

    for mask, expected in zip(masks, their_masks, strict=True):
        assert torch.equal(mask, expected)
    assert their_budget > 0
    assert their_bound > 0
    for mine, expected in (
        (ours, theirs),
        (cost.share(channels), share),
        (our_budget, their_budget),
        (our_bound, their_bound),
        (our_natural_bound, their_natural_bound),
    ):
        torch.testing.assert_close(mine, expected, **TOLERANCE)
    for key, parameter in backbone.named_parameters():
        scale = weights[key].grad.abs().max()
        assert scale > 0, key
        torch.testing.assert_close(
            parameter.grad, weights[key].grad, rtol=1e-9, atol=1e-9 * scale.item(), msg=key
        )


@pytest.mark.parametrize("name", ["resnet18_gated", "resnet18_two_encoders"])
def test_the_gates_learn_from_the_budget_alone(name):
    backbone, gated, _, weights = network(name, {"stem": "cifar"})
    x = images()
    with fixed_noise(5), backbone.train().path("gated") as passes:
        backbone(x)
    cost = count_flops(backbone, (SIZE, SIZE))
    budget_loss(cost.share(selected_channels(passes[-1].masks).mean(dim=0)), 0.1, 5.0).backward()
    noises = noise_table([tuple(mask.shape) for mask in passes[-1].masks], seed=5)
    share = gated.flops_share(gated.forward(x, "gated", noises)[1], x)
    budget(share, 0.1, 5.0).backward()
    for key, parameter in backbone.named_parameters():
        if "gate." in key:
            expected = weights[key].grad
            assert expected.abs().max() > 0, key
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-8, atol=1e-12, msg=key)


LARS = {
    "name": "lars",
    "lr": 0.03,
    "weight_decay": 0.1,
    "kwargs": {"momentum": 0.9, "eta": 0.02, "clip_lr": True, "exclude_bias_n_norm": True},
}
SGD = {"name": "sgd", "lr": 0.03, "weight_decay": 0.1, "kwargs": {"momentum": 0.9}}


@pytest.mark.parametrize(
    ("method", "backbone", "optimizer"),
    [
        ("vicreg_dual", "resnet18_gated", LARS),
        ("vicreg_dual", "resnet18_two_encoders", LARS),
        ("barlow_dual", "resnet18_gated", LARS),
        ("simsiam_gated", "resnet18_gated", SGD),
    ],
)
def test_ten_optimiser_steps_are_those_of_the_reference(method, backbone, optimizer):
    """As published: the gates have no weight decay, the bound's gradient reaches what is selected."""
    cfg = tiny_config(
        method,
        backbone={"name": backbone},
        gating={"target_budget": BUDGET},
        optimizer=optimizer,
        scheduler={"name": "none"},
    )
    with default_dtype(torch.float64):
        model = tiny_model(cfg, epoch=EPOCH)
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        ours = model.configure_optimizers()
        for number in range(10):

            def closure(number=number):
                ours.zero_grad()
                with fixed_noise(number):
                    model.training_step(random_batch(seed=number), number).backward()

            ours.step(closure)

    learnt = {
        n: weights[n].requires_grad_() for n, p in model.named_parameters() if p.grad is not None
    }
    learnt = {name: weight for name, weight in learnt.items() if "classifier" not in name}
    velocity = {}
    for number in range(10):
        reference_loss(method, weights, random_batch(seed=number), number).backward()
        descend(learnt, velocity, cfg.optimizer.lr, 0.1, 0.9, cfg.optimizer.kwargs.get("eta"))
    assert len(learnt) > 80
    for name, parameter in model.named_parameters():
        if name in learnt:
            torch.testing.assert_close(
                parameter.detach(), learnt[name].detach(), rtol=1e-9, atol=1e-11, msg=name
            )


def reference_loss(method, weights, batch, number):
    """A step's loss, but for the online classifier's, which reaches no other weight."""
    of_backbone = {
        key.removeprefix("backbone."): value
        for key, value in weights.items()
        if key.startswith("backbone.")
    }
    dense = Reference(of_backbone, "cifar")
    inner = {k.removeprefix("gated_net."): v for k, v in of_backbone.items() if "gated_net." in k}
    gated = Reference(inner, "cifar") if inner else dense
    _, images, _ = batch
    paths = ("gated", "gated" if method.endswith("_gated") else "dense")
    widths = [of_backbone[f"{block}.conv1.weight"].shape[0] for block in dense.blocks]
    noises = iter(noise_table([(len(images[0]), width) for width in widths * 2], seed=number))
    z, losses = [], []
    for view, path in zip(images, paths, strict=True):
        if path == "gated":
            own = [next(noises) for _ in widths]
            features, masks = gated.forward(view, "gated", own)
            losses.append(budget(gated.flops_share(masks, view), BUDGET, 5.0))
            losses.append(bound(masks, BUDGET**0.5, EPOCH))
        else:
            features, _ = dense.forward(view, "dense")
        z.append(mlp(weights, "projector", features))
    if method.startswith("simsiam"):
        losses.append(simsiam(*z, *(mlp(weights, "predictor", each) for each in z)))
    elif method.startswith("barlow"):
        losses.append(
            barlow(*z, METHOD_KWARGS["barlow"]["lamb"], METHOD_KWARGS["barlow"]["scale_loss"])
        )
    else:
        losses.append(vicreg(*z))
    return sum(losses)
