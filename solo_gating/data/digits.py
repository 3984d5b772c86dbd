"""A real data set that needs no download: scikit-learn's handwritten digits, as image folders.

    python -m solo_gating.data.digits [FOLDER]        (default: datasets/digits)

FOLDER/train/<digit>/ gets the first 1,400 images, FOLDER/test/<digit>/ the last 397, which were
written by other people; 16×16 pixels. A folder that is complete is left alone.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from ..cli import one_sentence_errors
from ..errors import InputError
from ..files import make_folder

TRAIN_IMAGES = 1400  # the first; the last 397 were written by other people


def write_digits(folder: Path, size: int = 16) -> None:
    """Write the 1,797 digits as image folders `train/0 … 9` and `test/0 … 9`, once.

    The 8×8 images (E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998)
    are scaled up bicubically.

    Args:
        folder: where to write; left alone if it is already complete.
        size: height and width in pixels.

    Raises:
        InputError: if it cannot be written.
    """
    done = folder / ".complete"
    if done.exists():
        return
    make_folder(folder)
    try:
        _write(folder, size)
        done.touch()
    except OSError as error:
        raise InputError(f"cannot write {str(folder)!r} ({error.strerror})") from error


def _write(folder: Path, size: int) -> None:
    digits = load_digits()
    for index, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = "train" if index < TRAIN_IMAGES else "test"
        path = folder / split / str(label) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = Image.fromarray(np.uint8(np.rint(image * (255 / 16))))
        pixels.resize((size, size), Image.Resampling.BICUBIC).save(path)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=Path("datasets/digits"))
    with one_sentence_errors():
        write_digits(parser.parse_args().folder)


if __name__ == "__main__":
    main()
