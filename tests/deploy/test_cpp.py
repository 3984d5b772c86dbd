"""`main_export format=cpp`: a folder that builds without this package, and computes the same."""

import json
import shutil
import subprocess

import numpy as np
import pytest

from solo_gating import InputError, deploy
from solo_gating.deploy.cpp import files_of
from solo_gating.main_export import main
from solo_gating_runtime.library import ENGINES

from ..support.encoders import run_config, save_run
from .test_engine_kinds import images, lively

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


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


def test_the_command_writes_either_path(tmp_path, monkeypatch):
    run = save_run(run_config(tmp_path), tmp_path)
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
    fast = deploy.compile(lively())
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
    refused = subprocess.run(
        [build / "example", tmp_path / "x.ppm", tmp_path / "x.ppm"], capture_output=True, text=True
    )
    assert refused.returncode == 1
    assert "x.ppm: got another kind of file" in refused.stderr
