"""Images below a folder, found by the same rules with labels and without.

An image is a file with one of torchvision's extensions, in upper or lower case. Links are followed,
to files and to folders, but for those back to a folder above. What is hidden (its name begins with a
dot) or of an operating system (`__MACOSX`, thumbnails) is no part of the data.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..errors import InputError
from .arrays import UNLABELLED
from .images import DamagedImageError, read_image

_SYSTEM = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")


class ImageFiles(Dataset):
    """Images that are read when they are asked for.

    Args:
        files: their paths.
        targets: an integer for each.
        transform: from a PIL image.
        key: the config key that names the data, for messages.
        classes: the names of the targets 0, 1, ...; empty for unlabelled images.

    Attributes:
        skipped: how many images were left out since they cannot be read.
    """

    def __init__(
        self,
        files: Sequence[str],
        targets: Sequence[int] | np.ndarray,
        transform: Callable[[Image.Image], Any] | None = None,
        key: str = "data",
        classes: Sequence[str] = (),
    ):
        self.files = list(files)
        self.targets = np.asarray(targets, dtype=np.int64)
        self.transform = transform
        self.key = key
        self.classes = list(classes)
        self.skipped = 0

    @property
    def samples(self) -> list[tuple[str, int]]:
        """Files and targets, as torchvision's ImageFolder has them."""
        return list(zip(self.files, self.targets.tolist(), strict=True))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.read(index)
        return (
            image if self.transform is None else self.transform(image),
            int(self.targets[index]),
        )

    def read(self, index: int) -> Image.Image:
        """An image as 8-bit RGB."""
        file = self.files[index]
        name = f"{self.key}: {file!r}"
        if not os.path.isfile(file):  # a pipe would never end
            raise DamagedImageError(f"{name} is a broken link, or no regular file")
        return read_image(file, name)

    def leave_out_damaged(self, threads: int) -> None:
        """Read every image once, and forget those that cannot be read.

        Args:
            threads: that read at the same time.

        Raises:
            InputError: if no image is left, or one cannot be used though it can be read.
        """

        def readable(index: int) -> bool:
            try:
                self.read(index)
            except DamagedImageError:
                return False
            return True

        with ThreadPoolExecutor(max(1, threads)) as pool:
            kept = np.fromiter(pool.map(readable, range(len(self))), dtype=bool, count=len(self))
        if not kept.any():
            raise InputError(f"{self.key}: none of the {len(self)} images can be read")
        self.skipped = int((~kept).sum())
        self.files = [file for file, keep in zip(self.files, kept, strict=True) if keep]
        self.targets = self.targets[kept]


class UnlabelledFolder(ImageFiles):
    """Every image below a folder, with the target -1.

    Args:
        root: a folder.
        transform: from a PIL image.
        key: for messages.

    Raises:
        InputError: for a folder that cannot be listed.
    """

    def __init__(
        self,
        root: str,
        transform: Callable[[Image.Image], Any] | None = None,
        key: str = "data",
    ):
        files = sorted(_images_below(root, key), key=lambda file: Path(file).parts)
        super().__init__(files, np.full(len(files), UNLABELLED), transform, key)


class LabelledFolder(ImageFiles):
    """The images below a folder's folders, each of which is a class.

    Args:
        root: a folder.
        classes: the names of the targets 0, 1, ...; images of other classes are left out.
        transform: from a PIL image.
        key: for messages.

    Raises:
        InputError: for a folder that cannot be listed.
    """

    def __init__(
        self,
        root: str,
        classes: Sequence[str],
        transform: Callable[[Image.Image], Any] | None = None,
        key: str = "data",
    ):
        files: list[str] = []
        targets: list[int] = []
        for target, name in enumerate(classes):
            folder = os.path.join(root, name)
            found = _images_below(folder, key, root) if os.path.isdir(folder) else ()
            files += sorted(found, key=os.path.split)  # torchvision's order
            targets += [target] * (len(files) - len(targets))
        super().__init__(files, targets, transform, key, classes)


def class_folders(root: str, key: str = "data.train_path") -> list[str]:
    """The names of a folder's folders that hold an image at any depth, in order.

    Args:
        root: a folder; what is none has no class.
        key: for messages.

    Raises:
        InputError: for a folder that cannot be listed.
    """
    if not os.path.isdir(root):
        return []
    names = [name for name, is_folder in _entries(root, key) if is_folder]
    return sorted(name for name in names if any(_images_below(os.path.join(root, name), key, root)))


def _images_below(folder: str, key: str, *above: str) -> Iterator[str]:
    """Paths of what is named like an image, unless `folder` leads back to one of those above."""
    if any(os.path.samefile(folder, other) for other in above):
        return
    for name, is_folder in _entries(folder, key):
        path = os.path.join(folder, name)
        if is_folder:
            yield from _images_below(path, key, *above, folder)
        elif name.lower().endswith(IMG_EXTENSIONS):
            yield path


def _entries(folder: str, key: str) -> Iterator[tuple[str, bool]]:
    """Names of what belongs to the data, and whether each is a folder or a link to one."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith(".") and entry.name not in _SYSTEM:
                    # Not `is_dir()` of a link, which fails for one to itself.
                    is_folder = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
                    yield entry.name, is_folder
    except OSError as error:
        raise InputError(f"{key}: cannot list {folder!r} ({error.strerror})") from error
