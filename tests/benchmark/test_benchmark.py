"""What main_benchmark measures: encoders at wanted densities, fair turns, rows that add up."""

import copy
import importlib.metadata
import importlib.util
import json
import os
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from solo_gating import InputError
from solo_gating.benchmark import timing
from solo_gating.benchmark.inference import engines as made_ready
from solo_gating.benchmark.inference import machine
from solo_gating.benchmark.inference import measure as measuring
from solo_gating.benchmark.inference.advice import advice
from solo_gating.benchmark.inference.cases import (
    Model,
    Network,
    density_of,
    gated_case,
    random_encoder,
    random_images,
    with_random_gates,
    with_threshold,
)
from solo_gating.benchmark.inference.engines import DENSE, Conditions, UnavailableError
from solo_gating.benchmark.inference.measure import ROUNDED, Contender, check, rows
from solo_gating.benchmark.machine import torch_threads
from solo_gating.deploy.dense import dense_resnet
from solo_gating.flops import count_flops
from solo_gating.main_benchmark import main

from ..support.encoders import run_config, save_run, tiny_backbone


def masks_of(backbone, images):
    """Zeros and ones, B × channels, of each block."""
    with torch.no_grad(), backbone.path("gated") as passes:
        backbone(images)
    return passes[-1].masks


def logits_of(backbone, images):
    """Every gate's logits, one after another."""
    logits = []
    for block in backbone.gated_blocks:
        block.gate.expand.register_forward_hook(lambda m, x, y: logits.append(y.flatten()))
    masks_of(backbone, images)
    return torch.cat(logits)


@pytest.fixture(scope="module")
def images():
    return random_images(64, 16, seed=3)


@pytest.fixture(scope="module")
def encoder(images):
    return random_encoder("resnet18_gated", 16, "cifar", images, seed=3)


@pytest.fixture(scope="module")
def dense(encoder, images):
    return Network(Model(dense_resnet(encoder), images), images[:3])


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("density", [0.05, 0.3, 0.75, 1.0])
def test_random_gates_compute_the_wanted_share_and_decide_by_image(encoder, images, density, batch):
    backbone = with_random_gates(encoder, images, batch, density, seed=0)
    computed = sum(int(mask.sum()) for mask in masks_of(backbone, images[:batch]))
    total = batch * sum(block.conv1.out_channels for block in backbone.gated_blocks)
    # What one block misses the next one makes up for; the last one may stay off by its own gap.
    assert computed / total == pytest.approx(density, abs=2 / total + 0.002)

    for block, mask in zip(backbone.gated_blocks, masks_of(backbone, images), strict=True):
        channels, counts = mask.shape[1], mask.sum(0)
        on = round(channels * max(density / 3, 2 * density - 1))
        assert int((counts == len(images)).sum()) >= on
        some = (counts > 0) & (counts < len(images))
        most = max(1, round(channels * min(4 * density / 3, 2 - 2 * density)))
        assert int(some.sum()) <= most
        if density < 1:
            # Not the same channels for all images; among few, chance may have it so.
            assert some.any() or most < 6
        assert block.gate.threshold == 0


def test_random_gates_leave_the_dense_path_as_it_is_and_stay_in_range(encoder, images):
    backbone = with_random_gates(encoder, images, 8, 0.3, seed=0)
    assert torch.equal(backbone(images[:4]), encoder(images[:4]))
    with torch.no_grad(), backbone.path("gated"):
        gated = backbone(images)
    for features in (gated, encoder(images)):
        assert features.isfinite().all()
        assert 0.01 < features.std() < 100


def test_two_encoders_can_be_benchmarked(images):
    backbone = random_encoder("resnet18_two_encoders", 8, "cifar", images, seed=0)
    backbone = with_random_gates(backbone, images, 4, 0.5, seed=0)
    masks = torch.cat(masks_of(backbone, images[:4]), dim=1)
    assert float(masks.mean()) == pytest.approx(0.5, abs=0.01)


def test_a_threshold_gives_the_share_and_lies_between_logits(images):
    backbone = tiny_backbone(width=8)
    for density in (0.2, 0.6):
        turned = with_threshold(backbone, images[:16], density)
        masks = masks_of(turned, images[:16])
        assert float(torch.cat(masks, dim=1).mean()) == pytest.approx(density, abs=0.01)
        every = logits_of(turned, images[:16]).double()
        above = float((every - turned.threshold).clamp_min(0)[every >= turned.threshold].min())
        below = float((turned.threshold - every)[every < turned.threshold].min())
        assert above == pytest.approx(below, rel=1e-3, abs=1e-7)
    assert backbone.threshold == 0


def test_the_ceiling_comes_from_the_masks_and_static_networks_are_checked(encoder, images):
    backbone = with_random_gates(encoder, images, 4, 0.3, seed=0)
    case = gated_case(backbone, images, 4, 0.3)
    flops = count_flops(backbone, (16, 16))
    spent = []
    for image in range(4):  # by the documented formula, block by block
        stem, *parts = flops.parts.values()
        cost = stem.dense
        for part, mask in zip(parts, case.masks, strict=True):
            conv1, conv2, shortcut = (conv.macs for conv in part.convolutions)
            share = float(mask[image].mean())
            cost += shortcut + part.decisions + share * (conv1 + conv2)
        spent.append(cost)
    assert case.share(case.masks) == pytest.approx(np.mean(spent) / flops.dense)
    torch.testing.assert_close(case.static.features, case.features, rtol=1e-4, atol=1e-4)
    used = torch.cat(masks_of(backbone, images), dim=1).amax(0).mean()
    assert density_of(case.masks) < float(used) <= case.static_density(case.static) < 1
    assert case.static_share(case.static) > case.static_share(case.static_without_gates)


def test_pytorch_computes_with_the_masks_that_another_engine_decided_on(encoder, images):
    backbone = with_random_gates(encoder, images, 4, 0.3, seed=0)
    case = gated_case(backbone, images, 4, 0.3)
    torch.testing.assert_close(case.features_with(case.masks), case.features)
    every = tuple(torch.ones_like(mask, dtype=torch.bool) for mask in case.masks)
    backbone.threshold = -1e9  # all channels
    with torch.no_grad(), backbone.path("gated"):
        torch.testing.assert_close(case.features_with(every), backbone(images[:4]))
    assert not case.features_with(every).allclose(case.features)


@pytest.mark.parametrize(
    ("name", "dtype"), [key for key in DENSE if key not in {("compile", "float32")}]
)
def test_engines_compute_the_dense_features(encoder, dense, images, name, dtype):
    if name != "torch" and not importlib.util.find_spec(name):
        pytest.skip(f"{name} is not installed")
    if dtype == "bfloat16" and not machine.computes_bfloat16():
        pytest.skip("no instructions for bfloat16")
    with torch_threads(1):
        found = DENSE[name, dtype](dense, Conditions(1, time.perf_counter))()
    found = found.float() if isinstance(found, torch.Tensor) else torch.from_numpy(found.copy())
    expected = encoder(images[:3])
    error = float((found - expected).norm() / expected.norm())
    if dtype == "float32":
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    else:
        assert 1e-4 < error < ROUNDED[dtype] / 2  # it is rounded, and leaves room to the limit


def test_bfloat16_is_taken_from_cpus_that_have_it_only(dense, monkeypatch):
    monkeypatch.setattr(made_ready, "computes_bfloat16", lambda: False)
    for name in ("torch", "openvino"):
        if importlib.util.find_spec(name):
            with pytest.raises(UnavailableError, match="no instructions for bfloat16"):
                DENSE[name, "bfloat16"](dense, Conditions(1, time.perf_counter))
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert not machine.computes_bfloat16()


class Machine:
    """A clock, and engines that take as long as they are told, on a machine that slows down."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def clock(self):
        return self.now

    def engine(self, name, cost):
        def call():
            self.calls.append(name)
            self.now += cost(len(self.calls)) * (1 + self.now / 10)

        return call


def test_turns_are_paired_shuffled_and_of_as_many_calls():
    m = Machine()
    calls = {"a": m.engine("a", lambda n: 0.03), "b": m.engine("b", lambda n: 0.001)}
    times = timing.interleaved(calls, seconds=10, clock=m.clock)
    rounds = len(times["a"])
    assert len(times["b"]) == rounds > timing.LEAST_ROUNDS
    # Ten calls to a turn, which make a turn of b long enough, and one to warm up: of both.
    assert m.calls.count("a") == m.calls.count("b") == 2 + 11 * rounds
    # The order varies: some rounds end with the engine that the next one starts with.
    assert "a" * 22 in "".join(m.calls)
    assert "a" * 11 + "b" * 11 + "a" * 11 in "".join(m.calls)
    # The machine gets slower, and the ratio does not notice.
    assert times["a"][-1] > 1.5 * times["a"][0]
    assert timing.paired_ratio(times["a"], times["b"]) == pytest.approx(30, rel=0.05)


def test_with_little_time_turns_are_shorter_rather_than_rounds_fewer():
    m = Machine()
    calls = {"a": m.engine("a", lambda n: 0.03), "b": m.engine("b", lambda n: 0.0001)}
    times = timing.interleaved(calls, seconds=1, clock=m.clock)
    assert m.calls.count("a") == m.calls.count("b")
    assert timing.LEAST_ROUNDS < len(times["a"]) <= 22


def test_long_calls_are_not_warmed_up_and_get_five_rounds():
    m = Machine()
    times = timing.interleaved({"a": m.engine("a", lambda n: 1.0)}, seconds=0.1, clock=m.clock)
    assert len(times["a"]) == timing.LEAST_ROUNDS == len(m.calls) - 1
    # Beside a short one they are: all turns have as many calls.
    m = Machine()
    calls = {"a": m.engine("a", lambda n: 1.0), "b": m.engine("b", lambda n: 0.01)}
    timing.interleaved(calls, seconds=0.1, clock=m.clock)
    assert m.calls.count("a") == 1 + 2 * timing.LEAST_ROUNDS == m.calls.count("b") - 1


def test_the_quickest_is_found_though_its_first_call_is_slow():
    m = Machine()
    slow_start = m.engine("a", lambda n: 5.0 if n == 1 else 0.01)
    calls = {"a": slow_start, "b": m.engine("b", lambda n: 0.02)}
    assert timing.quickest(calls, m.clock) == "a"


def test_noise_is_seen():
    steady = [1.0, 1.01, 0.99, 1.0, 1.02, 1.0]
    jumpy = [1.0, 2.0, 1.0, 2.0, 1.0, 2.0]
    assert timing.spread([1, 2, 3, 4, 5]) == pytest.approx(2 / 3)
    assert not timing.is_noisy(steady, [2 * t for t in steady])
    assert timing.is_noisy(steady, jumpy)
    assert timing.is_noisy(jumpy, steady)


def contenders():
    """Dense engines in three precisions, and ours."""
    dense = [
        Contender("torch", "float32", "torch", print, baseline=True),
        Contender("openvino", "float32", "openvino", print, baseline=True),
        Contender("openvino", "int8", "openvino", print, baseline=True),
    ]
    ours = [
        Contender("dynamic", "float32", "avx2", print, 0.25, 0.3, 0.31),
        Contender("dynamic", "int8", "avx2", print, 0.2, 0.3, 0.3, more={"flipped_masks": 0.07}),
        Contender("dynamic", "bfloat16", "avx2", print, 0.25, 0.3, 0.31),
    ]
    return dense + ours


# The machine is twice as slow in the second round; in the third that holds for a dense one alone.
TIMES = [[9, 18, 9], [4, 8, 8], [2, 4, 2], [2, 4, 2], [1, 2, 1], [2, 4, 2]]


def test_rows_add_up():
    torch_row, openvino, eight, dynamic, ours, half = rows(contenders(), TIMES)
    assert (torch_row["baseline"], torch_row["ceiling"]) == ("openvino", 1)
    assert openvino["speedup"] == openvino["efficiency"] == 1
    assert dynamic["speedup"] == 2
    assert dynamic["ceiling"] == 4
    assert dynamic["flops_cut"] == 0.75
    assert dynamic["efficiency"] == 0.5
    assert (dynamic["milliseconds"], dynamic["baseline_milliseconds"]) == (2000, 8000)
    # Against the same precision, and against float32.
    assert (eight["baseline_dtype"], eight["speedup"]) == ("int8", 1)
    assert (ours["baseline"], ours["baseline_dtype"]) == ("openvino", "int8")
    assert (ours["speedup"], ours["speedup_over_float32"]) == (2, 4)
    assert (ours["ceiling"], ours["efficiency"], ours["flipped_masks"]) == (5, 0.4, 0.07)
    # Nothing dense in bfloat16: then float32, and the row says so.
    assert (half["baseline_dtype"], half["speedup"]) == ("float32", 2)


def test_advice_names_what_is_fastest_and_what_in_float32():
    found = [{**row, "noisy": False} for row in rows(contenders(), TIMES)]
    assert advice(found) == (
        "Fastest here: openvino in int8 for the dense encoder (2000.00 ms); at density 0.3 ours in "
        "int8, 2.0× as fast.\n"
        "Fastest in float32: openvino in float32 for the dense encoder (8000.00 ms); at density 0.3 "
        "ours in float32, 4.0× as fast."
    )
    slow = [row for row in found if (row["engine"], row["dtype"]) != ("dynamic", "int8")]
    assert "at density 0.3 either, ours in float32 being as fast" in advice(slow)
    slow = [{**row, "noisy": True} for row in slow if row["dtype"] != "bfloat16"]
    slow[-1]["milliseconds"] = 3000
    assert "at density 0.3 the dense one, as ours in float32 takes 1.5× its time" in advice(slow)
    assert "too noisy" in advice(slow)
    far = [{**row, "realised_density": 0.42} for row in found]
    assert "at density 0.3 (0.42, the nearest that its gates give) ours in int8" in advice(far)


class RoundingEngine:
    """Gates whose logits rounding has shifted."""

    budget, engine, dtype, computes = None, "avx2", "int8", "int8"

    def __init__(self, backbone, shift, path="gated"):
        self.backbone, self.shift, self.path, self.threshold = backbone, shift, path, 0.0

    def features_and_masks(self, images):
        self.backbone.threshold = self.threshold - self.shift
        with torch.no_grad(), self.backbone.path(self.path) as passes:
            return self.backbone(images), passes[-1].masks

    def __call__(self, images):
        return self.features_and_masks(images)[0]

    def report(self, images):
        return f"report of {len(images)} images"


def test_the_density_is_met_by_an_engines_own_masks(encoder, images):
    backbone = with_random_gates(encoder, images, 8, 0.3, seed=0)
    engine = RoundingEngine(backbone, 0.2)
    assert density_of(engine.features_and_masks(images[:8])[1]) > 0.32
    threshold = measuring._turn(engine, images[:8], 0.3)
    assert engine.threshold == threshold
    assert density_of(engine.features_and_masks(images[:8])[1]) == pytest.approx(0.3, abs=1e-3)


def test_our_int8_engine_is_calibrated_turned_and_reported(encoder, images, dense, monkeypatch):
    backbone = with_random_gates(encoder, images, 3, 0.3, seed=0)
    case = measuring.Case(dense, (gated_case(backbone, images, 3, 0.3),), others=images[:20])
    real, calibrated = measuring.compile_encoder, []

    def compile(source, path="gated", *, dtype="float32", calibration=None):
        assert (calibration is not None) == (dtype == "int8")
        if dtype == "float32":
            return real(source, path, engine="pytorch")
        if few:
            raise InputError("calibration: got 3 images, expected at least 32")
        calibrated.append(len(calibration))
        return RoundingEngine(copy.deepcopy(source), 0.2, path)

    monkeypatch.setattr(measuring, "compile_encoder", compile)

    def measured():
        said, conditions = [], Conditions(1, time.process_time)
        found = measuring.measure(
            case, ("torch", "ours"), ("float32", "int8"), conditions, 0.1, said.append
        )
        return {(row["engine"], row["dtype"]): row for row in found}, said

    few = False
    found, said = measured()
    assert calibrated == [64, 64]
    assert said == ["report of 20 images"]
    row = found["dynamic", "int8"]
    assert row["realised_density"] == pytest.approx(0.3, abs=1e-3)
    assert row["threshold"] == pytest.approx(0.2, abs=0.1)
    assert 0.01 < row["flipped_masks"] < 0.3
    assert row["feature_difference"] < 1e-5  # with its own masks
    assert found["dense", "int8"]["baseline_dtype"] == "float32"

    # An engine that cannot be had is left out, and that is said.
    few = True
    found, said = measured()
    assert ("dense", "float32") in found
    assert ("dense", "int8") not in found
    assert said == ["ours in int8 is left out: calibration: got 3 images, expected at least 32"]


def test_wrong_features_are_an_error_that_names_the_engine():
    expected = torch.arange(1.0, 201).reshape(100, 2)
    check("fast", expected * 1.0005, expected)
    one_flip = expected.clone()
    one_flip[7] += 30
    check("dynamic", one_flip, expected, rare=True)
    with pytest.raises(InputError, match="engines: fast gives other features"):
        check("fast", one_flip, expected)
    for wrong in (expected * 1.01, expected * np.nan):
        with pytest.raises(InputError, match="engines: dynamic gives other features"):
            check("dynamic", wrong, expected, rare=True)
    rounded = measuring._checked("fast", "int8", expected * 1.01, expected)
    assert rounded["feature_difference"] == pytest.approx(0.01, rel=1e-4)
    for wrong in (expected.flip(1).flip(0), expected * np.nan):
        with pytest.raises(InputError, match="engines: fast in int8 gives other features"):
            measuring._checked("fast", "int8", wrong, expected)


def test_where_rounding_changes_much_int8_is_compared_bit_by_bit(encoder, images):
    compile = measuring.compile_encoder
    engine = compile(encoder, "dense", dtype="int8", calibration=images, engine="pytorch")
    own = partial(measuring._imitated, engine, images)
    found, far = engine(images[:3]), -encoder(images[:3])
    relative = measuring._checked("dense", "int8", found, far, own)["feature_difference"]
    assert relative > ROUNDED["int8"]
    found[0, 0] = found[0, 0].nextafter(torch.tensor(np.inf))
    with pytest.raises(InputError, match="engines: dense in int8 gives other features"):
        measuring._checked("dense", "int8", found, far, own)


def test_an_instruction_set_restarts_the_process_once(monkeypatch):
    seen = []
    monkeypatch.setattr(os, "execve", lambda *arguments: seen.append(arguments))
    machine.restart_restricted_to("portable")
    (program, arguments, environment) = seen.pop()
    assert program == arguments[0] == sys.executable
    assert environment["SOLO_GATING_ISA"] == "portable"
    assert environment["ONEDNN_MAX_CPU_ISA"] == "SSE41"
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    machine.restart_restricted_to("portable")
    assert not seen
    with pytest.raises(InputError, match="isa: got 'sse9'"):
        machine.restart_restricted_to("sse9")


# The entry point


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["main_benchmark", *map(str, arguments)])
    main()


def test_a_random_encoder_end_to_end(tmp_path, monkeypatch, capsys):
    call(
        monkeypatch,
        *("random=true", "width=8", "densities=0.3", "batch=[1,3]", "--resolution", 16),
        *("--seconds", 0.2, "--engines", "torch", "ours", "static", f"output={tmp_path}"),
        *("clock=cpu", "dtypes=[float32,bfloat16]"),
    )
    report = json.loads((tmp_path / "benchmark.json").read_text())
    assert isinstance(report["cpu"], str)
    assert report["versions"]["torch"] == importlib.metadata.version("torch")
    ours = ["dense", "dynamic", "dynamic", "dynamic on static"]
    native = ["dense"] * any(row["runtime"] == "avx512_bf16" for row in report["rows"])
    expected = ["torch", *["torch"] * machine.computes_bfloat16(), *native, *ours]
    assert sorted(row["engine"] for row in report["rows"]) == sorted(2 * expected)
    assert len(report["advice"]) == 2
    assert report["clock"] == "cpu"
    for row in report["rows"]:
        assert (row["resolution"], row["threads"]) == (16, 1)
        assert row["batch"] in (1, 3)
        assert row["milliseconds"] > 0
        assert row["baseline"] == "torch"
        assert row["efficiency"] == pytest.approx(row["speedup"] / row["ceiling"])
        assert row["ceiling"] == pytest.approx(1 / (1 - row["flops_cut"]))
        assert row["realised_density"] == pytest.approx(row["density"], abs=0.01)
        assert (row["density"] == 1) == (row["engine"] in ("torch", "dense"))
        assert isinstance(row["noisy"], bool)
        if row["dtype"] == "bfloat16":
            assert 0 < row["feature_difference"] < 0.5
            assert row["engine"] != "dynamic" or 0 <= row["flipped_masks"] < 0.1
    assert Image.open(tmp_path / "benchmark.png").size[0] > 600
    printed = capsys.readouterr().out
    assert report["cpu"] in printed
    assert "16×16 pixels, batch 3, threads: 1" in printed
    assert printed.count("\nFastest here: ") == 2
    assert ("not to be trusted" in printed) == any(row["noisy"] for row in report["rows"])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    return save_run(run_config(folder), folder)


def test_a_checkpoint_end_to_end(run, tmp_path, monkeypatch):
    common = ("--checkpoint", run.checkpoint, "--seconds", 0.1, "--engines", "torch", "ours")
    common += ("--dtypes", "float32")
    call(monkeypatch, *common, "--output", tmp_path / "own")
    own = json.loads((tmp_path / "own/benchmark.json").read_text())
    assert own["images"] == "random"
    dynamic = next(row for row in own["rows"] if row["engine"] == "dynamic")
    assert dynamic["density"] is None
    assert dynamic["resolution"] == 16

    data = f"data.val_path={run.folder / 'val.npz'}"
    call(monkeypatch, *common, "--batch", 8, "--densities", 0.4, "--output", tmp_path, data)
    turned = json.loads((tmp_path / "benchmark.json").read_text())
    assert turned["images"] == "validation"
    dynamic = next(row for row in turned["rows"] if row["engine"] == "dynamic")
    assert dynamic["realised_density"] == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize("gate", ["fbs", "cgnet"])
def test_a_checkpoint_whose_gates_do_more_than_mask(gate, tmp_path, monkeypatch, capsys):
    """Those that the engine runs are timed, but for static networks, which they have not."""
    cfg = run_config(tmp_path, gating={"gate": gate, "target_budget": 0.5})
    saved = save_run(cfg, tmp_path)
    common = ("--checkpoint", saved.checkpoint, "--seconds", 0.1, "--output", tmp_path / "out")
    common += ("--engines", "torch", "ours", "static", "--dtypes", "float32", "bfloat16")
    if gate == "cgnet":
        with pytest.raises(SystemExit):
            call(monkeypatch, *common)
        assert "which no engine here makes faster" in capsys.readouterr().err
        return
    call(monkeypatch, *common)
    assert "static is left out" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out/benchmark.json").read_text())["rows"]
    assert {row["engine"] for row in rows} == {"torch", "dense", "dynamic"}
    for row in rows:
        if row["engine"] == "dynamic":
            assert row["realised_density"] == pytest.approx(0.5, abs=0.01)
            assert row.get("feature_difference", 0) < 0.1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "checkpoint, random: got neither"),
        (("--random", "--checkpoint", "x.ckpt"), "checkpoint, random: got both"),
        (("--random", "--densities", "0"), "densities: got 0.0, expected a number in (0, 1]"),
        (("--random", "--densities", "0.3", "1.5"), "densities: got 1.5"),
        (("--random", "--engines", "tensorflow"), "engines: got 'tensorflow'"),
        (("--random", "--engines", "ours"), "engines: got none to compare with"),
        (("--random", "--threads", "4096"), "threads: got 4096, expected at most"),
        (("--random", "--batch", "0"), "batch: got 0"),
        (("--random", "--seconds", "0"), "seconds: got 0.0"),
        (("--random", "--dtypes", "int8"), "dtypes: got int8, expected float32, too"),
        (("--random", "--dtypes", "float32", "float8"), "dtypes: got 'float8'"),
        (("--random", "--clock", "sun"), "clock: got 'sun'"),
        (("--random", "--clock", "cpu", "--threads", "2"), "clock: got cpu with 2 threads"),
        (("--random", "--width", "4"), "width: got 4"),
        (("--random", "--backbone", "vgg"), "backbone: got 'vgg'"),
        (("--random", "--stem", "none"), "stem: got 'none'"),
        (("--checkpoint", "x.ckpt", "--width", "8"), "width: got 8 for a checkpoint"),
        (("--checkpoint", "nowhere.ckpt"), "nowhere.ckpt"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, monkeypatch, capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, *arguments, "--output", tmp_path / "out")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_gates_and_too_few_images_are_refused(
    run, tmp_path, monkeypatch, capsys
):
    dense = save_run(run_config(tmp_path / "dense", "vicreg"), tmp_path / "dense")
    data = f"data.val_path={run.folder / 'val.npz'}"
    for arguments, words in (
        (("--checkpoint", dense.checkpoint), "has no gates"),
        (("--checkpoint", run.checkpoint, "--batch", 500), "batch: got 500, there are 31"),
    ):
        overrides = (data,) if "--batch" in arguments else ()
        with pytest.raises(SystemExit):
            call(monkeypatch, *arguments, "--output", tmp_path / "out", *overrides)
        assert words in capsys.readouterr().err
