"""From the config's `data` and `augmentations` to batches."""

from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch.utils.data import DataLoader, Subset

from ..errors import InputError
from .augmentations import (
    check_augmentations,
    check_view,
    classification_transform,
    evaluation_transform,
    training_transform,
)
from .datasets import (
    DATASETS,
    FORMATS,
    NUM_CLASSES,
    check_data,
    count_class_folders,
    evenly,
    fraction_of,
    open_dataset,
)
from .device import Place, check_device_pipeline, device_loader, place_of
from .workers import LazyLoader, SeededImages, SeededSampler, end_with_parent

PIPELINES = ("workers", "device")


def training_loader(cfg: DictConfig, place: Place | None = None) -> Any:
    """Batches `[indices, [view 1, view 2, ...], targets]` for pre-training.

    Args:
        cfg: a complete config (`config.prepare_config`).
        place: which of how many processes this is, and with `data.pipeline: device` where the views
            are to be made; default: this process alone, on the CPU.

    Returns:
        A DataLoader whose workers make views from PIL images, or a `device.loader.DeviceLoader`.

    Raises:
        InputError: for data that cannot be used, or fewer images than one batch for each process.
    """
    on_device = cfg.data.pipeline == "device"
    transform = None if on_device else training_transform(cfg.data.dataset, cfg.augmentations)
    dataset: Any = open_dataset(cfg.data, "train", transform)
    if cfg.data.fraction > 0:
        dataset = fraction_of(dataset, cfg.data.fraction)
    place = place or Place()
    # Workers repeat some images where they do not divide evenly, the device leaves some out.
    of_each = (len(dataset) + (0 if on_device else place.processes - 1)) // place.processes
    if of_each < cfg.optimizer.batch_size:
        where = "" if place.processes == 1 else f" on {place.processes} processes"
        raise InputError(
            f"optimizer.batch_size: got {cfg.optimizer.batch_size}{where} with {len(dataset)} training "
            f"images, expected at most {of_each} (an incomplete last batch is dropped)"
        )
    if on_device:
        return device_loader(cfg, dataset, place)
    return LazyLoader(
        SeededImages(dataset),
        sampler=SeededSampler(len(dataset), cfg.seed),
        drop_last=True,
        **_options(cfg, cfg.optimizer.batch_size),
    )


def evaluation_loader(cfg: DictConfig, split: str, batch_size: int | None = None) -> DataLoader:
    """Batches `[images, targets]` without augmentation.

    Args:
        cfg: a complete config.
        split: "train" or "val".
        batch_size: default: `optimizer.batch_size`.

    Raises:
        InputError: for data that cannot be used.
    """
    transform = evaluation_transform(cfg.data.dataset, cfg.augmentations)
    dataset = _images(cfg, split, transform)
    return DataLoader(dataset, **_options(cfg, batch_size or cfg.optimizer.batch_size))


def has_labels(images: Any) -> bool:
    """Whether at least one image has a label.

    Args:
        images: a data set or a loader of this package; of another data set it is believed.
    """
    if hasattr(images, "has_labels"):
        return images.has_labels
    if isinstance(images, (DataLoader, SeededImages)):
        return has_labels(images.dataset)
    if isinstance(images, Subset):
        targets = _targets(images.dataset)
        return targets is None or bool((np.asarray(targets)[images.indices] >= 0).any())
    targets = _targets(images)
    return targets is None or max(targets) >= 0


def _targets(dataset: Any) -> Any:
    return getattr(dataset, "targets", getattr(dataset, "labels", None))


def classification_loader(cfg: DictConfig) -> DataLoader:
    """Shuffled batches `[images, targets]`, cropped and flipped, to train a classifier on.

    Args:
        cfg: a complete config. Images without a label are left out.

    Raises:
        InputError: for data that cannot be used, or if no image has a label.
    """
    dataset = _images(cfg, "train", classification_transform(cfg.data.dataset, cfg.augmentations))
    targets = getattr(dataset, "targets", None)
    if targets is not None and min(targets) < 0:
        labelled = [index for index, target in enumerate(targets) if target >= 0]
        if not labelled:
            raise InputError(
                "data.train_path: no image has a label, expected for a classifier are labelled "
                "images (data.no_labels=false)"
            )
        dataset = Subset(dataset, labelled)
    return DataLoader(dataset, shuffle=True, **_options(cfg, cfg.optimizer.batch_size))


def skipped_images(cfg: DictConfig, **loaders: Any) -> dict[str, Any]:
    """How many images `data.on_damaged: skip` has left out, for `metrics.json`.

    Args:
        cfg: a complete config.
        loaders: by the names of their splits.

    Returns:
        `skipped_images`, a number for each loader; empty if damaged images stop the run.
    """

    def skipped(dataset: Any) -> int:
        while not hasattr(dataset, "skipped") and hasattr(dataset, "dataset"):
            dataset = dataset.dataset
        return getattr(dataset, "skipped", 0)

    if cfg.data.on_damaged != "skip":
        return {}
    return {"skipped_images": {split: skipped(loader) for split, loader in loaders.items()}}


def _images(cfg: DictConfig, split: str, transform: Any) -> Any:
    if cfg.data[f"{split}_path"] is None:
        raise InputError(f"data.{split}_path: missing, there are no images to evaluate on")
    dataset: Any = open_dataset(cfg.data, split, transform)
    if split == "train" and cfg.data.fraction > 0:
        dataset = fraction_of(dataset, cfg.data.fraction)
    return dataset


def _options(cfg: DictConfig, batch_size: int) -> dict[str, Any]:
    workers = cfg.data.num_workers
    return {
        "batch_size": batch_size,
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "worker_init_fn": end_with_parent,
        "pin_memory": torch.cuda.is_available(),
    }


__all__ = [
    "DATASETS",
    "FORMATS",
    "NUM_CLASSES",
    "PIPELINES",
    "check_augmentations",
    "check_data",
    "check_device_pipeline",
    "check_view",
    "classification_loader",
    "count_class_folders",
    "evaluation_loader",
    "evenly",
    "has_labels",
    "place_of",
    "skipped_images",
    "training_loader",
]
