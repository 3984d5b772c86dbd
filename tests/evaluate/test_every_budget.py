"""One run for every budget: what steps draw, what the gates are told, and who can choose it."""

import json
import math
import runpy
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch._dynamo.utils import counters

from solo_gating import METHODS, BaseMethod
from solo_gating.backbones import BACKBONES
from solo_gating.budgets import BudgetSchedule
from solo_gating.checkpoints.encoder import encoder_of
from solo_gating.config.pretraining import prepare_config
from solo_gating.deploy import compile as compile_encoder
from solo_gating.deploy.dense import solo_learn_args
from solo_gating.deploy.static import kept_channels, slice_encoder
from solo_gating.evaluate.calibrate import (
    calibrate,
    lowest_share,
    mean_share,
    reachable_shares,
    sweep,
)
from solo_gating.evaluate.extract import extract
from solo_gating.evaluate.policy import policy_of
from solo_gating.evaluate.table import format_table
from solo_gating.flops import count_flops, count_parameters
from solo_gating.gates import BudgetEmbedding
from solo_gating.main_flops import report_flops
from solo_gating.main_knn import evaluate_knn
from solo_gating.main_policy import evaluate_policy
from solo_gating.main_pretrain import pretrain
from solo_gating.main_report import write_report
from solo_gating.plots.training import draw_curves
from solo_gating.policies import read_policy
from solo_gating.report.cells import measured_cells
from solo_gating.report.records import read_records

from ..methods.test_methods import vicreg
from ..support.encoders import (
    VAL,
    assert_refused,
    digit_tensors,
    evaluation_config,
    nothing_twice,
    run_config,
    save_run,
    tiny_backbone,
)
from ..support.helpers import (
    copy_of,
    default_dtype,
    fixed_noise,
    random_batch,
    randomise_norms,
    recorded_passes,
    tiny_config,
    tiny_model,
)
from ..support.reference import Reference, bound, budget

RANGE = [0.05, 0.9]
LOW, HIGH = RANGE
BOTH = pytest.mark.parametrize("name", ["resnet18_gated", "resnet18_two_encoders"])


def range_backbone(name="resnet18_gated", **kwargs):
    """An encoder with lively gates whose channels need different budgets."""
    backbone = tiny_backbone(name, budget_range=tuple(RANGE), **kwargs)
    generator = torch.Generator().manual_seed(3)
    for block in backbone.gated_blocks:
        weight = block.gate.embedding.expand.weight
        weight.data += 0.5 * torch.rand(weight.shape, generator=generator)
        block.gate.expand.bias.data += torch.randn(len(weight), generator=generator)
    return backbone


def gated_masks(backbone, images, **kwargs):
    with torch.no_grad(), backbone.path("gated", **kwargs) as passes:
        backbone(images)
    return passes[-1].masks


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with nothing_twice():
        yield


# What steps draw


def draws(number=20_000, seed=5, epoch=0, **kwargs):
    schedule = BudgetSchedule(LOW, HIGH, **kwargs)
    return np.array([schedule.at(seed, step, epoch) for step in range(number)])


def test_uniform_draws_are_uniform():
    found = draws()
    assert found.min() >= LOW
    assert found.max() <= HIGH
    # Kolmogorov-Smirnov: 1.63 / √n is the 1 % point.
    expected = (np.sort(found) - LOW) / (HIGH - LOW)
    assert np.abs(expected - np.linspace(0, 1, len(found))).max() < 1.63 / len(found) ** 0.5
    # Successive steps are independent: the correlation's standard error is 1 / √n.
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 3 / len(found) ** 0.5


def test_draws_depend_on_seed_and_step_alone():
    torch.manual_seed(1)
    one = draws(50)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    schedule = BudgetSchedule(LOW, HIGH)
    backwards = [schedule.at(5, step, epoch=3) for step in reversed(range(50))][::-1]
    assert (one == backwards).all()
    assert torch.equal(state, torch.random.get_rng_state())
    assert not np.isin(draws(50, seed=6), one).any()
    # Of every machine and every Python version: these are written down.
    assert one[:3] == pytest.approx([0.662680716, 0.552712658, 0.161359987], abs=1e-9)


def test_the_lower_end_falls_from_the_upper_one():
    schedule = BudgetSchedule(LOW, HIGH, anneal_epochs=4)
    lows = [schedule.ends(epoch)[0] for epoch in range(6)]
    assert lows == pytest.approx([0.9, 0.6875, 0.475, 0.2625, 0.05, 0.05])
    assert {schedule.ends(epoch)[1] for epoch in range(6)} == {HIGH}
    assert schedule.at(5, 0, 0) == HIGH
    assert min(schedule.at(5, step, 2) for step in range(1000)) == pytest.approx(0.475, abs=0.005)


def test_a_single_budget_falls_from_1():
    schedule = BudgetSchedule(0.3, 0.3, anneal_epochs=2)
    assert [schedule.at(5, 17, epoch) for epoch in range(4)] == pytest.approx([1, 0.65, 0.3, 0.3])
    assert not schedule.constant
    assert BudgetSchedule(0.3, 0.3).constant
    assert BudgetSchedule(0.3, 0.3).at(5, 17, 0) == 0.3


# What a number leaves as it was


def gating_config(**gating):
    return tiny_config("vicreg_dual", gating=gating)


def test_with_a_number_the_network_and_its_config_are_the_papers():
    cfg = gating_config(target_budget=0.3)
    model = METHODS["vicreg_dual"](cfg)
    assert not [n for n in model.state_dict() if "embedding" in n or n.endswith("expand.bias")]
    assert list(cfg.gating) == [
        *("target_budget", "sparsity_weight", "bound_weight", "bound_decay", "bound_target"),
        *(
            "bound_gradient",
            "gate",
            "gate_kwargs",
            "reduction",
            "temperature",
            "weight_decay",
            "separate_bn",
        ),
        *("warmup_epochs", "views"),
    ]
    assert set(cfg.backbone.kwargs) == {"width", "stem", "reduction", "temperature", "separate_bn"}
    assert model.backbone.budget is None
    assert "train_target_budget" not in step(tiny_model(cfg)).logged


def test_a_range_is_in_the_config_and_in_the_checkpoint_s_args():
    cfg = prepare_config(gating_config(target_budget=RANGE, budget_per_image=True))
    model = METHODS["vicreg_dual"](cfg)
    assert cfg.gating.target_budget == RANGE
    assert cfg.gating.budget_per_image is True
    assert cfg.gating.budget_anneal == 0
    assert cfg.backbone.kwargs.budget_range == RANGE
    assert model.backbone.budget_range == tuple(RANGE)
    assert OmegaConf.to_container(prepare_config(cfg.copy())) == OmegaConf.to_container(cfg)


# What the gates are told


@BOTH
def test_the_embedding_is_less_than_a_thousandth_of_the_network(name):
    with torch.device("meta"):
        fixed = BACKBONES[name]()
        told = BACKBONES[name](budget_range=RANGE)
    fixed.fc = told.fc = nn.Identity()
    added = count_parameters(told) - count_parameters(fixed)
    assert added == 1920 * (4 + 1) + 8 * 8  # four weights and a bias per channel, a trunk per gate
    assert added < 0.001 * count_parameters(fixed)


def test_an_embedding_starts_as_the_budget_s_log_odds():
    embedding = BudgetEmbedding(5).double()
    budgets = torch.tensor([0.05, 0.3, 0.5, 0.9], dtype=torch.float64)
    expected = torch.log(budgets / (1 - budgets))[:, None].expand(4, 5)
    torch.testing.assert_close(embedding(budgets), expected)
    assert torch.isfinite(embedding(torch.tensor(1.0, dtype=torch.float64))).all()


def test_new_gates_are_sampled_near_every_budget():
    torch.manual_seed(0)
    backbone = BACKBONES["resnet18_gated"](width=16, stem="cifar", budget_range=RANGE).train()
    images, _ = digit_tensors(slice(64))
    for told in (0.05, 0.3, 0.6, 0.9):
        share = torch.cat(gated_masks(backbone, images, budget=told), dim=1).mean().item()
        assert share == pytest.approx(told, abs=0.05)


def test_open_gates_stay_open_at_first():
    torch.manual_seed(0)
    backbone = BACKBONES["resnet18_gated"](width=8, stem="cifar", gate_kwargs={"bias": 4.0}).train()
    share = torch.cat(gated_masks(backbone, digit_tensors(slice(64))[0]), dim=1).mean().item()
    assert share == pytest.approx(1 / (1 + math.exp(-4)), abs=0.01)
    assert "layer1.0.gate.expand.bias" in dict(backbone.named_parameters())


@BOTH
def test_logits_are_those_without_a_budget_and_what_it_adds(name):
    backbone, (images, _) = range_backbone(name), digit_tensors(VAL)
    gate, inputs = backbone.gated_blocks[3].gate, []
    gate.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    weights = {key: value.double() for key, value in gate.embedding.state_dict().items()}
    for told in (0.05, 0.31, 0.9):
        mask = gated_masks(backbone, images, budget=told)[3]
        x = inputs[-1].mean(dim=(2, 3), keepdim=True)
        with torch.no_grad():
            plain = gate.expand(torch.relu(gate.norm(gate.reduce(x))))[:, :, 0, 0].double()
        t = math.log(told / (1 - told))
        hidden = (weights["reduce.weight"][:, 0] * t + weights["reduce.bias"]).clamp(min=0)
        logits = plain + weights["expand.weight"] @ hidden
        sure = logits.abs() > 1e-4
        assert torch.equal(mask.bool()[sure], (logits >= 0)[sure])


@BOTH
def test_a_higher_budget_opens_more(name):
    """With an embedding that rises everywhere, no channel of the first gate is ever closed."""
    backbone, (images, _) = range_backbone(name), digit_tensors(VAL)
    shares, before = [], None
    for told in (0.05, 0.2, 0.4, 0.7, 0.9):
        backbone.budget = told
        masks = gated_masks(backbone, images)
        if before is not None:
            assert (masks[0] >= before).all()
        before = masks[0]
        shares.append(torch.cat(masks, dim=1).mean().item())
    assert shares == sorted(shares)
    assert shares[0] < 0.3
    assert shares[-1] > 0.6


@BOTH
def test_the_budget_is_a_choice_that_no_checkpoint_holds(name):
    backbone = range_backbone(name)
    assert backbone.budget == pytest.approx(0.475)  # the middle
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    backbone.budget = 0.3
    assert backbone.budget == 0.3
    assert set(before) == set(backbone.state_dict())
    assert not [key for key in before if "budget" in key]
    backbone.budget = None
    assert backbone.budget == pytest.approx(0.475)
    other = BACKBONES[name](width=4, stem="cifar", budget_range=RANGE, budget=0.9)
    other.fc = nn.Identity()
    other.load_state_dict(before)
    assert other.budget == 0.9
    assert other.double().budget_told.dtype == torch.float64


def test_a_scope_s_budget_ends_with_it():
    backbone, (images, _) = range_backbone(), digit_tensors(slice(8))
    low, high = (gated_masks(backbone, images, budget=b) for b in RANGE)
    backbone.budget = 0.9
    state = dict(vars(backbone))
    with torch.no_grad(), backbone.path("gated", "dense", budget=0.05) as passes:
        backbone(images)
        backbone(images)
        assert all(map(torch.equal, passes[0].masks, low))
        with backbone.path("gated") as inner:  # its own choice: none
            backbone(images)
        assert all(map(torch.equal, inner[0].masks, high))
    with pytest.raises(OSError), backbone.path("gated", budget=0.05):  # noqa: PT011
        raise OSError
    assert vars(backbone) == state
    assert all(map(torch.equal, gated_masks(backbone, images), high))


def test_a_budget_outside_of_the_range_is_refused():
    backbone = range_backbone()

    def turn(value):
        backbone.budget = value

    words = "a number from 0.05 to 0.9, the range that the network was trained for"
    for value in (0.04, 0.91, -1, math.nan, "0.3", True, [0.3]):
        assert_refused(lambda v=value: turn(v), f"budget: got {value!r}", words)
    assert_refused(lambda: gated_masks(backbone, torch.zeros(1, 3, 16, 16), budget=1.0), words)
    assert backbone.budget == pytest.approx(0.475)
    assert_refused(
        lambda: BACKBONES["resnet18_gated"](width=4, budget_range=RANGE, budget=2), words
    )
    for value in ([0.9, 0.1], [0.1], 0.3):
        assert_refused(
            lambda v=value: BACKBONES["resnet18_gated"](width=4, budget_range=v),
            f"backbone.kwargs.budget_range: got {value!r}, expected a range like [0.05, 0.9]",
        )


def test_a_network_of_a_single_budget_cannot_be_told_one():
    backbone = tiny_backbone()
    assert backbone.budget is None
    backbone.budget = None
    words = "budget: got 0.3, the network's gates are told no budget; expected null"
    assert_refused(lambda: setattr(backbone, "budget", 0.3), words)
    assert_refused(lambda: gated_masks(backbone, torch.zeros(1, 3, 16, 16), budget=0.3), words)
    assert_refused(lambda: BACKBONES["resnet18_gated"](width=4, budget=0.3), words)
    assert_refused(lambda: compile_encoder(backbone, budget=0.3, engine="pytorch"), words)


def test_weights_of_a_range_are_not_dropped_without_a_word():
    """solo-learn's main_linear.py loads with strict=False."""
    state = range_backbone().state_dict()
    assert_refused(
        lambda: tiny_backbone().load_state_dict(state, strict=False),
        "backbone.kwargs.budget_range: got none",
    )


def test_a_compiled_network_is_not_compiled_again_for_another_budget():
    backbone, (images, _) = range_backbone().train(), digit_tensors(slice(8))
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(backbone, backend="eager")
    shares = []
    with torch.no_grad():
        for told in (0.05, 0.3, 0.31, 0.9):
            with backbone.path("gated", budget=told) as passes:
                compiled(images)
            shares.append(torch.cat(passes[-1].masks, dim=1).mean().item())
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["recompiles"]
    assert shares[0] < shares[1] < shares[3]


# Training


def step(model, seed=0):
    with fixed_noise(11):
        model.training_step(random_batch(seed=seed), 0).backward()
    return model


def test_a_step_s_budget_is_told_to_the_gates_and_aimed_at():
    with default_dtype(torch.float64):
        gating = {"target_budget": RANGE, "sparsity_weight": 50.0, "bound_weight": 2.0}
        model = tiny_model(tiny_config("vicreg_gated", gating=gating), epoch=4)
        model._trainer.global_step = 7
        copied, batch = copy_of(model), random_batch()
        told = BudgetSchedule(LOW, HIGH).at(0, 7, 4)
        before = model.backbone.budget
        with fixed_noise(11):
            loss = model.training_step(batch, 0)
        reference = Reference(copied.backbone.state_dict(), "cifar")
        views, expected = [], 0.0
        with fixed_noise(11):
            for images in batch[1]:
                with copied.backbone.path("gated", budget=told) as passes:
                    views.append(copied.backbone(images))
                masks = passes[0].masks
                expected += budget(reference.flops_share(list(masks), images), told, 50.0)
                expected += 2 * bound(masks, told**0.5, 4)
        expected += vicreg(copied, *map(copied.projector, views))
        expected += sum(
            nn.functional.cross_entropy(copied.classifier(f.detach()), batch[2]) / 2 for f in views
        )
        assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
        assert model.logged["train_target_budget"].item() == pytest.approx(told)
        assert model.backbone.budget == before
        loss.backward()
    for name, parameter in model.backbone.named_parameters():
        if "gate.embedding" in name or name.endswith("expand.bias"):
            assert parameter.grad is not None, name
    assert model.backbone.layer2[0].gate.embedding.expand.weight.grad.any()


def test_steps_draw_anew_and_leave_pytorch_s_streams_alone():
    model = tiny_model(gating_config(target_budget=RANGE))
    seen = []
    for number in range(4):
        model._trainer.global_step = number
        torch.manual_seed(3)
        step(model)
        seen.append((model.logged["train_target_budget"].item(), torch.rand(1).item()))
    told, streams = zip(*seen, strict=True)
    assert len(set(told)) == 4
    assert len(set(streams)) == 1
    assert told == pytest.approx([BudgetSchedule(LOW, HIGH).at(0, n, 0) for n in range(4)])


def test_a_single_budget_is_annealed_in_the_losses_only():
    cfg = gating_config(target_budget=0.3, budget_anneal=0.5, bound_target="budget")
    cfg.max_epochs = 8
    model = tiny_model(cfg, epoch=1)
    step(model)
    assert model.logged["train_target_budget"].item() == pytest.approx(0.825)
    assert model.backbone.budget is None
    assert cfg.gating.budget_anneal == 0.5
    assert "budget_per_image" not in cfg.gating


def test_gates_of_a_range_need_not_be_told():
    model = tiny_model(gating_config(target_budget=RANGE, budget_embedding=False))
    step(model)
    assert "train_target_budget" in model.logged
    assert model.backbone.budget is None
    assert not [name for name in model.state_dict() if "embedding" in name]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 2 epochs, and one that stops after the first and is continued."""
    folders, told, schedule_at = [], [], BudgetSchedule.at
    for name in ("whole", "stopped"):
        folder = tmp_path_factory.mktemp(name)
        cfg = run_config(
            folder,
            gating={"target_budget": RANGE},
            optimizer={"batch_size": 32},
            checkpoint={"enabled": True, "dir": str(folder), "keep_prev": True},
            final_knn={"enabled": True, "labels_per_class": 2, "budgets": [0.1, 0.8]},
        )
        seen = []

        def at(self, seed, step, epoch, seen=seen):
            seen.append((step, schedule_at(self, seed, step, epoch)))
            return seen[-1][1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(BudgetSchedule, "at", at)
            if name == "stopped":
                checkpoint = next(folders[0].rglob("tiny-ep=0.ckpt"))
                cfg.resume_from_checkpoint = str(checkpoint)
            pretrain(cfg)
        folders.append(folder)
        told.append(seen)
    return folders[0], told


def test_a_continued_run_goes_on_with_the_same_budgets(trained):
    _, (whole, continued) = trained
    assert [number for number, _ in whole] == list(range(6))
    assert len({value for _, value in whole}) == 6
    assert continued == whole[3:]
    assert [value for _, value in whole] == [
        BudgetSchedule(LOW, HIGH).at(0, n, 0) for n in range(6)
    ]


def test_a_checkpoint_says_its_range(trained):
    folder, _ = trained
    checkpoint = next(folder.rglob("last.ckpt"))
    args = json.loads((checkpoint.parent / "args.json").read_text())
    assert args["gating"]["target_budget"] == RANGE
    assert args["backbone"]["kwargs"]["budget_range"] == RANGE
    encoder = encoder_of(checkpoint)
    assert encoder.backbone.budget_range == tuple(RANGE)
    assert encoder.description()["target_budget"] == RANGE
    metrics = json.loads((checkpoint.parent / "metrics.json").read_text())
    assert metrics["pretraining"]["target_budget"] == RANGE
    assert LOW <= metrics["logged"]["train_target_budget"] <= HIGH
    assert draw_curves(checkpoint.parent, RANGE, "title").is_file()


def test_the_table_at_the_end_has_a_row_for_each_budget(trained):
    folder, _ = trained
    checkpoint = next(folder.rglob("last.ckpt"))
    table = json.loads((checkpoint.parent / "metrics.json").read_text())
    rows = [name for name in table if name.startswith("gated")]
    assert rows == ["gated", "gated at 0.1", "gated at 0.8"]
    for told in (0.1, 0.8):
        metrics = evaluate_knn(evaluation_config("knn", checkpoint, f"budget={told}", "k=1"))
        row = table[f"gated at {told}"]
        assert row["knn_top1"] == pytest.approx(metrics["gated"]["knn_top1"])
        assert row["flops"] == pytest.approx(metrics["gated"]["flops"])
        assert row["flops_cut"] == pytest.approx(1 - row["flops"] / table["dense"]["flops"])
    assert "gated at 0.8 " in format_table({n: table[n] for n in ("raw", "untrained", *rows)})


def test_budgets_of_the_table_are_in_the_range(tmp_path):
    for budgets, words in (([0.1, 0.95], "got 0.95, expected a number from"), ("x", "a list")):
        cfg = run_config(tmp_path, gating={"target_budget": RANGE}, final_knn={"budgets": budgets})
        assert_refused(lambda cfg=cfg: prepare_config(cfg), "final_knn.budgets: got", words)
    one = run_config(tmp_path, final_knn={"budgets": [0.1]})
    assert prepare_config(one).final_knn.budgets == []


def test_a_range_s_run_is_in_the_report(trained, tmp_path):
    folder, _ = trained
    write_report([folder], tmp_path)
    lines = (tmp_path / "report.md").read_text().splitlines()
    own = [x for x in lines if x.startswith("| tiny |") and "/evaluation/" not in x]
    assert len(own) == 2  # of both paths
    assert all("| 47.5 % |" in line for line in own)


# A budget for each image


def per_image(**gating):
    gating = {"target_budget": RANGE, "budget_per_image": True, "sparsity_weight": 10.0, **gating}
    return tiny_model(tiny_config(gating=gating))


def test_each_image_s_budget_is_told_to_the_gates():
    model = per_image()
    told = []
    model.backbone.layer3[1].gate.embedding.register_forward_pre_hook(
        lambda module, budgets: told.append(budgets[0])
    )
    step(model)
    budgets = told[0]  # the others of a copy, whose FLOPs are counted
    schedule = BudgetSchedule(LOW, HIGH)
    assert budgets.tolist() == pytest.approx(schedule.each(0, 0, 0, 8), rel=1e-6)
    assert len(budgets.unique()) == 8
    assert schedule.each(0, 0, 0, 8)[0] == schedule.at(0, 0, 0)
    assert model.logged["train_target_budget"] == pytest.approx(budgets.mean().item(), rel=1e-6)


def image_shares(model):
    """Of the dense FLOPs, by hand, of each image of a step."""
    seen = recorded_passes(model)
    step(model)
    (gated,) = [view for view in seen if view.path == "gated"]
    flops = count_flops(model.backbone, (16, 16))
    cost = np.full(8, float(flops.fixed))
    for mask, part in zip(gated.masks, list(flops.parts.values())[1:], strict=True):
        both = sum(c.macs for c in part.convolutions if (c.reads, c.writes) != (None, None))
        cost += mask.mean(dim=1).detach().numpy() * both
    return cost / flops.dense


@pytest.mark.parametrize("relative", [False, True])
def test_the_loss_of_each_image_s_budget_is_the_mean_of_theirs(relative):
    model = per_image(relative_budget_loss=relative)
    budgets = np.array(BudgetSchedule(LOW, HIGH).each(0, 0, 0, 8))
    weights = 10 / budgets if relative else 10
    expected = (weights * (image_shares(model) - budgets) ** 2).mean()
    assert model.logged["train_budget_loss"].item() == pytest.approx(expected, rel=1e-6)


def test_equal_budgets_of_all_images_are_one_of_the_step():
    """But for the images' spread around it, which only their own budgets mind."""
    one, each = per_image(budget_per_image=False), per_image()
    each.load_state_dict(one.state_dict())
    with mock.patch.object(BudgetSchedule, "each", lambda self, *args: [0.3] * args[-1]):
        shares = image_shares(each)
        assert image_shares(one) == pytest.approx(shares, rel=1e-12)
    spread = each.logged["train_budget_loss"] - one.logged["train_budget_loss"]
    assert spread.item() == pytest.approx(10 * shares.var(), rel=1e-5)


def test_images_have_no_budgets_that_gates_are_not_told():
    cfg = gating_config(target_budget=RANGE, budget_per_image=True, budget_embedding=False)
    assert_refused(lambda: prepare_config(cfg), "gating.budget_per_image: got true")


def test_one_budget_is_that_of_every_image():
    models = [per_image(target_budget=0.3, budget_per_image=key) for key in (True, False)]
    models[1].load_state_dict(models[0].state_dict())
    assert image_shares(models[0]) == pytest.approx(image_shares(models[1]), rel=1e-12)
    found, expected = (model.logged["train_budget_loss"].item() for model in models)
    assert found == expected


# Evaluation


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("range")
    cfg = run_config(folder, gating={"target_budget": RANGE}, backbone={"kwargs": {"width": 8}})
    return save_run(cfg, folder)


def test_an_evaluation_is_told_its_budget(run):
    found = {}
    for override in ("budget=null", "budget=0.1", "budget=0.8"):
        found[override] = evaluate_knn(evaluation_config("knn", run.checkpoint, override))
    default, low, high = found.values()
    assert [m["settings"]["budget"] for m in found.values()] == [pytest.approx(0.475), 0.1, 0.8]
    assert low["gated"]["flops"] < default["gated"]["flops"] < high["gated"]["flops"]
    assert low["dense"] == high["dense"]
    assert len({m["identity"] for m in found.values()}) == 3
    records, skipped, _ = read_records([run.folder])
    cells = {cell.target_budget: cell for cell in measured_cells(records) if cell.path == "gated"}
    assert not skipped
    assert sorted(cells) == [0.1, pytest.approx(0.475), 0.8]
    assert cells[0.1].variant == "vicreg_dual (range of budgets)"
    assert cells[0.1].flops == low["gated"]["flops"]


@pytest.mark.parametrize(
    ("budget", "words"),
    [("0.95", "expected a number from 0.05 to 0.9"), ("high", "got 'high'")],
)
def test_an_evaluation_s_budget_is_in_the_range(run, budget, words):
    cfg = evaluation_config("knn", run.checkpoint, f"budget={budget}")
    assert_refused(lambda: evaluate_knn(cfg), "budget: got", words)


def test_an_encoder_without_gates_has_no_budget(tmp_path):
    plain = save_run(run_config(tmp_path, "vicreg"), tmp_path)
    cfg = evaluation_config("knn", plain.checkpoint, "budget=0.3")
    assert_refused(lambda: evaluate_knn(cfg), "budget: got 0.3", "no gates", "expected null")


def test_calibrated_the_share_asked_for_is_used():
    backbone = range_backbone(width=8)
    images, _ = digit_tensors(slice(300, 332))
    backbone.threshold, backbone.budget = 0.2, 0.6
    lowest = lowest_share(backbone, (16, 16))
    assert lowest < 0.1
    for share, told in ((0.1, 0.1), (0.5, 0.5), (0.97, 0.9)):
        setting = calibrate(backbone, images, share)
        assert setting.budget == told
        assert setting.share == pytest.approx(share, abs=0.005)
        assert (backbone.threshold, backbone.budget) == (0.2, 0.6)
        setting.apply(backbone)
        assert mean_share(backbone, images) == setting.share
        backbone.threshold, backbone.budget = 0.2, 0.6
    assert calibrate(backbone, images, 0.3, budget=0.9).budget == 0.9
    assert_refused(lambda: calibrate(backbone, images, lowest / 2), "calibrate: got")
    assert_refused(lambda: calibrate(backbone, images, 0.3, budget=0.95), "budget: got 0.95")
    assert (backbone.threshold, backbone.budget) == (0.2, 0.6)


@pytest.mark.parametrize("kind", ["top_k", "fixed"])
def test_a_share_of_no_budget_is_refused(kind):
    backbone = tiny_backbone(gate=kind, width=8, budget_range=tuple(RANGE))
    images, _ = digit_tensors(slice(300, 332))
    before = backbone.budget
    least, most = reachable_shares(backbone, images)
    ends = []
    for told in RANGE:
        backbone.budget = told
        ends.append(mean_share(backbone, images))
    backbone.budget = before
    assert (least, most) == (pytest.approx(ends[0] - 0.01), pytest.approx(ends[1] + 0.01))
    assert_refused(lambda: calibrate(backbone, images, 1.0), "got 1.0", f"to {ends[1]:.4f}")
    assert calibrate(backbone, images, ends[1]).budget == pytest.approx(0.9)
    assert backbone.budget == before


def test_a_sweep_turns_the_budget():
    backbone = range_backbone(width=8)
    images, _ = digit_tensors(slice(300, 332))
    points = sweep(backbone, images, [0.3, 0.7, 0.95], lambda: {"seen": backbone.budget})
    asked = [point for point in points if point["asked"] is not None]
    assert [point["budget"] for point in asked] == [0.3, 0.7, 0.9]
    assert [point["seen"] for point in points] == [point["budget"] for point in points]
    shares = [point["calibrated_share"] for point in points]
    assert shares == sorted(shares)
    assert backbone.budget == pytest.approx(0.475)


def test_the_command_calibrates_in_two_steps(run, tmp_path, capsys):
    overrides = ["calibrate=0.3", "sweep=true", "shares=[0.1,0.8]", "calibration_images=32"]
    metrics = evaluate_policy(
        evaluation_config("policy", run.checkpoint, *overrides, f"output={tmp_path}")
    )
    row, policy = metrics["gated"], read_policy(tmp_path / "policy.json")
    assert policy.budget == row["budget"] == 0.3
    assert row["calibrated_share"] == pytest.approx(0.3, abs=0.005)
    assert policy.target_budget == RANGE
    assert "budget=0.3 threshold=" in capsys.readouterr().out
    asked = {point["asked"]: point["budget"] for point in row["sweep"]}
    assert asked == {None: 0.3, 0.1: 0.1, 0.8: 0.8}
    # Another evaluation with that position uses as much.
    position = [f"threshold={row['threshold']}", "budget=0.3", "path=gated"]
    knn = evaluate_knn(evaluation_config("knn", run.checkpoint, *position))
    assert knn["gated"]["flops"] == pytest.approx(row["flops"])


def test_flops_are_shown_at_a_budget(tmp_path):
    shares, gates = [], []
    for target, told in ((RANGE, None), (RANGE, 0.3), (0.3, None)):
        cfg = gating_config(target_budget=target)
        cfg.flops = {"budget": told, "output": str(tmp_path)}
        metrics = report_flops(cfg)
        shares.append((metrics.get("budget"), metrics["flops"]["share"]))
        gates.append(metrics["flops"]["gates"])
    middle = pytest.approx((0.475, 0.475))
    assert shares == [middle, pytest.approx((0.3, 0.3)), (None, pytest.approx(0.3))]
    assert len(set(gates)) == 1  # an embedding costs nothing for an image
    cfg = gating_config(target_budget=0.3)
    cfg.flops = {"budget": 0.3}
    assert_refused(lambda: report_flops(cfg), "flops.budget: got 0.3", "expected null")


def test_the_command_line_of_a_script_names_a_budget(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text(
        "from solo_gating import BaseMethod\n"
        "build = BaseMethod._BACKBONES['resnet18_gated']\n"
        "net = build('x', width=4, budget_range=[0.1, 0.5])\n"
        "print(net.budget, net.default_path)\n"
    )
    before = dict(BaseMethod._BACKBONES)
    printed = []
    monkeypatch.setattr("builtins.print", lambda *args: printed.append(args))
    arguments = ["--path", "gated", "--budget", "0.3", str(script)]
    monkeypatch.setattr(sys, "argv", ["solo_gating", *arguments])
    monkeypatch.setattr(sys, "path", list(sys.path))
    try:
        runpy.run_module("solo_gating", run_name="__main__")
    finally:
        BaseMethod._BACKBONES.update(before)
    assert printed == [(0.3, "gated")]


# What runs elsewhere


@pytest.mark.parametrize(
    ("name", "told"), [("resnet18_gated", 0.1), ("resnet18_two_encoders", 0.5)]
)
def test_a_sliced_encoder_is_frozen_at_the_budget(name, told):
    backbone, (images, targets) = range_backbone(name, width=8), digit_tensors(VAL)
    backbone.threshold, backbone.budget = 0.25, told
    policy = _policy(backbone, images, targets)
    assert policy.budget == told
    small = slice_encoder(
        backbone, kept_channels(policy, count_flops(backbone, (16, 16)), "dynamic", 1), gates=True
    )
    assert not [key for key in small.state_dict() if "embedding" in key]
    assert count_parameters(small) < count_parameters(backbone)
    again = type(small)(**small.architecture)
    again.fc = nn.Identity()
    again.load_state_dict(small.state_dict())
    with torch.no_grad(), backbone.path("gated"):
        torch.testing.assert_close(small(images), backbone(images), rtol=1e-4, atol=1e-4)


def _policy(backbone, images, targets):
    return policy_of(backbone, extract(backbone, [(images, targets)], "gated"), "x", {}, RANGE)


def test_the_dense_encoder_s_args_know_of_no_budget(run):
    encoder = encoder_of(run.checkpoint)
    encoder.args.backbone.kwargs.width = 64
    encoder.args.backbone.kwargs.stem = "imagenet"
    assert solo_learn_args(encoder)["backbone"]["kwargs"] == {}


@BOTH
def test_a_compiled_encoder_changes_its_budget_at_no_cost(name):
    backbone, (images, _) = range_backbone(name, width=8), digit_tensors(VAL)
    randomise_norms(backbone)
    backbone.threshold = 0.2
    fast = compile_encoder(backbone, budget=0.9, engine="pytorch")
    assert compile_encoder(backbone, engine="pytorch").budget == pytest.approx(0.475)
    engine, weights = fast._encoder.backend, fast._encoder.backend._net
    shares = []
    for told in (0.05, 0.3, 0.9):
        fast.budget = backbone.budget = told
        features, masks = fast.features_and_masks(images)
        expected = gated_masks(backbone, images)
        for mask, wanted in zip(masks, expected, strict=True):
            assert torch.equal(mask, wanted.bool())
        with torch.no_grad(), backbone.path("gated"):
            torch.testing.assert_close(features, backbone(images), rtol=1e-4, atol=1e-4)
        shares.append(torch.cat(masks, dim=1).float().mean().item())
    assert shares == sorted(set(shares))
    assert fast._encoder.backend is engine
    assert fast._encoder.backend._net is weights
    fast.threshold = backbone.threshold = -0.4  # at the budget that it has
    for mask, wanted in zip(
        fast.features_and_masks(images)[1], gated_masks(backbone, images), strict=True
    ):
        assert torch.equal(mask, wanted.bool())
    assert_refused(lambda: setattr(fast, "budget", 0.95), "budget: got 0.95")


def test_a_compiled_encoder_has_the_gates_bias(tmp_path):
    backbone, (images, _) = tiny_backbone(open_start=True), digit_tensors(VAL)
    for block in backbone.gated_blocks:
        nn.init.normal_(block.gate.expand.bias)
    fast = compile_encoder(backbone, engine="pytorch")
    assert fast.budget is None
    for mask, wanted in zip(
        fast.features_and_masks(images)[1], gated_masks(backbone, images), strict=True
    ):
        assert torch.equal(mask, wanted.bool())
