"""Small configs, and training steps without a Trainer."""

import copy
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from solo_gating import METHODS, BaseMethod, create_backbone
from solo_gating.backbones import BACKBONES, register_resnet

ROOT = Path(__file__).parents[2]

METHOD_KWARGS: dict[str, dict[str, Any]] = {
    "vicreg": {"sim_loss_weight": 25.0, "var_loss_weight": 25.0, "cov_loss_weight": 1.0},
    "barlow": {"lamb": 0.0051, "scale_loss": 0.1},
    "simsiam": {"pred_hidden_dim": 8},
    "simclr": {"temperature": 0.2},
    "nnclr": {"pred_hidden_dim": 8, "temperature": 0.2, "queue_size": 32},
    "nnsiam": {"pred_hidden_dim": 8, "queue_size": 32},
    "wmse": {"proj_output_dim": 4, "whitening_size": 8, "whitening_eps": 0.0},
    "vibcreg": {"cov_loss_weight": 8.0},
    "supcon": {"temperature": 0.2},
    "byol": {"pred_hidden_dim": 8},
    "mocov2plus": {"temperature": 0.2, "queue_size": 32},
    "mocov3": {"pred_hidden_dim": 8, "temperature": 0.2},
    "nnbyol": {"pred_hidden_dim": 8, "queue_size": 32},
    "dino": {"num_prototypes": 12},
    "us3l": {"pred_hidden_dim": 8},
    "all4one": {"pred_hidden_dim": 8, "temperature": 0.2, "queue_size": 32},
}


def explanation_of(command: Any) -> str:
    """What a command's `--help` says: the docstring of the room that the command's own names."""
    room = command.__doc__.rpartition("or `")[2].partition("`")[0]
    return importlib.import_module(f"solo_gating.{room}").__doc__.strip()


def package_environment(**more: str) -> dict[str, str]:
    """The environment of a process that finds this checkout, behind what PYTHONPATH names."""
    paths = [*os.environ.get("PYTHONPATH", "").split(os.pathsep), str(ROOT)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **more}


@contextmanager
def with_resnet10() -> Iterator[None]:
    """For what takes longer with each layer there are `resnet10_*`, with one block in a stage."""
    with mock.patch.dict(BACKBONES), mock.patch.dict(BaseMethod._BACKBONES):
        register_resnet("resnet10", "basic", [1, 1, 1, 1])
        yield


def of_two_processes(function: Callable[[int], Any], folder: Path) -> list[Any]:
    """What a module's function of the rank returns in each of two gloo processes.

    They find the folder as SHARED_FOLDER in their environment.
    """
    method = "forkserver"  # what is imported is imported once, and not beside running threads
    torch.multiprocessing.get_context(method).set_forkserver_preload([function.__module__])
    torch.multiprocessing.start_processes(
        _in_group, (function, str(folder)), nprocs=2, start_method=method
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def _in_group(rank: int, function: Callable[[int], Any], folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "SHARED_FOLDER": folder}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(function(rank), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def tiny_config(method: str = "vicreg_dual", **overrides: Any) -> DictConfig:
    """A complete config of a network of width 4 on 16×16 images; groups of overrides are merged."""
    gated = method.endswith(("_dual", "_gated", "_distilled", "us3l"))
    cfg = {
        "name": "tiny",
        "method": method,
        "seed": 0,
        "max_epochs": 2,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "backbone": {
            "name": "resnet18_gated" if gated else "resnet18_plain",
            "kwargs": {"width": 4, "stem": "cifar"},
        },
        "data": {
            "dataset": "custom",
            "format": "npz",
            "train_path": "absent.npz",
            "num_classes": 3,
            "num_workers": 0,
            "num_large_crops": 2,
            "num_small_crops": 0,
        },
        "augmentations": [{"crop_size": 16, "num_crops": 2, "horizontal_flip": {"prob": 0.5}}],
        "optimizer": {
            "name": "sgd",
            "batch_size": 8,
            "lr": 0.1,
            "classifier_lr": 0.1,
            "weight_decay": 1e-4,
            "kwargs": {"momentum": 0.9},
        },
        "scheduler": {"name": "warmup_cosine", "warmup_epochs": 1},
        "method_kwargs": {
            "proj_hidden_dim": 16,
            "proj_output_dim": 16,
            **METHOD_KWARGS.get(method.split("_")[0], {}),
        },
    }
    return OmegaConf.merge(cfg, overrides)


def student_config(method: str, teacher: Path, **overrides: Any) -> DictConfig:
    """As `tiny_config`, of a student with one view; the queue, where there is one, holds 16."""
    kwargs = {"teacher": str(teacher)} | ({"queue_size": 16} if method == "seed" else {})
    cfg = tiny_config(
        method,
        data={"num_large_crops": 1},
        augmentations=[{"crop_size": 16, "num_crops": 1, "horizontal_flip": {"prob": 0.5}}],
    )
    cfg.method_kwargs = kwargs
    return OmegaConf.merge(cfg, overrides)


def write_teacher(file: Path, width: int = 8) -> Path:
    """A ResNet-18's weights under torchvision's names, with statistics as after some training."""
    torch.manual_seed(1)
    net = create_backbone("resnet18_plain", width=width, stem="cifar")
    randomise_norms(net)
    torch.save(net.state_dict(), file)
    return file


STEPS = 3  # in an epoch of a `run_config`


def run_config(folder: Path, method: str = "vicreg", **overrides: Any) -> DictConfig:
    """Two epochs of three steps of 16 images without validation; checkpoints in `folder/runs`."""
    images = folder / "train.npz"
    cfg = tiny_config(
        method,
        data={"train_path": str(images if images.exists() else write_images(images, 50))},
        optimizer={"batch_size": 16, "lr": 0.32},  # for 256 images
        checkpoint={"enabled": True, "dir": str(folder / "runs")},
        log_every_n_steps=1,
    )
    return OmegaConf.merge(cfg, overrides)


def run_folder(folder: Path) -> Path:
    """The folder of the only run in `folder/runs`."""
    (found,) = (folder / "runs").glob("*/*")
    return found


def tiny_model(
    cfg: DictConfig, seed: int = 0, epoch: int = 0, steps: int = 40, dtype: Any = torch.float64
) -> Any:
    """A LightningModule in training mode with as much of a Trainer as its steps need.

    What it logs is kept in `model.logged`. Without a dtype it is left as it is built.
    """
    torch.manual_seed(seed)
    model = METHODS[cfg.method](cfg)
    if dtype is not None:
        model = model.to(dtype)
    model._trainer = SimpleNamespace(
        current_epoch=epoch,
        global_step=0,
        estimated_stepping_batches=steps,
        sanity_checking=False,
    )
    return _keeping_its_log(model).train()


def copy_of(model: Any) -> Any:
    """The same model again, with a log of its own."""
    return _keeping_its_log(copy.deepcopy(model))


def _keeping_its_log(model: Any) -> Any:
    model.logged = {}
    model.log = lambda name, value, **kwargs: model.logged.update({name: value})
    model.log_dict = lambda values, **kwargs: model.logged.update(values)
    return model


def recorded_passes(model: Any) -> list[Any]:
    """A list that the passes through the backbone of every later step are added to."""
    seen: list[Any] = []
    remember = model._remember

    def record(passes: Any, targets: Tensor) -> None:
        passes = list(passes)
        seen.extend(passes)
        remember(passes, targets)

    model._remember = record
    return seen


def random_batch(
    size: int = 8,
    seed: int = 0,
    classes: int = 3,
    resolution: int = 16,
    dtype: torch.dtype = torch.float64,
) -> list[Any]:
    """[indices, [view 1, view 2], targets] from a stream that NumPy promises never to change."""
    rng = np.random.RandomState(seed)
    shape = (size, 3, resolution, resolution)
    views = [torch.from_numpy(rng.standard_normal(shape)).to(dtype) for _ in range(2)]
    return [torch.arange(size), views, torch.from_numpy(rng.randint(0, classes, size))]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """PyTorch's default dtype, for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def fixed_noise(seed: int = 0) -> Iterator[None]:
    """The gates' logistic noise from a NumPy stream of its own."""
    rng = np.random.RandomState(seed)

    def noise(logits: Tensor) -> Tensor:
        return torch.from_numpy(rng.logistic(size=tuple(logits.shape))).to(logits)

    with mock.patch("solo_gating.gates.channel.logistic_noise", noise):
        yield


def write_images(
    file: Path, number: int, seed: int = 0, size: int = 16, labels: bool = True, classes: int = 3
) -> Path:
    """An .npz of random images; every class has a colour of its own."""
    rng = np.random.RandomState(seed)
    targets = np.arange(number) % classes
    colours = np.random.RandomState(42).randint(60, 196, (classes, 1, 1, 3))
    images = (colours[targets] + rng.randint(-60, 60, (number, size, size, 3))).astype(np.uint8)
    np.savez(file, images=images, **({"labels": targets} if labels else {}))
    return file


def randomise_norms(module: torch.nn.Module, seed: int = 0) -> None:
    """BatchNorms with scales, shifts and statistics that differ, as after some training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for norm in module.modules():
            if isinstance(norm, torch.nn.modules.batchnorm._BatchNorm):
                for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                    if tensor is not None:
                        noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                        lowest = (
                            0.5 if tensor is norm.weight or tensor is norm.running_var else -0.5
                        )
                        tensor.copy_(lowest + noise)
