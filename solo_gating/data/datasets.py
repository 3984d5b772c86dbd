"""The data sets that `data:` can name."""

import io
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from sklearn.model_selection import train_test_split
from torch.utils.data import Dataset, Subset
from torchvision import datasets as tv

from ..checks import is_positive, one_of, require, shortened, shown
from ..errors import InputError
from .arrays import ArrayDataset, read_arrays
from .folders import ImageFiles, LabelledFolder, UnlabelledFolder, class_folders
from .images import DamagedImageError, read_image

NUM_CLASSES = {"cifar10": 10, "cifar100": 100, "stl10": 10, "imagenet100": 100, "imagenet": 1000}
DATASETS = (*NUM_CLASSES, "custom")
FORMATS = ("image_folder", "npz", "h5")
ON_DAMAGED = ("stop", "skip")


def check_data(data: DictConfig) -> None:
    """Refuse values of `data` that every command reads in the same way.

    Args:
        data: the config's group `data`, complete.

    Raises:
        InputError: naming the key.
    """
    require(
        "data.fraction",
        data.fraction,
        lambda v: not isinstance(v, bool) and (v == -1 or (is_positive(v) and v < 1)),
        "a number in (0, 1), or -1",
    )
    one_of("data.on_damaged", data.on_damaged, ON_DAMAGED)


def open_dataset(data: DictConfig, split: str, transform: Callable[[Any], Any] | None) -> Dataset:
    """Open the training or validation images that a config names.

    The classes of folders (and of h5 files) are known by their names: a validation image has the
    label that training gives to its class. Validation may lack classes, but not have others.

    Args:
        data: the config's group `data`, complete (`config.prepare_config`).
        split: "train" or "val".
        transform: from a PIL image.

    Raises:
        InputError: for a path that does not exist, data that cannot be read or downloaded, or
            classes that do not fit `data.num_classes`, or those of training.
    """
    key = f"data.{split}_path"
    path = data[f"{split}_path"]
    if OmegaConf.is_config(path):
        path = OmegaConf.to_container(path, resolve=True)
    if data.format == "npz":
        images, labels = read_arrays(path, key, data.num_classes)
        hidden = data.no_labels and split == "train"
        return ArrayDataset(images, None if hidden else labels, transform)
    if data.dataset in ("cifar10", "cifar100", "stl10"):
        return _torchvision(data, split, str(path), key, transform)
    path = str(path)
    if not os.path.exists(path):
        raise InputError(f"{key}: {shown(path)} does not exist")
    opened = _h5 if data.format == "h5" else _folder
    dataset = opened(data, split, path, key, transform)
    if data.get("on_damaged") == "skip":
        found = len(dataset)
        dataset.leave_out_damaged(data.num_workers)
        if dataset.skipped:
            rank_zero_warn(
                f"{key}: {dataset.skipped} of {found} images cannot be read and are left out"
            )
    return dataset


def count_class_folders(path: str) -> int:
    """Number of folders with images directly below a folder; 0 if there is no such folder."""
    return len(class_folders(path))


def fraction_of(dataset: Any, fraction: float) -> Dataset:
    """A fixed random part of a data set, stratified by class where there are labels.

    Args:
        dataset: its `targets` or `labels`, if it has any, are its classes.
        fraction: in (0, 1).

    Raises:
        InputError: for a part that would have no image, or could not be stratified.
    """
    targets: Any = getattr(dataset, "targets", getattr(dataset, "labels", None))
    stratified = targets is not None and min(targets) >= 0
    try:
        indices, _ = train_test_split(
            np.arange(len(dataset)),
            train_size=fraction,
            stratify=targets if stratified else None,
            random_state=42,
        )
    except ValueError as error:
        having, each = "images", ""
        if stratified:
            _, sizes = np.unique(targets, return_counts=True)
            having = f"images of {len(sizes)} classes, the smallest of {min(sizes)}"
            each = " of each class"
        raise InputError(
            f"data.fraction: got {fraction} of {len(dataset)} {having}, expected a part that "
            f"has an image{each} and leaves one"
        ) from error
    return Subset(dataset, np.sort(indices).tolist())


def _folder(
    data: DictConfig, split: str, root: str, key: str, transform: Callable[[Any], Any] | None
) -> ImageFiles:
    if not os.path.isdir(root):
        raise InputError(f"{key}: {root!r} is a file, expected a folder of images")
    if data.no_labels and split == "train":
        dataset = UnlabelledFolder(root, transform, key)
        if not len(dataset):
            raise InputError(f"{key}: there is no image below {root!r}")
        return dataset
    names = class_folders(root, key)
    if not names:
        raise InputError(
            f"{key}: {root!r} is not a folder with one folder of images for each class; "
            "unlabelled images need data.no_labels=true"
        )
    classes = _classes(data, split, names, key, class_folders)
    return LabelledFolder(root, classes, transform, key)


def _classes(
    data: DictConfig,
    split: str,
    found: list[str],
    key: str,
    classes_at: Callable[[str], list[str]],
) -> list[str]:
    """The names of the classes 0, 1, ..., which are those of training where that has labels.

    Args:
        data: the config's group `data`.
        split: "train" or "val".
        found: the names at `data.<split>_path`.
        key: of that path.
        classes_at: the names at a path, none if there is nothing.
    """
    training: list[str] = []
    if split == "val" and not data.no_labels and data.train_path is not None:
        training = classes_at(str(data.train_path))
    names = training or found
    exact = split == "train" or training
    if len(names) > data.num_classes or (exact and len(names) < data.num_classes):
        raise InputError(
            f"{'data.train_path' if training else key}: got {len(names)} class folders, expected "
            f"with data.num_classes={data.num_classes} are {'' if exact else 'at most '}"
            f"{data.num_classes} (a folder without an image does not count)"
        )
    if strangers := [name for name in found if name not in names]:
        raise InputError(
            f"{key}: got the class {strangers[0]!r}, expected those of data.train_path: "
            f"{shortened(names)}"
        )
    return names


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


class _H5Images(ImageFiles):
    """Images in an h5 file of solo-learn's layout; `files` are their places in it."""

    path = ""

    def read(self, index: int) -> Image.Image:
        """An image as 8-bit RGB."""
        import h5py

        name = f"{self.key}: {self.files[index]!r} of {self.path!r}"
        try:
            with h5py.File(self.path, "r") as file:  # open once for each: workers fork and threads
                content = file[self.files[index]][:].tobytes()
        except (OSError, KeyError, AttributeError, ValueError) as error:
            raise DamagedImageError(f"{name} cannot be read") from error
        return read_image(io.BytesIO(content), name)


def _h5(
    data: DictConfig, split: str, path: str, key: str, transform: Callable[[Any], Any] | None
) -> ImageFiles:
    try:
        from solo.data.h5_dataset import H5Dataset
    except ImportError as error:
        raise InputError(
            f"data.format: got h5, which needs solo-learn 1.0.6 to 1.0.8 and h5py ({error}); "
            "accepted otherwise are image_folder and npz"
        ) from error
    if data.dataset not in ("imagenet", "imagenet100"):
        raise InputError(
            f"data.format: got h5 with data.dataset={data.dataset}, expected with it are "
            "imagenet and imagenet100"
        )

    def listed(path: str) -> list[tuple[str, str]]:
        if not os.path.isfile(path):
            return []
        try:
            return [(name, image) for name, image, _ in H5Dataset(data.dataset, path)._data]
        except (OSError, AttributeError, ValueError) as error:
            raise InputError(f"{key}: cannot read {path!r} as an h5 file of classes") from error

    def classes_at(path: str) -> list[str]:
        return sorted({name for name, _ in listed(path)})

    images = listed(path)
    if not images:
        raise InputError(f"{key}: {path!r} is no h5 file with images")
    classes = _classes(data, split, classes_at(path), key, classes_at)
    label = {name: target for target, name in enumerate(classes)}
    files = [f"{name}/{image}" for name, image in images]
    dataset = _H5Images(files, [label[name] for name, _ in images], transform, key, classes)
    dataset.path = path
    return dataset


def evenly(number: int, most: int) -> list[int]:
    """At most so many of the numbers from 0 to `number` − 1, evenly spread.

    Args:
        number: of images, whose folders may be in order of class.
        most: of those that are wanted.
    """
    used = min(number, most)
    return [index * number // used for index in range(used)]
