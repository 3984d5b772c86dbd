"""The pipeline `data.pipeline: device`: views made in batches where the network is trained."""

import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig

from ...errors import InputError
from .place import Place

if TYPE_CHECKING:
    from .loader import DeviceLoader

_IN_MEMORY = ("cifar10", "cifar100", "stl10")


def check_device_pipeline(data: DictConfig) -> None:
    """Refuse what cannot be trained on with `data.pipeline: device`.

    Args:
        data: the config's group `data`.

    Raises:
        InputError: for images that are not arrays of one size, or if kornia is not installed.
    """
    if data.format != "npz" and data.dataset not in _IN_MEMORY:
        raise InputError(
            f"data.pipeline: got device with data.dataset={data.dataset} data.format="
            f"{data.format}, whose images are read one by one and differ in size, expected "
            f"workers, or data.format=npz or one of {', '.join(_IN_MEMORY)}"
        )
    if importlib.util.find_spec("kornia") is None:
        raise InputError(
            "data.pipeline: got device, which needs `pip install kornia`, accepted otherwise "
            "is workers"
        )


def device_loader(cfg: DictConfig, dataset: Any, place: Place) -> "DeviceLoader":
    """Batches of a data set's views, made on the device.

    Args:
        cfg: a complete config.
        dataset: the training images, in memory.
        place: device, rank and number of processes.
    """
    # Only here: kornia is an extra.
    from .loader import DeviceLoader, arrays_of
    from .views import DeviceView

    views = [(DeviceView(cfg.data.dataset, view), view.num_crops) for view in cfg.augmentations]
    return DeviceLoader(*arrays_of(dataset), views, cfg.optimizer.batch_size, cfg.seed, place)


def place_of(trainer: Any) -> Place:
    """Where a Lightning Trainer trains."""
    device: torch.device = trainer.strategy.root_device
    return Place(device, trainer.global_rank, trainer.world_size)


__all__ = ["Place", "check_device_pipeline", "device_loader", "place_of"]
