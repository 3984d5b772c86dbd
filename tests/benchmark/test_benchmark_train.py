"""What main_benchmark_train measures: steps as Lightning does them, honest memory, rows that add up."""

import json
from dataclasses import replace
from itertools import pairwise

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from solo_gating import main_benchmark_train
from solo_gating.benchmark.training import peak
from solo_gating.benchmark.training.memory import added_bytes, bytes_of
from solo_gating.benchmark.training.parts import part_milliseconds
from solo_gating.benchmark.training.peak import step_flops
from solo_gating.benchmark.training.run import rows
from solo_gating.benchmark.training.step import Setup, TrainingStep
from solo_gating.flops import count_flops
from solo_gating.training.model import build_model

TINY = Setup(batch=4, resolution=16, width=4, projector=16, accelerator="cpu", optimization="sgd")
CPU = torch.device("cpu")


class _Batches(torch.utils.data.Dataset):
    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return self.batch


@pytest.mark.parametrize("recipe", ["vicreg", "vicreg_dual"])
def test_a_step_is_lightnings(recipe):
    step = TrainingStep(recipe, TINY)
    torch.manual_seed(1)
    step()
    step()

    cfg = TINY.config(recipe)
    model = build_model(cfg)
    # A constant rate, as in the benchmark, which has no scheduler.
    (optimizer,), _ = TrainingStep(recipe, TINY).model.configure_optimizers()
    rates = [group["lr"] for group in optimizer.param_groups]
    configure = model.configure_optimizers

    def without_scheduler():
        (optimizer,), _ = configure()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        return optimizer

    model.configure_optimizers = without_scheduler
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = torch.utils.data.DataLoader(_Batches(step.batch), batch_size=None)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    model.on_train_batch_start = lambda batch, index: (
        torch.set_rng_state(state) if index == 0 else None
    )
    model.configure_callbacks = list  # a run's steps are seeded one by one, the benchmark's are not
    trainer.fit(model, loader)
    for name, value in step.model.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_memory_is_the_most_held_at_once():
    kept = []

    def call():
        a = torch.ones(1000)
        del a
        kept.append(torch.ones(3000))
        b = torch.ones(2000)
        del b

    assert added_bytes(call, CPU) == pytest.approx(4 * 5000, abs=200)


def test_bytes_of_shared_memory_count_once():
    x = torch.zeros(100)
    assert bytes_of([x, x[:10], x.view(10, 10), torch.zeros(5)]) == 400 + 20


def test_what_a_step_holds_is_weights_gradients_momentum_and_batch():
    step = TrainingStep("vicreg", TINY)
    step()
    weights = sum(p.numel() for p in step.model.parameters())
    buffers = list(step.model.buffers())
    batch = 2 * step.batch[1][0].numel() * 4 + 4 * 8
    expected = 3 * 4 * weights + bytes_of(buffers) + batch
    assert step.held_bytes == pytest.approx(expected, rel=1e-3)
    assert step.peak_bytes() > expected
    assert step.peak_bytes() == pytest.approx(step.peak_bytes(), rel=1e-3)


def test_the_gated_step_holds_hardly_more_than_the_dense_one():
    # At this size activations are most of what is held.
    setup = Setup(
        batch=16, resolution=32, width=16, projector=16, accelerator="cpu", optimization="sgd"
    )
    held, kept = {}, []
    for recipe in ("vicreg", "vicreg_gated"):
        step = TrainingStep(recipe, setup)
        step()
        step.optimizer.zero_grad()
        held[recipe] = added_bytes(
            lambda step=step: kept.append(step.model.training_step(step.batch, 0)), CPU
        )
    assert held["vicreg_gated"] < 1.05 * held["vicreg"]


@pytest.mark.parametrize("method", ["vicreg_any", "vicreg_distilled"])
def test_parts_are_those_that_a_method_has(method):
    assert set(part_milliseconds(TrainingStep("vicreg", TINY))) == {"optimizer"}
    parts = part_milliseconds(TrainingStep(method, TINY))
    assert set(parts) == {"gates", "masks", "losses", "optimizer"}
    assert all(ms > 0 for ms in parts.values())


@pytest.mark.parametrize(("resolution", "macs"), [(32, 703_560_448), (96, 333_103_104)])
def test_the_stem_is_that_of_the_resolution(resolution, macs):
    step = TrainingStep("vicreg_dual", replace(TINY, resolution=resolution, width=64))
    assert count_flops(step.model.backbone, (resolution, resolution)).dense == macs


def test_a_step_s_operations_are_three_times_the_forward_pass_s():
    step = TrainingStep("vicreg", TINY)
    backbone = count_flops(step.model.backbone, (16, 16))
    widths = [step.model.features_dim, 16, 16, 16]
    projector = sum(a * b for a, b in pairwise(widths))
    covariances = 16 * 16
    classifier = step.model.features_dim * 100
    macs = 2 * 4 * (3 * (backbone.dense + projector + covariances) - backbone.parts["stem"].dense)
    # The images need no gradient, nor do the features that the classifier sees.
    macs += 2 * 4 * 2 * classifier
    assert step_flops(step) == pytest.approx(2 * macs, rel=0.01)


def test_rows_compare_rounds_in_pairs():
    base = [1.0, 2.0, 4.0]
    times = {"vicreg": base, "vicreg_dual": [1.1, 2.2, 8.0]}
    memory = {"vicreg": 2**20, "vicreg_dual": 3 * 2**19}
    parts = {"vicreg": {}, "vicreg_dual": {"gates": 1.0}}
    first, second = rows(times, memory, parts, batch=64)
    assert (first["ratio"], first["memory_ratio"], first["extra_milliseconds"]) == (1, 1, 0)
    assert second["ratio"] == pytest.approx(1.1)  # of the medians it would be 1.1 too, of means 1.6
    assert second["milliseconds"] == pytest.approx(2200)
    assert second["extra_milliseconds"] == pytest.approx(200)
    assert second["images_per_second"] == pytest.approx(64 / 2.2)
    assert second["peak_memory_mib"] == pytest.approx(1.5)
    assert second["noisy"]


def test_end_to_end(tmp_path, call, monkeypatch):
    # Where bfloat16 is emulated, a product of the usual size takes seconds.
    monkeypatch.setattr(peak, "_SIZES", {"cpu": 512})
    code, printed, errors = call(
        main_benchmark_train,
        *("--batch", "4", "--resolution", "16", "--backbone-width", "4", "--projector-width", "16"),
        *("--optimization", "adamw", "--precision", "bf16-mixed", "--memory-format", "contiguous"),
        "methods=[vicreg_dual,vicreg_dual_two_encoders]",
        *("--changes", "32-true", "fused", "--seconds", "0.1", "--output", str(tmp_path)),
    )
    assert code == 0, errors
    report = json.loads((tmp_path / "benchmark_train.json").read_text())
    methods = ["vicreg", "vicreg_dual", "vicreg_dual_two_encoders"]
    methods += ["vicreg_dual, 32-true", "vicreg_dual, fused"]
    assert [row["method"] for row in report["rows"]] == methods
    for row in report["rows"]:
        assert row["ratio"] > 0
        assert row["images_per_second"] == pytest.approx(4000 / row["milliseconds"])
        assert row["peak_memory_mib"] > 0
        assert row["rounds"] >= 5
        assert 0 < row["share_of_peak"] < 1
    assert report["precision"] == "bf16-mixed"
    assert report["memory_format"] == "contiguous"
    assert report["versions"]["torch"] == torch.__version__.split("+")[0]
    assert np.isfinite(report["rows"][1]["extra_milliseconds"])
    assert "vicreg_dual_two_encoders" in printed
    assert "gates" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--methods", "byol"), "methods: got 'byol', expected one of vicreg, "),
        (("--batch", 1), "batch: got 1, expected an integer ≥ 2"),
        (("--precision", "8"), "precision: got '8'"),
        (("--memory-format", "nhwc"), "memory_format: got 'nhwc'"),
        (("--optimization", "adam"), "optimization: got 'adam'"),
        (("--accelerator", "tpu"), "accelerator: got 'tpu'"),
        (("--accelerator", "cpu", "--precision", "16-mixed"), "precision: got '16-mixed'"),
        (
            ("--changes", "faster"),
            "changes: got 'faster', expected one of 16-mixed",
        ),
        (("--changes", "16-mixed"), "precision: got '16-mixed'"),
        (("--changes", "fused"), "changes: got 'fused', expected any but fused with lars"),
        (("--seconds", 0), "seconds: got 0.0, expected a number > 0"),
        (("--threads", 5000), "threads: got 5000, expected at most"),
    ],
)
def test_mistakes_are_told_in_one_sentence(arguments, words, tmp_path, call):
    out = str(tmp_path / "out")
    code, _, errors = call(main_benchmark_train, *map(str, arguments), "--output", out)
    assert code != 0
    assert words in errors
    assert not (tmp_path / "out").exists()
