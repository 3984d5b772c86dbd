"""The group `performance` and mixed precision: faster, and the same numbers."""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from solo.losses.barlow import barlow_loss_func
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from solo_gating import InputError
from solo_gating.backbones import masking
from solo_gating.config.pretraining import prepare_config
from solo_gating.gates import spatial_mean
from solo_gating.solo_learn.fixes import barlow_loss, covariance_loss
from solo_gating.training.model import build_model, compile_model

from ..support.helpers import copy_of, fixed_noise, random_batch, tiny_config, tiny_model


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def losses(model, batches, seed=0):
    """Of successive SGD steps from given views, with the same noise of the gates."""
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    found = []
    for batch in batches:
        loss = model.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


BATCHES = [random_batch(seed=seed) for seed in range(3)]


@pytest.mark.parametrize(
    "backbone",
    [
        "resnet18_gated",
        pytest.param("resnet18_two_encoders", marks=pytest.mark.slow),
        pytest.param("resnet18_plain", marks=pytest.mark.slow),
    ],
)
def test_compiled_steps_give_the_same_losses_and_compile_once(backbone):
    """With gates each step has a budget of its own; one network is differentiated ahead, too."""
    overrides = {"backbone": {"name": backbone}}
    if not backbone.endswith("plain"):
        overrides["gating"] = {"target_budget": [0.1, 0.9]}
    method = "vicreg_dual" if "gating" in overrides else "vicreg"
    cfg = tiny_config(method, **overrides)
    expected, model = epoch(shallow(tiny_model(cfg))), shallow(tiny_model(cfg))
    names = list(model.state_dict())
    compiler = CompileCounterWithBackend("aot_eager" if backbone == "resnet18_gated" else "eager")
    compile_model(model, backend=compiler, fullgraph=True)  # a break in the graph would raise
    frames = []
    assert epoch(model, lambda: frames.append(compiler.frame_count)) == pytest.approx(
        expected, rel=1e-9
    )
    assert frames[0] >= 2
    assert len(set(frames)) == 1
    assert list(model.state_dict()) == names


def shallow(model):
    """With one block in each stage: what compiling takes grows with their number."""
    for stage in (module for name, module in model.backbone.named_modules() if "layer" in name):
        if (
            isinstance(stage, torch.nn.Sequential)
            and len(stage) == 2
            and hasattr(stage[1], "conv2")
        ):
            del stage[1]
    return model


def epoch(model, watch=lambda: None):
    """The losses of three steps; evaluated after the first and the last of them."""
    found = []
    for number, batch in enumerate(BATCHES):
        model._trainer.global_step = number
        found += losses(model, [batch])
        if number != 1:
            model.eval()
            evaluate(model)
            model.train()
            watch()
    return found


def evaluate(model):
    """A full validation batch and the last one, which is smaller, on each path."""
    with torch.no_grad():
        for size in (8, 5):
            images = random_batch(size)[1][0]
            for path in getattr(model, "trained_paths", [None]):
                with model.backbone.path(path) if path else nullcontext():
                    model.backbone(images)


def test_copies_are_not_compiled():
    backbone = tiny_model(tiny_config()).backbone
    backbone.compile(backend="eager")
    assert backbone._compiled
    copied = copy.deepcopy(backbone)
    assert not copied._compiled
    images = BATCHES[0][1][0]
    with torch.no_grad():
        torch.testing.assert_close(copied.eval()(images), backbone.eval()(images))


def test_channels_last_gives_the_same_losses():
    model = tiny_model(tiny_config())
    other = copy_of(model).to(memory_format=torch.channels_last)
    other.no_channel_last = False
    model.no_channel_last = True
    assert losses(other, BATCHES) == pytest.approx(losses(model, BATCHES), rel=1e-9)


def test_a_fused_optimiser_is_a_key_of_its_own():
    cfg = prepare_config(tiny_config(optimizer={"kwargs": {"fused": True}}))
    model = tiny_model(cfg, dtype=torch.float32)
    (optimizer,), _ = model.configure_optimizers()
    assert all(group["fused"] for group in optimizer.param_groups)


def test_gates_and_their_losses_are_float32_in_mixed_precision():
    model = tiny_model(tiny_config(), dtype=torch.float32)
    seen = []
    for block in model.backbone.gated_blocks:
        block.gate.expand.register_forward_hook(lambda m, x, logits: seen.append(logits.dtype))
    convolved = []
    model.backbone.layer1[0].conv2.register_forward_hook(
        lambda m, x, y: convolved.append((x[0].dtype, y.dtype))
    )
    batch = random_batch(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.training_step(batch, 0)
    loss.backward()
    assert set(seen) == {torch.float32}
    assert convolved[0] == (torch.bfloat16, torch.bfloat16)
    assert loss.dtype == torch.float32
    assert model.logged["train_budget_loss"].dtype == torch.float32
    assert model.logged["train_bound_loss"].dtype == torch.float32
    grads = [p.grad for p in model.backbone.parameters()]
    assert all(g is None or bool(g.isfinite().all()) for g in grads)


def test_keeping_factors_instead_of_the_product_changes_no_gradient(monkeypatch):
    model = tiny_model(tiny_config())
    other = copy_of(model)
    images = BATCHES[0][1][0]

    def gradients(net):
        torch.manual_seed(0)
        features, masks = net.forward_gated(images)
        (features.square().sum() + sum(mask.sum() for mask in masks)).backward()
        return [p.grad for p in net.parameters()]

    kept = gradients(model.backbone)
    monkeypatch.setattr(
        masking, "_kept_as_product", lambda *tensors: torch.autograd.graph.save_on_cpu()
    )
    for one, another in zip(kept, gradients(other.backbone), strict=True):
        torch.testing.assert_close(one, another, rtol=0, atol=0)


def test_the_mean_over_pixels_is_torchs():
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    mine, theirs = spatial_mean(x), torch.nn.AdaptiveAvgPool2d(1)(y)
    torch.testing.assert_close(mine, theirs)
    weights = torch.randn_like(mine)
    (mine * weights).sum().backward()
    (theirs * weights).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    assert torch.autograd.gradgradcheck(spatial_mean, (x,))


def test_a_mean_in_float32_copies_nothing_of_half_precision():
    x = torch.randn(2, 3, 64, 64).bfloat16().requires_grad_()
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
            out = function(*arguments, **(kwargs or {}))
            sizes.append(out.untyped_storage().nbytes())
            return out

    with Sizes():
        mean = spatial_mean(x, torch.float32)
        (gradient,) = torch.autograd.grad(mean, x, torch.ones(2, 3, 1, 1))
    assert max(sizes) <= 4 * mean.numel()
    assert mean.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(mean, x.detach().double().mean((2, 3), keepdim=True).float())


def test_the_covariance_loss_is_the_sum_off_the_diagonal():
    z1, z2 = (torch.randn(7, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    expected = 0.0
    for z in (z1, z2):
        covariances = np.cov(z.detach().numpy(), rowvar=False)
        expected += (covariances**2).sum() - (np.diag(covariances) ** 2).sum()
    assert covariance_loss(z1, z2).item() == pytest.approx(expected / 5, rel=1e-12)
    assert torch.autograd.gradcheck(covariance_loss, (z1, z2))


def test_barlow_s_loss_is_solo_learn_s():
    z1, z2 = (torch.randn(7, 5, requires_grad=True) for _ in range(2))
    found = barlow_loss(z1, z2, 0.0051, 0.1)
    expected = barlow_loss_func(z1, z2, lamb=0.0051, scale_loss=0.1)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, (z1, z2)), torch.autograd.grad(expected, (z1, z2)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_validation_runs_the_backbone_once_for_each_path(monkeypatch):
    model = tiny_model(tiny_config()).eval()
    calls = []
    for name in ("conv1", "layer4"):
        getattr(model.backbone, name).register_forward_hook(
            lambda m, x, y, name=name: calls.append(name)
        )
    _, (images, _), targets = random_batch()
    model.flops((images.shape[-2], images.shape[-1]))  # counted by a copy, hooks and all
    calls.clear()
    with torch.no_grad():
        model.validation_step([images, targets], 0)
    assert calls.count("conv1") == 2
    assert calls.count("layer4") == 2


@pytest.mark.parametrize(
    ("performance", "words"),
    [
        ({"compile": "yes"}, "performance.compile: got 'yes', expected true or false"),
        ({"compiled": True}, "performance.compiled: no such key, expected"),
        ({"disable_channel_last": 1}, "performance.disable_channel_last: got 1"),
        (3, "performance: got 3, expected a group with"),
    ],
)
def test_mistakes_are_told_in_one_sentence(performance, words):
    cfg = tiny_config()
    cfg.performance = performance
    with pytest.raises(InputError, match="performance") as error:
        prepare_config(cfg)
    assert words in str(error.value)


def test_the_config_compiles_and_keeps_the_names(monkeypatch):
    asked = []
    monkeypatch.setattr(
        torch, "compile", lambda function=None, **kwargs: asked.append(kwargs) or function
    )
    cfg = prepare_config(tiny_config(performance={"compile": True}))
    plain = build_model(OmegaConf.merge(cfg, {"performance": {"compile": False}}))
    assert not asked
    model = build_model(cfg)
    assert len(asked) == 3  # dense path, gated path, projector
    assert all(kwargs == {"options": {"fallback_random": True}} for kwargs in asked)
    assert list(model.state_dict()) == list(plain.state_dict())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_steps_on_a_gpu_have_the_losses_of_those_on_the_cpu():
    model = tiny_model(tiny_config())
    moved = copy_of(model).to("cuda")
    batches = [
        [index, [view.cuda() for view in views], targets.cuda()]
        for index, views, targets in BATCHES
    ]
    with fixed_noise():
        expected = losses(model, BATCHES)
    with fixed_noise():
        assert losses(moved, batches) == pytest.approx(expected, rel=1e-6)
