"""`main_export format=cpp` and `format=sgx`: what runs without this package computes the same."""

import json
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from solo_gating import InputError, deploy, main_export
from solo_gating.deploy.cpp import files_of
from solo_gating.main_export import main
from solo_gating_runtime.library import ENGINES, supported_engines

from ..support.encoders import VAL, digits, run_config, save_run
from .test_engine_kinds import images, lively

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return save_run(run_config(folder), folder)


@pytest.fixture(scope="module")
def run_of_a_range(tmp_path_factory):
    folder = tmp_path_factory.mktemp("range")
    return save_run(run_config(folder, gating={"target_budget": [0.1, 0.9]}), folder)


@pytest.fixture
def _no_kernel(monkeypatch):
    """Files are the same whoever computes, and no test here needs to build one."""
    monkeypatch.setenv("SOLO_GATING_ISA", "pytorch")


pytestmark = pytest.mark.usefixtures("_no_kernel")


def written(files, folder):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_files(dtype):
    fast = deploy.compile(lively(), dtype=dtype)
    files = files_of(fast, MEAN, STD)
    assert {"encoder.sgx", "CMakeLists.txt", "example.cpp", "kernel/gated.h"} <= set(files)
    assert files["encoder.sgx"] == fast.to_bytes()
    cmake, example = files["CMakeLists.txt"].decode(), files["example.cpp"].decode()
    assert ("-DGATED_BFLOAT16" in cmake) == (dtype == "bfloat16")
    assert all(f"set(needs_{name}" in cmake for name in ENGINES[dtype])
    assert "kMean[] = {0.5, 0.4, 0.3}" in example
    assert "@MEAN@" not in example


def test_the_command_writes_either_path(run, tmp_path, monkeypatch):
    for path in ("gated", "dense"):
        folder = tmp_path / path
        arguments = ["--checkpoint", run.checkpoint, f"path={path}", "format=cpp"]
        monkeypatch.setattr("sys.argv", [*map(str, ["x", *arguments]), f"output={folder}"])
        main()
        assert json.loads((folder / "export.json").read_text())["path"] == path
        x = images(2)
        found = deploy.load(folder / "encoder.sgx")(x)
        assert (found == deploy.compile(run.checkpoint, path)(x)).all()
        assert (folder / "kernel" / "float32" / "engine.h").is_file()


@pytest.mark.parametrize("options", [(), ("float_stem=true",)])
def test_an_int8_file_is_what_compile_gives(options, run, tmp_path, call):
    for number, image in enumerate(digits(slice(40))[0]):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    code, out, err = call(
        main_export,
        *(f"checkpoint={run.checkpoint}", "path=gated", "format=sgx", "dtype=int8", *options),
        *(f"calibration={tmp_path}", "threshold=0.25", f"output={tmp_path / 'out'}"),
    )
    assert (code, err) == (0, "")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"encoder.sgx", "export.json"}
    fast = deploy.compile(
        run.checkpoint,
        threshold=0.25,
        dtype="int8",
        calibration=str(tmp_path),
        float_stem=bool(options),
    )
    content = (tmp_path / "out" / "encoder.sgx").read_bytes()
    assert content == fast.to_bytes()
    report = json.loads((tmp_path / "out" / "export.json").read_text())
    assert (report["dtype"], report["calibration_images"]) == ("int8", 40)
    assert (report["bytes"], report["float_stem"]) == (len(content), bool(options))
    assert report["threshold"] == 0.25
    # Of the calibration images, since there are no others.
    assert report["rounding_on"] == "40 calibration images"
    gated, dense = report["rounding"]["paths"]
    assert (gated["path"], dense["path"], gated["knn_top1"]) == ("gated", "dense", None)
    assert 0 < gated["feature_error"] < 0.2
    stem = ", the first convolution in float32" * bool(options)
    assert f"int8, calibrated on 40 images{stem}, encoder.sgx has {len(content):,} bytes" in out
    assert "what rounding changed, on 40 calibration images:\n40 images, scales from 40\n" in out


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_rounding_is_measured_on_validation_images(dtype, run_of_a_range, tmp_path, call):
    run = run_of_a_range
    options = ("path=gated", "format=sgx", f"dtype={dtype}", "budget=0.2", "evaluate=true")
    code, out, err = call(main_export, f"checkpoint={run.checkpoint}", *options, "output=out")
    assert (code, err) == (0, "")
    report = json.loads((tmp_path / "out" / "export.json").read_text())
    # As on a CPU without instructions for bfloat16.
    assert report["computes"] == ("int8" if dtype == "int8" else "float32")
    assert ("bfloat16, which is stored, and computed in float32" in out) == (dtype != "int8")
    assert "what rounding changed, on 31 validation images:" in out
    assert report["budget"] == 0.2
    assert report.get("calibration_images") == (96 if dtype == "int8" else None)
    fast = deploy.load(tmp_path / "out" / "encoder.sgx")
    assert (fast.dtype, fast.path, fast.budget) == (dtype, "gated", 0.2)

    # The validation images as training normalises them, with 1-NN among themselves.
    mean, std = (torch.tensor(report[key]).view(3, 1, 1) for key in ("mean", "std"))
    levels, labels = digits(VAL)
    x = (torch.from_numpy(levels).permute(0, 3, 1, 2) / 255 - mean) / std
    assert report["rounding_on"] == "31 validation images"
    found = report["rounding"]["paths"][0]
    backbone = run.model.backbone
    with torch.no_grad(), backbone.path("gated", budget=0.2):
        expected = backbone(x)
    features = fast(x)
    error = float((features - expected).norm() / expected.norm())
    assert found["feature_error"] == pytest.approx(error, rel=1e-2)
    distances = torch.cdist(features.double(), features.double()).fill_diagonal_(torch.inf)
    hits = torch.from_numpy(labels[distances.argmin(dim=1)] == labels)
    assert found["knn_top1"] == pytest.approx(100 * float(hits.double().mean()))
    assert "what rounding changed, on 31 validation images:" in out
    (head,) = [line for line in out.splitlines() if line.startswith(f"float32 → {dtype}")]
    assert head.endswith("1-NN, %")


def test_a_float_file_holds_the_dial_and_says_its_size(run, tmp_path, call):
    options = ("path=gated", "format=sgx", "threshold=-0.5")
    code, out, _ = call(main_export, f"checkpoint={run.checkpoint}", *options, "output=out")
    assert code == 0
    assert deploy.load(tmp_path / "out" / "encoder.sgx").threshold == -0.5
    report = json.loads((tmp_path / "out" / "export.json").read_text())
    assert (report["dtype"], report["threshold"]) == ("float32", -0.5)
    assert "rounding" not in report
    assert f"float32, encoder.sgx has {report['bytes']:,} bytes" in out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            "format=onnx dtype=int8",
            "dtype: got int8 for format=onnx, expected format=cpp or sgx",
        ),
        ("float_stem=true", "float_stem: got one for format=torch, expected format=cpp or sgx"),
        (
            "format=sgx float_stem=true",
            "float_stem: got one for dtype=float32, expected with dtype=int8",
        ),
        (
            "format=sgx dtype=int8",
            "calibration: missing, dtype=int8 needs images; expected a folder, or evaluate=true for "
            "those of pre-training, or others, as with data.train_path=...",
        ),
        (
            "format=sgx dtype=bfloat16 calibration=.",
            "calibration: got a folder for dtype=bfloat16, expected onnx-int8 or openvino-int8, or "
            "dtype=int8 with cpp or sgx",
        ),
        ("format=sgx threshold=1", "threshold: got 1 for the dense path, expected path=gated"),
        (
            "format=sgx path=gated policy=policy.json budget=0.2",
            "budget: got 0.2 with a policy, expected the policy's alone",
        ),
        (
            "format=cpp path=gated budget=0.2",
            "budget: got 0.2, the network's gates are told no budget; expected null",
        ),
        ("format=cpp path=gated threshold=nan", "threshold: got nan, expected a number"),
    ],
)
def test_a_mistake_is_one_sentence(options, sentence, run, tmp_path, call):
    code, out, err = call(
        main_export, f"checkpoint={run.checkpoint}", *options.split(), "output=out"
    )
    assert (code, out, err) == (2, "", f"error: {sentence}\n")
    assert not (tmp_path / "out").exists()


def test_a_budget_outside_of_the_range_is_refused(run_of_a_range, call):
    options = (f"checkpoint={run_of_a_range.checkpoint}", "path=gated", "format=sgx", "budget=0.95")
    code, _, err = call(main_export, *options, "output=out")
    assert code == 2
    assert err.startswith("error: budget: got 0.95, expected a number from 0.1 to 0.9, the range")


def test_statistics_of_the_budget_are_exported(run_of_a_range, call, tmp_path):
    def exported(name, *options):
        code, out, err = call(
            main_export,
            *(f"checkpoint={run_of_a_range.checkpoint}", "path=gated", "format=sgx", "budget=0.3"),
            *("evaluate=true", f"output={name}", *options),
        )
        assert code == 0, err
        report = json.loads((tmp_path / name / "export.json").read_text())
        assert f"{report['flops']:,.0f} FLOPs per image, {report['flops_cut']:.1%} fewer" in out
        assert 0 < report["flops"] < report["dense_flops"]
        assert report["knn_top1_before"] == report["knn_top1_after"]
        return report, (tmp_path / name / "encoder.sgx").read_bytes()

    own, recalibrated = exported("own"), exported("new", "recalibrate=16")
    assert "recalibrate" not in own[0]
    assert recalibrated[0]["recalibrate"] == 16
    assert own[1] != recalibrated[1]


def test_what_only_pytorch_runs_has_no_cpp():
    fast = deploy.compile(lively(), engine="pytorch")
    fast._encoder.backend.is_compilable = False
    with pytest.raises(InputError, match="encoder: got one that only PyTorch can run"):
        files_of(fast, MEAN, STD)


def output(*command, **options):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("cmake"), reason="needs CMake")
@pytest.mark.parametrize("engine", ["", "portable"])
def test_it_builds_and_computes_the_same(engine, tmp_path):
    fast = deploy.compile(lively(), engine=supported_engines()[0])
    folder, build = written(files_of(fast, MEAN, STD), tmp_path / "out"), tmp_path / "build"
    output("cmake", "-S", folder, "-B", build, f"-DGATED_ENGINE={engine}")
    output("cmake", "--build", build)

    def features(*arguments):
        return np.array(
            output(build / "example", folder / "encoder.sgx", *arguments).split(), float
        )

    levels = np.random.default_rng(0).integers(0, 256, (13, 18, 3), np.uint8)
    (tmp_path / "x.ppm").write_bytes(b"P6\n# a comment\n18 13\n255\n" + levels.tobytes())
    x = (levels.transpose(2, 0, 1)[None] / 255 - np.reshape(MEAN, (1, 3, 1, 1))) / np.reshape(
        STD, (1, 3, 1, 1)
    )
    x = x.astype(np.float32)
    np.testing.assert_allclose(features(tmp_path / "x.ppm"), fast(x)[0], rtol=1e-3, atol=1e-4)
    x.tofile(tmp_path / "x.raw")
    for threshold in (0.0, 0.7):
        fast.threshold = threshold
        found = features(tmp_path / "x.raw", 13, 18, threshold)
        np.testing.assert_allclose(found, fast(x)[0], rtol=1e-4, atol=1e-5)

    def refused(*arguments):
        done = subprocess.run([build / "example", *arguments], capture_output=True, text=True)
        assert done.returncode == 1
        return done.stderr

    assert "x.ppm: got another kind of file" in refused(tmp_path / "x.ppm", tmp_path / "x.ppm")
    one = (folder / "encoder.sgx", tmp_path / "x.ppm")
    assert "abc: expected a number" in refused(*one, "abc")
    assert "cannot be told this budget" in refused(*one, "0", "0.3")

    told = deploy.compile(
        lively(budget_range=[0.1, 0.9]), budget=0.3, engine=supported_engines()[0]
    )
    (folder / "encoder.sgx").write_bytes(told.to_bytes())
    saved = features(tmp_path / "x.raw", 13, 18, "0")  # the budget stays
    np.testing.assert_allclose(saved, told(x)[0], rtol=1e-4, atol=1e-5)
    told.budget = 0.8
    found = features(tmp_path / "x.raw", 13, 18, "0", "0.8")
    np.testing.assert_allclose(found, told(x)[0], rtol=1e-4, atol=1e-5)
    assert "cannot be told this budget" in refused(*one, "0", "7")
