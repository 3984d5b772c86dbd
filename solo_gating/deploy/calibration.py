"""Calibration images, as users have them: a tensor, an array, a folder, or what a config names."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import evenly
from ..errors import InputError

# How many are used at most, and needed at least.
MOST_IMAGES, FEWEST_IMAGES = 256, 32

_KINDS = "a tensor or an array of images, a folder of images, or a list of key=value as main_knn's"


def calibration_images(
    given: Any, checkpoint: Path | None, channels: int, smallest: int = 1
) -> Tensor:
    """At most 256 of the images that were given, evenly spread.

    Args:
        given: N × C × H × W, float32, normalised as in training; or a folder of images, of which those
            at any depth are taken; or overrides of the data as main_knn takes them,
            "data.train_path=..." and so on, whose training images are taken: without any, those of
            pre-training. The images of a folder and of a config are prepared as in training.
        checkpoint: whose `args.json` says how images are prepared; None for an encoder without one.
        channels: of an image.
        smallest: least height and width.

    Returns:
        N × C × H × W, float32.

    Raises:
        InputError: for what cannot be used, or fewer than 32 images.
    """
    if isinstance(given, (Tensor, np.ndarray)):
        _check(tuple(given.shape), given.dtype, channels, smallest)
        images = torch.as_tensor(given[evenly(len(given), MOST_IMAGES)]).detach()
        return _checked(images, channels, smallest)
    overrides = isinstance(given, Sequence) and not isinstance(given, (str, bytes))
    if overrides and all(isinstance(override, str) for override in given):
        folder = None
    elif isinstance(given, (str, Path)):
        folder = Path(given).expanduser()
        if not folder.is_dir():
            raise InputError(f"calibration: {str(given)!r} is no folder, expected {_KINDS}")
    else:
        raise InputError(f"calibration: got {type(given).__name__}, expected {_KINDS}")
    if checkpoint is None:
        kind = "data to read" if folder is None else "a folder"
        raise InputError(
            f"calibration: got {kind}, which needs a checkpoint as source: its args.json says how "
            "images are prepared; expected a tensor or an array"
        )
    # Only here: tensors need nothing of Hydra and Lightning.
    from ..evaluate.evaluation import images_of

    dataset: Any = images_of(
        checkpoint,
        [] if folder is not None else list(given),
        "train",
        None if folder is None else str(folder),
    )
    found = [dataset[index][0] for index in evenly(len(dataset), MOST_IMAGES)]
    if not found:
        raise InputError(f"calibration: got no images in {str(given)!r}, expected {_expected()}")
    return _checked(torch.stack(found), channels, smallest)


def _check(shape: tuple[int, ...], dtype: Any, channels: int, smallest: int) -> None:
    if len(shape) != 4 or shape[1] != channels or min(shape[2:]) < smallest:
        least = f" of at least {smallest} pixels" if smallest > 1 else ""
        raise InputError(
            f"calibration: got the shape {shape}, expected N × {channels} × H × W{least}"
        )
    found = str(dtype).removeprefix("torch.")
    if found != "float32":
        raise InputError(f"calibration: got {found}, expected float32, normalised as in training")


def _checked(images: Tensor, channels: int, smallest: int) -> Tensor:
    _check(tuple(images.shape), images.dtype, channels, smallest)
    if len(images) < FEWEST_IMAGES:
        number = f"{len(images)} image" + "s" * (len(images) != 1)
        raise InputError(f"calibration: got {number}, expected {_expected()}")
    if not images.isfinite().all():
        raise InputError("calibration: got NaN or infinity, expected finite pixels")
    return images.to("cpu").contiguous()


def _expected() -> str:
    return f"at least {FEWEST_IMAGES}, better {MOST_IMAGES}"
