"""What PyTorch's tools and a training loop of one's own do to a two-path backbone."""

import copy
import functools
import io
import pickle
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.feature_extraction import create_feature_extractor

from solo_gating import BaseMethod, InputError
from solo_gating.backbones.paths import scope_of

from ..support.helpers import randomise_norms

PATHS = ("gated", "dense")


def tiny(name="resnet18_gated", **kwargs):
    torch.manual_seed(0)
    backbone = BaseMethod._BACKBONES[name]("m", width=4, stem="cifar", **kwargs)
    backbone.fc = nn.Identity()
    randomise_norms(backbone)
    return backbone.eval()


X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def traced(backbone):
    return torch.jit.trace(backbone, X[:2])(X)


def exported(backbone):
    batch = torch.export.Dim("batch")
    return torch.export.export(backbone, (X,), dynamic_shapes=({0: batch},)).module()(X)


def extracted(backbone):
    net = create_feature_extractor(backbone, {"layer4": "maps", "flatten": "features"})
    return net(X)["features"]


def hooked(backbone):
    seen = []
    backbone.layer4.register_forward_hook(lambda module, args, maps: seen.append(maps))
    backbone(X)
    (maps,) = seen
    return maps.mean((2, 3))


def reloaded_from_meta(backbone):
    kwargs = {"budget_range": list(backbone.budget_range)} if backbone.budget_range else {}
    with torch.device("meta"):
        net = BaseMethod._BACKBONES["resnet18_gated"](
            "m", width=4, stem="cifar", path=backbone.default_path, **kwargs
        )
    net.fc = nn.Identity()
    net.load_state_dict(backbone.state_dict(), assign=True)
    return net.eval()(X)


TOOLS = {
    "deepcopy": lambda b: copy.deepcopy(b)(X),
    "pickle": lambda b: pickle.loads(pickle.dumps(b))(X),
    "jit.trace": traced,
    "export": exported,
    "fx": lambda b: torch.fx.symbolic_trace(b)(X),
    "feature extractor": extracted,
    "layer getter": lambda b: IntermediateLayerGetter(b, {"layer4": "m"})(X)["m"].mean((2, 3)),
    "hook": hooked,
    "children": lambda b: nn.Sequential(*list(b.children())[:-1])(X).flatten(1),
    "blocks": lambda b: b.avgpool(
        nn.Sequential(b.conv1, b.bn1, b.relu, *b.layer1, *b.layer2, *b.layer3, *b.layer4)(X)
    ).flatten(1),
    "forward_features": lambda b: b.forward_features(X).mean((2, 3)),
    "meta": reloaded_from_meta,
}


@pytest.mark.parametrize(
    "kwargs", [{"path": "dense"}, {"path": "gated"}, {"path": "gated", "budget_range": [0.1, 0.9]}]
)
@pytest.mark.parametrize("tool", TOOLS)
def test_tools_see_the_path_that_the_backbone_takes(tool, kwargs):
    backbone, path = tiny(**kwargs), kwargs["path"]
    with torch.no_grad():
        expected = backbone(X)
        with backbone.path("dense" if path == "gated" else "gated"):
            assert not torch.allclose(backbone(X), expected, rtol=1e-2)
    torch.testing.assert_close(TOOLS[tool](backbone), expected, rtol=1e-4, atol=1e-5)


def test_embeddings_of_budgets_can_be_quantized_as_linear_layers():
    backbone = tiny(path="gated", budget_range=[0.1, 0.9])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = torch.ao.quantization.quantize_dynamic(backbone, {nn.Linear}, dtype=torch.qint8)
    with torch.no_grad(), net.path("gated") as passes:
        net(X)
    with torch.no_grad(), backbone.path("gated") as expected:
        backbone(X)
    first = [one[-1].masks[0] for one in (passes, expected)]  # those behind see other inputs
    assert (first[0] != first[1]).float().mean() < 0.2


def test_hooks_of_stages_blocks_and_gates_fire_on_both_paths():
    backbone, seen = tiny(), []
    for name, module in backbone.named_modules():
        module.register_forward_hook(lambda *args, name=name: seen.append(name))
    fired = {}
    for path in PATHS:
        seen.clear()
        with torch.no_grad(), backbone.path(path):
            backbone(X)
        fired[path] = set(seen)
    own = {"layer1", "layer4", "layer1.0", "layer4.1"}
    assert own <= fired["dense"]
    assert own | {"layer1.0.gate", "layer4.1.gated_bn2"} <= fired["gated"]


def test_a_path_can_be_assigned():
    backbone = tiny()
    with torch.no_grad(), backbone.path("gated"):
        gated = backbone(X)
    backbone.path = "gated"
    assert backbone.default_path == "gated"
    assert torch.equal(backbone(X), gated)
    with pytest.raises(InputError, match=r"^path: got 'sparse', expected"):
        backbone.path = "sparse"
    assert backbone.default_path == "gated"


@pytest.mark.parametrize("name", ["resnet18_gated", "resnet18_two_encoders"])
def test_what_is_called_by_itself_never_takes_the_other_path(name):
    """A stage in an open scope, or of the dense encoder of two, cannot know the path."""
    backbone = tiny(name, path="gated")
    stem = backbone.relu(backbone.bn1(backbone.conv1(X)))
    if "two" in name:
        with pytest.raises(RuntimeError, match=r"no gate.*gated_net"):
            backbone.layer1(stem)
    else:
        with backbone.path("dense"), pytest.raises(RuntimeError, match="scope"):
            backbone.layer1(stem)
        with tiny().path("dense"):  # another backbone's
            backbone.layer1(stem)


def test_a_scripted_backbone_and_one_with_replicas_in_a_scope_are_refused():
    backbone = tiny()
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script: .*torch\.jit\.trace"):
        torch.jit.script(backbone)
    with backbone.path("gated"), pytest.raises(RuntimeError, match="DataParallel"):
        backbone._replicate_for_data_parallel()


# Scopes belong to threads


def test_threads_do_not_disturb_each_other_s_scopes():
    backbone, failed = tiny(), []
    expected = {}
    for path in PATHS:
        with torch.no_grad(), backbone.path(path):
            expected[path] = backbone(X)
    start = threading.Barrier(3)

    def run(path):
        start.wait()
        for _ in range(10):
            with torch.no_grad(), backbone.path(path) as passes:
                features = [backbone(X) for _ in range(2)]
            paths = [p.path for p in passes]
            same = all(torch.equal(one, expected[path]) for one in features)
            if not same or paths != [path]:
                failed.append(path)

    threads = [threading.Thread(target=run, args=(path,)) for path in (*PATHS, "gated")]
    with backbone.path("dense") as outer:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed
    assert not outer
    assert scope_of(backbone) is None


def test_a_copy_made_in_a_scope_is_in_no_scope():
    backbone = tiny()
    with torch.no_grad(), backbone.path("gated") as passes:
        backbone(X)
        for other in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
            dense = other(X)
    assert len(passes) == 1
    torch.testing.assert_close(dense, backbone(X).detach())


# Activation checkpointing: what was chosen at forward holds for recomputation


def gradients(backbone, run, paths=("gated", "dense"), images=X, budget=None):
    """Of one step over two views, through features and masks; the backward pass outside the scope."""
    torch.manual_seed(1)
    backbone.train()
    with backbone.path(*paths, budget=budget) as passes:
        features = [run(view) for view in images.chunk(2)]
    loss = sum(view.square().sum() for view in features)
    loss = loss + sum(mask.sum() for one in passes for mask in one.masks)
    loss.backward()
    return {
        name.replace("_checkpoint_wrapped_module.", ""): parameter.grad.clone()
        for name, parameter in backbone.named_parameters()
        if parameter.grad is not None
    }


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * scale, msg=name)


def wrapped(kind, implementation):
    backbone = tiny()
    apply_activation_checkpointing(
        backbone,
        checkpoint_wrapper_fn=functools.partial(checkpoint_wrapper, checkpoint_impl=implementation),
        check_fn=lambda module: type(module).__name__ == kind,
    )
    return backbone


@pytest.mark.parametrize("kind", ["GatedBasicBlock", "Stage"])
def test_recomputed_blocks_give_the_same_gradients(kind):
    plain = tiny()
    expected = gradients(plain, plain)
    backbone = wrapped(kind, CheckpointImpl.NO_REENTRANT)
    assert_same(gradients(backbone, backbone), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_backbone_takes_the_path_it_took(reentrant):
    plain = tiny(budget_range=[0.1, 0.9])
    backbone = copy.deepcopy(plain)
    images = X.clone().requires_grad_(reentrant)

    def run(view):
        return checkpoint(backbone, view, use_reentrant=reentrant)

    options = {"paths": ("gated", "dense"), "budget": torch.tensor([0.2, 0.8])}
    expected = gradients(plain, plain, **options)
    found = gradients(backbone, run, images=images, **options)
    if reentrant:  # the masks' own loss has no gradient: gates differ, and what lies before them
        assert found.keys() == expected.keys()
        for name in ("layer4.1.gated_bn2.weight", "layer4.1.bn2.weight", "layer4.1.conv2.weight"):
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
    else:
        assert_same(found, expected)


def test_a_recomputation_in_the_scope_uses_up_no_path():
    plain = tiny()
    expected = gradients(plain, plain)
    backbone = tiny().train()
    torch.manual_seed(1)
    with backbone.path("gated", "dense") as passes:
        views = [checkpoint(backbone, view, use_reentrant=False) for view in X.chunk(2)]
        loss = sum(view.square().sum() for view in views)
        (loss + sum(mask.sum() for one in passes for mask in one.masks)).backward()
        assert [one.path for one in passes] == ["gated", "dense"]
    assert_same({n: p.grad for n, p in backbone.named_parameters() if p.grad is not None}, expected)


def test_a_recomputation_that_cannot_know_its_path_is_refused():
    backbone = tiny().train()
    with backbone.path("gated", "dense"):
        views = [checkpoint(backbone, X, use_reentrant=False) for _ in range(2)]
    with pytest.raises(RuntimeError, match=r"activation checkpointing.*clone"):
        sum(view.sum() for view in views).backward()


@pytest.mark.parametrize("kind", ["GatedBasicBlock", "Stage"])
def test_masks_without_a_gradient_are_refused(kind):
    backbone = wrapped(kind, CheckpointImpl.REENTRANT)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        gradients(backbone, backbone)


def test_nothing_is_remembered_of_images_that_are_gone():
    backbone = tiny().train()
    with backbone.path("gated"):
        for _ in range(5):
            backbone(torch.randn(2, 3, 8, 8)).sum().backward()
    assert len(backbone._remembered._choices) <= 1


def test_budgets_for_another_number_of_images_are_refused():
    backbone = tiny(budget_range=[0.1, 0.9])
    budgets = torch.tensor([0.2, 0.8])
    with backbone.path("gated", budget=budgets), pytest.raises(InputError, match=r"2 budgets.*4"):
        backbone(X)


def test_a_saved_module_is_loaded_with_its_path_and_budget():
    backbone, file = tiny(path="gated", budget_range=[0.1, 0.9]), io.BytesIO()
    backbone.budget = 0.3
    torch.save(backbone, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert (loaded.default_path, loaded.budget) == ("gated", 0.3)
    assert torch.equal(loaded(X), backbone(X))
