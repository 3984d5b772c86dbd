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

TRAIN_IMAGES = 1400  # the first; the last 397 were written by other people


def write_digits(folder: Path, size: int = 16) -> None:
    """Write the 1,797 digits as image folders `train/0 … 9` and `test/0 … 9`, once.

    The 8×8 images (E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998)
    are scaled up bicubically.

    Args:
        folder: where to write; left alone if it is already complete.
        size: height and width in pixels.
    """
    done = folder / ".complete"
    if done.exists():
        return
    digits = load_digits()
    for index, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = "train" if index < TRAIN_IMAGES else "test"
        path = folder / split / str(label) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = Image.fromarray(np.uint8(np.rint(image * (255 / 16))))
        pixels.resize((size, size), Image.Resampling.BICUBIC).save(path)
    done.touch()


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=Path("datasets/digits"))
    write_digits(parser.parse_args().folder)


if __name__ == "__main__":
    main()
