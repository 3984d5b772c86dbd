"""The data sets that `data:` can name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from sklearn.model_selection import train_test_split
from torch.utils.data import Dataset, Subset
from torchvision import datasets as tv
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..errors import InputError
from .arrays import UNLABELLED, ArrayDataset, read_arrays

NUM_CLASSES = {"cifar10": 10, "cifar100": 100, "stl10": 10, "imagenet100": 100, "imagenet": 1000}
DATASETS = (*NUM_CLASSES, "custom")
FORMATS = ("image_folder", "npz", "h5")


class UnlabelledFolder(Dataset):
    """Every image below a folder, with the target -1.

    Args:
        root: a folder, searched recursively.
        transform: from a PIL image.
    """

    def __init__(self, root: str, transform: Callable[[Image.Image], Any] | None = None):
        files = (p for p in Path(root).rglob("*") if p.suffix.lower() in IMG_EXTENSIONS)
        self.files = sorted(files)
        self.targets = np.full(len(self.files), UNLABELLED)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        with Image.open(self.files[index]) as file:
            image = file.convert("RGB")
        return image if self.transform is None else self.transform(image), UNLABELLED


def open_dataset(data: DictConfig, split: str, transform: Callable[[Any], Any] | None) -> Dataset:
    """Open the training or validation images that a config names.

    Args:
        data: the config's group `data`, complete (`config.prepare_config`).
        split: "train" or "val".
        transform: from a PIL image.

    Raises:
        InputError: for a path that does not exist, data that cannot be read or downloaded, or
            classes that do not fit `data.num_classes`.
    """
    key = f"data.{split}_path"
    path = data[f"{split}_path"]
    if OmegaConf.is_config(path):
        path = OmegaConf.to_container(path)
    if data.format == "npz":
        images, labels = read_arrays(path, key, data.num_classes)
        hidden = data.no_labels and split == "train"
        return ArrayDataset(images, None if hidden else labels, transform)
    if data.dataset in ("cifar10", "cifar100", "stl10"):
        return _torchvision(data, split, str(path), key, transform)
    if not Path(path).exists():
        raise InputError(f"{key}: {str(path)!r} does not exist")
    if data.format == "h5":
        return _h5(data.dataset, str(path), transform)
    if not Path(path).is_dir():
        raise InputError(f"{key}: {str(path)!r} is a file, accepted is a folder of images")
    if data.no_labels and split == "train":
        dataset: Any = UnlabelledFolder(path, transform)
        if not len(dataset):
            raise InputError(f"{key}: there is no image below {str(path)!r}")
        return dataset
    try:
        dataset = tv.ImageFolder(path, transform)
    except FileNotFoundError as error:
        raise InputError(
            f"{key}: {str(path)!r} is not a folder with one folder of images for each class "
            f"({error}); unlabelled images need data.no_labels=true"
        ) from error
    if len(dataset.classes) != data.num_classes:
        raise InputError(
            f"{key}: found {len(dataset.classes)} class folders, "
            f"accepted with data.num_classes={data.num_classes} are {data.num_classes}"
        )
    return dataset


def count_class_folders(path: str) -> int:
    """Number of folders directly below a folder; 0 if there is no such folder."""
    root = Path(path)
    return sum(entry.is_dir() for entry in root.iterdir()) if root.is_dir() else 0


def fraction_of(dataset: Any, fraction: float) -> Dataset:
    """A fixed random part of a data set, stratified by class where there are labels.

    Args:
        dataset: its `targets` or `labels`, if it has any, are its classes.
        fraction: in (0, 1).
    """
    targets = getattr(dataset, "targets", getattr(dataset, "labels", None))
    indices, _ = train_test_split(
        np.arange(len(dataset)),
        train_size=fraction,
        stratify=None if targets is None or min(targets) < 0 else targets,
        random_state=42,
    )
    return Subset(dataset, np.sort(indices).tolist())


def _torchvision(
    data: DictConfig, split: str, root: str, key: str, transform: Callable[[Any], Any] | None
) -> Dataset:
    def build(download: bool) -> Dataset:
        if data.dataset == "stl10":
            name = data.split if split == "train" else "test"
            return tv.STL10(root, split=name, download=download, transform=transform)
        cls = {"cifar10": tv.CIFAR10, "cifar100": tv.CIFAR100}[data.dataset]
        return cls(root, train=split == "train", download=download, transform=transform)

    try:
        return build(download=False)
    except RuntimeError:  # torchvision's word for: not there, or damaged
        pass
    try:
        return build(download=True)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"{key}: {data.dataset} is not in {root!r} and could not be downloaded ({error}); put "
            "torchvision's files there, or use data.format=npz with arrays on disk"
        ) from error


def _h5(dataset: str, path: str, transform: Callable[[Any], Any] | None) -> Dataset:
    try:
        from solo.data.h5_dataset import H5Dataset
    except ImportError as error:
        raise InputError(
            f"data.format: found h5, which needs solo-learn 1.0.6 to 1.0.8 and h5py ({error}); "
            "accepted otherwise are image_folder and npz"
        ) from error
    return H5Dataset(dataset, path, transform)
