"""In-place distillation: dense views as in the plain method, and a gated pass that regresses to them."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from solo_gating import METHODS, InputError
from solo_gating.checkpoints.reading import trained_paths
from solo_gating.config.pretraining import prepare_config
from solo_gating.losses import unexplained_variance
from solo_gating.solo_learn import METHODS as SOLO

from ..support.helpers import (
    copy_of,
    default_dtype,
    fixed_noise,
    random_batch,
    recorded_passes,
    tiny_config,
    tiny_model,
)
from ..support.reference import Reference, bound, budget
from ..training.test_randomness import assert_same, small_config, trained, write_data
from .test_momentum import EVERY, losses_of_two_steps, pair

GATING = {"target_budget": 0.3, "sparsity_weight": 50.0, "bound_weight": 2.0}
ALONE = {"distillation_weight": 0.0, "sparsity_weight": 0.0, "bound_weight": 0.0}


@pytest.fixture(autouse=True)
def _float64():
    with default_dtype(torch.float64):
        yield


def model_of(method="vicreg_distilled", epoch=3, **gating):
    cfg = tiny_config(method, **({"gating": {**GATING, **gating}} if "_" in method else {}))
    cfg.backbone.name = "resnet18_gated" if "_" in method else "resnet18_plain"
    return tiny_model(cfg, epoch=epoch)


def step(model, batch):
    with fixed_noise(11):
        return model.training_step(batch, 0)


def unexplained_by_hand(f, t):
    f, t = f.detach().numpy().astype(np.float64), t.detach().numpy().astype(np.float64)
    error = sum((f[i] - t[i]) ** 2 for i in range(len(f))) / len(f)
    return float(np.mean(error / (t.var(axis=0) + 1e-4)))


def test_unexplained_variance_is_the_share_of_the_target_s():
    rng = np.random.RandomState(0)
    f, t = (torch.from_numpy(rng.standard_normal((9, 5)) * [1, 2, 3, 0, 1e-3]) for _ in range(2))
    assert unexplained_variance(f, t).item() == pytest.approx(unexplained_by_hand(f, t), rel=1e-12)
    assert unexplained_variance(t, t) == 0
    mean = t[:, :3].mean(0).expand(9, 3)
    assert unexplained_variance(mean, t[:, :3]).item() == pytest.approx(1, rel=1e-3)
    assert unexplained_variance(f.bfloat16(), t.bfloat16()).dtype is torch.float32


@pytest.mark.parametrize("name", EVERY)
def test_the_dense_path_is_trained_as_the_plain_method_trains_it(name):
    """Losses of two steps, where nothing pulls at the third pass."""
    ours, plain = pair(name, "distilled", ALONE)
    with fixed_noise():  # All4One's dropout draws from the stream that gates draw from
        found = losses_of_two_steps(ours)
    assert found == pytest.approx(losses_of_two_steps(plain), rel=1e-8)
    assert ours.logged["train_unexplained_variance"] > 0


def test_the_loss_is_the_method_s_and_the_regression_s_and_the_gates():
    ours, plain, batch = model_of(), model_of("vicreg"), random_batch()
    plain.load_state_dict({k: v for k, v in ours.state_dict().items() if k in plain.state_dict()})
    copied, seen = copy_of(ours), recorded_passes(ours)
    loss = step(ours, batch)
    (dense, other, third), image = seen, batch[1][0]
    assert [view.path for view in seen] == ["dense", "dense", "gated"]
    with fixed_noise(11), copied.backbone.path("gated"):
        expected_features = copied.backbone(image)
    torch.testing.assert_close(third.features, expected_features)
    share = Reference(copied.backbone.state_dict(), "cifar").flops_share(third.masks, image)
    expected = (
        step(plain, batch)
        + 10 * unexplained_by_hand(third.features, dense.features)
        + budget(share, 0.3, 50.0)
        + 2 * bound(third.masks, 0.3**0.5, 3)
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-8)
    logged = ours.logged["train_unexplained_variance"]
    assert logged.item() == pytest.approx(unexplained_by_hand(third.features, dense.features))
    assert not torch.equal(other.features, dense.features)


def test_the_target_gets_no_gradient():
    """The dense BatchNorms of the blocks are in the target alone."""
    model, batch = model_of(), random_batch()
    seen = recorded_passes(model)
    step(model, batch)
    loss = unexplained_variance(seen[2].features, seen[0].features)
    loss.backward()
    gradients = {n: p.grad for n, p in model.backbone.named_parameters()}
    target_s = [n for n in gradients if ".bn1." in n or ".bn2." in n]
    assert target_s
    assert all(gradients[name] is None for name in target_s)
    assert any(gradients[n].any() for n in gradients if ".gate." in n)


@pytest.mark.parametrize(("share", "images"), [(1.0, 8), (0.5, 4), (0.25, 2), (0.01, 2)])
def test_a_share_of_the_images_takes_the_third_pass(share, images):
    model = model_of(target_budget=[0.1, 0.9], budget_per_image=True, distillation_images=share)
    seen, told = recorded_passes(model), []
    gate = model.backbone.gates[0]
    gate.register_forward_hook(lambda m, arguments, mask: told.append(arguments[1]))
    batch = random_batch()
    assert step(model, batch).isfinite()
    assert [len(view.features) for view in seen] == [8, 8, images]
    budgets = told[0]  # others are of counting FLOPs
    assert budgets.tolist() == model.budget_of_step(3, batch[-1])[1].tolist()[:images]


def test_gates_rest_during_warm_up_and_neighbours_are_each_path_s():
    cfg = tiny_config(
        "vicreg_distilled",
        gating={**GATING, "warmup_epochs": 4, "distillation_images": 0.5},
        knn_eval={"enabled": True, "k": 1},
    )
    resting = tiny_model(cfg.copy(), epoch=3)
    seen = recorded_passes(resting)
    step(resting, random_batch())
    assert [view.path for view in seen] == ["dense", "dense"]
    awake = tiny_model(cfg, epoch=4)
    step(awake, random_batch())
    counts = {path: sum(map(len, knn.train_features)) for path, knn in awake.path_knn.items()}
    assert counts == {"dense": 16, "gated": 4}


def test_every_method_that_can_be_gated_can_be_distilled():
    names = [n.removesuffix("_dual") for n in METHODS if n.endswith("_dual")]
    assert {f"{name}_distilled" for name in names} <= set(SOLO)


@pytest.mark.parametrize(
    ("method", "gating", "message"),
    [
        (
            "vicreg_dual",
            {"distillation_weight": 1},
            "gating.distillation_weight: got 1, but method",
        ),
        ("vicreg_distilled", {"distillation_weight": -1}, "expected a number ≥ 0"),
        ("vicreg_distilled", {"distillation_images": 0}, r"expected a number in \(0, 1\]"),
        ("vicreg_distilled", {"views": ["gated", "dense"]}, "expected all dense"),
    ],
)
def test_what_cannot_be_is_refused(method, gating, message):
    with pytest.raises(InputError, match=message):
        prepare_config(OmegaConf.merge(tiny_config(method), {"gating": gating}))


def test_a_recorded_run_says_which_paths_it_trained():
    cfg = prepare_config(tiny_config("vicreg_distilled"))
    assert list(cfg.gating.views) == ["dense", "dense"]
    assert trained_paths(cfg.gating) == ("dense", "gated")
    assert trained_paths({}) == ("dense",)  # of a method without gates, whatever the backbone
    assert "distillation_weight" not in prepare_config(tiny_config("vicreg_dual")).gating


def test_a_continued_run_goes_on_as_if_undisturbed(tmp_path):
    write_data(tmp_path)
    with default_dtype(torch.float32):
        cfg = small_config(tmp_path, "vicreg_distilled", checkpoint={"dir": str(tmp_path)})
        cfg = OmegaConf.merge(cfg, {"gating": {"target_budget": [0.1, 0.9]}})
        ours = trained(cfg, (1, 1))
        cfg.checkpoint.dir += "/whole"
        assert_same(ours, trained(cfg))
    assert "val_gated_acc1" in ours[1]
