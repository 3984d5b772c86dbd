"""Images from NumPy archives: `.npz` files with `images` and, if there are any, `labels`."""

import glob
import math
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ..checks import shortened, shown
from ..errors import InputError

UNLABELLED = -1
_ENCRYPTED = 1  # a bit of a zip member's flags
# The third version is for names of fields.
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


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
        InputError: for a file that is missing, damaged, or of the wrong content; before anything is
            unpacked where its header says so.
    """
    files = _expand(paths, key)
    parts = [_read(file, key, num_classes) for file in files]
    sizes = {images.shape[1:3] for images, _ in parts}
    if len(sizes) > 1:
        raise InputError(f"{key}: got images of different sizes {sorted(sizes)}, expected one")
    if len({labels is None for _, labels in parts}) > 1:
        raise InputError(f"{key}: got files with and without labels, expected one kind")
    if len(parts) == 1:
        return parts[0]
    images = np.concatenate([images for images, _ in parts])
    if parts[0][1] is None:
        return images, None
    return images, np.concatenate([labels for _, labels in parts])  # type: ignore[misc]


def _expand(paths: Any, key: str) -> list[str]:
    patterns = [paths] if isinstance(paths, (str, Path)) else paths
    if not isinstance(patterns, (list, tuple)) or not all(
        isinstance(pattern, (str, Path)) for pattern in patterns
    ):
        raise InputError(f"{key}: got {shown(paths)}, expected a path or glob of .npz, or a list")
    files: list[str] = []
    for pattern in map(str, patterns):
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern))
        if not found:
            raise InputError(
                f"{key}: no file matches {shown(pattern)}, expected a path or glob of .npz"
            )
        files += found
    if not files:
        raise InputError(f"{key}: got an empty list, expected at least one .npz file")
    for file in files:
        if not os.path.isfile(file):  # a pipe would never end
            raise InputError(
                f"{key}: {file!r} is a folder, a broken link or no regular file, expected .npz"
            )
    return files


def _read(file: str, key: str, num_classes: int) -> tuple[np.ndarray, np.ndarray | None]:
    try:
        with zipfile.ZipFile(file) as archive:
            return _read_members(archive, file, key, num_classes)
    except InputError:
        raise
    except Exception as error:  # whatever a damaged file makes zipfile and NumPy say
        reason = "it is a single array" if _is_single_array(file) else _reason(error)
        raise InputError(f"{key}: cannot read {file!r} as .npz ({reason})") from error


def _read_members(
    archive: zipfile.ZipFile, file: str, key: str, num_classes: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Images and labels; every header is checked before anything is unpacked, labels come first."""
    names = archive.namelist()
    if "images.npy" not in names:
        found = shortened([repr(name.removesuffix(".npy")) for name in sorted(names)])
        raise InputError(
            f"{key}: {file!r} holds [{found}], expected `images` (and `labels`), as np.savez "
            "writes them"
        )
    dtype, shape = _header(archive, "images.npy")
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
        raise InputError(
            f"{key}: images of {file!r} are {_described(dtype, shape)}, "
            "expected uint8 N×H×W×3 with N ≥ 1"
        )
    labels = None
    if "labels.npy" in names:
        number = shape[0]
        dtype, shape = _header(archive, "labels.npy")
        if shape != (number,) or dtype.kind not in "iu":
            raise InputError(
                f"{key}: labels of {file!r} are {_described(dtype, shape)}, "
                f"expected {number} integers"
            )
        labels = _array(archive, "labels.npy")
        lowest, highest = int(labels.min()), int(labels.max())
        if lowest < UNLABELLED or highest >= num_classes:
            raise InputError(
                f"{key}: labels of {file!r} go from {lowest} to {highest}, "
                f"expected with data.num_classes={num_classes} are 0 to {num_classes - 1}"
            )
        labels = labels.astype(np.int64)
    return np.ascontiguousarray(_array(archive, "images.npy")), labels


def _header(archive: zipfile.ZipFile, name: str) -> tuple[np.dtype, tuple[int, ...]]:
    """What the header of a member says, compared with the member's size."""
    member = archive.getinfo(name)
    if member.flag_bits & _ENCRYPTED:
        raise _RefusedError("it is encrypted")
    with archive.open(member) as content:
        read = _HEADERS[np.lib.format.read_magic(content)]
        shape, _, dtype = read(content)
        size = content.tell() + math.prod(shape) * dtype.itemsize
    if dtype.hasobject:
        raise _RefusedError(f"{name} holds Python objects")
    if size != member.file_size:
        raise _RefusedError(
            f"{name} has {member.file_size:,} bytes, but by its header {_described(dtype, shape)}"
        )
    if size > (memory := _memory()):
        raise _RefusedError(
            f"{name} unpacks to {size:,} bytes, this machine has {memory:,} of memory"
        )
    return dtype, shape


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(name) as content:
        return np.lib.format.read_array(content, allow_pickle=False)


def _is_single_array(file: str) -> bool:
    try:
        with open(file, "rb") as content:
            return content.read(6) == np.lib.format.MAGIC_PREFIX
    except OSError:
        return False


def _described(dtype: np.dtype, shape: tuple[int, ...]) -> str:
    kind = dtype.name if dtype.names is None else "records"
    return f"{kind} {shape}" if len(shape) <= 8 else f"{kind} of {len(shape)} dimensions"


def _memory() -> float:
    """Bytes of memory that this machine has; infinite where it does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return math.inf


class _RefusedError(ValueError):
    """What is wrong with a file, in words for its user."""


def _reason(error: Exception) -> str:
    """Never NumPy's own words, which advise to read what is in a file without its checks."""
    if isinstance(error, (_RefusedError, zipfile.BadZipFile)):
        return str(error)
    if isinstance(error, MemoryError):
        return "there is not enough memory for it"
    return getattr(error, "strerror", None) or "it is damaged, or NumPy did not write it"
