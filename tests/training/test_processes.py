"""A run of two processes: one dies, the run says so, and any number of processes goes on."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from omegaconf import OmegaConf

from solo_gating.main_pretrain import pretrain
from solo_gating.training.processes import lost_process

from ..support.helpers import STEPS, package_environment, run_folder
from ..test_cli import assert_one_sentence
from .test_pretrain import run_config


def start(module, *arguments, cwd):
    """An entry point in processes of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", f"solo_gating.{module}", *map(str, arguments)],
        cwd=cwd,
        env=package_environment(OMP_NUM_THREADS="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def children(process):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True)
    return [int(pid) for pid in found.stdout.split()]


@pytest.fixture(scope="module")
def died(tmp_path_factory):
    """A run of two processes whose second one is killed after a first checkpoint."""
    folder = tmp_path_factory.mktemp("two")
    cfg = run_config(
        folder,
        max_epochs=10_000,
        devices=2,
        strategy="ddp",
        data={"pipeline": "device"},
        optimizer={"batch_size": 8},  # of each process
        gating={"warmup_epochs": 1},  # the gates' parameters have no gradient in it
    )
    OmegaConf.save(cfg, folder / "two.yaml")
    process = start("main_pretrain", "--config-path", folder, "--config-name", "two", cwd=folder)
    wait_for(lambda: list((folder / "runs").glob("*/*/last.ckpt")), process)
    (second,) = children(process)
    os.kill(second, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    return folder, cfg, process.returncode, errors


def test_the_death_of_a_process_ends_the_run_with_one_sentence(died):
    folder, _, code, errors = died
    assert_one_sentence(code, errors, "auto_resume.enabled=true continues from the last checkpoint")
    assert len(list((folder / "runs").glob("*/*"))) == 1
    assert torch.load(run_folder(folder) / "last.ckpt", weights_only=True)["global_step"] > 0


def test_one_process_continues_what_two_began(died):
    folder, cfg, *_ = died
    checkpoint = run_folder(folder) / "last.ckpt"
    epochs = torch.load(checkpoint, weights_only=True)["epoch"] + 3
    one = {
        "devices": 1,
        "strategy": "auto",
        "optimizer": {"batch_size": 16},  # of all processes as before
        "max_epochs": epochs,
        "resume_from_checkpoint": str(checkpoint),
    }
    metrics = pretrain(OmegaConf.merge(cfg, one))
    assert metrics["epochs"] == epochs
    assert metrics["steps"] == STEPS * epochs
    assert 0 < metrics["logged"]["train_flops_share"] < 1


def test_a_dead_worker_is_named():
    sentence = lost_process(
        RuntimeError("DataLoader worker (pid 11995) is killed by signal: Terminated. ")
    )
    assert sentence is not None
    assert "loads images (data.num_workers) died (DataLoader worker (pid 11995)" in sentence
    assert lost_process(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert lost_process(ValueError("NCCL")) is None
