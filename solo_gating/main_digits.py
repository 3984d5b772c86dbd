"""Write scikit-learn's handwritten digits as image folders, for the `*_digits` configs.

    python -m solo_gating.main_digits [FOLDER]        (default: datasets/digits)

FOLDER/train/<digit>/ gets the first 1,400 images, FOLDER/test/<digit>/ the last 397, which were
written by other people; 16×16 pixels. A folder that is complete is left alone.
"""

import argparse
from pathlib import Path

from .data.digits import write_digits


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=Path("datasets/digits"))
    folder = parser.parse_args().folder
    write_digits(folder)
    print(folder)


if __name__ == "__main__":
    main()
