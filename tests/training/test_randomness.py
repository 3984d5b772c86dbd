"""A run that is continued, any number of times, ends with the weights of one that never stopped."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from omegaconf import OmegaConf

from solo_gating import METHODS, data
from solo_gating.config.pretraining import prepare_config
from solo_gating.data import classification_loader, evaluation_loader, training_loader
from solo_gating.data.workers import SeededImages, SeededSampler
from solo_gating.main_pretrain import pretrain
from solo_gating.randomness import StepSeeds
from solo_gating.solo_learn import LINE
from solo_gating.training import pretrain as training_pretrain

from ..support.helpers import tiny_config, write_images

STEPS = 2  # per epoch


class Killed(RuntimeError):
    pass


class Killer(Callback):
    """Kills a run before some of its steps, (epoch, batch), one after the other."""

    def __init__(self, places: list[tuple[int, int]]):
        self.places = places

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if self.places and (trainer.current_epoch, args[-1]) == self.places[0]:
            raise Killed(self.places.pop(0))


def small_config(folder: Path, method: str = "vicreg_dual", **overrides: Any) -> Any:
    """Three epochs of two steps on 8×8 images, with views of all kinds."""
    views = {
        "crop_size": 8,
        "num_crops": 2,
        "rrc": {"enabled": True, "crop_min_scale": 0.3, "crop_max_scale": 1.0},
        "color_jitter": {
            "prob": 0.8,
            "brightness": 0.4,
            "contrast": 0.4,
            "saturation": 0.2,
            "hue": 0.1,
        },
        "gaussian_blur": {"prob": 0.5},
    }
    cfg = tiny_config(
        method,
        max_epochs=3,
        data={"train_path": str(folder / "train.npz"), "val_path": str(folder / "val.npz")},
        augmentations=[views],
        optimizer={"lr": 0.32},
        checkpoint={"enabled": True, "dir": str(folder / "runs")},
        auto_resume={"enabled": True},
    )
    return OmegaConf.merge(cfg, overrides)


def write_data(folder: Path, processes: int = 1) -> None:
    write_images(folder / "train.npz", 8 * STEPS * processes + 1, size=8)
    write_images(folder / "val.npz", 5, seed=1, size=8)


def trained(cfg: Any, *kills: tuple[int, int]) -> tuple[dict[str, Any], dict[str, float]]:
    """The last checkpoint of a run that is killed, and continued as often; and what it logged."""
    logged = logged_by(cfg, *kills)
    return last_checkpoint(cfg), logged


def last_checkpoint(cfg: Any) -> dict[str, Any]:
    (file,) = Path(cfg.checkpoint.dir).glob("*/*/last.ckpt")
    return torch.load(file, weights_only=True)


def logged_by(cfg: Any, *kills: tuple[int, int]) -> dict[str, float]:
    """What a run logs that is killed, and continued as often."""
    killer, build = Killer(list(kills)), training_pretrain.build_trainer

    def with_killer(cfg: Any) -> Any:
        trainer = build(cfg)
        trainer.callbacks.append(killer)
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("solo_gating.training.pretrain.build_trainer", with_killer)
        patch.setattr("solo_gating.training.pretrain.draw_curves", lambda *args: None)
        for _ in kills:
            with pytest.raises(Killed):
                pretrain(cfg.copy())
        metrics = pretrain(cfg.copy())
    assert not killer.places
    return metrics["logged"]


def equal(ours: Any, theirs: Any) -> bool:
    """Whether two nested contents of a checkpoint are, bit for bit."""
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(equal(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(equal, ours, theirs))
    return torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


def assert_same(ours: Any, theirs: Any) -> None:
    """Weights, states of optimiser and schedule, and figures."""
    for key in ("state_dict", "lr_schedulers", "epoch", "global_step"):
        assert equal(ours[0][key], theirs[0][key]), key
    ours_and_theirs = zip(ours[0]["optimizer_states"], theirs[0]["optimizer_states"], strict=True)
    assert all(equal(mine["state"], other["state"]) for mine, other in ours_and_theirs)
    assert ours[0]["global_step"] == 3 * STEPS
    assert ours[1] == theirs[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("continuing")
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    """Of each pipeline, a run that was never killed."""
    return {
        pipeline: trained(
            small_config(
                folder, data={"pipeline": pipeline}, checkpoint={"dir": str(folder / pipeline)}
            )
        )
        for pipeline in ("workers", "device")
    }


ENDS = ((1, 0), (2, 0))


@pytest.mark.parametrize(
    ("kills", "pipeline", "workers"),
    [
        (ENDS, "workers", 0),
        (((1, 1), (1, 1)), "workers", 0),
        (((2, 0),), "workers", 2),
        (((1, 1), (2, 0)), "device", 0),
    ],
)
def test_a_run_killed_anywhere_ends_like_one_that_was_not(
    kills, pipeline, workers, folder, whole, tmp_path
):
    """At an epoch's end, within one, twice at one place; however many workers make its views."""
    cfg = small_config(
        folder,
        data={"pipeline": pipeline, "num_workers": workers},
        checkpoint={"dir": str(tmp_path)},
    )
    assert_same(trained(cfg, *kills), whole[pipeline])


@pytest.mark.parametrize(
    "overrides",
    [
        {"val_check_interval": 1, "knn_eval": {"enabled": True, "k": 1}},
        {"check_val_every_n_epoch": 3, "log_every_n_steps": 1, "enable_progress_bar": True},
    ],
)
def test_what_only_watches_a_run_changes_no_weight(overrides, folder, whole, tmp_path):
    cfg = small_config(folder, **{"checkpoint": {"dir": str(tmp_path)}, **overrides})
    found, _ = trained(cfg)
    assert equal(found["state_dict"], whole["workers"][0]["state_dict"])


HARD: dict[str, Any] = {
    "nnclr_dual": {
        "optimizer": {"name": "lars", "kwargs": {"eta": 0.02}},
        "scheduler": {"name": "step", "lr_decay_steps": [1, 2]},
    },
    "vicreg_gated": {
        "precision": "bf16-mixed",
        "gating": {"target_budget": [0.1, 0.9], "budget_per_image": True, "warmup_epochs": 1},
    },
    "wmse_dual": {},
    "byol": {"method_kwargs": {"pred_hidden_dim": 8}, "momentum": {"base_tau": 0.9}},
}


@pytest.mark.parametrize("method", HARD)
def test_every_method_s_own_state_goes_on(method, folder, tmp_path):
    """Queues, momentum networks and their rate, random whitening, schedules, budgets."""
    if method not in METHODS:
        pytest.skip(f"the {LINE} line has no {method}")
    cfg = small_config(folder, method, checkpoint={"dir": str(tmp_path)})
    cfg = OmegaConf.merge(cfg, HARD[method])
    ours = trained(cfg, (1, 1))
    cfg.checkpoint.dir += "/whole"
    assert_same(ours, trained(cfg))


# What each draws


def epoch_of(loader: Any, epoch: int) -> list[Any]:
    loader.sampler.set_epoch(epoch)
    return list(loader)


def test_order_and_views_follow_from_seed_epoch_and_image(folder):
    def views(epoch: int, seed: int = 0) -> dict[int, torch.Tensor]:
        batches = epoch_of(training_loader(prepare_config(small_config(folder, seed=seed))), epoch)
        return {int(i): v for ids, (v, _), _ in batches for i, v in zip(ids, v, strict=True)}

    first, again, later, other = views(1), views(1), views(2), views(1, seed=1)
    assert list(first) == list(again)
    assert all(torch.equal(first[i], again[i]) for i in first)
    for different in (later, other):
        assert list(first) != list(different)
        assert not any(torch.equal(first[i], v) for i, v in different.items() if i in first)


def test_the_epoch_counts_that_is_set_after_the_iterator_is_made(folder):
    """As Lightning does where a run is continued, while workers fetch ahead."""
    cfg = prepare_config(small_config(folder, data={"num_workers": 1}))
    loader = training_loader(cfg)
    batches = iter(loader)
    loader.sampler.set_epoch(2)
    (indices, *_), *_ = batches
    cfg.data.num_workers = 0
    assert torch.equal(indices, epoch_of(training_loader(cfg), 2)[0][0])


class Draws:
    """A data set of random numbers."""

    def __getitem__(self, index: int) -> tuple[float, ...]:
        return random.random(), np.random.rand(), torch.rand(()).item()


def test_views_leave_the_generators_as_they_were():
    images = SeededImages(Draws())
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    a, b, c = images.__getitems__([(3, 1), (3, 2), (4, 1)])
    assert torch.equal(torch.rand(3), expected)
    assert len({*a[1:], *b[1:]}) == 6
    assert a[1:] == c[1:]  # of equal seeds, in every library
    assert images[7] == images[7]


def test_processes_share_an_epoch_and_give_an_image_the_same_views(monkeypatch):
    def of_process(rank: int, processes: int) -> dict[int, int]:
        monkeypatch.setattr(data.workers, "rank_and_processes", lambda: (rank, processes))
        sampler = SeededSampler(9, seed=3)
        sampler.set_epoch(1)
        part = dict(sampler)
        assert len(part) == len(sampler)
        return part

    one = of_process(0, 1)
    parts = [of_process(rank, 3) for rank in range(3)]
    assert sorted(index for part in parts for index in part) == list(range(9))
    assert all(part.items() <= one.items() for part in parts)
    assert len(set(one.values())) == 9


def test_steps_and_processes_draw_numbers_of_their_own():
    class Trainer:
        current_epoch = 1
        global_rank = 0

    def drawn(batch: int = 0, seed: int = 0, **attributes: int) -> float:
        trainer: Any = type("", (Trainer,), attributes)
        StepSeeds(seed).on_train_batch_start(trainer, None, None, batch)  # type: ignore[arg-type]
        return torch.rand(()).item()

    assert drawn() == drawn()
    others = {drawn(1), drawn(seed=1), drawn(current_epoch=2), drawn(global_rank=1)}
    assert len(others | {drawn()}) == 5


# Workers of a run that is killed


class Sleepy:
    """A data set whose second image takes a minute."""

    def __init__(self, images: int):
        self.targets = [0] * images

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        time.sleep(60)
        return torch.zeros(3), 0


def start_workers(cfg: Any, pids: Any) -> None:
    data.open_dataset = lambda *args: Sleepy(16)  # in this process only
    loaders = [training_loader(cfg), evaluation_loader(cfg, "val"), classification_loader(cfg)]
    processes = []
    for loader in loaders:
        iterator = torch.utils.data.DataLoader.__iter__(loader)
        processes += iterator._workers
    pids.put([process.pid for process in processes])
    time.sleep(60)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux for processes")
def test_no_worker_outlives_a_killed_run(folder):
    """However busy; PyTorch's own look for their parent between two batches only."""
    cfg = prepare_config(small_config(folder, data={"num_workers": 1}))
    fork = multiprocessing.get_context("fork")
    pids = fork.Queue()
    run = fork.Process(target=start_workers, args=(cfg, pids))
    run.start()
    workers = pids.get(timeout=60)
    assert len(workers) == 3
    assert all(map(is_running, workers))
    os.kill(run.pid, signal.SIGKILL)
    run.join()
    end = time.monotonic() + 20
    while any(map(is_running, workers)):
        assert time.monotonic() < end, "workers go on"
        time.sleep(0.05)
