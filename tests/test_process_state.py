"""One run, one state: a second run in the process sees nothing of the first."""

import logging
import os
import random
import signal
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from solo_gating.__main__ import main as run_script
from solo_gating.main_pretrain import pretrain
from solo_gating.process_state import process_state_kept
from solo_gating.solo_learn import BaseMethod

from .support.helpers import tiny_config, write_images


def state():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    return {
        "environment": dict(os.environ),
        "arguments": list(sys.argv),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "torch": torch.get_rng_state().tolist(),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "anomaly": torch.is_anomaly_enabled(),
        "handlers": handlers,
        "loggers": {name: logging.getLogger(name).disabled for name in ("mine", "lightning")},
        "log handlers": list(logging.root.handlers),
        "level": logging.root.level,
        "warnings": list(warnings.filters),
        "hydra": (GlobalHydra.instance().hydra, HydraConfig.instance().cfg),
    }


def disturb():
    os.environ |= {"PL_GLOBAL_SEED": "3", "MASTER_PORT": "1"}
    os.environ.pop("OMP_NUM_THREADS", None)
    sys.argv.append("more")
    random.seed(9)
    np.random.seed(9)
    torch.manual_seed(9)
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("medium")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
    torch.autograd.set_detect_anomaly(True)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.getLogger("mine").disabled = True
    logging.getLogger("of this run").disabled = True
    logging.root.setLevel(logging.CRITICAL)
    logging.root.addHandler(logging.NullHandler())
    warnings.simplefilter("ignore", ImportWarning)
    HydraConfig.instance().cfg = OmegaConf.create({"hydra": {}})


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_run_changes_ends_with_it(fails, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    logging.getLogger("mine")

    @process_state_kept()
    def run():
        disturb()
        if fails:
            raise ZeroDivisionError

    before = state()
    if fails:
        with pytest.raises(ZeroDivisionError):
            run()
    else:
        run()
    assert state() == before
    assert not logging.getLogger("of this run").disabled


@pytest.mark.parametrize("own", [False, True])
def test_a_run_of_wandb_s_is_finished_where_it_began(own, monkeypatch):
    finished = []
    wandb = types.SimpleNamespace(run=None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run = types.SimpleNamespace(finish=lambda exit_code: finished.append(exit_code))
    if own:
        wandb.run = run
    with process_state_kept():
        wandb.run = run
    assert finished == ([] if own else [0])


def test_a_config_that_is_used_twice_gives_the_same_run_twice(tmp_path):
    images = str(write_images(tmp_path / "images.npz", 16))
    cfg = tiny_config(
        max_epochs=1,
        deterministic=True,
        data={"train_path": images},
        checkpoint={"dir": str(tmp_path / "runs")},
    )
    given, before = cfg.copy(), state()
    first = pretrain(cfg)
    random.seed(1)
    torch.manual_seed(1)
    second = pretrain(OmegaConf.to_container(cfg))
    assert cfg == given
    assert first["logged"] == second["logged"]
    assert first["pretraining"]["optimizer"] == second["pretraining"]["optimizer"]
    assert first["pretraining"]["optimizer"]["lr"] == pytest.approx(0.1 * 8 / 256)
    random.setstate(before["python"])
    torch.set_rng_state(torch.tensor(before["torch"], dtype=torch.uint8))
    assert state() == before


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")
    file = tmp_path / "script.py"
    file.write_text(
        "import sys\nfrom solo_gating import BaseMethod\n"
        "kwargs = {'width': 4, 'path': sys.argv[1]} if sys.argv[1:] else {'width': 4}\n"
        "sys.built = BaseMethod._BACKBONES['resnet18_gated']('vicreg', **kwargs).default_path\n"
    )
    return str(file)


def test_a_script_s_options_end_with_it(script, monkeypatch):
    before = dict(BaseMethod._BACKBONES), list(sys.path)
    argv = ["solo_gating", "--path", "gated", script]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "built", None, raising=False)
    run_script()
    assert sys.built == "gated"
    assert (dict(BaseMethod._BACKBONES), list(sys.path)) == before
    assert sys.argv == argv


def test_a_script_s_option_and_its_own_path_are_one_setting(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["solo_gating", "--path", "gated", script, "dense"])
    with pytest.raises(SystemExit, match=r"--path: got gated, and backbone.kwargs.path=dense"):
        run_script()
