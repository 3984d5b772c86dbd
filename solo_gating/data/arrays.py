"""Images from NumPy archives: `.npz` files with `images` and, if there are any, `labels`."""

import glob
import zipfile
import zlib
from collections.abc import Callable, Sequence
from lzma import LZMAError
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ..errors import InputError

UNLABELLED = -1


class ArrayDataset(Dataset):
    """Images held in memory.

    Args:
        images: uint8, N × H × W × 3.
        targets: N integers, or None for unlabelled images (every target is then -1).
        transform: from a PIL image.
    """

    def __init__(
        self,
        images: np.ndarray,
        targets: np.ndarray | None = None,
        transform: Callable[[Image.Image], Any] | None = None,
    ):
        self.images = images
        self.targets = np.full(len(images), UNLABELLED) if targets is None else targets
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.images[index])
        return (
            image if self.transform is None else self.transform(image),
            int(self.targets[index]),
        )


def read_arrays(
    paths: str | Sequence[str], key: str, num_classes: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Read and check one or more archives, as one set.

    Args:
        paths: a file, a glob pattern, or a list of these; a pattern's files are read in order of
            their names.
        key: the config key that holds the paths, for messages.
        num_classes: labels must lie in 0 … num_classes − 1; -1 marks a single unlabelled image.

    Returns:
        images, uint8 N × H × W × 3, and labels, int64 N, or None if no file has any.

    Raises:
        InputError: for a file that is missing, damaged, or of the wrong content.
    """
    files = _expand([paths] if isinstance(paths, (str, Path)) else list(paths), key)
    parts = [_read(file, key, num_classes) for file in files]
    sizes = {images.shape[1:3] for images, _ in parts}
    if len(sizes) > 1:
        raise InputError(f"{key}: found images of different sizes {sorted(sizes)}, accepted is one")
    if len({labels is None for _, labels in parts}) > 1:
        raise InputError(f"{key}: found files with and without labels, accepted is one kind")
    images = np.concatenate([images for images, _ in parts])
    if parts[0][1] is None:
        return images, None
    return images, np.concatenate([labels for _, labels in parts])  # type: ignore[misc]


def _expand(patterns: list[str], key: str) -> list[str]:
    files: list[str] = []
    for pattern in map(str, patterns):
        found = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern))
        if not found:
            raise InputError(
                f"{key}: no file matches {pattern!r}, accepted is a path or glob of .npz"
            )
        files += found
    if not files:
        raise InputError(f"{key}: found an empty list, accepted is at least one .npz file")
    return files


def _read(file: str, key: str, num_classes: int) -> tuple[np.ndarray, np.ndarray | None]:
    try:
        with np.load(file, allow_pickle=False) as archive:
            names = set(archive.files)
            images = archive["images"] if "images" in names else None
            labels = archive["labels"] if "labels" in names else None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, LZMAError) as error:
        raise InputError(f"{key}: cannot read {file!r} as .npz ({error})") from error
    except (AttributeError, TypeError) as error:  # np.load gave a bare array
        raise InputError(
            f"{key}: {file!r} is a single array, accepted is an .npz archive"
        ) from error
    if images is None:
        raise InputError(
            f"{key}: {file!r} holds {sorted(names)}, accepted is `images` (and `labels`)"
        )
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not images.size:
        raise InputError(
            f"{key}: images of {file!r} are {images.dtype} {images.shape}, "
            "accepted is uint8 N×H×W×3 with N ≥ 1"
        )
    if labels is None:
        return images, None
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(
            f"{key}: labels of {file!r} are {labels.dtype} {labels.shape}, "
            f"accepted is {len(images)} integers"
        )
    labels = labels.astype(np.int64)
    if labels.min() < UNLABELLED or labels.max() >= num_classes:
        raise InputError(
            f"{key}: labels of {file!r} go from {labels.min()} to {labels.max()}, "
            f"accepted with data.num_classes={num_classes} are 0 to {num_classes - 1}"
        )
    return images, labels
