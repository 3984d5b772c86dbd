"""The entry points, as processes of their own where that is what matters."""

import json
import subprocess
import sys

import pytest

from solo_gating import main_flops, main_pretrain
from solo_gating.__main__ import main as run_script
from solo_gating.config.compose import config_names

from .support.helpers import ROOT, explanation_of, package_environment, write_images


def start(*arguments, cwd):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=package_environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def assert_one_sentence(code, stderr, *parts):
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert code != 0
    assert "Traceback" not in stderr
    assert len(lines) == 1, stderr
    assert all(part in lines[0] for part in parts), lines[0]


@pytest.mark.parametrize("arguments", [[], ["seed=3"]])
def test_without_a_config_the_configs_are_named(arguments, call):
    code, _, stderr = call(main_pretrain, *arguments)
    assert_one_sentence(code, stderr, "--config-name", "vicreg_dual_cifar100")


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("gating.foo=1", ["gating.foo: no such key", "target_budget"]),
        ("+gating.foo=1", ["gating.foo: no such key"]),
        ("gating.target_budget=2", ["gating.target_budget: got 2", "(0, 1]"]),
        ("method=vicreg_tripple", ["method: got 'vicreg_tripple'", "vicreg_dual"]),
        ("backbone.name=resnet18", ["backbone.name: got 'resnet18'", "resnet18_gated"]),
        ("data.train_path=absent.npz", ["data.train_path: no file matches 'absent.npz'"]),
        ("resume_from_checkpoint=absent", ["resume_from_checkpoint: 'absent' is not a file"]),
    ],
)
def test_a_mistake_ends_with_one_sentence(argument, parts, call, tmp_path):
    images = write_images(tmp_path / "images.npz", 512)
    data = [f"data.{split}_path={images}" for split in ("train", "val")]
    config = ["--config-name", "vicreg_dual_cifar100", "data.format=npz"]
    code, _, stderr = call(main_pretrain, *config, *data, argument)
    assert_one_sentence(code, stderr, *parts)
    assert list(tmp_path.iterdir()) == [images]


@pytest.mark.parametrize("module", [main_pretrain, main_flops])
def test_help_explains_the_command_and_lists_the_configs(module, call):
    code, stdout, _ = call(module, "--help")
    assert code == 0
    assert explanation_of(module) in stdout
    assert f"python -m {module.__name__} --config-name" in stdout
    assert set(config_names()) - {"run"} <= set(stdout.split())


def test_help_beside_a_config_prints_it(call):
    code, stdout, _ = call(main_pretrain, "--config-name", "vicreg_dual_cifar100", "--help")
    assert code == 0
    assert "target_budget: 0.5" in stdout


def test_a_process_that_fails_says_so_and_leaves_nothing_behind(tmp_path):
    result = start(  # as a file, as solo-learn's scripts are
        ROOT / "solo_gating/main_pretrain.py",
        "--config-name=vicreg_dual_cifar100",
        "data.format=npz",
        "data.train_path=absent.npz",
        cwd=tmp_path,
    )
    assert_one_sentence(result.returncode, result.stderr, "data.train_path: no file matches")
    assert list(tmp_path.iterdir()) == []


def test_a_script_that_does_not_exist_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["solo_gating", "absent.py"])
    with pytest.raises(SystemExit, match=r"error: 'absent.py' is not a file"):
        run_script()


@pytest.mark.parametrize(
    ("name", "dense"),
    [
        ("vicreg_dual_cifar100", 703_560_448),
        ("vicreg_dual_stl10", 333_103_104),
        ("simsiam_gated_imagenet100", 1_813_561_344),
        ("vicreg_imagenet100", 1_813_561_344),
    ],
)
def test_main_flops_writes_the_reference_figures(name, dense, call, tmp_path):
    code, stdout, _ = call(main_flops, "--config-name", name, f"flops.output={tmp_path}")
    assert code == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["flops"]["dense"] == dense
    assert f"{dense:,}" in stdout
    assert len(metrics["blocks"]) == 8
    assert sum(block["dense"] for block in metrics["blocks"]) + metrics["flops"]["stem"] == dense
    if name == "vicreg_imagenet100":
        assert "gated" not in metrics["flops"]
        return
    assert metrics["parameters"]["gates"] == 241_376
    assert metrics["flops"]["gates"] == 240_640
    assert metrics["flops"]["share"] == pytest.approx(0.5)
    assert f"{241_376:,}" in stdout
